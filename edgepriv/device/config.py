"""The device's configuration file, as frozen dataclasses; the example in deploy/examples/device.toml explains it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path  # noqa: TC003 - the settings reader resolves the annotations
from typing import Any

from edgepriv.errors import ConfigError
from edgepriv.federated.self_check import CheckPolicy
from edgepriv.mqtt import BrokerSettings  # noqa: TC001 - as above
from edgepriv.settings import load_settings


@dataclass(frozen=True, slots=True)
class IdentityConfig:
    """``[device]``: who this is and whom it believes. Paths of files; ``gateway`` is a full name."""

    key: Path
    trust: Path
    owner: Path
    gateway: str
    state: Path
    shard: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """``[model]``: a plain ONNX file, a carrier with a permission, or the device's model store (``state`` + /models).

    ``follow``: install new versions of this model id from the gateway into the store; asked for every ``check_s``.
    """

    path: Path
    permission: Path | None = None
    threads: int = 1
    follow: str = ""
    check_s: float = 300.0


@dataclass(frozen=True, slots=True)
class ReleaseConfig:
    """``[release]``: what may leave. ``bits_per_scene`` and ``max_bits_per_inference`` 0 mean no budget and no limit.

    A budget is what may ever be said about one scene, so a camera that looks at one unchanging scene falls silent when
    it is spent: therefore none is set unasked, and a start without one says so in the log.
    ``indicator``: the risk service's reference file; outputs that look unlike an honest model's are counted, and with
    ``refuse_suspicious`` they do not leave. ``purifier``: a file of ``edgepriv harden``; outputs are pulled towards
    their class's mean before the policy.
    """

    policy: str = "argmax"
    bits_per_scene: float = 0.0
    scene_window_s: float = 2.0
    max_bits_per_inference: float = 0.0
    indicator: Path | None = None
    refuse_suspicious: bool = False
    purifier: Path | None = None


@dataclass(frozen=True, slots=True)
class SealConfig:
    """``[seal]``: the cipher's profile and when keys change. ``images = false`` seals and sends outputs only."""

    images: bool = True
    profile: str = "flep3"
    alg: str = "auto"
    frames_per_epoch: int = 10_000
    epoch_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class SpoolConfig:
    """``[spool]``: how much may wait and what is dropped first."""

    max_mb: float = 512.0
    max_rows: int = 100_000
    drop: str = "oldest"
    commit_frames: int = 16
    commit_s: float = 0.2


@dataclass(frozen=True, slots=True)
class RoundsConfig:
    """``[rounds]``: taking part in federated rounds. The floors are the device's own; no announcement lowers them.

    ``min_cohort``: fewest devices under one sum of masks. ``active_gateway``: the gateway may lie, so two thirds of a
    cohort must agree on a sum and not half of it. ``colluders``: how many devices of a cohort are assumed to leave
    out their share of the noise, at least.
    """

    take_part: bool = True
    labels: Path | None = None
    max_samples: int = 2000
    min_samples: int = 8
    min_cohort: int = 32
    require_masks: bool = False
    active_gateway: bool = False
    colluders: int = 0
    epsilon_budget: float = 0.0

    def __post_init__(self) -> None:
        if self.min_cohort < 2 or not 0 <= self.colluders < self.min_cohort:
            raise ConfigError("[rounds] min_cohort is 2 or more, and colluders are fewer than that")


@dataclass(frozen=True, slots=True)
class SelfCheckConfig:
    """``[self_check]``: the device's last look at its own update, before every upload of a clear round.

    ``policy``, above a limit: ``send`` (report only), ``drop_bn`` (BatchNorm statistics stay at home, which does
    nothing for an update of a head alone), ``add_noise`` (and the least noise that meets the limit), ``refuse``
    (nothing leaves). ``max_explained_variance``: of the worst example's features. ``examples``: how many of them the
    bound looks at, 0 for none.
    """

    policy: str = "add_noise"
    max_explained_variance: float = 0.2
    min_images: int = 9
    examples: int = 8

    def __post_init__(self) -> None:
        CheckPolicy(self.policy, self.max_explained_variance, self.min_images)
        if self.examples < 0:
            raise ConfigError("examples must not be negative")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """``[run]``: pace and end. ``frames`` 0 runs until stopped; ``linger_s`` waits for acknowledgements at the end."""

    frames: int = 0
    interval_s: float = 0.0
    linger_s: float = 10.0
    status_s: float = 30.0


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """The whole file."""

    device: IdentityConfig
    broker: BrokerSettings
    model: ModelConfig
    source: dict[str, Any]
    release: ReleaseConfig = field(default_factory=ReleaseConfig)
    seal: SealConfig = field(default_factory=SealConfig)
    spool: SpoolConfig = field(default_factory=SpoolConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    self_check: SelfCheckConfig = field(default_factory=SelfCheckConfig)
    run: RunConfig = field(default_factory=RunConfig)


def load_config(path: Path) -> DeviceConfig:
    """Read and check a device configuration (ConfigError, MissingFileError)."""
    config = load_settings(DeviceConfig, path)
    limits = config.release.bits_per_scene, config.release.max_bits_per_inference, config.release.scene_window_s
    if not all(math.isfinite(limit) and limit >= 0 for limit in limits):
        raise ConfigError(f"{path}: [release] bits_per_scene, max_bits_per_inference, scene_window_s: none below 0")
    return config
