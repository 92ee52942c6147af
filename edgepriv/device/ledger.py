"""The bit ledger: how much has been released about one scene, durable, failing closed.

Rules. A scene is what a device's frames within ``window_s`` seconds of its first one show, and also every frame that
looks like any frame that was charged to it (64-bit difference hash within ``hash_distance``): repeating a scene, or any
part of it, later does not give it a new budget. A frame may belong to several scenes; all of them are charged and each
must have room; what it looks like is remembered with every one of them. A charge and its look are on disk before the
release is allowed, so a crash can only lose budget, never give it back. Whatever goes wrong with the file refuses the
release, and so does a scene of ``max_looks`` different looks that would need another. The oldest scenes are forgotten
beyond ``max_scenes``: stated here because an attacker who can show a camera so many other scenes gets the budget of one
again. Looks are compared in memory, where one process holds what the file says.
"""

from __future__ import annotations

import math
import os
import sqlite3
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgepriv.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

HASH_SIDE = 8
DEFAULT_HASH_DISTANCE = 6
MAX_SCENES = 4096
MAX_LOOKS = 256
SCENE_ID_BYTES = 8


class TimedPixels(Protocol):
    """What the ledger needs of a frame."""

    @property
    def pixels(self) -> NDArray[Any]:
        """The picture [height, width, channels]."""

    @property
    def at(self) -> float:
        """Unix seconds of capture."""


