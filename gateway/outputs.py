"""Released outputs become counts: per device, model, class and time window.

What is counted. Classification: the class with the best score (the first one on a tie), once for each output, and its
score where the policy releases one. Detection: each object (``counts`` rows count as many as they say, up to
`MAX_COUNT`). Regression: class 0, the value as the score. An output without rows counts under class ``NONE``. ``bits``
adds what each output may have revealed at most, on the first class counted. ``rate_per_s`` is count over the window's
seconds.
A window is published (MQTT, webhook) once it is over, and again if something late changes it: consumers replace by
(device, model, class, start). Windows are by the device's time of capture, held within a day of the gateway's clock.
The risk service compares bytes and not names: for it the same counts are kept by the digest of the model that ran, by
the hour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from edgepriv.wire.output import Output
    from gateway.database import Database, Row

NONE = -1
SCHEMA = "edgepriv.windows/1"
MAX_SKEW_S = 86_400.0
MAX_PUBLISHED = 500
MAX_RECENT = 2000
MAX_COUNT = 1 << 20  # what one row may add, so that no device brings a window's sum out of a column's range
BY = {"device": "party", "model": "model", "class": "class", "window": "start"}

_UPSERT = """INSERT INTO windows (party, model, class, start, seconds, count, scored, score_sum, bits, dirty)
 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 1) ON CONFLICT (party, model, class, start) DO UPDATE SET
 count = windows.count + excluded.count, scored = windows.scored + excluded.scored,
 score_sum = windows.score_sum + excluded.score_sum, bits = windows.bits + excluded.bits, dirty = 1"""
_UPSERT_MODEL = """INSERT INTO model_windows (party, digest, class, start, count) VALUES (?, ?, ?, ?, ?)
 ON CONFLICT (party, digest, class, start) DO UPDATE SET count = model_windows.count + excluded.count"""
HOUR_S = 3600
_SUMS = "sum(count), sum(scored), sum(score_sum), sum(bits)"


@dataclass(frozen=True, slots=True)
class Counted:
    """What one output adds to one class."""

    label: int
    count: int
    scored: int
    score_sum: float


def count_output(output: Output) -> list[Counted]:
    """Classes that one output counts for; pure."""
    rows = [row for row in output.values if row]
    if not rows:
        return [Counted(NONE, 1, 0, 0.0)]
    scale = 10.0**output.decimals
    if output.task == "detect":
        totals: dict[int, int] = {}
        for row in rows:
            totals[row[0]] = totals.get(row[0], 0) + (min(max(row[1], 0), MAX_COUNT) if len(row) == 2 else 1)
        return [Counted(label, count, 0, 0.0) for label, count in sorted(totals.items())]
    if output.task == "regress":
        return [Counted(row[0], 1, 1, row[1] * _step(output.policy) / scale) for row in rows if len(row) > 1]
    best = max(rows, key=lambda row: row[1] if len(row) > 1 else 0)
    scored = int(output.policy != "argmax" and len(best) > 1)
    return [Counted(best[0], 1, scored, best[1] / scale if scored else 0.0)]


def _step(policy: str) -> float:
    name, _, size = policy.partition(":")
    try:
        return float(size) if name == "steps" else 1.0
    except ValueError:
        return 1.0


class Windows:
    """Sums of the running batch, written together with the outputs that they come from."""

    def __init__(self, database: Database, window_s: int) -> None:
        self._database, self._window_s = database, window_s
        self._sums: dict[tuple[str, str, int, int], list[float]] = {}
        self._models: dict[tuple[str, bytes, int, int], int] = {}

    def add(self, party: str, output: Output, now: float) -> None:
        """Count a new output."""
        at = min(max(output.at, now - MAX_SKEW_S), now + MAX_SKEW_S)
        start, hour = int(at // self._window_s) * self._window_s, int(at // HOUR_S) * HOUR_S
        for index, counted in enumerate(count_output(output)):
            sums = self._sums.setdefault((party, output.model, counted.label, start), [0, 0, 0.0, 0.0])
            sums[0] += counted.count
            sums[1] += counted.scored
            sums[2] += counted.score_sum
            sums[3] += output.bits if index == 0 else 0.0
            key = (party, output.model_digest, counted.label, hour)
            self._models[key] = self._models.get(key, 0) + counted.count

    def flush(self) -> None:
        """Write the sums inside the caller's transaction."""
        rows = [(*key, self._window_s, int(s[0]), int(s[1]), s[2], s[3]) for key, s in self._sums.items()]
        if rows:
            self._database.executemany(_UPSERT, rows)
            self._database.executemany(_UPSERT_MODEL, [(*key, count) for key, count in self._models.items()])
        self.discard()

    def discard(self) -> None:
        """Forget the sums of a batch that failed."""
        self._sums, self._models = {}, {}


