"""Files that are replaced whole and survive a cut of power, and their digests; one way for every party.

Without the sync before the rename a cut of power may leave an empty file under the final name; without the sync of the
folder after it, the old file.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def replace(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Replace a file by new content: readers see the old or the new one, and the new one is on the disk on return.

    Args:
        path: the file; its folder exists.
        content: all of it.
        mode: permissions whatever the process's umask (a secret is never readable to others, not even for a moment);
            None leaves them to the umask.

    Raises:
        OSError: the folder cannot be written; the old file is untouched.
    """
    fresh = path.with_name(path.name + ".part")
    fresh.unlink(missing_ok=True)
    number = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
    with os.fdopen(number, "wb") as file:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(content)
        sync_open(file)
    rename(fresh, path)


def rename(fresh: Path, path: Path) -> None:
    """Put a synced file or folder in its place, durably."""
    fresh.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_open(file: Any) -> None:
    """Bring what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sha256(path: Path) -> bytes:
    """SHA-256 of a file, read in pieces (OSError: it cannot be read)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.digest()
