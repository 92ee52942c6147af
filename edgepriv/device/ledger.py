"""The bit ledger: how much has been released about one scene, durable, failing closed.

Rules. A scene is what a device's frames within ``window_s`` seconds show, and also every frame that looks like an
earlier one (64-bit difference hash within ``hash_distance``): repeating a scene later does not give it a new budget.
A frame may belong to several scenes; all of them are charged, and each must have room. A charge is on disk before the
release is allowed, so a crash can only lose budget, never give it back. Whatever goes wrong with the file refuses the
release. The oldest scenes are forgotten beyond ``max_scenes``: stated here because an attacker who can show a camera so
many other scenes gets the budget of one again.
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
        window_s: frames closer in time than this are one scene.
        hash_distance: frames whose hashes differ in at most so many of 64 bits are one scene; -1 compares no hashes.
        max_scenes: how many scenes are remembered.

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
    ) -> None:
        if not (math.isfinite(bits_per_scene) and bits_per_scene > 0 and math.isfinite(window_s) and window_s >= 0):
            raise ConfigError("bits_per_scene must be above 0 and scene_window_s at least 0")
        self._budget, self._window_s = bits_per_scene, window_s
        self._distance, self._max_scenes = hash_distance, max_scenes
        self.scene_id = b""
        self.refused = 0
        try:
            self._database = _open(path)
        except sqlite3.Error as error:
            raise DataError(
                f"the bit ledger {path} cannot be used: {error}",
                hint="releases stay refused; move the file away only if every remembered scene may be released again",
            ) from error

    def allow(self, frame: TimedPixels, bits: float) -> bool:
        """Charge a release of a frame to its scenes; False where one has no room or the ledger cannot be written."""
        try:
            scenes = self._scenes_of(difference_hash(frame.pixels), frame.at)
        except (sqlite3.Error, ValueError):
            self.refused += 1
            return False
        self.scene_id = scenes[0]
        return self._charge_all(scenes, bits)

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

    def _charge_all(self, scenes: list[bytes], bits: float) -> bool:
        if not math.isfinite(bits) or bits < 0:
            self.refused += 1
            return False
        try:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                if any(self.spent(scene) + bits > self._budget + 1e-9 for scene in scenes):
                    self.refused += 1
                    return False
                for scene in scenes:
                    self._database.execute(
                        "INSERT INTO scenes (id, started, hash, spent) VALUES (?, 0, NULL, ?)"
                        " ON CONFLICT (id) DO UPDATE SET spent = spent + excluded.spent",
                        (scene, bits),
                    )
        except sqlite3.Error:
            self.refused += 1
            return False
        return True

    def _scenes_of(self, fingerprint: int, at: float) -> list[bytes]:
        """Ids of all scenes that a frame belongs to, the newest first; begins one where there is none."""
        if not math.isfinite(at):
            raise ValueError("a frame without a time")
        rows = self._database.execute("SELECT id, started, hash FROM scenes ORDER BY seq DESC").fetchall()
        found = [
            scene
            for scene, started, known in rows
            if abs(at - started) < self._window_s
            or (known is not None and (int(known, 16) ^ fingerprint).bit_count() <= self._distance)
        ]
        return found or [self._begin(fingerprint, at)]

    def _begin(self, fingerprint: int, at: float) -> bytes:
        scene = os.urandom(SCENE_ID_BYTES)
        with self._database:
            self._database.execute(
                "INSERT INTO scenes (id, started, hash, spent) VALUES (?, ?, ?, 0)", (scene, at, f"{fingerprint:016x}")
            )
            self._database.execute(
                "DELETE FROM scenes WHERE seq <= (SELECT max(seq) FROM scenes) - ?", (self._max_scenes,)
            )
        return scene


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
    except sqlite3.Error:
        database.close()
        raise
    return database
