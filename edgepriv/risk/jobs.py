"""The queue of audits: durable, bounded, one job for each digest.

Rules: a job is on disk before anybody is told that it was taken. A model is given up after ``MAX_DEATHS`` attempts in
which the worker that audited it died, or when the whole service ended ``MAX_INTERRUPTED`` times while it ran; nothing
else counts. An orderly stop gives the attempt back, and what is the gateway's or the machine's fault puts the job back
for a while that doubles up to an hour. A full queue refuses (and counts) instead of growing. What was concluded is kept
with the digest of the settings that it was reached under: a model that is offered again gets its verdict without
another audit as long as those are today's.
"""

from __future__ import annotations

import json
import math
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv.errors import MissingFileError

if TYPE_CHECKING:
    from pathlib import Path

MAX_DEATHS = 3
MAX_INTERRUPTED = 10
FIRST_WAIT_S, LONGEST_WAIT_S = 5.0, 3600.0
COLUMNS = "digest, name, size, state, attempts, error, report, added, finished, settings, deaths, not_before"
ADDED = {
    "settings": "TEXT NOT NULL DEFAULT ''",
    "deaths": "INTEGER NOT NULL DEFAULT 0",
    "interrupted": "INTEGER NOT NULL DEFAULT 0",
    "delays": "INTEGER NOT NULL DEFAULT 0",
    "not_before": "REAL NOT NULL DEFAULT 0",
}
AFRESH = "state = 'queued', error = '', deaths = 0, interrupted = 0, delays = 0, not_before = 0"


@dataclass(frozen=True, slots=True)
class Job:
    """One model to audit. ``state``: queued, running, done, failed. ``report`` is the last conclusion, if any.

    ``settings``: digest of what it was last audited under. ``attempts``: audits begun. ``not_before``: Unix seconds.
    """

    digest: bytes
    name: str
    size: int
    state: str
    attempts: int
    error: str
    report: dict[str, Any] | None
    added: float
    finished: float
    settings: str = ""
    deaths: int = 0
    not_before: float = 0.0


