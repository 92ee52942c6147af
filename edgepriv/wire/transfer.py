"""Moving objects larger than a packet, in chunks, resumable at both ends: pure state, no sockets or files.

Uplink (`Outgoing` -> `Incoming`): the sender offers, the receiver grants ranges, the sender sends only what was
granted. A grant is credit and list of missing chunks at once, so the receiver bounds the broker's queue. Downlink
(`Download`): the receiver asks for ranges and so bounds the queue itself; the sender keeps no state.
Rules: sizes are refused before anything is allocated; a duplicate chunk is counted and ignored; a chunk outside the
object or of the wrong length is a WireError; an object is complete only when its SHA-256 is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepriv.errors import WireError
from edgepriv.wire.link import OVERHEAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK_BYTES = 64 << 10
PACKET_OVERHEAD_BYTES = OVERHEAD_BYTES + 21 + 256  # link header and tag, chunk header, topic and MQTT framing
REF_BYTES = 16


def chunk_bytes_for(max_packet_bytes: int) -> int:
    """The chunk size under a broker's packet limit: 64 KiB, or less where the broker allows less."""
    size = min(CHUNK_BYTES, max_packet_bytes - PACKET_OVERHEAD_BYTES)
    if size < 256:
        raise WireError(f"a packet limit of {max_packet_bytes} bytes leaves no room for chunks")
    return size


class Bitmap:
    """Which of ``n`` chunks are there."""

    __slots__ = ("_bits", "count", "n")

    def __init__(self, n: int, raw: bytes = b"") -> None:
        self.n, self._bits = n, bytearray((n + 7) // 8)
        self._bits[: len(raw)] = raw[: len(self._bits)]
        self.count = sum(byte.bit_count() for byte in self._bits)

    def add(self, index: int) -> bool:
        """Mark a chunk; False when it was there."""
        byte, bit = divmod(index, 8)
        if self._bits[byte] >> bit & 1:
            return False
        self._bits[byte] |= 1 << bit
        self.count += 1
        return True

    def __contains__(self, index: int) -> bool:
        return bool(self._bits[index // 8] >> (index % 8) & 1)

    def missing(self) -> Iterator[int]:
        """Indices that are not there, in order."""
        return (i for i in range(self.n) if i not in self)

    @property
    def full(self) -> bool:
        """Whether all are there."""
        return self.count == self.n

    def to_bytes(self) -> bytes:
        """For the store."""
        return bytes(self._bits)


def chunk_count(size: int, chunk_bytes: int) -> int:
    """Number of chunks of an object; an empty object has one empty chunk."""
    return max(1, -(-size // chunk_bytes))


def to_ranges(indices: list[int]) -> tuple[int, ...]:
    """Sorted indices as flattened pairs (first, count)."""
    flat: list[int] = []
    for index in indices:
        if flat and flat[-2] + flat[-1] == index:
            flat[-1] += 1
        else:
            flat += [index, 1]
    return tuple(flat)


def from_ranges(flat: tuple[int, ...], limit: int, *, most: int = 4096) -> list[int]:
    """Indices of flattened pairs, checked against the object's chunk count and a bound on how many."""
    if len(flat) % 2:
        raise WireError("ranges come in pairs")
    indices: list[int] = []
    for first, count in zip(flat[::2], flat[1::2], strict=True):
        if first < 0 or count < 1 or first + count > limit or len(indices) + count > most:
            raise WireError("a range lies outside the object")
        indices.extend(range(first, first + count))
    return indices


class Incoming:
    """The receiving end of an upload. Granted-but-missing chunks are granted again after ``regrant_s``."""

    def __init__(self, size: int, chunk_bytes: int, *, have: bytes = b"", regrant_s: float = 5.0) -> None:
        self.size, self.chunk_bytes, self.regrant_s = size, chunk_bytes, regrant_s
        self.have = Bitmap(chunk_count(size, chunk_bytes), have)
        self._granted: dict[int, float] = {}

    def accept(self, index: int, length: int) -> bool:
        """Check a chunk's place and length; True when it is new (then write it at ``index * chunk_bytes``)."""
        if not 0 <= index < self.have.n or length != self.length_of(index):
            raise WireError("a chunk does not fit its transfer")
        self._granted.pop(index, None)
        return self.have.add(index)

    def length_of(self, index: int) -> int:
        """Length of a chunk in bytes."""
        return min(self.chunk_bytes, self.size - index * self.chunk_bytes)

    @property
    def open_credits(self) -> int:
        """Chunks that were granted and have not arrived."""
        return len(self._granted)

    def grant(self, window: int, now: float) -> tuple[int, ...]:
        """The next ranges to grant so that at most ``window`` chunks are on their way; empty when there is nothing."""
        late = [i for i, at in self._granted.items() if now - at >= self.regrant_s]
        room = window - (len(self._granted) - len(late))
        if room <= 0:
            return ()
        chosen = sorted(late)[:room]
        for index in self.have.missing() if len(chosen) < room else ():
            if index not in self._granted:
                chosen.append(index)
                if len(chosen) >= room:
                    break
        for index in chosen:
            self._granted[index] = now
        return to_ranges(sorted(chosen))


class Download:
    """The asking end of a download: which range to ask for next, and when to ask again."""

    def __init__(
        self, size: int, chunk_bytes: int, *, have: bytes = b"", window: int = 16, retry_s: float = 3.0
    ) -> None:
        self._incoming = Incoming(size, chunk_bytes, have=have, regrant_s=retry_s)
        self.window = window

    @property
    def complete(self) -> bool:
        """Whether every chunk is there (the digest is the caller's to check)."""
        return self._incoming.have.full

    @property
    def have(self) -> Bitmap:
        """Chunks that are there."""
        return self._incoming.have

    def accept(self, index: int, length: int) -> bool:
        """As `Incoming.accept`."""
        return self._incoming.accept(index, length)

    def wants(self, now: float) -> list[tuple[int, int]]:
        """Ranges to ask for now; asks in half windows, so that the pipe never runs dry."""
        if self._incoming.open_credits > self.window // 2 and not self._late(now):
            return []
        flat = self._incoming.grant(self.window, now)
        return list(zip(flat[::2], flat[1::2], strict=True))

    def _late(self, now: float) -> bool:
        return any(now - at >= self._incoming.regrant_s for at in self._incoming._granted.values())  # noqa: SLF001
