"""What a recipient has opened, on disk, so that a gateway cannot serve an old frame as a new one.

For one epoch each counter has one frame: the same frame again is a duplicate, another under the same counter a
conflict, in any order of arrival and after any restart (`edgepriv.wire.envelope.judge`). A frame counts only after it
was verified and opened. The file names frames by digests and holds no key and no picture.
"""

from __future__ import annotations

import os
import sqlite3
from typing import TYPE_CHECKING

from edgepriv.errors import ConfigError
from edgepriv.wire.envelope import judge

if TYPE_CHECKING:
    from pathlib import Path

    from edgepriv.wire.envelope import Outcome

SCHEMA = """
CREATE TABLE IF NOT EXISTS opened (epoch BLOB, counter INTEGER, digest BLOB, PRIMARY KEY (epoch, counter)) WITHOUT ROWID
"""


class OpenedFrames:
    """The memory of one recipient.

    ``path``: its file, made where there is none (0600). ``again``: open a frame that was opened before once more; a
    conflict is refused all the same.

    Raises:
        ConfigError: the file cannot be made, or is not one of these.
    """

    def __init__(self, path: Path, *, again: bool = False) -> None:
        self.again = again
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute(SCHEMA)
        except (OSError, sqlite3.DatabaseError) as error:
            raise ConfigError(f"cannot remember opened frames in {path}: {error}", hint="name another file") from error

    def knows(self, epoch: bytes, counter: int) -> bool:
        """Whether a frame was opened under this counter."""
        query = "SELECT 1 FROM opened WHERE epoch = ? AND counter = ?"
        return self._db.execute(query, (epoch, counter)).fetchone() is not None

    def judge(self, epoch: bytes, counter: int, digest: bytes) -> Outcome:
        """Say what a frame is. ``epoch``: digest of its record; ``digest``: `Envelope.content_digest`."""
        query = "SELECT digest FROM opened WHERE epoch = ? AND counter = ?"
        row = self._db.execute(query, (epoch, counter)).fetchone()
        return judge(row[0] if row else None, digest)

    def record(self, epoch: bytes, counter: int, digest: bytes) -> None:
        """Remember a frame that was opened; durable when it returns."""
        self._db.execute("INSERT OR IGNORE INTO opened VALUES (?, ?, ?)", (epoch, counter, digest))

    def close(self) -> None:
        """Close the file."""
        self._db.close()
