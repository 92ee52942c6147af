"""What the gateway must not forget, in one database and one folder of large objects.

Rules: `Store.batch` is one transaction; whoever acknowledges an item does so after its batch was committed. An object
larger than `INLINE_BYTES` is a file under ``blobs/``; the file is synced before the row that names it. Inserting the
same bytes again is `DUPLICATE`, the same (epoch, counter) with other bytes is `CONFLICT`; both change nothing.
Byte limits are checked before anything is written, and what does not fit is not accepted, so nothing that was
acknowledged has to make room. Content older than the age limit goes epoch by epoch, with an audit record.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv import files
from edgepriv.errors import DataError, StorageFullError, TemporaryError, WireError
from edgepriv.wire import cbor
from gateway import schema

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgepriv.wire.epoch import SignedEpoch
    from edgepriv.wire.output import Output
    from gateway.database import Database, Row

STORED, DUPLICATE, CONFLICT = "stored", "duplicate", "conflict"
INLINE_BYTES = 256 << 10
ROW_BYTES = 512  # what a row without its content is counted as
SIZE_CHECK_EVERY = 64
MAX_META_BYTES = 1 << 20
# what a database that is away, a full disk or a broken file raise: nothing of the batch is stored, and it is done again
STORE_FAILED = (StorageFullError, TemporaryError, sqlite3.Error, OSError)


class StoreLimitError(StorageFullError):
    """A configured limit refused one item; the transaction around it goes on."""


def store_failed(error: Exception) -> bool:
    """Whether the store itself failed, which is nobody's refusal and may pass."""
    return isinstance(error, STORE_FAILED) and not isinstance(error, StoreLimitError)


@dataclass(frozen=True, slots=True)
class EpochRow:
    """A stored epoch record: ``id`` is the store's own number, ``raw`` the signed bytes (empty once closed)."""

    id: int
    epoch_id: bytes
    party: str
    seq: int
    created: int
    digest: bytes
    raw: bytes
    closed: bool


@dataclass(frozen=True, slots=True)
class FrameRow:
    """A stored envelope without its bytes; ``record`` is the digest of its epoch record."""

    id: int
    digest: bytes
    party: str
    counter: int
    size: int
    received: float
    record: bytes


_EPOCH = "SELECT id, epoch_id, party, seq, created, digest, raw, closed FROM epochs"


