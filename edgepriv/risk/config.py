"""The risk service's configuration file, as frozen dataclasses; the example is deploy/examples/risk.toml."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path  # noqa: TC003 - the settings reader resolves the annotations

from edgepriv.errors import ConfigError
from edgepriv.mqtt import BrokerSettings  # noqa: TC001 - as above
from edgepriv.settings import load_settings

MAX_CANARIES = 32


@dataclass(frozen=True, slots=True)
class RiskSection:
    """``[risk]``: who this is, whom it believes, where it keeps its state. ``gateway`` is a full name."""

    identity: Path
    owner: Path
    trust: Path
    gateway: str
    state: Path
    shard: int = 0
    poll_s: float = 2.0


@dataclass(frozen=True, slots=True)
class AuditSection:
    """``[audit]``: the auditor's own pictures, the policies that devices use, and what an audit may spend.

    ``purifier``: the file that the devices' ``[release]`` names, so that what is judged is what they release.
    ``output``, ``scale``, ``mean``, ``colour``: as in the models' ``model.toml`` (``output`` is its ``logits``, empty
    for the first one); pictures with one channel are ``gray`` whatever ``colour`` says. All of these are signed in the
    verdict, and a device that does otherwise refuses it. ``report_days``: a conclusion that is older is reached again.
    ``ray_address``: the cluster of ``executor = "ray"`` (``auto``, ``HOST:6379``); empty: Ray on this machine alone.
    """

    probe: str
    policies: tuple[str, ...] = ("argmax",)
    references: int = 5
    reference_images: int = 6000
    images: int = 4000
    auditors: str = "conv"
    decoder_epochs: int = 6
    max_explained_variance: float = 0.25
    verdict_days: float = 30.0
    workers: int = 1
    threads: int = 1
    executor: str = "processes"
    ray_address: str = ""
    device: str = "cpu"
    max_jobs: int = 100
    max_model_mb: float = 512.0
    memory_mb: float = 4096.0
    purifier: Path | None = None
    output: str = ""
    scale: tuple[float, ...] = (1 / 255,)
    mean: tuple[float, ...] = (0.0,)
    colour: str = "RGB"
    report_days: float = 180.0


@dataclass(frozen=True, slots=True)
class DriftSection:
    """``[drift]``: when released outputs that differ from the audited behaviour raise an alert."""

    min_outputs: int = 200
    threshold: float = 0.25
    every_s: float = 30.0


@dataclass(frozen=True, slots=True)
class RoundsSection:
    """``[rounds]``: canary devices for every federated round; without ``canaries`` rounds are not audited.

    ``canaries``: labelled pictures of the auditor's own, never frames of a device. ``model``: architecture whose
    ``state_dict`` names the rounds' tensors; ``weights``: safetensors with what the rounds do not train (a frozen
    backbone). ``images``: of one canary device; ``public_images``: the others, for the prior and the pool.
    """

    canaries: str = ""
    model: str = ""
    weights: Path | None = None
    images: int = 4
    public_images: int = 1000
    iterations: int = 100
    max_weights_mb: float = 256.0


@dataclass(frozen=True, slots=True)
class HttpSection:
    """``[http]``: metrics and reports; port 0 serves nothing."""

    host: str = "127.0.0.1"
    port: int = 0


@dataclass(frozen=True, slots=True)
class RiskConfig:
    """The whole file."""

    risk: RiskSection
    broker: BrokerSettings
    audit: AuditSection
    drift: DriftSection = field(default_factory=DriftSection)
    rounds: RoundsSection = field(default_factory=RoundsSection)
    http: HttpSection = field(default_factory=HttpSection)


def load_config(path: Path) -> RiskConfig:
    """Read and check a configuration (ConfigError, MissingFileError)."""
    config = load_settings(RiskConfig, path)
    audit = config.audit
    if audit.auditors not in {"ridge", "mlp", "conv"}:
        raise ConfigError(f"{path}: auditors must be ridge, mlp or conv, not {audit.auditors!r}")
    if audit.executor not in {"processes", "ray"}:
        raise ConfigError(f"{path}: executor must be processes or ray, not {audit.executor!r}")
    if audit.workers < 1 or audit.max_jobs < 1 or not audit.policies:
        raise ConfigError(f"{path}: an audit needs a worker, room for a job and a policy")
    if audit.colour not in {"RGB", "BGR"} or len(audit.scale) not in {1, 3} or len(audit.mean) not in {1, 3}:
        raise ConfigError(f"{path}: [audit] colour must be RGB or BGR, scale and mean one value or three")
    if not 0 <= config.http.port <= 65_535:
        raise ConfigError(f"{path}: [http] port must be 0 to 65535, not {config.http.port}", hint="0 serves nothing")
    if audit.verdict_days <= 0 or audit.report_days <= 0:
        raise ConfigError(f"{path}: verdict_days and report_days must be above 0")
    rounds = config.rounds
    if rounds.canaries and not rounds.model:
        raise ConfigError(f"{path}: [rounds] model is missing", hint="the architecture whose tensors rounds train")
    if not 1 <= rounds.images <= MAX_CANARIES or rounds.iterations < 1 or rounds.public_images < 2:
        raise ConfigError(f"{path}: [rounds] images must be 1 to {MAX_CANARIES}, with iterations and public images")
    return config
