"""One worker of the fleet: many virtual devices in one process, each the real `DeviceRuntime`, stepped in turn.

One onnxruntime session and one loop for all of them; every device has its own keys, spool (real SQLite), learner and
link. Nothing of a device is replaced but its camera, its clock and its network, which are interfaces that production
has too. Attackers are devices whose trainer is wrapped.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import datasets
from edgepriv.device.config import (
    DeviceConfig,
    IdentityConfig,
    ModelConfig,
    ReleaseConfig,
    RoundsConfig,
    RunConfig,
    SealConfig,
    SelfCheckConfig,
    SpoolConfig,
)
from edgepriv.device.infer import Inferer
from edgepriv.device.start import assemble
from edgepriv.errors import DataError
from edgepriv.federated.local_update import LocalUpdate
from edgepriv.mqtt import BrokerSettings, open_link
from firmware_sim.clock import SkewedClock
from firmware_sim.network import Hub, VirtualLink
from firmware_sim.scenario import DIGITS, Scenario, load_scenario

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgepriv.device.runtime import DeviceRuntime
    from edgepriv.federated.local_update import RoundSettings, Trainer

MODEL = Path(__file__).parent / "pixels" / "model.onnx"
SIDE = 160
CONNECTIONS = 8
HELD_OUT = 400
IDLE_S = 0.01
LABELS = 10


@dataclass(slots=True)
class Virtual:
    """A virtual device and what the scenario has in store for it."""

    runtime: DeviceRuntime
    link: VirtualLink
    vanishes: bool
    parted: bool


def labels_seen(folder: Path, scenario: Scenario) -> Any:
    """The labels of the pictures that the scenario shows to its devices.

    Raises:
        DataError: not all of the ten classes are there, or more.
    """
    spec = scenario.data.found(folder)
    labels = datasets.load(spec, split="all").labels
    if set(labels.tolist()) != set(range(LABELS)):
        raise DataError(f"{spec} does not have the labels 0..{LABELS - 1}", hint="the simulator's model has these")
    return labels


def rows_of(scenario: Scenario, index: int, labels: Any) -> list[int]:
    """The pictures that device ``index`` sees: few classes each (non-IID), never the held-out digits."""
    rng = np.random.default_rng([scenario.fleet.seed, 2, index])
    classes = rng.choice(LABELS, scenario.fleet.classes_each, replace=False)
    first = HELD_OUT if scenario.data.spec == DIGITS else 0
    allowed = np.flatnonzero(np.isin(labels[first:], classes)) + first
    return [int(row) for row in rng.choice(allowed, scenario.fleet.frames)]


def chosen(scenario: Scenario, what: str, share: float) -> set[int]:
    """Which devices a share means: the same for the same seed, whoever asks."""
    count = round(share * scenario.fleet.devices)
    return set(random.Random(f"{scenario.fleet.seed}/{what}").sample(range(scenario.fleet.devices), count))


def attack(trainer: Trainer, kind: str) -> Trainer:
    """A dishonest device: trains like the others, then lies."""

    def lie(weights: Mapping[str, Any], settings: RoundSettings) -> LocalUpdate:
        update = trainer(weights, settings)
        factor = {"sign-flip": -4.0, "scaling": -100.0}.get(kind, 1.0)
        return LocalUpdate({n: t * np.float32(factor) for n, t in update.tensors.items()}, update.examples)

    return lie


def build(folder: Path, scenario: Scenario, names: dict[str, int], broker: str) -> tuple[Hub, dict[str, Virtual]]:
    """Connect and assemble this worker's devices (name -> index in the fleet)."""
    first = next(iter(names))
    shared = [open_link(broker, f"{first}-{i}", inflight=64, inbox=8000) for i in range(min(CONNECTIONS, len(names)))]
    for connection in shared:
        connection.wait(30)
    hub, inferer, labels = Hub(list(shared)), Inferer.from_file(MODEL, threads=1), labels_seen(folder, scenario)
    groups = {
        "attack": chosen(scenario, "attack", scenario.attack.share if scenario.attack.kind != "none" else 0),
        "vanish": chosen(scenario, "vanish", scenario.network.vanish_share),
        "part": chosen(scenario, "part", scenario.network.partition_share),
        "slow": chosen(scenario, "slow", scenario.network.slow_share),
    }
    devices = {}
    for name, index in names.items():
        skew = random.Random(f"{scenario.fleet.seed}/skew/{index}").uniform(-1, 1) * scenario.fleet.clock_skew_s
        slow = scenario.network.slow_bytes_per_s if index in groups["slow"] else 0.0
        seed = scenario.fleet.seed * 1_000_003 + index
        link = VirtualLink(hub, name, scenario.network, seed=seed, clock=time.monotonic, bytes_per_s=slow)
        config = _config(folder, name, broker, scenario, rows_of(scenario, index, labels))
        runtime = assemble(config, folder=folder, clock=SkewedClock(skew), link=link, inferer=inferer)
        if index in groups["attack"] and runtime.stages.learner is not None:
            _corrupt(runtime, scenario.attack.kind)
        devices[name] = Virtual(runtime, link, index in groups["vanish"], index in groups["part"])
    return hub, devices


