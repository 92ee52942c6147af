"""Stage 5, spool: what was accepted is never forgotten; the broker is not a store.

Rules: an item stays until the gateway's own acknowledgement. SQLite in WAL mode with ``synchronous=FULL``; several
frames share one commit, because each commit is a disk sync; until it, or until somebody reads, rows wait in memory.
Large items lie in an arena file (`edgepriv.device.arena`) that is synced before the commit that makes their rows
durable. The spool is bounded in bytes and rows with a stated drop policy: ``oldest`` drops the oldest frames, then the
oldest outputs; ``refuse`` refuses new items. Epoch records are small and always taken, because a full spool cannot be
emptied without one; none is dropped before its last item. An update of a round is never dropped. Every drop is
counted. Nothing in here opens anything: frames are sealed, outputs are sealed, and the keys of both live in the memory
of the process that made them.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import sqlite3
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv.device.arena import Arena
from edgepriv.errors import ConfigError, StorageFullError, UnavailableError

if TYPE_CHECKING:
    from pathlib import Path

    from edgepriv.device.seal import SealedItem

ARENA_BYTES = 16 << 10
NO_SPACE_BYTES = 64 << 10
DROP_POLICIES = ("oldest", "refuse")
SCHEMA = """
CREATE TABLE items (
  id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, digest BLOB NOT NULL UNIQUE, epoch BLOB NOT NULL,
  size INTEGER NOT NULL, payload BLOB, place INTEGER,
  round INTEGER NOT NULL DEFAULT 0, held INTEGER NOT NULL DEFAULT 0);
CREATE INDEX items_by_epoch ON items (epoch);
CREATE INDEX items_by_kind ON items (kind, id);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
PRAGMA user_version = 1;
"""
INSERTION = """
INSERT INTO items (kind, digest, epoch, size, payload, place, round) VALUES (?,?,?,?,?,?,?)
ON CONFLICT (digest) DO NOTHING
"""
COUNT = """
INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value
"""


@dataclass(frozen=True, slots=True)
class Waiting:
    """An item's row without its bytes."""

    id: int
    kind: str
    digest: bytes
    epoch: bytes
    size: int
    round: int


