"""Which parties are there, when they were last heard, and what they last said of themselves.

Kept in memory and written every few seconds: after a kill the last few seconds of "last heard" are gone, which nobody
is owed. Nothing here decides anything about trust.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from edgepriv.wire import cbor

if TYPE_CHECKING:
    from edgepriv.wire.messages import Status
    from gateway.store import Store

_UPSERT = """INSERT INTO devices (party, first_seen, last_seen, epoch) VALUES (?, ?, ?, ?)
 ON CONFLICT (party) DO UPDATE SET last_seen = excluded.last_seen, epoch = excluded.epoch"""


class Presence:
    """Collects what was heard and writes it in one go."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._heard: dict[str, tuple[float, int]] = {}
        self._status: dict[str, tuple[Status, float]] = {}

    def heard(self, party: str, epoch: int, now: float) -> None:
        """A party sent something authentic."""
        self._heard[party] = (now, epoch)

    def status(self, party: str, status: Status, now: float) -> None:
        """A device told how it is."""
        self._status[party] = (status, now)

    def flush(self) -> None:
        """Write what was collected."""
        if not self._heard and not self._status:
            return
        heard, self._heard = self._heard, {}
        status, self._status = self._status, {}
        with self._store.batch():
            self._store.database.executemany(_UPSERT, [(p, at, at, epoch) for p, (at, epoch) in heard.items()])
            self._store.database.executemany(
                "UPDATE devices SET status = ?, status_at = ? WHERE party = ?",
                [(cbor.encode(_plain(s)), at, party) for party, (s, at) in status.items()],
            )


def _plain(status: Status) -> dict[str, Any]:
    return {field.name: getattr(status, field.name) for field in dataclasses.fields(status)}