class JobQueue:
    """Jobs in an SQLite file that one service owns; the commands read it and may put a job back."""

    def __init__(self, path: Path, *, max_jobs: int) -> None:
        self._max_jobs = max_jobs
        self.refused = 0
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS jobs (seq INTEGER PRIMARY KEY, digest BLOB UNIQUE NOT NULL, name TEXT NOT NULL,"
            " size INTEGER NOT NULL, state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,"
            " error TEXT NOT NULL DEFAULT '', report TEXT, added REAL NOT NULL, finished REAL NOT NULL DEFAULT 0)"
        )
        known = {row[1] for row in self._database.execute("PRAGMA table_info(jobs)").fetchall()}
        for name, kind in ADDED.items():
            if name not in known:
                self._database.execute(f"ALTER TABLE jobs ADD COLUMN {name} {kind}")
        self._database.execute("CREATE TABLE IF NOT EXISTS serials (last INTEGER NOT NULL)")

    def recover(self) -> int:
        """Queue again what was running when the process ended without a word; returns how many."""
        self._database.execute(
            "UPDATE jobs SET state = 'failed', error = 'the service ended too often while it was audited'"
            " WHERE state = 'running' AND interrupted + 1 >= ?",
            (MAX_INTERRUPTED,),
        )
        return self._database.execute(
            "UPDATE jobs SET state = 'queued', interrupted = interrupted + 1 WHERE state = 'running'"
        ).rowcount

    def add(self, digest: bytes, name: str, size: int, now: float) -> bool:
        """Queue a model; False where it is known already or the queue is full."""
        if self.find(digest) is not None or not self._room():
            return False
        self._database.execute(
            "INSERT INTO jobs (digest, name, size, state, added) VALUES (?, ?, ?, 'queued', ?)",
            (digest, name, size, now),
        )
        return True

    def _room(self) -> bool:
        full = self.counts().get("queued", 0) >= self._max_jobs
        self.refused += full
        return not full

    def again(self, digest: bytes) -> bool:
        """Queue a finished or given up model afresh; its last report stays to be read. False where it cannot be."""
        if not self._room():
            return False
        where = "WHERE digest = ? AND state IN ('done', 'failed')"
        return self._database.execute(f"UPDATE jobs SET {AFRESH} {where}", (digest,)).rowcount == 1  # noqa: S608 - fixed

    def retry(self, prefix: str) -> Job:
        """Put a given up or waiting model at once to be audited, with all its attempts; returns the job.

        Raises:
            MissingFileError: not exactly one such job's digest begins with ``prefix``.
        """
        found = [j for j in self.listed("WHERE state IN ('failed', 'queued')") if j.digest.hex().startswith(prefix)]
        if len(found) != 1:
            raise MissingFileError(f"no model {prefix!r} was given up or waits", hint="edgepriv risk list shows them")
        where = "WHERE digest = ? AND state IN ('failed', 'queued')"
        self._database.execute(f"UPDATE jobs SET {AFRESH} {where}", (found[0].digest,))  # noqa: S608 - fixed
        return found[0]

    def take(self, now: float = math.inf, *, settings: str = "") -> Job | None:
        """Return the oldest queued job that may begin now, as running under these settings; None: there is none."""
        row = self._database.execute(
            "UPDATE jobs SET state = 'running', attempts = attempts + 1, settings = ? WHERE seq ="
            " (SELECT seq FROM jobs WHERE state = 'queued' AND not_before <= ? ORDER BY seq LIMIT 1) RETURNING digest",
            (settings, now),
        ).fetchall()
        return self.find(bytes(row[0][0])) if row else None

    def finish(self, digest: bytes, report: dict[str, Any], now: float) -> None:
        """Keep what an audit found."""
        self._database.execute(
            "UPDATE jobs SET state = 'done', report = ?, error = '', finished = ?, deaths = 0,"
            " interrupted = 0, delays = 0, not_before = 0 WHERE digest = ?",
            (json.dumps(report), now, digest),
        )

    def fail(self, digest: bytes, error: str, now: float) -> None:
        """Give a model up: under these settings it cannot be audited."""
        self._database.execute(
            "UPDATE jobs SET state = 'failed', error = ?, finished = ? WHERE digest = ?", (error[:500], now, digest)
        )

    def worker_died(self, digest: bytes, error: str, now: float) -> None:
        """Count a worker that died on this model; queue it again or give it up."""
        self._database.execute(
            "UPDATE jobs SET error = ?, finished = ?, deaths = deaths + 1,"
            " state = CASE WHEN deaths + 1 >= ? THEN 'failed' ELSE 'queued' END WHERE digest = ?",
            (error[:500], now, MAX_DEATHS, digest),
        )

    def postpone(self, digest: bytes, error: str, now: float) -> None:
        """Give an attempt back that failed through no fault of the model; it waits twice as long each time."""
        self._database.execute(
            "UPDATE jobs SET state = 'queued', error = ?, attempts = attempts - 1, delays = delays + 1,"
            " not_before = ? + min(?, ? * (1 << min(delays, 20))) WHERE digest = ?",
            (error[:500], now, LONGEST_WAIT_S, FIRST_WAIT_S, digest),
        )

    def give_back(self, digest: bytes) -> None:
        """Queue a running job again as if it had not begun: the service stops."""
        self._database.execute(
            "UPDATE jobs SET state = 'queued', attempts = attempts - 1 WHERE digest = ? AND state = 'running'",
            (digest,),
        )

    def find(self, digest: bytes) -> Job | None:
        """Return the job of a model."""
        found = self.listed("WHERE digest = ?", (digest,))
        return found[0] if found else None

    def listed(self, where: str = "", values: tuple[Any, ...] = ()) -> list[Job]:
        """Return jobs in the order in which they came."""
        rows = self._database.execute(
            f"SELECT {COLUMNS} FROM jobs {where} ORDER BY seq",  # noqa: S608 - fixed
            values,
        ).fetchall()
        return [_job(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """Return the number of jobs by state."""
        return dict(self._database.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())

    def next_serial(self, now: float) -> int:
        """Return a verdict's serial: above every earlier one, also after the clock went back."""
        row = self._database.execute("SELECT max(last) FROM serials").fetchone()
        serial = max(int(row[0] or 0) + 1, int(now))
        with self._database:
            self._database.execute("DELETE FROM serials")
            self._database.execute("INSERT INTO serials VALUES (?)", (serial,))
        return serial

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def _job(row: tuple[Any, ...]) -> Job:
    values = dict(zip(COLUMNS.split(", "), row, strict=True))
    report = values["report"]
    return Job(**{**values, "digest": bytes(values["digest"]), "report": json.loads(report) if report else None})
