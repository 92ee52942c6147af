"""The main job on one machine: broker, gateway, risk service and devices as processes, then the report.

Each stage below is a function of its own, in the order in which they run. What is reported is read from the product's
own commands and stores: frames are fetched and opened through the recipient's command, outputs and rounds come from
the gateway, the leakage from the audit. The demo itself counts only the frames that came back identical.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.cipher import container
from edgepriv.datasets import read_image
from edgepriv.demo import processes, site, suppliers
from edgepriv.demo.prepare import prepare
from edgepriv.demo.updates import update_views
from edgepriv.device.capture import open_source
from edgepriv.errors import DataError, TemporaryError
from edgepriv.federated import head
from edgepriv.wire.update import decode_update

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgepriv.demo.prepare import Prepared

POLL_S = 0.3
SAMPLES = 4


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command line asks for."""

    devices: int
    frames: int
    rounds: int
    data: str
    out: Path
    seed: int
    broker: str = "auto"


@dataclass(slots=True)
class Outcome:
    """What the run showed; the report is made from this."""

    options: DemoOptions
    class_names: tuple[str, ...] = ()
    broker: str = ""
    captured: int = 0
    stored: int = 0
    released: int = 0
    opened_identical: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    audits: list[dict[str, Any]] = field(default_factory=list)
    updates: list[Any] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


@dataclass(frozen=True, slots=True)
class Stage:
    """What every step of the running site needs."""

    children: processes.Children
    place: site.Site
    prepared: Prepared
    options: DemoOptions
    progress: Callable[[str], None]

    def gateway(self, *arguments: str) -> dict[str, Any]:
        """Run a gateway command with ``--json`` and return its document."""
        config = str(self.place.config(site.GATEWAY))
        return run_json(processes.python_command("gateway", *arguments, "--config", config, "--json"))


def run_demo(options: DemoOptions, progress: Callable[[str], None]) -> Outcome:
    """Run everything and return what was seen.

    Raises:
        EdgeprivError: a part did not come up or did not finish in time; all processes are stopped.
    """
    started = time.monotonic()
    outcome = Outcome(options)
    folder, logs = options.out / "site", options.out / "logs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    logs.mkdir(exist_ok=True)
    prepared = prepare(options.data, options.devices, options.seed, folder, progress)
    outcome.class_names = prepared.data.class_names
    outcome.accuracies.append(prepared.accuracy_before)
    place = site.make_site(folder, options.devices)
    with processes.Children(logs) as children:
        stage = Stage(children, place, prepared, options, progress)
        trained = suppliers.start_suppliers(children, prepared.probe, folder / "suppliers", options.seed)
        start_site(stage, outcome)
        collect_frames(stage, outcome)
        offered = suppliers.offer(trained, stage.gateway)
        open_frames(stage, outcome)
        outcome.outputs = stage.gateway("outputs", "--by", "device,model,class")["rows"]
        run_rounds(stage, outcome)
        listed = suppliers.await_verdicts(stage.gateway, offered, progress)
        outcome.audits = suppliers.reports(place, offered, listed)
        progress("what an update of this fleet would have shown")
        masked = site.round_privacy(options.devices) == "masked"
        try:
            outcome.updates = update_views(prepared, masked=masked, seed=options.seed)
        except DataError as error:  # with very few pictures a canary's update may move nothing
            progress(f"the attack on a canary's update read nothing: {error}")
        progress("stopping all processes")
    outcome.released = released_outputs(logs, place)
    outcome.seconds = time.monotonic() - started
    return outcome


def released_outputs(logs: Path, place: site.Site) -> int:
    """Outputs that the devices made durable, from the report with which each of them ended."""
    total = 0
    for name in place.devices:
        last = (logs / f"{name}.log").read_text(errors="replace").strip().splitlines()[-1]
        total += int(json.loads(last)["counters"]["spooled_outputs"])
    return total


def run_json(command: list[str]) -> dict[str, Any]:
    """Run a command of the product and parse the last line that it prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode not in {0, 3}:
        raise TemporaryError(f"{' '.join(command[2:5])} ended with code {done.returncode}: {done.stderr[-600:]}")
    document: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return document


# --- the stages, in order ----------------------------------------------------------------------------------


def start_site(stage: Stage, outcome: Outcome) -> None:
    """Broker, gateway, risk service, devices: each the product's own command."""
    options, place, prepared, children = stage.options, stage.place, stage.prepared, stage.children
    url, outcome.broker = processes.start_broker(children, options.broker)
    stage.progress(f"broker: {outcome.broker}; starting the gateway, the risk service and {options.devices} devices")
    config = site.write_gateway(
        place, url, port=processes.free_port(), weights=prepared.weights, devices=options.devices
    )
    children.start("gateway", processes.python_command("gateway", "run", "--config", str(config)))
    risk = site.write_risk(place, url, port=0, probe=prepared.probe.parent)
    children.start("risk", processes.python_command("edgepriv", "risk", "serve", "--config", str(risk)))
    for i, name in enumerate(place.devices):
        device = site.write_device(
            place,
            name,
            url,
            model=prepared.model,
            data=prepared.spec,
            rows=prepared.parts[i],
            seed=device_seed(options, i),
            frames=options.frames,
            masked=site.round_privacy(options.devices) == "masked",
        )
        children.start(name, processes.python_command("edgepriv", "device", "run", "--json", "--config", str(device)))


