"""The queue of audits: durable, bounded, one job for each digest.

Rules: a job is on disk before anybody is told that it was taken; a job that was running when the process died is queued
again, at most ``MAX_ATTEMPTS`` times; a full queue refuses (and counts) instead of growing. What was concluded is kept:
a model that is offered again gets its verdict without another audit.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

MAX_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Job:
    """One model to audit. ``state``: queued, running, done, failed."""

    digest: bytes
    name: str
    size: int
    state: str
    attempts: int
    error: str
    report: dict[str, Any] | None
    added: float
    finished: float


class JobQueue:
    """Jobs in an SQLite file that one service owns."""

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
        self._database.execute("CREATE TABLE IF NOT EXISTS serials (last INTEGER NOT NULL)")

    def recover(self) -> int:
        """Queue again what was running when the process ended; returns how many."""
        self._database.execute(
            "UPDATE jobs SET state = 'failed', error = 'ended the process too often' WHERE state = 'running'"
            " AND attempts >= ?",
            (MAX_ATTEMPTS,),
        )
        return self._database.execute("UPDATE jobs SET state = 'queued' WHERE state = 'running'").rowcount

    def add(self, digest: bytes, name: str, size: int, now: float) -> bool:
        """Queue a model; False where it is known already or the queue is full."""
        if self.find(digest) is not None:
            return False
        if self.counts().get("queued", 0) >= self._max_jobs:
            self.refused += 1
            return False
        self._database.execute(
            "INSERT INTO jobs (digest, name, size, state, added) VALUES (?, ?, ?, 'queued', ?)",
            (digest, name, size, now),
        )
        return True

    def take(self) -> Job | None:
        """Return the oldest queued job, now running; None where there is none."""
        row = self._database.execute(
            "UPDATE jobs SET state = 'running', attempts = attempts + 1 WHERE seq ="
            " (SELECT seq FROM jobs WHERE state = 'queued' ORDER BY seq LIMIT 1) RETURNING digest"
        ).fetchall()
        return self.find(bytes(row[0][0])) if row else None

    def finish(self, digest: bytes, report: dict[str, Any], now: float) -> None:
        """Keep what an audit found."""
        self._database.execute(
            "UPDATE jobs SET state = 'done', report = ?, error = '', finished = ? WHERE digest = ?",
            (json.dumps(report), now, digest),
        )

    def put_back(self, digest: bytes, error: str, now: float, *, final: bool = False) -> None:
        """Queue a job again after a temporary failure, or give it up."""
        state = "failed" if final else "queued"
        self._database.execute(
            "UPDATE jobs SET error = ?, finished = ?, state = CASE WHEN attempts >= ? THEN 'failed' ELSE ? END"
            " WHERE digest = ?",
            (error[:500], now, MAX_ATTEMPTS, state, digest),
        )

    def find(self, digest: bytes) -> Job | None:
        """Return the job of a model."""
        found = self.listed("WHERE digest = ?", (digest,))
        return found[0] if found else None

    def listed(self, where: str = "", values: tuple[Any, ...] = ()) -> list[Job]:
        """Return jobs in the order in which they came."""
        rows = self._database.execute(
            "SELECT digest, name, size, state, attempts, error, report, added, finished FROM jobs"  # noqa: S608 - fixed
            f" {where} ORDER BY seq",
            values,
        ).fetchall()
        return [
            Job(bytes(d), n, s, st, a, e, json.loads(r) if r else None, ad, f) for d, n, s, st, a, e, r, ad, f in rows
        ]

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
