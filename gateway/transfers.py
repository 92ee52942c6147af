"""Uploads in chunks: staged in a file of their own, resumed after any restart, bounded by credits.

Rules: sizes are refused at the offer, before anything is reserved. A chunk goes straight to its place in the staged
file. Which chunks are there is written to the store once a second, not per chunk: after a kill a few are asked for
again. An object is complete only when its SHA-256 is right; where a transfer was resumed, a wrong digest starts it
over once (a power cut may lose pages that a row believes in), else the offer lied and is refused for good.
The grants that are open for all devices together never exceed ``total_credits``, so the broker's queue is bounded;
a device that falls silent gives its credits back after `STALLED_S`.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgepriv import files
from edgepriv.errors import WireError
from edgepriv.wire import cbor
from edgepriv.wire.messages import Grant
from edgepriv.wire.transfer import CHUNK_BYTES, REF_BYTES, Incoming, chunk_count
from gateway.store import unpack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgepriv.wire.messages import Chunk, Offer
    from gateway.config import IngestSection
    from gateway.store import Store

STALLED_S = 30.0
MIN_CHUNK_BYTES = 256
FRAME, UPDATE, PARTIAL = "frame", "update", "partial"
_COLUMNS = "party, ref, what, size, chunk_bytes, digest, round, expires, meta, have, path"

Key = tuple[str, bytes]


@dataclass(slots=True)
class Transfer:
    """One open upload."""

    party: str
    ref: bytes
    what: str
    digest: bytes
    round: int
    expires: float
    meta: dict[str, Any]
    path: str
    incoming: Incoming
    resumed: bool = False
    heard: float = 0.0
    dirty: bool = False
    fd: int = field(default=-1, repr=False)

    @property
    def key(self) -> Key:
        """Party and reference."""
        return self.party, self.ref


class Transfers:
    """All open uploads."""

    def __init__(self, store: Store, limits: IngestSection) -> None:
        self._store, self._limits = store, limits
        self._open: dict[Key, Transfer] = {}
        self.load()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def open_credits(self) -> int:
        """Chunks that are granted and under way, over all transfers."""
        return sum(t.incoming.open_credits for t in self._open.values())

    def load(self) -> None:
        """Take the state from the store (at start, and after a transaction failed)."""
        fresh: dict[Key, Transfer] = {}
        for row in self._store.database.query(f"SELECT {_COLUMNS} FROM transfers"):  # noqa: S608 - fixed columns
            party, ref, what, size, chunk_bytes, digest, number, expires, meta, have, path = row
            there = (self._store.blobs / path).is_file()
            incoming = Incoming(size, chunk_bytes, have=bytes(have) if there else b"", regrant_s=self._limits.regrant_s)
            fresh[party, bytes(ref)] = Transfer(
                party, bytes(ref), what, bytes(digest), number, expires, unpack(meta), path, incoming, resumed=True
            )
        for transfer in self._open.values():
            _close(transfer)
        self._open = fresh

    def offer(self, party: str, offer: Offer, now: float) -> None:
        """Open or continue an upload; chunks are granted by `grants`.

        Raises:
            WireError: the offer is malformed or over a limit: it is refused for good.
            StoreLimitError: no room now.
        """
        key = (party, offer.ref)
        self.check(offer)
        known = self._open.get(key)
        if known and (known.incoming.chunk_bytes, known.incoming.size) != (offer.chunk_bytes, offer.size):
            self.drop(known)  # the packet limit has changed since
            known = None
        if known:
            have = known.incoming.have.to_bytes()
            known.incoming = Incoming(
                known.incoming.size, known.incoming.chunk_bytes, have=have, regrant_s=self._limits.regrant_s
            )
            known.heard = now
            return
        if not self._place_for(party, now):
            return  # the device offers again; its other uploads are under way
        self._store.reserve(offer.size)
        path = f"upload-{hashlib.sha256(party.encode() + offer.digest).hexdigest()}"
        self._store.database.execute(
            f"INSERT INTO transfers ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            (
                party, offer.ref, offer.what, offer.size, offer.chunk_bytes, offer.digest, offer.round,
                offer.expires, cbor.encode(offer.meta), b"", path,
            ),
        )  # fmt: skip
        incoming = Incoming(offer.size, offer.chunk_bytes, regrant_s=self._limits.regrant_s)
        self._open[key] = Transfer(
            party,
            offer.ref,
            offer.what,
            offer.digest,
            offer.round,
            offer.expires,
            offer.meta,
            path,
            incoming,
            heard=now,
        )

    def _place_for(self, party: str, now: float) -> bool:
        """Whether a device may open another upload; one that it let go of, as by a restart, gives way."""
        own = [transfer for (other, _), transfer in self._open.items() if other == party]
        if len(own) < self._limits.max_transfers_per_device:
            return True
        oldest = min(own, key=lambda transfer: transfer.heard)
        if now - oldest.heard < STALLED_S:
            return False
        self.drop(oldest)
        return True

    def get(self, party: str, ref: bytes) -> Transfer | None:
        """An open transfer, or None."""
        return self._open.get((party, ref))

    def check(self, offer: Offer) -> None:
        """Refuse an offer that is malformed or over a limit (WireError)."""
        limits = {FRAME: self._limits.max_frame_bytes, UPDATE: self._limits.max_update_bytes}
        limits[PARTIAL] = 2 * self._limits.max_update_bytes  # sums have 64 bits where updates have 32
        if offer.what not in limits:
            raise WireError("an offer of something unknown")
        if len(offer.digest) != 32 or offer.ref != offer.digest[:REF_BYTES]:
            raise WireError("an offer's reference is not its digest's beginning")
        if not 0 < offer.size <= limits[offer.what]:
            raise WireError(f"an offer of {offer.size} bytes is over the limit of {limits[offer.what]}")
        if not MIN_CHUNK_BYTES <= offer.chunk_bytes <= CHUNK_BYTES:
            raise WireError("an offer's chunk size is out of range")
        if chunk_count(offer.size, offer.chunk_bytes) > 1 << 20:
            raise WireError("an offer has too many chunks")

    def chunk(self, party: str, chunk: Chunk, now: float) -> tuple[Transfer, bool]:
        """Write a chunk; returns its transfer and whether it was the last one. WireError where it does not fit."""
        transfer = self._open.get((party, chunk.ref))
        if transfer is None:
            raise WireError("a chunk of no open transfer")
        new = transfer.incoming.accept(chunk.index, len(chunk.data))
        transfer.heard = now
        if not new:
            return transfer, False
        if transfer.fd < 0:
            transfer.fd = os.open(self._path(transfer), os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(transfer.fd, chunk.data, chunk.index * transfer.incoming.chunk_bytes)
        transfer.dirty = True
        return transfer, transfer.incoming.have.full

    def complete(self, transfer: Transfer, *, valid: Callable[[Path], bool] | None = None) -> Path | None:
        """Check a full transfer and make its file durable; None where it starts over.

        ``valid`` judges the staged file instead of its SHA-256: a frame's own MAC says all that a hash would.

        Raises:
            WireError: the bytes are not what was offered: refused for good, staged bytes are deleted.
        """
        path = self._path(transfer)
        if valid(path) if valid else files.sha256(path) == transfer.digest:
            _close(transfer)
            files.sync(path)
            files.sync(self._store.blobs)
            return path
        if transfer.resumed:
            transfer.resumed = False
            transfer.incoming = Incoming(
                transfer.incoming.size, transfer.incoming.chunk_bytes, regrant_s=self._limits.regrant_s
            )
            return None
        self.drop(transfer)
        raise WireError("an upload is not what its offer promised")

    def detach(self, transfer: Transfer) -> None:
        """Forget a transfer whose file now belongs to another row."""
        _close(transfer)
        self._open.pop(transfer.key, None)
        self._store.database.execute(
            "DELETE FROM transfers WHERE party = ? AND ref = ?", (transfer.party, transfer.ref)
        )

    def drop(self, transfer: Transfer) -> None:
        """Forget a transfer and its bytes."""
        self.detach(transfer)
        self._path(transfer).unlink(missing_ok=True)
        self._store.release(transfer.incoming.size)

    def drop_digest(self, party: str, digest: bytes) -> None:
        """Delete what is staged of an upload that nobody wants any more, unread."""
        if transfer := self._open.get((party, digest[:REF_BYTES])):
            self.drop(transfer)

    def grants(self, now: float) -> list[tuple[str, Grant]]:
        """Ranges that devices may send now, within the credits of all; transfers take turns."""
        live = [t for t in self._open.values() if now - t.heard < STALLED_S and not t.incoming.have.full]
        room = self._limits.total_credits - sum(t.incoming.open_credits for t in live)
        out: list[tuple[str, Grant]] = []
        for transfer in live:
            on_the_way = transfer.incoming.open_credits
            window = min(self._limits.window, on_the_way + max(room, 0))
            if on_the_way > self._limits.window // 2 and not self._late(transfer, now):
                continue
            if ranges := transfer.incoming.grant(window, now):
                room -= max(0, transfer.incoming.open_credits - on_the_way)
                out.append((transfer.party, Grant(transfer.ref, ranges)))
        return out

    def _late(self, transfer: Transfer, now: float) -> bool:
        return now - transfer.heard >= self._limits.regrant_s

    def flush(self) -> None:
        """Write the bitmaps that changed (inside the caller's transaction)."""
        for transfer in self._open.values():
            if transfer.dirty:
                self._store.database.execute(
                    "UPDATE transfers SET have = ? WHERE party = ? AND ref = ?",
                    (transfer.incoming.have.to_bytes(), transfer.party, transfer.ref),
                )
                transfer.dirty = False

    def expire(self, now: float) -> int:
        """Delete uploads that have been silent for too long; returns how many. The device offers them again."""
        for transfer in self._open.values():
            transfer.heard = transfer.heard or now
        old = [t for t in self._open.values() if now - t.heard > self._limits.transfer_expiry_s]
        for transfer in old:
            self.drop(transfer)
        return len(old)

    def close(self) -> None:
        """Close files."""
        for transfer in self._open.values():
            _close(transfer)

    def _path(self, transfer: Transfer) -> Path:
        return self._store.blobs / transfer.path


def _close(transfer: Transfer) -> None:
    if transfer.fd >= 0:
        os.close(transfer.fd)
        transfer.fd = -1