def difference_hash(pixels: NDArray[Any]) -> int:
    """64 bits of a picture [h, w, c]: is each cell of an 8x9 raster darker than its right neighbour?

    Small changes of light, noise and position flip few bits. Cells are means of samples of at most 16 pixels a side.
    """
    rows = np.linspace(0, pixels.shape[0], HASH_SIDE + 1).astype(int)
    columns = np.linspace(0, pixels.shape[1], HASH_SIDE + 2).astype(int)
    cells = np.empty((HASH_SIDE, HASH_SIDE + 1))
    for i in range(HASH_SIDE):
        for j in range(HASH_SIDE + 1):
            block = pixels[rows[i] : max(rows[i + 1], rows[i] + 1), columns[j] : max(columns[j + 1], columns[j] + 1)]
            step_y, step_x = -(-block.shape[0] // 16), -(-block.shape[1] // 16)
            cells[i, j] = block[::step_y, ::step_x].mean() if block.size else 0.0
    bits = (cells[:, 1:] > cells[:, :-1]).reshape(-1)
    return int(np.packbits(bits).tobytes().hex(), 16)


class SceneLedger:
    """Bits released for each scene.

    Args:
        path: SQLite file of this device; only one process may use it.
        bits_per_scene: budget of one scene.
        window_s: frames closer in time than this to a scene's first one belong to it.
        hash_distance: frames whose hashes differ in at most so many of 64 bits are one scene; -1 compares no hashes.
        max_scenes: how many scenes are remembered.
        max_looks: how many different frames of one scene are remembered; beyond them its releases are refused.

    Raises:
        DataError: the file is damaged; nothing may be released until a person has looked at it.
    """

    def __init__(
        self,
        path: Path,
        *,
        bits_per_scene: float,
        window_s: float,
        hash_distance: int = DEFAULT_HASH_DISTANCE,
        max_scenes: int = MAX_SCENES,
        max_looks: int = MAX_LOOKS,
    ) -> None:
        if not (math.isfinite(bits_per_scene) and bits_per_scene > 0 and math.isfinite(window_s) and window_s >= 0):
            raise ConfigError("bits_per_scene must be above 0 and scene_window_s at least 0")
        self._budget, self._window_s = bits_per_scene, window_s
        self._distance, self._max_scenes, self._max_looks = hash_distance, max_scenes, max_looks
        self.scene_id = b""
        self.refused = 0
        try:
            self._database = _open(path)
            self._seen = _Seen(self._database)
        except (sqlite3.Error, ValueError) as error:
            raise DataError(
                f"the bit ledger {path} cannot be used: {error}",
                hint="releases stay refused; move the file away only if every remembered scene may be released again",
            ) from error

    def allow(self, frame: TimedPixels, bits: float) -> bool:
        """Charge a release of a frame to its scenes; False where one has no room or the ledger cannot be written."""
        try:
            look = difference_hash(frame.pixels)
        except ValueError:  # no picture
            self.refused += 1
            return False
        if not math.isfinite(frame.at):
            self.refused += 1
            return False
        scenes = self._seen.scenes_of(look, frame.at, self._window_s, self._distance)
        fresh = not scenes
        self.scene_id = os.urandom(SCENE_ID_BYTES) if fresh else scenes[0]
        return self._charge_all(scenes or [self.scene_id], bits, look, frame.at if fresh else None)

    def charge(self, scene_id: bytes, bits: float) -> bool:
        """Charge one scene by its id; an unknown id begins a scene. False where there is no room."""
        return self._charge_all([scene_id], bits)

    def spent(self, scene_id: bytes) -> float:
        """Bits charged to a scene so far."""
        row = self._database.execute("SELECT spent FROM scenes WHERE id = ?", (scene_id,)).fetchone()
        return float(row[0]) if row else 0.0

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _charge_all(
        self, scenes: list[bytes], bits: float, look: int | None = None, started: float | None = None
    ) -> bool:
        """Charge all scenes or none, with what the frame looks like; ``started``: of the scene that this begins."""
        if not math.isfinite(bits) or bits < 0:
            self.refused += 1
            return False
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                room = all(self.spent(scene) + bits <= self._budget + 1e-9 for scene in scenes)
                if not room or (look is not None and not all(self._look(scene, look) for scene in scenes)):
                    self._database.rollback()
                    self.refused += 1
                    return False
                for scene in scenes:
                    self._add(scene, bits, started)
                forgot = self._forget()
            if forgot or look is None:
                self._seen = _Seen(self._database)
            else:
                self._seen.add(scenes, look, started)
        except sqlite3.Error:
            self.refused += 1
            return False
        return True

    def _look(self, scene: bytes, look: int) -> bool:
        """Remember what a frame of a scene looks like; False where its looks are full."""
        key = (scene, f"{look:016x}")
        if self._database.execute("SELECT 1 FROM looks WHERE scene = ? AND hash = ?", key).fetchone():
            return True
        (count,) = self._database.execute("SELECT count(*) FROM looks WHERE scene = ?", (scene,)).fetchone()
        if count >= self._max_looks:
            return False
        self._database.execute("INSERT INTO looks (scene, hash) VALUES (?, ?)", key)
        return True

    def _add(self, scene: bytes, bits: float, started: float | None) -> None:
        self._database.execute(
            "INSERT INTO scenes (id, started, hash, spent) VALUES (?, ?, NULL, ?)"
            " ON CONFLICT (id) DO UPDATE SET spent = spent + excluded.spent",
            (scene, 0.0 if started is None else started, bits),
        )

    def _forget(self) -> bool:
        """Forget the oldest scenes; True where there were some."""
        bound = "(SELECT max(seq) FROM scenes) - ?"
        limit = (self._max_scenes,)
        self._database.execute(f"DELETE FROM looks WHERE scene IN (SELECT id FROM scenes WHERE seq <= {bound})", limit)  # noqa: S608 - fixed
        return self._database.execute(f"DELETE FROM scenes WHERE seq <= {bound}", limit).rowcount > 0  # noqa: S608 - fixed


class _Seen:
    """What the file says of scenes and looks, as arrays: which scenes does a frame belong to?"""

    def __init__(self, database: sqlite3.Connection) -> None:
        rows = database.execute("SELECT id, started FROM scenes ORDER BY seq").fetchall()
        self._ids = [bytes(scene) for scene, _ in rows]
        self._index = {scene: i for i, scene in enumerate(self._ids)}
        self._started = np.array([started for _, started in rows], np.float64)
        looks = database.execute("SELECT scene, hash FROM looks").fetchall()
        known = [(self._index[bytes(scene)], int(text, 16)) for scene, text in looks if bytes(scene) in self._index]
        self._owners = np.array([owner for owner, _ in known], np.int64)
        self._looks = np.array([look for _, look in known], np.uint64)

    def scenes_of(self, look: int, at: float, window_s: float, distance: int) -> list[bytes]:
        """Ids of the scenes that a frame belongs to, the newest first."""
        near = np.flatnonzero(np.abs(at - self._started) < window_s)
        alike = self._owners[_differing_bits(self._looks ^ np.uint64(look)) <= distance]
        return [self._ids[i] for i in sorted({*near.tolist(), *alike.tolist()}, reverse=True)]

    def add(self, scenes: list[bytes], look: int, started: float | None) -> None:
        """Take over what was just written: a look of known scenes, or of the one scene that began."""
        if started is not None:
            self._index[scenes[0]] = len(self._ids)
            self._ids.append(scenes[0])
            self._started = np.append(self._started, started)
        owners = np.array([self._index[scene] for scene in scenes], np.int64)
        missing = owners[~np.isin(owners, self._owners[self._looks == np.uint64(look)])]
        self._owners = np.append(self._owners, missing)
        self._looks = np.append(self._looks, np.full(len(missing), look, np.uint64))


def _differing_bits(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Number of bits set in each value."""
    bits = np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1)
    return np.asarray(bits.sum(axis=1), np.int64)


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, timeout=5.0)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        if database.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("quick_check failed")
        database.execute(
            "CREATE TABLE IF NOT EXISTS scenes (seq INTEGER PRIMARY KEY AUTOINCREMENT, id BLOB UNIQUE NOT NULL,"
            " started REAL NOT NULL, hash TEXT, spent REAL NOT NULL)"
        )
        database.execute(
            "CREATE TABLE IF NOT EXISTS looks (scene BLOB NOT NULL, hash TEXT NOT NULL, PRIMARY KEY (scene, hash))"
        )
        # an older release kept the first frame's hash alone, beside the scene
        database.execute("INSERT OR IGNORE INTO looks SELECT id, hash FROM scenes WHERE hash IS NOT NULL")
    except sqlite3.Error:
        database.close()
        raise
    return database
