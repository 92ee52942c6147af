"""What counts as leaking and what as unjudged: one notion for alerts, pages and metrics.

Rules: a model leaks when there is a verdict on what would run and it is not the good one, whatever its word and even
when it has expired; a word that is not known is never taken for a good one. A model is unjudged when it has no verdict
that holds now: none at all, an expired one, one of other bytes. A round leaks when the newest verdict on a round is
neither ``contained`` nor ``at risk``; ``at risk`` (no attack worked, no bound promises that none can) is unsure.
Audits of rounds are expected where there has ever been one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway.models import GOOD_VERDICT
from gateway.store import unpack

if TYPE_CHECKING:
    from gateway.database import Database

NOT_AUDITED = "not audited"
CONTAINED, AT_RISK = "contained", "at risk"
AUDIT_WITHIN_S = 3600.0
LOOKED_AT = 50
MAX_WORD = 40


def leaks(model: dict[str, Any]) -> bool:
    """Whether there is a verdict on the model (as `gateway.models` lists it) and it is not the good one."""
    return model["verdict"] not in {NOT_AUDITED, GOOD_VERDICT}


def unjudged(model: dict[str, Any], now: float) -> bool:
    """Whether no verdict on the model holds now."""
    return not leaks(model) and not (model.get("valid") and model.get("expires", 0) > now)


def style(model: dict[str, Any], now: float) -> str:
    """How a page shows the model's verdict: ``bad``, ``good`` or ``unsure``."""
    return "bad" if leaks(model) else ("unsure" if unjudged(model, now) else "good")


@dataclass(frozen=True, slots=True)
class RoundAudits:
    """What is known of the rounds' leakage.

    ``number``, ``verdict``, ``reason``: the newest round with a verdict (``verdict`` empty: none has one). ``missing``:
    what should have been audited since and was not, in words. ``never``: rounds have ended and none was ever audited.
    """

    number: int = 0
    verdict: str = ""
    reason: str = ""
    missing: str = ""
    never: bool = False

    @property
    def leaking(self) -> bool:
        """Whether the newest verdict says so."""
        return self.verdict not in {"", CONTAINED, AT_RISK}

    @property
    def unsure(self) -> str:
        """Why nobody can say that rounds do not leak, in words; empty where somebody can, or there are no rounds."""
        if self.never:
            return "no federated round has been audited"
        if self.verdict == AT_RISK:
            return f"round {self.number} is at risk: {self.reason}"
        return self.missing


def round_audits(database: Database, now: float) -> RoundAudits:
    """Read what was reported about ended rounds."""
    rows = database.query(
        "SELECT rounds.number, reports.body FROM rounds JOIN reports ON reports.kind = 'round'"
        " AND reports.subject = CAST(rounds.number AS TEXT) ORDER BY rounds.number DESC LIMIT ?",
        (LOOKED_AT,),
    )
    audits = [(int(number), _conclusion(unpack(body))) for number, body in rows]
    audits = [(number, (word, why)) for number, (word, why) in audits if word or why]
    if not audits:
        return RoundAudits(never=_newest_done(database, now) is not None)
    number, (word, why) = next(((n, c) for n, c in audits if c[0]), (0, ("", "")))
    return RoundAudits(number, word, why, _missing(database, now, audits[0]))


def _conclusion(report: Any) -> tuple[str, str]:
    """A report's verdict and reason; an empty verdict with the error where the round could not be audited."""
    if not isinstance(report, dict):
        return "", ""
    return str(report.get("verdict", ""))[:MAX_WORD], str(report.get("reason") or report.get("error", ""))[:200]


def _missing(database: Database, now: float, newest: tuple[int, tuple[str, str]]) -> str:
    number, (word, why) = newest
    due = _newest_done(database, now - AUDIT_WITHIN_S)
    if due is not None and due > number:
        return f"round {due} ended over {AUDIT_WITHIN_S / 3600:.0f} h ago and nobody has audited it"
    return "" if word else f"round {number} could not be audited: {why}"


def _newest_done(database: Database, before: float) -> int | None:
    rows = database.query(
        "SELECT number FROM rounds WHERE state = 'done' AND snapshot IS NULL AND updated <= ?"
        " ORDER BY number DESC LIMIT 1",
        (before,),
    )
    return int(rows[0][0]) if rows else None