class Store:
    """All tables that ingest writes; other modules keep their own tables through ``database``."""

    def __init__(self, database: Database, folder: Path, *, max_bytes: int, min_free_bytes: int = 0) -> None:
        self.database, self.folder, self.max_bytes, self.min_free_bytes = database, folder, max_bytes, min_free_bytes
        self.blobs = folder / "blobs"
        self.blobs.mkdir(parents=True, exist_ok=True, mode=0o700)
        schema.migrate(database)
        self._blob_bytes = self._sum_blobs()
        self._database_bytes = database.size_bytes()
        self._since_check = 0

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Everything inside becomes durable together when the block ends."""
        before = self._blob_bytes
        try:
            with self.database.transaction():
                yield
        except BaseException:
            self._blob_bytes = before
            raise

    # --- room ---------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Bytes of blobs and database."""
        return self._blob_bytes + self._database_bytes

    def require_room(self, size: int) -> None:
        """Raise StoreLimitError where ``size`` more bytes break the byte limit or the disk's reserve."""
        self._since_check -= 1
        if self._since_check <= 0:
            self._database_bytes, self._since_check = self.database.size_bytes(), SIZE_CHECK_EVERY
        hint = "raise [store] max_bytes, erase old data, or add disk; devices keep what is not acknowledged"
        if self.used_bytes + size > self.max_bytes:
            raise StoreLimitError(f"the store holds {self.used_bytes} of {self.max_bytes} bytes", hint=hint)
        if self.min_free_bytes and shutil.disk_usage(self.folder).free - size < self.min_free_bytes:
            raise StoreLimitError("the disk of the store is nearly full", hint=hint)

    def _sum_blobs(self) -> int:
        sql = "SELECT coalesce(sum(size), 0) FROM {} WHERE path IS NOT NULL"
        total = sum(int(self.database.query(sql.format(t))[0][0]) for t in ("objects", "uploads", "transfers"))
        return total + int(self.database.query(sql.format("frames") + " AND erased = 0")[0][0])

    def reserve(self, size: int) -> None:
        """Count a staged object before its first byte is written."""
        self.require_room(size)
        self._blob_bytes += size

    def release(self, size: int) -> None:
        """Take back a reservation or the size of a deleted object."""
        self._blob_bytes = max(0, self._blob_bytes - size)

    # --- epochs -------------------------------------------------------------------------------------------

    def add_epoch(self, signed: SignedEpoch, now: float) -> str:
        """Keep an epoch record; an id that was used with other bytes is a conflict, also after it was closed."""
        record = signed.record
        if row := self.epoch(record.epoch_id):
            return DUPLICATE if row.digest == signed.digest else CONFLICT
        self.require_room(len(signed.raw))
        self.database.execute(
            "INSERT INTO epochs (epoch_id, party, seq, created, digest, raw, received) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (record.epoch_id, record.party, record.seq, record.created, signed.digest, signed.raw, now),
        )
        key = self.epoch(record.epoch_id)
        keys = {stanza[:8] for stanza in record.stanzas}
        if key and keys:
            rows = [(key.id, key_id) for key_id in keys]
            self.database.executemany("INSERT INTO epoch_recipients (epoch, key_id) VALUES (?, ?)", rows)
        return STORED

    def epoch(self, epoch_id: bytes) -> EpochRow | None:
        """The record of an epoch, or None."""
        return _epoch_row(self.database.query(f"{_EPOCH} WHERE epoch_id = ?", (epoch_id,)))

    def epoch_by_digest(self, digest: bytes) -> EpochRow | None:
        """The record with this SHA-256, or None."""
        return _epoch_row(self.database.query(f"{_EPOCH} WHERE digest = ?", (digest,)))

    def epoch_by_row(self, row: int) -> EpochRow | None:
        """The record with this number in the store, or None."""
        return _epoch_row(self.database.query(f"{_EPOCH} WHERE id = ?", (row,)))

    # --- frames -------------------------------------------------------------------------------------------

    def frame_outcome(self, epoch: int, counter: int, digest: bytes) -> str | None:
        """DUPLICATE, CONFLICT, or None where the frame is new."""
        rows = self.database.query(
            "SELECT digest FROM frames WHERE digest = ? OR (epoch = ? AND counter = ?)", (digest, epoch, counter)
        )
        if not rows:
            return None
        return DUPLICATE if any(bytes(found) == digest for (found,) in rows) else CONFLICT

    def has_frame(self, digest: bytes) -> bool:
        """Whether an envelope was accepted before (erased ones count)."""
        return bool(self.database.query("SELECT 1 FROM frames WHERE digest = ?", (digest,)))

    def add_frame(
        self,
        epoch: EpochRow,
        counter: int,
        digest: bytes,
        size: int,
        now: float,
        *,
        path: str | None,
        data: bytes | None,
    ) -> str:
        """Keep a verified envelope, inline (``data``) or as the synced file ``path`` (reserved before)."""
        if outcome := self.frame_outcome(epoch.id, counter, digest):
            return outcome
        if path is None:
            self.require_room(size + ROW_BYTES)
            self._database_bytes += size + ROW_BYTES
        self.database.execute(
            "INSERT INTO frames (digest, epoch, party, counter, size, received, path, envelope)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (digest, epoch.id, epoch.party, counter, size, now, path, data),
        )
        return STORED

    def frames_for(
        self, key_id: bytes, *, after: int = 0, limit: int = 100, party: str | None = None, since: float = 0.0
    ) -> list[FrameRow]:
        """Frames that are addressed to a recipient's key, in the order of arrival."""
        sql = (
            "SELECT f.id, f.digest, f.party, f.counter, f.size, f.received, e.digest FROM frames f"
            " JOIN epochs e ON e.id = f.epoch JOIN epoch_recipients r ON r.epoch = f.epoch"
            " WHERE r.key_id = ? AND f.id > ? AND f.erased = 0 AND f.received >= ?"
        )
        params: list[Any] = [key_id, after, since]
        if party is not None:
            sql, params = sql + " AND f.party = ?", [*params, party]
        rows = self.database.query(sql + " ORDER BY f.id LIMIT ?", (*params, limit))
        return [FrameRow(r[0], bytes(r[1]), r[2], r[3], r[4], r[5], bytes(r[6])) for r in rows]

    def frame_content(self, ref: bytes, key_id: bytes) -> tuple[bytes | Path, int] | None:
        """Bytes or file of a stored envelope whose digest begins with ``ref`` and that is addressed to ``key_id``."""
        rows = self.database.query(
            "SELECT f.path, f.envelope, f.size FROM frames f JOIN epoch_recipients r ON r.epoch = f.epoch"
            " WHERE f.digest >= ? AND f.digest <= ? AND r.key_id = ? AND f.erased = 0",
            (ref + bytes(16), ref + b"\xff" * 16, key_id),
        )
        if not rows:
            return None
        path, envelope, size = rows[0]
        return (self.blobs / path if path else bytes(envelope)), int(size)

    # --- outputs ------------------------------------------------------------------------------------------

    def add_output(self, epoch: EpochRow, digest: bytes, output: Output, now: float) -> str:
        """Keep a released output under the SHA-256 of the sealed message that brought it."""
        if self.database.query("SELECT 1 FROM outputs WHERE digest = ?", (digest,)):
            return DUPLICATE
        body = cbor.encode({"decimals": output.decimals, "scene": output.scene, "values": list(output.values)})
        self.require_room(len(body) + ROW_BYTES)
        self._database_bytes += len(body) + ROW_BYTES
        self.database.execute(
            "INSERT INTO outputs (digest, epoch, party, counter, at, model, model_digest, task, policy, bits, body,"
            " received) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                digest, epoch.id, epoch.party, output.counter, output.at, output.model, output.model_digest,
                output.task, output.policy, output.bits, body, now,
            ),
        )  # fmt: skip
        return STORED

    # --- forgetting ---------------------------------------------------------------------------------------

    def erase(self, party: str, before: float, *, actor: str, now: float) -> dict[str, int]:
        """Delete a device's frames, outputs and windows received before a time; tombstones and an audit row stay."""
        with self.batch():
            paths = self.database.query(
                "SELECT path, size FROM frames WHERE party = ? AND received < ? AND erased = 0", (party, before)
            )
            frames = self._blank("frames", "envelope", "party = ? AND received < ?", (party, before))
            outputs = self._blank("outputs", "body", "party = ? AND received < ?", (party, before))
            windows = self.database.execute(
                "DELETE FROM windows WHERE party = ? AND start + seconds <= ?", (party, int(before))
            )
            self.database.execute(
                "DELETE FROM model_windows WHERE party = ? AND start + 3600 <= ?", (party, int(before))
            )
            counts = {"frames": frames, "outputs": outputs, "windows": windows}
            self.audit(actor, "erase", {"device": party, "before": before, **counts}, now)
        self._unlink(paths)
        return counts

    def expire(self, older_than: float, *, now: float) -> int:
        """Close epochs whose last item came before ``older_than``; content and tombstones go, the id stays."""
        rows = self.database.query(
            "SELECT id FROM epochs WHERE closed = 0 AND received < ?"
            " AND NOT EXISTS (SELECT 1 FROM frames f WHERE f.epoch = epochs.id AND f.received >= ?)"
            " AND NOT EXISTS (SELECT 1 FROM outputs o WHERE o.epoch = epochs.id AND o.received >= ?) LIMIT 200",
            (older_than, older_than, older_than),
        )
        if not rows:
            return 0
        paths: list[Row] = []
        with self.batch():
            for (epoch,) in rows:
                paths += self.database.query("SELECT path, size FROM frames WHERE epoch = ? AND erased = 0", (epoch,))
                for table in ("frames", "outputs", "epoch_recipients"):
                    self.database.execute(f"DELETE FROM {table} WHERE epoch = ?", (epoch,))  # noqa: S608 - fixed names
                self.database.execute("UPDATE epochs SET raw = NULL, closed = 1 WHERE id = ?", (epoch,))
            for table in ("windows", "model_windows"):
                self.database.execute(f"DELETE FROM {table} WHERE start < ?", (int(older_than),))  # noqa: S608 - as above
            self.audit("gateway", "expire", {"epochs": len(rows), "frames": len(paths)}, now)
        self._unlink(paths)
        return len(rows)

    def _blank(self, table: str, column: str, where: str, params: tuple[Any, ...]) -> int:
        extra = ", path = NULL" if table == "frames" else ""
        return self.database.execute(
            f"UPDATE {table} SET {column} = NULL{extra}, erased = 1 WHERE {where} AND erased = 0",  # noqa: S608
            params,
        )

    def _unlink(self, rows: list[Row]) -> None:
        for path, size in rows:
            if path:
                (self.blobs / path).unlink(missing_ok=True)
                self.release(int(size))

    def sweep(self) -> int:
        """Delete files that no row names (left by a crash between file and row); returns how many."""
        known = {
            str(path)
            for table in ("frames", "transfers", "objects", "uploads")
            for (path,) in self.database.query(f"SELECT path FROM {table} WHERE path IS NOT NULL")  # noqa: S608
        }
        orphans = [file for file in self.blobs.iterdir() if file.name not in known]
        for file in orphans:
            file.unlink(missing_ok=True)
        return len(orphans)

    # --- small things -------------------------------------------------------------------------------------

    def audit(self, actor: str, action: str, detail: dict[str, Any], now: float) -> None:
        """Append to the audit log."""
        self.database.execute(
            "INSERT INTO audit (at, actor, action, detail) VALUES (?, ?, ?, ?)",
            (now, actor, action, cbor.encode(detail)),
        )

    def meta(self, name: str) -> Any:
        """A small named value, or None."""
        rows = self.database.query("SELECT value FROM meta WHERE name = ?", (name,))
        return cbor.decode(bytes(rows[0][0]), max_bytes=MAX_META_BYTES) if rows else None

    def set_meta(self, name: str, value: Any) -> None:
        """Keep a small named value."""
        self.database.execute(
            "INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (name, cbor.encode(value)),
        )

    def add_object(self, path: Path, *, kind: str, name: str, meta: dict[str, Any], now: float) -> bytes:
        """Copy a file into the store so that parties can fetch it; returns its SHA-256.

        Raises:
            DataError: an object with these bytes is here already; it stays as it is.
        """
        size = path.stat().st_size
        digest = files.sha256(path)
        if found := self.database.query("SELECT kind, name FROM objects WHERE ref = ?", (digest[:16],)):
            raise DataError(f"these bytes are here already, as the {found[0][0]} {found[0][1]}")
        self.reserve(size)
        target = self.blobs / f"object-{digest.hex()}"
        temporary = target.with_suffix(".part")
        shutil.copyfile(path, temporary)
        files.sync(temporary)
        files.rename(temporary, target)
        with self.batch():
            self.database.execute(
                "INSERT INTO objects (ref, digest, kind, name, size, path, added, meta)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (digest[:16], digest, kind, name, size, target.name, now, cbor.encode(meta)),
            )
        return digest

    def drop_object(self, ref: bytes) -> None:
        """Delete an object that nobody shall fetch any more."""
        rows = self.database.query("SELECT path, size FROM objects WHERE ref = ?", (ref,))
        self.database.execute("DELETE FROM objects WHERE ref = ?", (ref,))
        self._unlink(rows)

    def object_content(self, ref: bytes, *kinds: str) -> tuple[Path, int] | None:
        """File and size of an object of one of the kinds, or None."""
        rows = self.database.query("SELECT path, size, kind FROM objects WHERE ref = ?", (ref,))
        if not rows or rows[0][2] not in kinds:
            return None
        return self.blobs / rows[0][0], int(rows[0][1])


def _epoch_row(rows: list[Row]) -> EpochRow | None:
    if not rows:
        return None
    key, epoch_id, party, seq, created, digest, raw, closed = rows[0]
    return EpochRow(key, bytes(epoch_id), party, seq, created, bytes(digest), bytes(raw or b""), bool(closed))


def unpack(raw: bytes | None) -> Any:
    """Decode a CBOR column, or return an empty map where there is none."""
    try:
        return cbor.decode(bytes(raw), max_bytes=MAX_META_BYTES) if raw else {}
    except WireError:
        return {}