def device_seed(options: DemoOptions, index: int) -> int:
    """Seed of a device's scenes; the comparison renders them again from it."""
    return options.seed * 1000 + 100 + index


def collect_frames(stage: Stage, outcome: Outcome) -> None:
    """Wait until every frame that the devices captured is durable at the gateway."""
    outcome.captured = sum(min(stage.options.frames, len(part)) for part in stage.prepared.parts)
    deadline = time.monotonic() + 60 + outcome.captured
    shown = -1
    while time.monotonic() < deadline:
        stage.children.check()
        try:
            outcome.stored = int(stage.gateway("status")["store"]["frames"])
        except TemporaryError:
            outcome.stored = 0  # the gateway has not written its first status yet
        if outcome.stored != shown:
            shown = outcome.stored
            stage.progress(f"frames stored at the gateway: {shown} of {outcome.captured}")
        if outcome.stored >= outcome.captured:
            return
        time.sleep(POLL_S)
    raise TemporaryError(
        f"only {outcome.stored} of {outcome.captured} frames arrived", hint=f"see {stage.children.folder}"
    )


def open_frames(stage: Stage, outcome: Outcome) -> None:
    """Fetch every frame as the recipient, open it, and compare it with what the camera saw."""
    stage.progress("the recipient fetches and opens the frames")
    place = stage.place
    out = stage.options.out / "opened"
    shutil.rmtree(out, ignore_errors=True)
    listed = fetch_as_recipient(place, out, "--all", "--open")
    opened: dict[tuple[str, int], Path] = {(row["device"], row["counter"]): out / row["file"] for row in listed}
    for index, name in enumerate(place.devices):
        for counter, pixels in enumerate(seen_by(stage, index)):
            path = opened.get((name, counter))
            if path is None:
                continue
            picture = read_image(path)
            outcome.opened_identical += bool(np.array_equal(picture, pixels))
            if index < SAMPLES and counter == 0:
                sealed = sealed_bytes(place, listed, name, counter, stage.options.out / "sealed")
                outcome.samples.append({"device": name, "plain": pixels, "opened": picture, "sealed": sealed})


def fetch_as_recipient(place: site.Site, out: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run ``edgepriv frames fetch`` with the recipient's key; returns its rows."""
    command = ["edgepriv", "frames", "fetch", *arguments, "--out", str(out), "--json"]
    command += ["--key", str(place.key(site.RECIPIENT)), "--owner", str(place.owner), "--trust", str(place.trust)]
    command += ["--broker", broker_url(place), "--gateway", site.GATEWAY]
    rows: list[dict[str, Any]] = run_json(processes.python_command(*command))["frames"]
    return rows


def sealed_bytes(place: site.Site, listed: list[dict[str, Any]], device: str, counter: int, out: Path) -> bytes:
    """The envelope of one frame, as the gateway keeps it."""
    row = next(r for r in listed if (r["device"], r["counter"]) == (device, counter))
    (fetched,) = fetch_as_recipient(place, out, row["digest"])
    return bytes(container.unpack((out / fetched["file"]).read_bytes())[1])


def broker_url(place: site.Site) -> str:
    """The broker's URL, from a configuration file as an operator would read it."""
    from edgepriv.settings import read_toml

    return str(read_toml(place.config(site.GATEWAY))["broker"]["url"])


def seen_by(stage: Stage, index: int) -> list[np.ndarray[Any, Any]]:
    """What a device's camera saw, rendered again from its seed."""
    options: dict[str, Any] = {"data": stage.prepared.spec, "rows": stage.prepared.parts[index]}
    options["seed"] = device_seed(stage.options, index)
    source = open_source("simulated", options, folder=stage.place.folder, clock=time.time)
    frames: list[np.ndarray[Any, Any]] = []
    while (frame := source.read()) is not None and len(frames) < stage.options.frames:
        frames.append(frame.pixels)
    return frames


def run_rounds(stage: Stage, outcome: Outcome) -> None:
    """Run the federated rounds one after the other and measure each new global head on held-out pictures."""
    if stage.options.rounds:
        stage.gateway("rounds", "weights", str(stage.prepared.weights), "--model", "backbone")
    for number in range(1, stage.options.rounds + 1):
        started = stage.gateway("rounds", "start")["round"]
        record = wait_for_round(stage, started)
        outcome.rounds.append(record)
        if record["outcome"] != "done":
            raise TemporaryError(f"round {started} was aborted: {record['reason']}")
        outcome.accuracies.append(held_out_accuracy(stage, record["after"]))
        stage.progress(
            f"round {number} of {stage.options.rounds}: {len(record['participants'])} devices, "
            f"accuracy on held-out pictures {outcome.accuracies[-1]:.3f}"
        )


def wait_for_round(stage: Stage, number: int) -> dict[str, Any]:
    """A round's record, once it has ended."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        stage.children.check()
        record = stage.gateway("rounds", "show", str(number))
        if record.get("outcome"):
            return record
        time.sleep(POLL_S)
    raise TemporaryError(f"round {number} did not end", hint=f"see {stage.children.folder}/gateway.log")


def held_out_accuracy(stage: Stage, digest: str) -> float:
    """Accuracy of a global head, read from the gateway's store, on the held-out third."""
    raw = (stage.place.folder / "gateway" / "rounds" / "models" / digest).read_bytes()
    tensors = decode_update(raw, max_bytes=64 << 20).tensors
    return head.accuracy(tensors, stage.prepared.held_features, stage.prepared.held_labels)
