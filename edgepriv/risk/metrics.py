"""Prometheus metrics of the risk service."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "edgepriv_risk"


class RiskMetrics:
    """All counters and gauges; the service's loop sets them, the HTTP thread reads them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        reg = self.registry
        self.connected = Gauge(f"{PREFIX}_gateway_connected", "1 while a session is open", registry=reg)
        self.jobs = Gauge(f"{PREFIX}_jobs", "Audits by state", ["state"], registry=reg)
        self.jobs_refused = Gauge(f"{PREFIX}_jobs_refused", "Models not queued because the queue is full", registry=reg)
        self.audits = Counter(f"{PREFIX}_audits", "Finished audits by verdict", ["verdict"], registry=reg)
        self.verdicts = Counter(f"{PREFIX}_verdicts_sent", "Signed verdicts sent to the gateway", registry=reg)
        self.rounds = Counter(f"{PREFIX}_rounds", "Audited rounds by verdict", ["verdict"], registry=reg)
        self.rejected = Counter(f"{PREFIX}_rejected", "What was not believed, by kind", ["kind"], registry=reg)
        self.drift = Gauge(
            f"{PREFIX}_drift_index", "Stability index of released outputs", ["model", "digest"], registry=reg
        )
        self.alerts = Counter(f"{PREFIX}_drift_alerts", "Drift alerts raised", registry=reg)
        self.audit_seconds = Histogram(
            f"{PREFIX}_audit_seconds", "Duration of an audit", buckets=(5, 15, 60, 300, 1800), registry=reg
        )

    def show_jobs(self, counts: dict[str, int], refused: int) -> None:
        """Set the gauges of the queue."""
        for state in ("queued", "running", "done", "failed"):
            self.jobs.labels(state).set(counts.get(state, 0))
        self.jobs_refused.set(refused)
