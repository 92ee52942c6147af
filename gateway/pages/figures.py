"""What the pages show, read from the store: plain values, no markup, every list paged.

Nothing here returns an image, an envelope, a single output or an update; sizes and counts only.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv.errors import DataError
from edgepriv.wire import cbor
from gateway.alerts import LEAKS
from gateway.judged import MAX_WORD, leaks, round_audits, style, unjudged
from gateway.store import unpack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gateway.config import Config
    from gateway.database import Database, Row

PAGE_ROWS = 50
STALE_S = 15.0
MAX_REMEMBERED = 2000
MAX_SNAPSHOT_BYTES = 64 << 20
ATTACK = ("psnr_db", "ssim", "iip", "rdlv", "seconds")
_ROUND = "SELECT number, state, record, started, updated FROM rounds"


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list."""

    rows: list[dict[str, Any]]
    number: int
    pages: int
    total: int


class Figures:
    """Reads everything that the pages show."""

    def __init__(self, database: Database, config: Config, clock: Callable[[], float] = time.time) -> None:
        self._db, self._config, self._clock = database, config, clock
        self._ended: dict[int, tuple[float, dict[str, Any]]] = {}

    def _described(self, row: Row, reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """A round's row as values; what an ended round was never changes, so it is decoded once."""
        number, _, _, _, updated = row
        known = self._ended.get(number)
        if known is None or known[0] != updated:
            known = (updated, _round(row))
            if len(self._ended) > MAX_REMEMBERED:
                self._ended.clear()
            self._ended[number] = known
        report = reports.get(str(number), {})
        return {**known[1], "accuracy": report.get("accuracy"), "leakage": _leakage(report)}

    def _count(self, sql: str, *params: Any) -> int:
        return int(self._db.query(sql, params)[0][0] or 0)

    def _page(self, number: int, total: int) -> tuple[int, int, int]:
        pages = max(1, -(-total // PAGE_ROWS))
        number = min(max(number, 1), pages)
        return number, pages, (number - 1) * PAGE_ROWS

    # --- the daemon ---------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The daemon's own status file, with its age; ``stale`` where it has not written lately."""
        path: Path = self._config.gateway.state / "status.json"
        try:
            status: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            return {"stale": True, "age_s": None, "failed": {"daemon": "it has not run yet"}, "gateway": "gateway"}
        status["age_s"] = max(0.0, self._clock() - float(status.get("at", 0)))
        status["stale"] = status["age_s"] > STALE_S
        return status

    def overview(self) -> dict[str, Any]:
        """The two questions: is the fleet well, and is anything leaking?

        ``signature`` changes when what an open page says of alerts, models and rounds is not true any more.
        """
        now, alerts, models = self._clock(), self.open_alerts(), self.models()
        audits = round_audits(self._db, now)
        leaking = [f"{m['id']} {m['version']}: {m['verdict'][:MAX_WORD]}" for m in models if leaks(m)]
        if audits.leaking:
            leaking.append(f"round {audits.number}: {audits.verdict}")
        unjudged_models = sum(unjudged(m, now) for m in models)
        unsure = [f"{unjudged_models} of {len(models)} models have no valid verdict"] if unjudged_models else []
        unsure += [audits.unsure] if audits.unsure else []
        told = {
            "alerts": alerts,
            "unwell": any(a["name"] not in LEAKS for a in alerts),
            "leaking": leaking,
            "unsure": "; ".join(unsure),
            "models": len(models),
            "audited_round": audits.number,
            "stale": self.status()["stale"],
        }
        return {**told, "signature": _digest([told, self.past_alerts(1)])}

    # --- fleet --------------------------------------------------------------------------------------------

    def fleet_counts(self) -> dict[str, int]:
        """Devices in all, and how many are silent."""
        before = self._clock() - self._config.alerts.device_silent_s
        total = self._count("SELECT count(*) FROM devices WHERE party LIKE 'dev-%'")
        silent = self._count("SELECT count(*) FROM devices WHERE party LIKE 'dev-%' AND last_seen < ?", before)
        return {"devices": total, "silent": silent}

    def fleet(self, search: str, number: int, *, only_silent: bool = False) -> Page:
        """Devices by name; ``search`` is a part of the name."""
        where = "party LIKE 'dev-%'"
        params: list[Any] = []
        if search:
            where += " AND party LIKE ? ESCAPE '!'"
            params.append(f"%{_literal(search[:48])}%")
        if only_silent:
            where += " AND last_seen < ?"
            params.append(self._clock() - self._config.alerts.device_silent_s)
        total = self._count(f"SELECT count(*) FROM devices WHERE {where}", *params)  # noqa: S608 - parts above
        number, pages, offset = self._page(number, total)
        rows = self._db.query(
            f"SELECT party, last_seen, status, status_at FROM devices WHERE {where} ORDER BY party LIMIT ? OFFSET ?",  # noqa: S608
            (*params, PAGE_ROWS, offset),
        )
        newest = self._newest_trust()
        return Page([self._device(row, newest) for row in rows], number, pages, total)

    def _newest_trust(self) -> int:
        """Version of the list that the gateway offers to devices; 0 where it has not run."""
        trust = self.status().get("trust", {})
        return int(trust.get("version", 0)) if isinstance(trust, dict) else 0

    def _device(self, row: Row, newest_trust: int) -> dict[str, Any]:
        party, last_seen, raw, _ = row
        now, status = self._clock(), unpack(raw)
        counters = status.get("counters", {}) if isinstance(status.get("counters"), dict) else {}
        days, trust = _figure(counters.get("certificate_days")), status.get("trust_version")
        drops = sum(v for k, v in counters.items() if k.startswith("dropped") and isinstance(v, int))
        return {
            "name": party,
            "seen_s": max(0.0, now - last_seen),
            "silent": now - last_seen > self._config.alerts.device_silent_s,
            "model": str(status.get("model", "")),
            "level": status.get("level", 0),
            "firmware": str(status.get("firmware", "")),
            "queue": counters.get("queue_items"),
            "drops": drops,
            "certificate_days": days,
            "certificate_short": days is not None and days < self._config.alerts.certificate_days,
            "trust_version": trust,
            "trust_old": isinstance(trust, int) and trust < newest_trust,
        }

    # --- rounds -------------------------------------------------------------------------------------------

    def rounds(self, number: int) -> Page:
        """Rounds, newest first, with what was reported about them."""
        total = self._count("SELECT count(*) FROM rounds")
        number, pages, offset = self._page(number, total)
        rows = self._db.query(f"{_ROUND} ORDER BY number DESC LIMIT ? OFFSET ?", (PAGE_ROWS, offset))
        reports = self._reports([row[0] for row in rows])
        return Page([self._described(row, reports) for row in rows], number, pages, total)

    def _reports(self, numbers: list[int]) -> dict[str, dict[str, Any]]:
        if not numbers:
            return {}
        marks = ", ".join("?" for _ in numbers)
        rows = self._db.query(
            f"SELECT subject, sender, at, body FROM reports WHERE kind = 'round' AND subject IN ({marks})",  # noqa: S608
            [str(n) for n in numbers],
        )
        return {subject: {**unpack(body), "sender": sender, "at": at} for subject, sender, at, body in rows}

    def round(self, number: int) -> dict[str, Any] | None:
        """One round's record, or None."""
        rows = self._db.query(f"{_ROUND} WHERE number = ?", (number,))
        return self._described(rows[0], self._reports([number])) if rows else None

    def running(self) -> dict[str, Any] | None:
        """The round that runs now: its state and how many devices stand where."""
        rows = self._db.query(
            "SELECT number, state, snapshot, started FROM rounds WHERE snapshot IS NOT NULL"
            " ORDER BY number DESC LIMIT 1"
        )
        if not rows:
            return None
        number, state, raw, started = rows[0]
        body = cbor.decode_map(bytes(raw), max_bytes=MAX_SNAPSHOT_BYTES)
        counts: dict[str, int] = {}
        for device in body.get("devices", {}).values():
            counts[device[0]] = counts.get(device[0], 0) + 1
        plan = body.get("plan", {})
        return {
            "number": number,
            "state": state,
            "seconds": max(0.0, self._clock() - started),
            "counts": dict(sorted(counts.items())),
            "invited": len(body.get("devices", {})),
            "folded": counts.get("folded", 0),
            "quorum": plan.get("quorum", 0),
            "deadline_s": plan.get("deadline_s", 0.0),
            "privacy": plan.get("privacy", ""),
        }

    def round_series(self) -> dict[str, list[float]]:
        """The last 200 ended rounds as columns for the chart."""
        rows = self._db.query(f"{_ROUND} WHERE snapshot IS NULL ORDER BY number DESC LIMIT 200")
        rounds = [self._described(row, {}) for row in reversed(rows)]
        return {
            "number": [r["number"] for r in rounds],
            "participants": [r["participants"] for r in rounds],
            "seconds": [round(r["seconds"], 1) for r in rounds],
        }

    # --- models, storage, alerts --------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        """Models with what the daemon last judged of them; ``style`` says how the verdict is shown."""
        rows = self._db.query("SELECT value FROM meta WHERE name = 'models_seen'")
        listed, now = (unpack(rows[0][0]) if rows else []), self._clock()
        if not isinstance(listed, list):
            return []
        return [
            {**m, "style": style(m, now), "valid": bool(m.get("valid")) and m.get("expires", 0) > now} for m in listed
        ]

    def storage(self, number: int) -> tuple[dict[str, Any], Page]:
        """Totals, and frames and bytes by device."""
        totals = self._db.query("SELECT count(*), coalesce(sum(size), 0) FROM frames WHERE erased = 0")[0]
        outputs = self._count("SELECT count(*) FROM outputs WHERE erased = 0")
        erased = self._count("SELECT count(*) FROM frames WHERE erased = 1")
        devices = self._count("SELECT count(DISTINCT party) FROM frames WHERE erased = 0")
        number, pages, offset = self._page(number, devices)
        rows = self._db.query(
            "SELECT party, count(*), sum(size), min(received), max(received) FROM frames WHERE erased = 0"
            " GROUP BY party ORDER BY party LIMIT ? OFFSET ?",
            (PAGE_ROWS, offset),
        )
        listed = [{"name": r[0], "frames": r[1], "bytes": int(r[2]), "first": r[3], "last": r[4]} for r in rows]
        summary = {
            "frames": totals[0], "bytes": int(totals[1]), "outputs": outputs, "erased": erased,
            "limit": self._config.store.max_bytes, "age_days": self._config.store.max_age_days,
        }  # fmt: skip
        return summary, Page(listed, number, pages, devices)

    def open_alerts(self) -> list[dict[str, Any]]:
        """Alerts that are true now."""
        return self._alerts("cleared IS NULL ORDER BY severity, raised DESC LIMIT 200")

    def past_alerts(self, limit: int = 100) -> list[dict[str, Any]]:
        """Alerts that were cleared, the last one first."""
        return self._alerts(f"cleared IS NOT NULL ORDER BY cleared DESC LIMIT {int(limit)}")

    def _alerts(self, where: str) -> list[dict[str, Any]]:
        columns = ("name", "subject", "severity", "text", "raised", "cleared")
        rows = self._db.query(f"SELECT {', '.join(columns)} FROM alerts WHERE {where}")  # noqa: S608 - fixed text
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def audit(self, number: int) -> Page:
        """The audit log, newest first."""
        total = self._count("SELECT count(*) FROM audit")
        number, pages, offset = self._page(number, total)
        rows = self._db.query(
            "SELECT at, actor, action, detail FROM audit ORDER BY id DESC LIMIT ? OFFSET ?", (PAGE_ROWS, offset)
        )
        listed = [{"at": r[0], "actor": r[1], "action": r[2], "detail": _shown(unpack(r[3]))} for r in rows]
        return Page(listed, number, pages, total)


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _literal(text: str) -> str:
    """Make a search text match itself in LIKE."""
    return text.replace("!", "!!").replace("%", "!%").replace("_", "!_")


def _round(row: Row) -> dict[str, Any]:
    number, state, raw, started, updated = row
    record = unpack(raw)
    return {
        "number": number,
        "state": state,
        "reason": record.get("reason", ""),
        "privacy": record.get("privacy", ""),
        "participants": len(record.get("participants", [])),
        "names": list(record.get("participants", [])),
        "invited": record.get("invited", 0),
        "rejected": [list(r) for r in record.get("rejected", [])],
        "epsilon": record.get("epsilon", 0.0),
        "delta": record.get("delta", 0.0),
        "noise": record.get("noise", "none"),
        "model": record.get("model", ""),
        "parts": [list(part) for part in record.get("parts", [])],
        "before": _hex(record.get("before")),
        "after": _hex(record.get("after")),
        "started": started,
        "seconds": max(0.0, updated - started),
    }


def _leakage(report: dict[str, Any]) -> dict[str, Any] | None:
    """What the risk service found that a round's updates give away, as plain values; None where nobody looked."""
    if not {"leakage_bound", "verdict", "error"} & report.keys():
        return None
    attack = report.get("attack")
    return {
        "error": str(report.get("error", ""))[:200],
        "verdict": str(report.get("verdict", ""))[:40],
        "reason": str(report.get("reason", ""))[:300],
        "seen": str(report.get("seen", ""))[:120],
        "about": str(report.get("about", ""))[:300],
        "caveat": str(report.get("caveat", ""))[:300],
        "bound": _figure(report.get("leakage_bound")),
        "floor": _figure(report.get("leakage_floor")),
        "attack": {k: _figure(v) for k, v in attack.items() if k in ATTACK} if isinstance(attack, dict) else {},
        "clients": report.get("clients"),
        "canaries": report.get("canaries"),
        "by": str(report.get("sender", "")),
        "at": report.get("at"),
    }


def _figure(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _hex(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else ""


def _shown(detail: Any) -> str:
    if not isinstance(detail, dict):
        return str(detail)[:200]
    inner = {**detail, **detail["args"]} if isinstance(detail.get("args"), dict) else detail
    parts = [f"{k}: {_short(v)}" for k, v in inner.items() if not isinstance(v, dict)]
    return ", ".join(parts)[:300]


def _short(value: Any) -> str:
    """A value of the audit log; digests by their first 16 characters, as everywhere on the pages."""
    text = value.hex() if isinstance(value, bytes) else str(value)
    return f"{text[:16]}…" if len(text) == 64 and not set(text) - set("0123456789abcdef") else text


def whole_number(text: str | None, default: int) -> int:
    """A positive number of a query string, or DataError."""
    if text is None or text == "":
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise DataError("a page number is a number")
    return int(text)
