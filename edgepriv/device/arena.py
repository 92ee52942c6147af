"""Room for large spool items in one file whose space is used again and again.

Why: on flash and on journalling file systems, syncing data into new blocks costs several times what syncing into
blocks that the file already owns costs (measured here: 4.7 against 0.8 ms for a VGA frame). Rules: an extent is
durable after `sync`; an extent that is given back may be written again only after the caller has made its removal
durable, which `settle` says; the free list is rebuilt from the caller's rows at start, so nothing about it is stored.
"""

from __future__ import annotations

import bisect
import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

GROW_BYTES = 16 << 20
ALIGN = 4096


class Arena:
    """Extents of one file. ``used``: offsets and sizes that are in use at start."""

    def __init__(self, path: Path, used: Iterable[tuple[int, int]]) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._end = os.fstat(self._fd).st_size
        self._free: list[tuple[int, int]] = []  # (offset, size), by offset, never touching each other
        self._returned: list[tuple[int, int]] = []
        self._written: list[tuple[int, int]] = []  # since the last settle
        self._dirty = False
        at = 0
        for offset, size in sorted(used):
            if offset > at:
                self._free.append((at, offset - at))
            at = max(at, offset + _aligned(size))
        self._end = max(self._end // ALIGN * ALIGN, at)
        if self._end > at:
            self._free.append((at, self._end - at))

    def write(self, data: bytes | memoryview) -> int:
        """Write an item and return its offset; OSError when the disk is full (then nothing is taken)."""
        need = _aligned(len(data))
        offset = self._take(need)
        try:
            written = 0
            view = memoryview(data)
            while written < len(view):
                written += os.pwrite(self._fd, view[written:], offset + written)
        except OSError:
            self._give(offset, need)
            raise
        self._dirty = True
        self._written.append((offset, need))
        # the disk begins now what `sync` would otherwise wait for: Linux starts to write such pages at once
        os.posix_fadvise(self._fd, offset, need, os.POSIX_FADV_DONTNEED)
        return offset

    def read(self, offset: int, size: int) -> bytes:
        """Read a part of the file."""
        return os.pread(self._fd, size, offset)

    def sync(self) -> None:
        """Make everything written so far durable."""
        if self._dirty:
            os.fdatasync(self._fd)
            self._dirty = False

    def give_back(self, offset: int, size: int) -> None:
        """Return an extent; its bytes stay until `settle`."""
        self._returned.append((offset, _aligned(size)))

    def settle(self) -> None:
        """The removals are durable: what was given back may be written again."""
        for offset, size in self._returned:
            self._give(offset, size)
        self._returned.clear()
        self._written.clear()

    def mark(self) -> int:
        """A point to go back to by `undo_writes`."""
        return len(self._written)

    def undo_write(self, offset: int) -> None:
        """The item written at ``offset`` since the last settle belongs to no row: its room is free."""
        i = next(i for i, (place, _) in enumerate(self._written) if place == offset)
        self._give(*self._written.pop(i))

    def undo_writes(self, mark: int = 0) -> None:
        """What was written since ``mark`` belongs to no row: its room is free."""
        for offset, size in self._written[mark:]:
            self._give(offset, size)
        del self._written[mark:]

    def undo(self) -> None:
        """The transaction was undone: what was given back is in use again, what was written is not."""
        self._returned.clear()
        self.undo_writes()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            os.close(self._fd)

    def _take(self, need: int) -> int:
        fits = [(size, i) for i, (_, size) in enumerate(self._free) if size >= need]
        if not fits:
            self._grow(need)
            return self._take(need)
        size, i = min(fits)
        offset = self._free[i][0]
        if size == need:
            del self._free[i]
        else:
            self._free[i] = (offset + need, size - need)
        return offset

    def _grow(self, need: int) -> None:
        step = max(need, GROW_BYTES)
        try:
            os.posix_fallocate(self._fd, self._end, step)
        except OSError:
            step = need
            os.posix_fallocate(self._fd, self._end, step)  # a nearly full disk may still have room for this one
        offset, self._end = self._end, self._end + step
        self._give(offset, step)

    def _give(self, offset: int, size: int) -> None:
        i = bisect.bisect(self._free, (offset, size))
        if i < len(self._free) and offset + size == self._free[i][0]:
            size += self._free.pop(i)[1]
        if i and sum(self._free[i - 1]) == offset:
            offset, size = self._free[i - 1][0], self._free[i - 1][1] + size
            del self._free[i - 1]
            i -= 1
        self._free.insert(i, (offset, size))


def _aligned(size: int) -> int:
    return -(-max(size, 1) // ALIGN) * ALIGN