def _corrupt(runtime: DeviceRuntime, kind: str) -> None:
    learner = runtime.stages.learner
    if learner is None:
        return
    participant = learner.participant
    if kind == "label-flip":
        samples, add = learner.samples, learner.samples.add
        samples.add = lambda name, features, label: add(  # type: ignore[method-assign]
            name, features, None if label is None else (label + 1) % LABELS
        )
    else:
        participant.trainer = attack(participant.trainer, kind)
        participant.clips = False  # nobody makes a dishonest device clip


def _config(folder: Path, name: str, broker: str, scenario: Scenario, rows: list[int]) -> DeviceConfig:
    fleet = scenario.fleet
    source = {"kind": "simulated", "data": scenario.data.found(folder), "rows": rows, "seed": fleet.seed}
    source |= {"height": SIDE, "width": SIDE}
    return DeviceConfig(
        device=IdentityConfig(
            key=folder / "keys" / f"{name}.key",
            trust=folder / "trust.cbor",
            owner=folder / "keys" / "owner.key.pub",
            gateway="gateway-site",
            state=folder / "devices" / name,
        ),
        broker=BrokerSettings(broker),
        model=ModelConfig(MODEL),
        source=source,
        release=ReleaseConfig(),
        seal=SealConfig(images=fleet.images),
        spool=SpoolConfig(max_mb=16.0, commit_frames=64),
        # the pictures are public ones: clear rounds are to show what the gateway does with honest updates
        self_check=SelfCheckConfig("send"),
        rounds=RoundsConfig(min_samples=1, min_cohort=int(scenario.rounds.get("min_cohort", 2))),
        run=RunConfig(frames=fleet.frames, interval_s=fleet.interval_s, status_s=20.0),
    )


class Worker:
    """Steps its devices until it is told to stop."""

    def __init__(self, scenario: Scenario, hub: Hub, devices: dict[str, Virtual]) -> None:
        self.scenario, self.hub, self.devices = scenario, hub, devices
        self.began_round: float | None = None
        self.steps = 0

    def turn(self, now: float) -> bool:
        """One step of every device; True when any had something to do."""
        worked = self.hub.pump(now)
        for device in self.devices.values():
            if not device.link.gone:
                worked |= device.runtime.step()
                self.steps += 1
                self._trouble(device, now)
        return worked

    def _trouble(self, device: Virtual, now: float) -> None:
        learner = device.runtime.stages.learner
        in_round = learner is not None and learner.participant.round is not None
        if in_round and self.began_round is None:
            self.began_round = now
        network = self.scenario.network
        if device.vanishes and learner is not None and learner.participant.counters["uploaded"]:
            device.link.vanish()
        if device.parted and self.began_round is not None:
            since = now - self.began_round
            device.link.cut(off=network.partition_from_s <= since < network.partition_to_s)

    def report(self) -> dict[str, Any]:
        """Counters over all devices of this worker."""
        counters: Counter[str] = Counter()
        rounds: Counter[str] = Counter()
        pending = 0
        for device in self.devices.values():
            counters.update(device.runtime.counters)
            pending += 0 if device.link.gone else device.runtime.stages.spool.pending()
            if device.runtime.stages.learner is not None:
                rounds.update(device.runtime.stages.learner.participant.counters)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "devices": len(self.devices),
            "vanished": sum(d.link.gone for d in self.devices.values()),
            "steps": self.steps,
            "pending": pending,
            "counters": dict(counters),
            "rounds": dict(rounds),
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_mb": usage.ru_maxrss / 1024,
        }


def run_worker(folder: Path, scenario_path: Path, broker: str, part: int) -> None:
    """Process of one worker: every ``workers``-th device; writes ``worker-N.json`` when told to stop."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65_536)), hard))
    scenario = load_scenario(scenario_path)
    names = {device_name(i): i for i in range(part, scenario.fleet.devices, scenario.fleet.workers)}
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stop.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = Worker(scenario, *build(folder, scenario, names, broker))
    while not stop:
        if not worker.turn(time.monotonic()):
            time.sleep(IDLE_S)
    report = folder / f"worker-{part}.json"
    fresh = report.with_suffix(".new")
    fresh.write_text(json.dumps(worker.report()))
    fresh.replace(report)
    for device in worker.devices.values():
        device.runtime.stages.spool.close()


def device_name(index: int) -> str:
    """The name that `edgepriv.demo.site` gives to the device of this index."""
    return f"dev-{index + 1}"
