"""Alerts: what an operator must act on, raised and cleared by rules over the daemon's own figures.

Rules: a rule is a function of `Facts` that returns the alerts which are true now; the engine raises what is new and
clears what is gone, so an alert has one row from its beginning to its end. Each change is published once on
``edgepriv/v1/<gateway>/out/alerts``, posted to the webhook and counted; an alert whose severity changes is published
as ``raised`` again, with the severity that holds from then on. Texts name parties and figures, never data.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gateway.judged import MAX_WORD, RoundAudits, leaks

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.config import AlertsSection
    from gateway.store import Store

SCHEMA = "edgepriv.alert/1"
DAY_S = 86_400
NAMED = 5
FORGET_S = 7 * DAY_S
LEAKS = {"model-leaks", "round-leaks"}


@dataclass(frozen=True, slots=True)
class Alert:
    """Something to act on. ``name`` is stable; ``severity`` is ``critical`` or ``warning``."""

    name: str
    subject: str
    severity: str
    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules look at; times in Unix seconds."""

    now: float
    store_bytes: int
    store_limit_bytes: int
    not_ready: dict[str, str]
    trust_expires: float
    trust_error: str
    certificate_expires: float
    rejected_last_minute: int
    silent: tuple[str, ...]
    silent_count: int
    models: tuple[dict[str, Any], ...]
    aborted_round: tuple[int, str] | None
    round_audits: RoundAudits = field(default_factory=RoundAudits)


def rules(facts: Facts, settings: AlertsSection) -> list[Alert]:
    """Every alert that is true now; pure."""
    found = [Alert(f"not-ready-{name}", "gateway", "critical", why) for name, why in facts.not_ready.items()]
    if facts.store_bytes >= settings.store_used_ratio * facts.store_limit_bytes:
        share = 100 * facts.store_bytes / facts.store_limit_bytes
        found.append(Alert("store-nearly-full", "gateway", "warning", f"the store is at {share:.0f} % of its limit"))
    found += _expiries(facts, settings)
    if facts.rejected_last_minute >= settings.rejected_per_minute:
        text = f"{facts.rejected_last_minute} packets were refused within a minute"
        found.append(Alert("many-rejections", "gateway", "warning", text))
    if facts.silent_count:
        more = f" and {facts.silent_count - NAMED} more" if facts.silent_count > NAMED else ""
        text = f"{facts.silent_count} silent: {', '.join(facts.silent[:NAMED])}{more}"
        found.append(Alert("devices-silent", "fleet", "warning", text))
    found += [_model_leaks(model) for model in facts.models if leaks(model)]
    found += _round_leaks(facts.round_audits)
    if facts.aborted_round:
        number, reason = facts.aborted_round
        found.append(Alert("round-aborted", f"round {number}", "warning", f"the last round was aborted: {reason}"))
    return found


def _model_leaks(model: dict[str, Any]) -> Alert:
    name, withheld = f"{model['id']} {model['version']}", model["withheld"]
    text = f"the risk service's verdict on {name} is “{model['verdict'][:MAX_WORD]}”"
    if withheld:
        return Alert("model-leaks", name, "warning", f"{text}; it is withheld from devices")
    return Alert("model-leaks", name, "critical", f"{text}, and devices are offered it")


def _round_leaks(audits: RoundAudits) -> list[Alert]:
    """The newest audited round leaks; what should have been audited since was not."""
    found = []
    if audits.leaking:
        text = f"an audit of round {audits.number} says “{audits.verdict}”: {audits.reason}"
        found.append(Alert("round-leaks", f"round {audits.number}", "critical", text))
    if audits.missing:
        found.append(Alert("round-leaks", "audits of rounds", "warning", audits.missing))
    return found


def _expiries(facts: Facts, settings: AlertsSection) -> list[Alert]:
    found = []
    left = (facts.trust_expires - facts.now) / DAY_S
    if left < settings.certificate_days:
        severity = "critical" if left <= 0 else "warning"
        found.append(Alert("trust-expires", "trust list", severity, f"the trust list has {max(left, 0):.1f} days left"))
    if facts.trust_error:
        found.append(Alert("trust-refused", "trust list", "warning", f"a new list was refused: {facts.trust_error}"))
    if facts.certificate_expires:
        left = (facts.certificate_expires - facts.now) / DAY_S
        if left < settings.certificate_days:
            text = f"the TLS certificate has {max(left, 0):.1f} days left"
            found.append(Alert("certificate-expires", "gateway", "critical" if left <= 0 else "warning", text))
    return found


class AlertEngine:
    """Keeps the table of alerts in step with what is true."""

    def __init__(self, store: Store, settings: AlertsSection, publish: Callable[[dict[str, Any]], None]) -> None:
        self._store, self._settings, self._publish = store, settings, publish

    def turn(self, facts: Facts) -> Counter[tuple[str, str]]:
        """Raise and clear; returns how many alerts are open by name and severity."""
        true_now = {(a.name, a.subject): a for a in rules(facts, self._settings)}
        rows = self._store.database.query("SELECT id, name, subject, severity, text FROM alerts WHERE cleared IS NULL")
        known = {(name, subject): (number, severity, text) for number, name, subject, severity, text in rows}
        kept = true_now.keys() & known.keys()
        turned = {key for key in kept if known[key][1] != true_now[key].severity}
        changed = (true_now.keys() ^ known.keys()) | turned
        if changed or any(known[key][2] != true_now[key].text for key in kept):
            with self._store.batch():
                self._write(true_now, known, facts.now)
        for key in sorted(changed):
            alert = true_now.get(key)
            self._publish(self._document(key, alert, known.get(key), facts.now))
        return Counter((alert.name, alert.severity) for alert in true_now.values())

    def _write(self, true_now: dict[tuple[str, str], Alert], known: dict[tuple[str, str], Any], now: float) -> None:
        execute = self._store.database.execute
        for key, alert in true_now.items():
            if key in known:
                execute(
                    "UPDATE alerts SET severity = ?, text = ? WHERE id = ?", (alert.severity, alert.text, known[key][0])
                )
            else:
                execute(
                    "INSERT INTO alerts (name, subject, severity, text, raised) VALUES (?, ?, ?, ?, ?)",
                    (alert.name, alert.subject, alert.severity, alert.text, now),
                )
        for key in known.keys() - true_now.keys():
            execute("UPDATE alerts SET cleared = ? WHERE id = ?", (now, known[key][0]))
        execute("DELETE FROM alerts WHERE cleared < ?", (now - FORGET_S,))

    def _document(self, key: tuple[str, str], alert: Alert | None, known: Any, now: float) -> dict[str, Any]:
        severity, text = (alert.severity, alert.text) if alert else known[1:]
        name, subject = key
        state = "raised" if alert else "cleared"
        return {
            "schema": SCHEMA,
            "name": name,
            "subject": subject,
            "state": state,
            "severity": severity,
            "text": text,
            "at": now,
        }
