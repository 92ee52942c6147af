"""Prometheus metrics of the gateway: one registry for each daemon, names by the conventions of the format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "edgepriv_gateway"


class Metrics:
    """All counters and gauges; the work loop sets them, the HTTP thread reads them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.messages = Counter(f"{PREFIX}_messages", "Messages handled", ["kind", "outcome"], registry=registry)
        self.received_bytes = Counter(f"{PREFIX}_received_bytes", "Bytes of packets received", registry=registry)
        self.rejected = Counter(
            f"{PREFIX}_rejected", "Messages refused, by the class of the error", ["reason"], registry=registry
        )
        self.not_acknowledged = Counter(
            f"{PREFIX}_not_acknowledged", "Items left with their device because the store is full", registry=registry
        )
        self.batch_failures = Counter(
            f"{PREFIX}_batch_failures", "Batches that could not be committed", registry=registry
        )
        self.sent = Gauge(f"{PREFIX}_sent_packets", "Packets sent since the start", registry=registry)
        self.batch_seconds = Histogram(
            f"{PREFIX}_batch_seconds",
            "Time to handle and commit a batch",
            buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2, 10),
            registry=registry,
        )
        self.connected = Gauge(f"{PREFIX}_broker_connected", "1 while the broker is connected", registry=registry)
        self.store_bytes = Gauge(f"{PREFIX}_store_bytes", "Bytes in the store", registry=registry)
        self.store_limit_bytes = Gauge(f"{PREFIX}_store_limit_bytes", "Byte limit of the store", registry=registry)
        self.transfers = Gauge(f"{PREFIX}_transfers_open", "Uploads under way", registry=registry)
        self.credits = Gauge(f"{PREFIX}_credits_open", "Chunks granted and not yet arrived", registry=registry)
        self.downlink = Gauge(
            f"{PREFIX}_downlink_waiting", "Messages and fetches waiting to be sent", registry=registry
        )
        self.downlink_dropped = Gauge(
            f"{PREFIX}_downlink_dropped", "Messages dropped since the start", registry=registry
        )
        self.devices = Gauge(f"{PREFIX}_devices", "Devices by state", ["state"], registry=registry)
        self.webhook_dropped = Gauge(
            f"{PREFIX}_webhook_dropped", "Webhook documents dropped since the start", registry=registry
        )
        self.windows_published = Counter(
            f"{PREFIX}_windows_published", "Aggregated windows published", registry=registry
        )
        self.trust_version = Gauge(f"{PREFIX}_trust_version", "Version of the trust list in force", registry=registry)
        self.trust_expires = Gauge(
            f"{PREFIX}_trust_expires_timestamp_seconds", "When the trust list expires", registry=registry
        )
        self.certificate_expires = Gauge(
            f"{PREFIX}_certificate_expires_timestamp_seconds",
            "When the TLS certificate expires (0: none)",
            registry=registry,
        )
        self.loop = Gauge(f"{PREFIX}_loop_timestamp_seconds", "When the work loop last turned", registry=registry)
        self.rounds = Gauge(f"{PREFIX}_rounds", "Rounds by state", ["state"], registry=registry)
        self.alerts = Gauge(
            f"{PREFIX}_alerts", "Open alerts by name and severity", ["name", "severity"], registry=registry
        )
        self._open_alerts: set[tuple[str, str]] = set()

    def set_alerts(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Count the open alerts by name and severity; a series that stays is never away, not even for a moment."""
        for labels, count in counts.items():
            self.alerts.labels(*labels).set(count)
        for labels in self._open_alerts - counts.keys():
            self.alerts.remove(*labels)
        self._open_alerts = set(counts)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)
