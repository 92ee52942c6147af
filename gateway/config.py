"""``gateway.toml`` as frozen dataclasses; every limit has its unit in its name.

Rules of reading (unknown keys, paths, ``EDGEPRIV_<SECTION>__<KEY>``) are those of `edgepriv.settings`. Secrets are
paths. A value outside its range is an error at start, not a surprise at night.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path  # noqa: TC003 - the settings reader resolves the annotations
from urllib.parse import urlsplit

from edgepriv.errors import ConfigError
from edgepriv.mqtt import BrokerSettings
from edgepriv.settings import load_settings


@dataclass(frozen=True, slots=True)
class GatewaySection:
    """Who this gateway is. ``state`` holds everything that must survive; ``shard`` is the topic shard it serves."""

    identity: Path
    owner: Path
    trust: Path
    state: Path
    shard: int = 0


@dataclass(frozen=True, slots=True)
class BrokerSection(BrokerSettings):
    """Where the MQTT broker is. ``inflight``: packets sent and not yet acknowledged by the broker."""

    url: str = "mqtt://127.0.0.1:1883"
    max_packet_bytes: int = 262_144
    inflight: int = 20


@dataclass(frozen=True, slots=True)
class StoreSection:
    """Limits of what is kept. ``url_file``: a file with a ``postgresql://`` URL; without it SQLite in ``state``."""

    url_file: Path | None = None
    max_bytes: int = 20_000_000_000
    min_free_bytes: int = 200_000_000
    max_age_days: float = 30.0


@dataclass(frozen=True, slots=True)
class IngestSection:
    """What is taken from the link. ``total_credits``: chunks that may be under way from all devices together."""

    batch: int = 128
    max_frame_bytes: int = 64_000_000
    max_update_bytes: int = 512_000_000
    total_credits: int = 256
    window: int = 16
    max_transfers_per_device: int = 4
    transfer_expiry_s: float = 3600.0
    regrant_s: float = 5.0


@dataclass(frozen=True, slots=True)
class OutputsSection:
    """Aggregation and republishing of released outputs."""

    window_s: int = 60
    grace_s: float = 5.0
    publish_every_s: float = 5.0
    publish_mqtt: bool = True
    webhook_url: str | None = None
    webhook_secret: Path | None = None
    webhook_timeout_s: float = 10.0
    webhook_queue: int = 100


@dataclass(frozen=True, slots=True)
class ModelsSection:
    """Model delivery. ``require_verdict``: withhold a model without a valid verdict of the risk service.

    ``policies``: release policies of this site's devices, by the names that verdicts use (``argmax``, ``softmax:1``): a
    verdict that does not hold for each of them withholds the model. Empty leaves that to the devices, which check it.
    """

    require_verdict: bool = True
    policies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HttpSection:
    """Metrics and health, on loopback unless said otherwise; port 0 turns them off."""

    host: str = "127.0.0.1"
    port: int = 9464


@dataclass(frozen=True, slots=True)
class PagesSection:
    """The operator pages; port 0 turns them off. ``tokens`` is the file that ``operators add`` writes."""

    host: str = "127.0.0.1"
    port: int = 0
    tokens: Path | None = None
    risk_pages_url: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    requests_per_minute: int = 600


@dataclass(frozen=True, slots=True)
class AlertsSection:
    """When to raise an alert, and where to send it besides the page, the metrics and the MQTT topic."""

    device_silent_s: float = 300.0
    rejected_per_minute: int = 60
    store_used_ratio: float = 0.9
    certificate_days: float = 14.0
    webhook_url: str | None = None


@dataclass(frozen=True, slots=True)
class LogSection:
    """How the daemon logs to stderr."""

    json: bool = False
    level: str = "info"


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file."""

    gateway: GatewaySection
    broker: BrokerSection = field(default_factory=BrokerSection)
    store: StoreSection = field(default_factory=StoreSection)
    ingest: IngestSection = field(default_factory=IngestSection)
    outputs: OutputsSection = field(default_factory=OutputsSection)
    rounds: dict[str, object] = field(default_factory=dict)
    models: ModelsSection = field(default_factory=ModelsSection)
    http: HttpSection = field(default_factory=HttpSection)
    pages: PagesSection = field(default_factory=PagesSection)
    alerts: AlertsSection = field(default_factory=AlertsSection)
    log: LogSection = field(default_factory=LogSection)


def load(path: Path) -> Config:
    """Read and check ``gateway.toml``.

    Raises:
        MissingFileError: it does not exist.
        ConfigError: unknown key, wrong type, or a value out of range.
    """
    config = load_settings(Config, path)
    _check(config)
    return config


def _check(config: Config) -> None:
    positive = {
        "[store] max_bytes": config.store.max_bytes,
        "[store] max_age_days": config.store.max_age_days,
        "[ingest] batch": config.ingest.batch,
        "[ingest] max_frame_bytes": config.ingest.max_frame_bytes,
        "[ingest] max_update_bytes": config.ingest.max_update_bytes,
        "[ingest] total_credits": config.ingest.total_credits,
        "[ingest] window": config.ingest.window,
        "[outputs] window_s": config.outputs.window_s,
        "[outputs] webhook_queue": config.outputs.webhook_queue,
        "[broker] inflight": config.broker.inflight,
    }
    for name, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{name} must be above 0, not {value}")
    if not 0 <= config.gateway.shard <= 999:
        raise ConfigError(f"[gateway] shard must be 0 to 999, not {config.gateway.shard}")
    for name, port in {"[http] port": config.http.port, "[pages] port": config.pages.port}.items():
        if not 0 <= port <= 65_535:
            raise ConfigError(f"{name} must be 0 to 65535, not {port}", hint="0 turns it off")
    if config.log.level not in {"debug", "info", "warning", "error"}:
        raise ConfigError(f"[log] level {config.log.level!r} is not one of debug, info, warning, error")
    for name, url in {
        "[outputs] webhook_url": config.outputs.webhook_url,
        "[alerts] webhook_url": config.alerts.webhook_url,
    }.items():
        if url is not None and urlsplit(url).scheme not in {"http", "https"}:
            raise ConfigError(f"{name} must begin with http:// or https://")