class Spool:
    """The durable queue of one device."""

    def __init__(self, folder: Path, *, max_bytes: int, max_rows: int = 100_000, drop: str = "oldest") -> None:
        if drop not in DROP_POLICIES:
            raise ConfigError(f"unknown drop policy {drop!r}", hint=f"use {' or '.join(DROP_POLICIES)}")
        self.folder, self.max_bytes, self.max_rows, self.drop = folder, max_bytes, max_rows, drop
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._counted: Counter[str] = Counter()  # since the last commit, as the next three
        self._rows: deque[tuple[Any, ...]] = deque()
        self._drops: list[tuple[int]] = []
        self._next_drops: dict[str, deque[tuple[int, int | None, int]]] = {}
        self._db = self._open()
        self._forget_lost()
        self._count, self._stored = self._totals()
        self._arena = Arena(
            folder / "arena.bin", self._db.execute("SELECT place, size FROM items WHERE place IS NOT NULL").fetchall()
        )

    # --- filling ------------------------------------------------------------------------------------------

    def add(self, items: list[SealedItem]) -> None:
        """Add items to the open transaction; they are durable after `commit`.

        Raises:
            StorageFullError: no room under the policy, or the disk is full. Nothing of this call was added.
        """
        bounded = [item for item in items if item.kind != "epoch"]
        try:
            if bounded:
                self._make_room(sum(len(item.payload) for item in bounded), len(bounded))
            self._take(items)
        except (OSError, sqlite3.OperationalError) as error:
            if not _is_full(error, self.folder):
                raise
            raise StorageFullError(
                "the disk of the spool is full", hint="free space, or lower [spool] max_mb"
            ) from error

    def _take(self, items: list[SealedItem]) -> None:
        """Large bytes go to the arena at once, rows to memory until the next read or commit; all items or none."""
        mark, rows = self._arena.mark(), list[tuple[Any, ...]]()
        try:
            for item in items:
                large = len(item.payload) > ARENA_BYTES
                place, inline = (self._arena.write(item.payload), None) if large else (None, bytes(item.payload))
                rows.append((item.kind, item.digest, item.epoch, len(item.payload), inline, place, item.round))
        except BaseException:
            self._arena.undo_writes(mark)
            raise
        self._rows += rows
        self._count += len(rows)
        self._stored += sum(row[3] for row in rows)

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """What any reader asks, after all that was added and dropped before it."""
        self._write_rows()
        return self._db.execute(statement, values)

    def _write_rows(self) -> None:
        """Give SQLite what was dropped and added since the last time, in one go: it costs a third of row by row."""
        if self._drops:
            self._db.executemany("DELETE FROM items WHERE id = ?", self._drops)
            self._drops.clear()
        while self._rows:
            kind, _, _, size, _, place, _ = row = self._rows[0]
            if self._db.execute(INSERTION, row).rowcount:
                self.count(f"spooled_{kind}s")
            else:  # it was there already
                self._count, self._stored = self._count - 1, self._stored - size
                if place is not None:
                    self._arena.undo_write(place)
            self._rows.popleft()

    def _has_room(self, need: int, rows: int) -> bool:
        return self._stored + need <= self.max_bytes and self._count + rows <= self.max_rows

    def _make_room(self, need: int, rows: int) -> None:
        for kind in ("frame", "output") if self.drop == "oldest" else ():
            while not self._has_room(need, rows):
                oldest = self._oldest(kind)
                if oldest is None:
                    break
                self._drops.append(oldest[:1])
                self._let_go(*oldest[1:])
                self.count(f"dropped_{kind}s")
        if not self._has_room(need, rows):
            raise StorageFullError(
                f"the spool holds {self._stored} of {self.max_bytes} bytes and has no room",
                hint="is the gateway reachable? raise [spool] max_mb, or set drop = 'oldest'",
            )

    def _oldest(self, kind: str) -> tuple[int, int | None, int] | None:
        """Id, place and size of the oldest row of a kind; looked up for several drops at a time."""
        ahead = self._next_drops.setdefault(kind, deque())
        if not ahead:
            query = "SELECT id, place, size FROM items WHERE kind = ? ORDER BY id LIMIT 32"
            ahead.extend(self._execute(query, (kind,)).fetchall())
        return ahead.popleft() if ahead else None

    def commit(self) -> None:
        """Make everything added, removed and counted so far durable."""
        try:
            self._arena.sync()
            self._write_rows()
            if self._counted:
                self._db.executemany(COUNT, self._counted.items())
            self._db.commit()
        except (OSError, sqlite3.OperationalError) as error:
            self._db.rollback()
            self._arena.undo()
            for changes in (self._counted, self._rows, self._drops, self._next_drops):
                changes.clear()
            self._count, self._stored = self._totals()
            if not _is_full(error, self.folder):
                raise
            raise StorageFullError("the disk of the spool is full", hint="free space") from error
        self._counted.clear()
        self._arena.settle()

    # --- emptying -----------------------------------------------------------------------------------------

    def waiting(self, limit: int, *, after: int = 0) -> list[Waiting]:
        """Rows in order of arrival, without their bytes; held items are left out."""
        rows = self._execute(
            "SELECT id, kind, digest, epoch, size, round FROM items WHERE id > ? AND held = 0 AND kind != 'epoch' "
            "ORDER BY id LIMIT ?",
            (after, limit),
        )
        return [Waiting(*row) for row in rows]

    def payload(self, digest: bytes) -> bytes | None:
        """The bytes of an item, or None when it is gone."""
        row = self._execute("SELECT size FROM items WHERE digest = ?", (digest,)).fetchone()
        return None if row is None else self.read_range(digest, 0, int(row[0]))

    def read_range(self, digest: bytes, offset: int, length: int) -> bytes | None:
        """A part of an item, so that a large one never stands in memory whole."""
        row = self._execute(
            "SELECT substr(payload, ?, ?), place, size FROM items WHERE digest = ?", (offset + 1, length, digest)
        ).fetchone()
        if row is None:
            return None
        if row[1] is None:
            return bytes(row[0])
        return self._arena.read(int(row[1]) + offset, min(length, int(row[2]) - offset))

    def epoch_record(self, epoch: bytes) -> bytes | None:
        """The epoch record with this digest, or None."""
        row = self._execute("SELECT payload FROM items WHERE digest = ? AND kind = 'epoch'", (epoch,)).fetchone()
        return bytes(row[0]) if row else None

    def remove(self, digest: bytes) -> bool:
        """Forget an acknowledged item; `drop_finished_epochs` forgets records that no item needs."""
        row = self._execute("SELECT id, place, size FROM items WHERE digest = ?", (digest,)).fetchone()
        if row is None:
            return False
        self._forget(*row)
        return True

    def remove_round(self, number: int) -> None:
        """Forget the upload of a round."""
        query = "SELECT id, place, size FROM items WHERE kind = 'update' AND round = ?"
        for row in self._execute(query, (number,)).fetchall():
            self._forget(*row)

    def hold(self, digest: bytes) -> None:
        """Keep an item but stop sending it (the gateway has another one under its counter)."""
        self._execute("UPDATE items SET held = 1 WHERE digest = ?", (digest,))

    def drop_finished_epochs(self, current: bytes) -> None:
        """Forget records of past epochs that no item needs any more."""
        rows = self._execute(
            "SELECT id, place, size FROM items WHERE kind = 'epoch' AND digest != ? AND digest NOT IN "
            "(SELECT epoch FROM items WHERE kind != 'epoch')",
            (current,),
        ).fetchall()
        for row in rows:
            self._forget(*row)

    def _forget(self, row_id: int, place: int | None, size: int) -> None:
        self._next_drops.clear()  # it may be among them
        self._execute("DELETE FROM items WHERE id = ?", (row_id,))
        self._let_go(place, size)

    def _let_go(self, place: int | None, size: int) -> None:
        self._count -= 1
        self._stored -= size
        if place is not None:
            self._arena.give_back(place, size)

    # --- facts --------------------------------------------------------------------------------------------

    def _totals(self) -> tuple[int, int]:
        count, size = self._execute("SELECT count(*), coalesce(sum(size), 0) FROM items").fetchone()
        return int(count), int(size)

    @property
    def items(self) -> int:
        """Rows, epoch records included."""
        return int(self._count)

    @property
    def stored_bytes(self) -> int:
        """Payload bytes."""
        return int(self._stored)

    def pending(self) -> int:
        """Items that wait for an acknowledgement (records and held items aside)."""
        row = self._execute("SELECT count(*) FROM items WHERE kind != 'epoch' AND held = 0").fetchone()
        return int(row[0])

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter; it is durable after `commit`."""
        self._counted[name] += by

    def next_value(self, name: str) -> int:
        """Increment a counter durably at once and return its new value: for numbers that must never repeat."""
        self.count(name)
        value = self.counters()[name]
        self.commit()
        return value

    def counters(self) -> dict[str, int]:
        """All durable counters, with what the next commit adds to them."""
        return dict(Counter(dict(self._execute("SELECT name, value FROM counters"))) + self._counted)

    def close(self) -> None:
        """Commit and close."""
        with contextlib.suppress(StorageFullError):
            self.commit()
        self._db.close()
        self._arena.close()

    # --- the file -----------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        path = self.folder / "spool.db"
        try:
            return _connect(path)
        except sqlite3.OperationalError as error:  # the file may be sound: it must not be set aside
            if _is_full(error, self.folder):
                raise StorageFullError("the disk of the spool is full", hint="free space") from error
            raise UnavailableError(f"the spool {path} cannot be opened: {error}", hint="check the disk") from error
        except sqlite3.DatabaseError:
            # a damaged file is set aside for inspection; the device goes on with an empty spool
            path.rename(path.with_suffix(".damaged"))
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            db = _connect(path)
            db.execute("INSERT INTO counters VALUES ('spool_recreated', 1)")
            return db

    def _forget_lost(self) -> None:
        """Drop rows whose bytes the arena no longer has (a file system repair cut it); counted, the rest goes on."""
        arena = self.folder / "arena.bin"
        size = arena.stat().st_size if arena.is_file() else 0
        lost = self._db.execute("DELETE FROM items WHERE place IS NOT NULL AND place + size > ?", (size,)).rowcount
        if lost:
            self._db.execute(COUNT, ("damaged_frames", lost))
        self._db.commit()


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=10, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = ON")
        if db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("quick_check failed")
        if db.execute("PRAGMA user_version").fetchone()[0] == 0:
            db.executescript(SCHEMA)
    except BaseException:
        db.close()
        raise
    return db


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether an error means that the disk is full; SQLite says only "disk I/O error" for some of its files."""
    if "full" in str(error) or getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return True
    return "disk I/O error" in str(error) and shutil.disk_usage(folder).free < NO_SPACE_BYTES
