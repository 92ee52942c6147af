"""The stage of a scenario: a broker, the real gateway daemon and the workers as processes; rounds, then a summary."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepriv import datasets
from edgepriv.demo.processes import Children, python_command, start_broker
from edgepriv.demo.site import GATEWAY, make_site
from edgepriv.errors import ConfigError, TemporaryError
from edgepriv.federated.head import accuracy, new_head
from edgepriv.wire.update import decode_update, encode_update
from firmware_sim.fleet import HELD_OUT, LABELS, MODEL, SIDE, labels_seen
from firmware_sim.release import make_release, probe
from firmware_sim.scenario import RELEASE, Scenario, load_scenario

if TYPE_CHECKING:
    from edgepriv.demo.processes import Child

POLL_S = 1.0
READY_S = 240.0
SETTLE_S = 20.0


def run_scenario(path: Path, folder: Path, *, devices: int | None = None) -> dict[str, Any]:
    """Run a scenario in ``folder`` and return its summary (schema ``edgepriv.sim/1``).

    Raises:
        EdgeprivError: the scenario is wrong, or a process did not come up.
    """
    require_mosquitto()
    scenario = load_scenario(path)
    if devices is not None:
        scenario = _resized(scenario, folder, devices)
        path = folder / "scenario.toml"
    site = make_site(folder, scenario.fleet.devices)
    began = time.monotonic()
    card = make_release(folder, scenario) if scenario.data.spec == RELEASE else None
    data = {"spec": scenario.data.spec, "pictures": len(labels_seen(folder, scenario)), "release": card}
    with Children(folder) as children:
        broker, _ = start_broker(children, "mosquitto")
        write_gateway(folder, broker, scenario)
        gateway = children.start("gateway", python_command("gateway", "run", "--config", str(site.config(GATEWAY))))
        arguments = [str(folder), str(_source(path)), broker]
        workers = [
            children.start(f"worker-{part}", python_command("firmware_sim.cli", "worker", *arguments, str(part)))
            for part in range(min(scenario.fleet.workers, scenario.fleet.devices))
        ]
        stage = _Stage(folder, scenario, children)
        stage.wait_for_devices()
        stage.set_weights()
        rounds = [stage.round(number) for number in range(1, scenario.run.rounds + 1)]
        stored = stage.settle()
        cpu_s, peak_mb = _usage(gateway.process.pid)
        reports = [_stop(worker, folder, part) for part, worker in enumerate(workers)]
        accepted = sum(r["counters"].get("accepted", 0) for r in reports)
        data["probe"] = stage.probe(rounds) if scenario.data.probe else None
        return {
            "schema": "edgepriv.sim/1",
            "scenario": path.stem,
            "seed": scenario.fleet.seed,
            "devices": scenario.fleet.devices,
            "vanished": sum(r["vanished"] for r in reports),
            "data": data,
            "untrained_accuracy": stage.untrained,
            "rounds": rounds,
            "outputs": {"accepted": accepted, "stored": stored, "waiting": sum(r["pending"] for r in reports)},
            "gateway_cpu_s": cpu_s,
            "gateway_peak_mb": peak_mb,
            "fleet_cpu_s": round(sum(r["cpu_s"] for r in reports), 2),
            "steps": sum(r["steps"] for r in reports),
            "seconds": round(time.monotonic() - began, 2),
            "ok": all(one["outcome"] == "done" or one["reason"] for one in rounds),
        }


def _source(path: Path) -> Path:
    return path.resolve() if path.exists() else path


def _resized(scenario: Scenario, folder: Path, devices: int) -> Scenario:
    """The same scenario with another number of devices, as a file of its own for the workers."""
    import dataclasses

    fleet = dataclasses.replace(scenario.fleet, devices=devices)
    changed = dataclasses.replace(scenario, fleet=fleet)
    text = ""
    for section in ("fleet", "data", "network", "attack", "run"):
        values = dataclasses.asdict(getattr(changed, section))
        text += f"[{section}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())
    for section in ("rounds", "training"):
        text += f"[{section}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in getattr(changed, section).items())
    target = folder / "scenario.toml"
    target.write_text(text)
    return load_scenario(target)


def write_gateway(folder: Path, broker: str, scenario: Scenario) -> None:
    """The gateway's configuration: the scenario's rounds, started by the stage."""

    def table(name: str, values: dict[str, Any]) -> str:
        return f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()) + "\n"

    keys = {"identity": f"keys/{GATEWAY}.key", "owner": "keys/owner.key.pub", "trust": "trust.cbor", "state": "gateway"}
    text = table("gateway", keys) + table("broker", {"url": broker, "inflight": 100}) + table("http", {"port": 0})
    text += table("store", {"min_free_bytes": 1}) + table("log", {"level": "warning"})
    text += table("rounds", {"model": "pixels", "active_s": 3600.0, **scenario.rounds})
    text += table("rounds.training", scenario.training)
    (folder / f"{GATEWAY}.toml").write_text(text)


class _Stage:
    """What the stage asks of the gateway while a scenario runs."""

    def __init__(self, folder: Path, scenario: Scenario, children: Children) -> None:
        self.folder, self.scenario, self.children = folder, scenario, children
        data = datasets.load("digits", split="all")
        self._held = _features(data.images[:HELD_OUT]), data.labels[:HELD_OUT]
        self._head: dict[str, Any] = new_head(LABELS, 64)
        self.untrained = round(accuracy(self._head, *self._held), 4)

    def gateway(self, *arguments: str) -> dict[str, Any]:
        """A command of the gateway, as its operator types it."""
        command = python_command("gateway", *arguments, "--config", str(self.folder / f"{GATEWAY}.toml"), "--json")
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            raise TemporaryError(f"gateway {arguments[0]}: {done.stderr.strip()[-500:]}")
        return dict(json.loads(done.stdout))

    def status(self) -> dict[str, Any]:
        """What the daemon writes every two seconds; empty before the first time."""
        try:
            return dict(json.loads((self.folder / "gateway" / "status.json").read_text()))
        except (OSError, ValueError):
            return {}

    def wait_for_devices(self) -> None:
        """Until every device was heard and has sent its outputs (or the network is too bad for that)."""
        wanted, deadline = self.scenario.fleet.devices, time.monotonic() + READY_S
        outputs = wanted * self.scenario.fleet.frames
        while time.monotonic() < deadline:
            self.children.check()
            status = self.status()
            if status.get("devices") == wanted and status["store"]["outputs"] >= outputs:
                return
            time.sleep(POLL_S)
        if self.status().get("devices", 0) < wanted:
            raise TemporaryError("the fleet did not come up", hint=f"see the logs in {self.folder}")

    def set_weights(self) -> None:
        """A head of zeros is where the first round begins."""
        path = self.folder / "weights.epu"
        path.write_bytes(encode_update(new_head(LABELS, 64), {"model": "pixels"}))
        self.gateway("rounds", "weights", str(path), "--model", "pixels")

    def round(self, number: int) -> dict[str, Any]:
        """Run one round to its end."""
        began = time.monotonic()
        self.gateway("rounds", "start")
        deadline, started = began + self.scenario.run.timeout_s, time.time()
        while self._runs(number, started):
            self.children.check()
            if time.monotonic() > deadline:
                self.gateway("rounds", "stop", str(number))
            time.sleep(POLL_S)
        record = self.gateway("rounds", "show", str(number))
        return {
            "round": number,
            "outcome": record["state"],
            "reason": record.get("reason", ""),
            "invited": record["invited"],
            "participants": len(record["participants"]),
            "rejected": _reasons(record["rejected"]),
            "privacy": record["privacy"],
            "epsilon": record["epsilon"],
            "accuracy": self._accuracy(record),
            "seconds": round(time.monotonic() - began, 2),
        }

    def _runs(self, number: int, since: float) -> bool:
        """Whether a round runs, by a status that is newer than its start."""
        status = self.status()
        return float(status.get("at", 0.0)) < since or number in status["rounds"]["running"]

    def _accuracy(self, record: dict[str, Any]) -> float | None:
        if record["state"] != "done":
            return None
        path = self.folder / "gateway" / "rounds" / "models" / str(record["after"])
        self._head = dict(decode_update(path.read_bytes(), max_bytes=1 << 24).tensors)
        return round(accuracy(self._head, *self._held), 4)

    def probe(self, rounds: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The audit of the trained model with the devices' data as probe; None where no round came to its end."""
        if all(one["accuracy"] is None for one in rounds):
            return None
        return probe(self.folder, self.scenario.data.found(self.folder), self._head)

    def settle(self) -> int:
        """Wait until the number of stored outputs stands still; returns it."""
        deadline, last = time.monotonic() + SETTLE_S, -1
        while time.monotonic() < deadline:
            stored = int(self.status().get("store", {}).get("outputs", 0))
            if stored == last or stored == self.scenario.fleet.devices * self.scenario.fleet.frames:
                return stored
            last = stored
            time.sleep(3 * POLL_S)
        return max(last, 0)