def finished(database: Database, *, before: float) -> list[dict[str, Any]]:
    """Windows that are over and changed since they were published, oldest first."""
    rows = database.query(
        f"SELECT party, model, class, start, seconds, {_SUMS} FROM windows WHERE dirty = 1 AND start + seconds <= ?"  # noqa: S608
        " GROUP BY party, model, class, start, seconds ORDER BY start, party, model, class LIMIT ?",
        (int(before), MAX_PUBLISHED),
    )
    return [_described(row) for row in rows]


def recent(database: Database, *, since: float) -> list[dict[str, Any]]:
    """The newest windows that begin at ``since`` or later, at most `MAX_RECENT`."""
    rows = database.query(
        "SELECT party, model, class, start, seconds, count, scored, score_sum, bits FROM windows WHERE start >= ?"
        " ORDER BY start DESC, party, model, class LIMIT ?",
        (int(since), MAX_RECENT),
    )
    return [_described(row) for row in rows]


def by_model(database: Database, *, since: float) -> list[dict[str, Any]]:
    """Counts of the hours that begin at ``since`` or later, by model digest and class, at most `MAX_RECENT`."""
    rows = database.query(
        "SELECT digest, class, sum(count) FROM model_windows WHERE start >= ? GROUP BY digest, class"
        " ORDER BY digest, class LIMIT ?",
        (int(since), MAX_RECENT),
    )
    return [{"digest": bytes(digest), "class": label, "count": int(count)} for digest, label, count in rows]


def _described(row: Row) -> dict[str, Any]:
    party, model, label, start, seconds, *sums = row
    figures = _figures(tuple(sums), seconds)
    return {"device": party, "model": model, "class": label, "start": start, "seconds": seconds, **figures}


def mark_published(database: Database, windows: list[dict[str, Any]]) -> None:
    """Note that windows were handed over with the counts that they have in ``windows``."""
    database.executemany(
        "UPDATE windows SET dirty = 0 WHERE party = ? AND model = ? AND class = ? AND start = ? AND count = ?",
        [(w["device"], w["model"], w["class"], w["start"], w["count"]) for w in windows],
    )


def summary(
    database: Database, *, since: float, by: tuple[str, ...], until: float | None = None
) -> list[dict[str, Any]]:
    """Sums over windows that begin at ``since`` or later, grouped.

    Args:
        database: the store's database.
        since: Unix seconds.
        by: any of ``device``, ``model``, ``class``, ``window``.
        until: Unix seconds, or None for now and later.

    Raises:
        ConfigError: an unknown grouping.
    """
    if unknown := [name for name in by if name not in BY]:
        raise ConfigError(f"cannot group by {unknown[0]!r}", hint=f"use {', '.join(BY)}")
    columns = ", ".join(BY[name] for name in by)
    ending = "" if until is None else " AND start < ?"
    params: list[Any] = [int(since)] if until is None else [int(since), int(until)]
    rows = database.query(
        f"SELECT {columns}{', ' if columns else ''}{_SUMS}, min(start), max(start + seconds) FROM windows"  # noqa: S608
        f" WHERE start >= ?{ending}" + (f" GROUP BY {columns} ORDER BY {columns}" if columns else ""),
        params,
    )
    return [
        {**dict(zip(by, row, strict=False)), **_figures(row[len(by) : len(by) + 4], row[-1] - row[-2])}
        for row in rows
        if row[len(by)] is not None
    ]


def _figures(sums: Row, seconds: float) -> dict[str, Any]:
    count, scored, score_sum, bits = sums
    return {
        "count": int(count),
        "mean_score": round(score_sum / scored, 6) if scored else None,
        "rate_per_s": round(int(count) / seconds, 6) if seconds else None,
        "bits": round(float(bits), 3),
    }
