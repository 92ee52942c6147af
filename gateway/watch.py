"""Looks at the gateway every few seconds: feeds the alert rules, the metrics and the pages' figures of the fleet."""

from __future__ import annotations

import json
from collections import deque
from typing import TYPE_CHECKING, Any

from edgepriv.doctor import certificate_expiry
from edgepriv.wire import topics
from gateway.alerts import NAMED, AlertEngine, Facts
from gateway.judged import round_audits
from gateway.store import unpack
from gateway.webhook import Webhook

if TYPE_CHECKING:
    from gateway.daemon import Gateway

MAX_PENDING = 200


class Watch:
    """One look at everything; called by the work loop."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._engine = AlertEngine(gateway.store, gateway.config.alerts, self._publish)
        url = gateway.config.alerts.webhook_url
        self._webhook = Webhook(url, secret=gateway.config.outputs.webhook_secret) if url else None
        self._rejected: deque[tuple[float, int]] = deque()
        self._models_seen: list[dict[str, Any]] | None = None
        self._pending: deque[bytes] = deque(maxlen=MAX_PENDING)

    def turn(self, now: float) -> None:
        """Gather the facts, raise and clear alerts, set the gauges."""
        facts = self._facts(now)
        self._keep_models(facts.models)
        counts = self._engine.turn(facts)
        self._send_pending()
        metrics = self._gateway.metrics
        metrics.set_alerts(counts)
        metrics.certificate_expires.set(facts.certificate_expires)
        total = int(self._one("SELECT count(*) FROM devices WHERE party LIKE 'dev-%'"))
        metrics.devices.labels("silent").set(facts.silent_count)
        metrics.devices.labels("heard").set(total - facts.silent_count)
        for state, count in self._gateway.store.database.query("SELECT state, count(*) FROM rounds GROUP BY state"):
            metrics.rounds.labels(state).set(count)

    def _facts(self, now: float) -> Facts:
        gateway = self._gateway
        readiness = {k: v for k, v in gateway.readiness().items() if k != "trust"}
        count, silent = self._silent(now)
        return Facts(
            now=now,
            store_bytes=gateway.store.used_bytes,
            store_limit_bytes=gateway.store.max_bytes,
            not_ready=readiness,
            trust_expires=gateway.roster.trust.expires,
            trust_error=gateway.roster.last_error,
            certificate_expires=certificate_expiry(gateway.config.broker.certificate),
            rejected_last_minute=self._rejections(now),
            silent=silent,
            silent_count=count,
            models=tuple(gateway.models.listed(now)),
            aborted_round=self._aborted(),
            round_audits=round_audits(gateway.store.database, now),
        )

    def _keep_models(self, models: tuple[dict[str, Any], ...]) -> None:
        """What the pages show of the models: they have no trust list and judge nothing themselves."""
        shown = [{**{k: v for k, v in m.items() if k != "verdict_bytes"}, "digest": m["digest"].hex()} for m in models]
        if shown != self._models_seen:
            self._gateway.store.set_meta("models_seen", shown)
            self._models_seen = shown

    def _one(self, sql: str, *params: Any) -> Any:
        return self._gateway.store.database.query(sql, params)[0][0]

    def _silent(self, now: float) -> tuple[int, tuple[str, ...]]:
        before = now - self._gateway.config.alerts.device_silent_s
        where = "FROM devices WHERE last_seen < ? AND party LIKE 'dev-%'"
        count = int(self._one(f"SELECT count(*) {where}", before))
        rows = self._gateway.store.database.query(f"SELECT party {where} ORDER BY party LIMIT {NAMED}", (before,))
        return count, tuple(name for (name,) in rows)

    def _rejections(self, now: float) -> int:
        total = sum(v for k, v in self._gateway.totals.items() if k.startswith("rejected_"))
        self._rejected.append((now, total))
        while self._rejected[0][0] < now - 60:
            self._rejected.popleft()
        return total - self._rejected[0][1]

    def _aborted(self) -> tuple[int, str] | None:
        rows = self._gateway.store.database.query(
            "SELECT number, state, record FROM rounds WHERE snapshot IS NULL ORDER BY number DESC LIMIT 1"
        )
        if not rows or rows[0][1] != "aborted":
            return None
        return int(rows[0][0]), str(unpack(rows[0][2]).get("reason", ""))

    def _publish(self, document: dict[str, Any]) -> None:
        self._pending.append(json.dumps({**document, "gateway": self._gateway.name}, separators=(",", ":")).encode())
        if self._webhook is not None:
            self._webhook.put({**document, "gateway": self._gateway.name})

    def _send_pending(self) -> None:
        topic = f"{topics.ROOT}/{self._gateway.name}/out/alerts"
        while self._pending and self._gateway.link.send(topic, self._pending[0]):
            self._pending.popleft()

    def close(self) -> None:
        """Stop the webhook."""
        if self._webhook is not None:
            self._webhook.close()