def _features(images: Any) -> Any:
    """What the model's features are for held-out pictures, through the same camera and the same model."""
    import numpy as np

    from edgepriv.device.capture import Frame
    from edgepriv.device.infer import Inferer
    from firmware_sim.scenes import SceneRenderer

    inferer, render = Inferer.from_file(MODEL, threads=1), SceneRenderer(0, height=SIDE, width=SIDE)
    frames = (Frame(render(image, i), 0.0, i, None, name="held-out") for i, image in enumerate(images))
    return np.stack([inferer(frame).features for frame in frames])


def _reasons(rejected: list[list[str]]) -> dict[str, int]:
    counted: dict[str, int] = {}
    for _, reason in rejected:
        counted[reason] = counted.get(reason, 0) + 1
    return counted


def _usage(pid: int) -> tuple[float, float]:
    """CPU seconds and peak memory (MB) of a process so far."""
    import os

    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    status = Path(f"/proc/{pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return round((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), 2), round(peak / 1024, 1)


def _stop(worker: Child, folder: Path, part: int) -> dict[str, Any]:
    worker.process.send_signal(signal.SIGTERM)
    worker.process.wait(60)
    report = folder / f"worker-{part}.json"
    if not report.exists():
        raise TemporaryError(f"{worker.name} left no report", hint=f"its log: {worker.log}")
    return dict(json.loads(report.read_text()))


def require_mosquitto() -> None:
    """Scenarios need a broker that takes hundreds of devices.

    Raises:
        ConfigError: mosquitto is not installed.
    """
    if not (shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")):
        raise ConfigError("the simulator needs mosquitto", hint="apt install mosquitto")
