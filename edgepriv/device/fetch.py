"""Pulling objects from the gateway: models and global weights, in chunks, resumable, checked by SHA-256.

The device asks for ranges and so bounds the broker's queue itself. Chunks go to a file, and now and then which of them
are there goes to another, so that a download goes on after a restart; an object is handed on only when its digest is
right, otherwise it is thrown away and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepriv import files
from edgepriv.errors import WireError
from edgepriv.wire.messages import Chunk, Fetch
from edgepriv.wire.transfer import REF_BYTES, Download, chunk_bytes_for, chunk_count

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgepriv.mqtt import Link

NOTE_CHUNKS = 32  # how much of a download a restart may cost


@dataclass(slots=True)
class _Pull:
    digest: bytes
    size: int
    path: Path
    download: Download
    chunk_bytes: int


class Fetcher:
    """Downloads by digest into ``folder``; one file a digest."""

    def __init__(self, folder: Path, link: Link, send: Callable[[Fetch], bool], *, max_bytes: int) -> None:
        self._folder, self._link, self._send, self.max_bytes = folder, link, send, max_bytes
        self._pulls: dict[bytes, _Pull] = {}
        self.failed = 0
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def want(self, digest: bytes, size: int, *, max_bytes: int = 0) -> Path | None:
        """Ask for an object; its path when it is there, else None (ask again after a while).

        Args:
            digest: SHA-256 of the object.
            size: in bytes.
            max_bytes: a limit other than the fetcher's own.

        Raises:
            WireError: the announced size is over the limit.
        """
        path = self._folder / digest.hex()
        if path.is_file():
            return path
        ref = digest[:REF_BYTES]
        if ref not in self._pulls:
            limit = max_bytes or self.max_bytes
            if not 0 < size <= limit:
                raise WireError(f"an object of {size} bytes is over the limit of {limit}")
            chunk = chunk_bytes_for(self._link.max_packet_bytes)
            part = path.with_suffix(".part")
            have = _noted(part, size, chunk)
            if not have:
                part.write_bytes(b"")
            self._pulls[ref] = _Pull(digest, size, part, Download(size, chunk, have=have), chunk)
        return None

    def step(self, now: float) -> None:
        """Send the requests that are due."""
        for ref, pull in self._pulls.items():
            for first, count in pull.download.wants(now):
                if not self._send(Fetch(ref, first, count, pull.chunk_bytes)):
                    return

    def on_chunk(self, chunk: Chunk) -> None:
        """Store a chunk; unknown references and duplicates are ignored, misfits are WireErrors."""
        pull = self._pulls.get(chunk.ref)
        if pull is None or not pull.download.accept(chunk.index, len(chunk.data)):
            return
        with pull.path.open("r+b") as file:
            file.seek(chunk.index * pull.chunk_bytes)
            file.write(chunk.data)
        if pull.download.complete:
            self._finish(chunk.ref, pull)
        elif pull.download.have.count % NOTE_CHUNKS == 0:
            _note(pull)

    def _finish(self, ref: bytes, pull: _Pull) -> None:
        del self._pulls[ref]
        digest = files.sha256(pull.path)
        _notes(pull.path).unlink(missing_ok=True)
        if digest == pull.digest:
            files.sync(pull.path)
            files.rename(pull.path, pull.path.with_suffix(""))
        else:
            pull.path.unlink()
            self.failed += 1

    def drop(self, digest: bytes) -> None:
        """Ask no more for an object that is not wanted any longer."""
        pull = self._pulls.pop(digest[:REF_BYTES], None)
        if pull is not None:
            pull.path.unlink(missing_ok=True)
            _notes(pull.path).unlink(missing_ok=True)

    def discard(self, digest: bytes) -> None:
        """Delete a finished object that was used."""
        (self._folder / digest.hex()).unlink(missing_ok=True)

    def forget(self, keep: set[bytes]) -> None:
        """Delete finished objects that are not in ``keep``."""
        names = {digest.hex() for digest in keep}
        for path in self._folder.iterdir():
            if path.suffix not in {".part", ".have"} and path.name not in names:
                path.unlink(missing_ok=True)


def _notes(part: Path) -> Path:
    return part.with_suffix(".have")


def _note(pull: _Pull) -> None:
    """Write which chunks are there. What a cut of power makes wrong in it, the digest at the end finds."""
    head = f"{pull.size} {pull.chunk_bytes}\n".encode()
    fresh = pull.path.with_suffix(".have-new")
    fresh.write_bytes(head + pull.download.have.to_bytes())
    fresh.replace(_notes(pull.path))


def _noted(part: Path, size: int, chunk_bytes: int) -> bytes:
    """Chunks of an earlier process's download of the same object, or nothing."""
    try:
        head, _, bits = _notes(part).read_bytes().partition(b"\n")
    except OSError:
        return b""
    fits = head == f"{size} {chunk_bytes}".encode() and part.is_file()
    return bits if fits and len(bits) == (chunk_count(size, chunk_bytes) + 7) // 8 else b""
