"""A scenario: how large the fleet is, what the network does to it, who misbehaves, and which rounds are run.

One TOML file, read as every configuration of edgepriv is (`edgepriv.settings`). The same file and seed make the same
devices, data, faults and attackers; times on a real machine still vary, and what arrives first with them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgepriv.errors import ConfigError, MissingFileError
from edgepriv.settings import load_settings

SHIPPED = Path(__file__).parent / "scenarios"
ATTACKS = ("none", "sign-flip", "scaling", "label-flip")
MAX_DEVICES = 1000
DIGITS, RELEASE = "digits", "release"


@dataclass(frozen=True, slots=True)
class FleetSection:
    """``[fleet]``: virtual devices in ``workers`` processes; each sees ``frames`` labelled pictures of few classes."""

    devices: int = 50
    workers: int = 2
    seed: int = 0
    frames: int = 16
    classes_each: int = 3
    images: bool = False
    interval_s: float = 0.0
    clock_skew_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DataSection:
    """``[data]``: the pictures that the devices see; accuracy is always measured on real digits held out.

    ``spec`` is ``digits``, a data set or release (a path from the scenario's folder), or ``release``: one is made
    first, with ``noise_ratio`` and ``vae_epochs`` (0: the default), and with the membership audit where ``audited``.
    ``probe`` hands the pictures to the audit of the trained model's outputs when the rounds are over.
    """

    spec: str = DIGITS
    noise_ratio: float = 2.0
    vae_epochs: int = 0
    audited: bool = False
    probe: bool = False

    def found(self, folder: Path) -> str:
        """What `edgepriv.datasets.load` takes, for a scenario that runs in ``folder``."""
        return str(folder / RELEASE) if self.spec == RELEASE else self.spec


@dataclass(frozen=True, slots=True)
class NetworkSection:
    """``[network]``: probabilities for each packet in each direction; delays and partitions in seconds.

    ``partition_share`` of the devices are cut off from ``partition_from_s`` to ``partition_to_s`` after the first
    round began; ``slow_share`` of them send at most ``slow_bytes_per_s``; ``vanish_share`` fall silent for ever when
    their update is made and its upload begins.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    delay_s: float = 0.0
    partition_share: float = 0.0
    partition_from_s: float = 0.0
    partition_to_s: float = 0.0
    slow_share: float = 0.0
    slow_bytes_per_s: float = 0.0
    vanish_share: float = 0.0


@dataclass(frozen=True, slots=True)
class AttackSection:
    """``[attack]``: this share of the devices trains honestly and then lies, or lies about its labels."""

    kind: str = "none"
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class RunSection:
    """``[run]``: how many rounds, one after the other, and when to give up."""

    rounds: int = 3
    timeout_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """The whole file. ``rounds`` are the gateway's settings; ``training`` the recipe of local training."""

    fleet: FleetSection = field(default_factory=FleetSection)
    data: DataSection = field(default_factory=DataSection)
    network: NetworkSection = field(default_factory=NetworkSection)
    attack: AttackSection = field(default_factory=AttackSection)
    run: RunSection = field(default_factory=RunSection)
    rounds: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def load_scenario(path: Path) -> Scenario:
    """Read and check a scenario; a bare name means a shipped one.

    Raises:
        MissingFileError: neither a file nor a shipped scenario.
        ConfigError: a value is out of range.
    """
    shipped = SHIPPED / f"{path}.toml"
    if not path.exists() and len(path.parts) == 1 and shipped.exists():
        path = shipped
    if not path.exists():
        names = ", ".join(p.stem for p in sorted(SHIPPED.glob("*.toml")))
        raise MissingFileError(f"no such scenario: {path}", hint=f"shipped: {names}")
    scenario = load_settings(Scenario, path)
    _check(scenario)
    if scenario.data.spec in {DIGITS, RELEASE}:
        return scenario
    spec = str(path.resolve().parent / scenario.data.spec)
    return dataclasses.replace(scenario, data=dataclasses.replace(scenario.data, spec=spec))


def _check(scenario: Scenario) -> None:
    fleet, network, attack = scenario.fleet, scenario.network, scenario.attack
    if not 1 <= fleet.devices <= MAX_DEVICES or not 1 <= fleet.workers <= 64 or fleet.frames < 1:
        raise ConfigError(f"[fleet] devices lie in 1..{MAX_DEVICES}, workers in 1..64, frames from 1")
    shares = (
        network.drop, network.duplicate, network.corrupt, network.partition_share, network.slow_share,
        network.vanish_share, attack.share,
    )  # fmt: skip
    if not all(0 <= share <= 1 for share in shares) or network.delay_s < 0:
        raise ConfigError("shares and probabilities lie in 0..1, delays from 0")
    if attack.kind not in ATTACKS:
        raise ConfigError(f"[attack] kind is one of {', '.join(ATTACKS)}")
    if not 1 <= fleet.classes_each <= 10:
        raise ConfigError("[fleet] classes_each lies in 1..10")
    if not scenario.data.noise_ratio > 0 or scenario.data.vae_epochs < 0:
        raise ConfigError("[data] noise_ratio is above 0, vae_epochs from 0")
