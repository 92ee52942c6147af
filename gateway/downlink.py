"""What goes back to the parties: acknowledgements and grants first, then the chunks that they asked for.

Rules: a message is sealed when it leaves, under the party's current session. The queue is bounded; what does not fit
is dropped and counted, because every party repeats what it still waits for. Chunks are made when there is room on the
link, so a fetch of any size costs one row here. Requests of several parties take turns.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv.wire import messages, topics
from edgepriv.wire.messages import Chunk, Fetch
from edgepriv.wire.transfer import PACKET_OVERHEAD_BYTES, chunk_count

if TYPE_CHECKING:
    from pathlib import Path

    from edgepriv.mqtt import Link
    from gateway.sessions import Sessions

MAX_QUEUED = 20_000
MAX_FETCH_CHUNKS = 256
MAX_FETCHES_PER_PARTY = 8
MAX_OPEN_FILES = 32


@dataclass(slots=True)
class _Serving:
    content: bytes | Path
    size: int
    ref: bytes
    chunk_bytes: int
    following: int
    end: int


class Downlink:
    """Queue and sender of everything that the gateway says."""

    def __init__(self, link: Link, sessions: Sessions) -> None:
        self._link, self._sessions = link, sessions
        self._queue: deque[tuple[str, Any]] = deque()
        self._ready: tuple[str, bytes] | None = None
        self._serving: OrderedDict[tuple[str, bytes, int], _Serving] = OrderedDict()
        self._files: OrderedDict[Path, Any] = OrderedDict()
        self.dropped = 0
        self.sent = 0

    @property
    def waiting(self) -> int:
        """Messages and fetches that wait to be sent."""
        return len(self._queue) + len(self._serving) + (self._ready is not None)

    def put(self, party: str, message: Any) -> None:
        """Queue a message for a party."""
        if len(self._queue) >= MAX_QUEUED:
            self._queue.popleft()
            self.dropped += 1
        self._queue.append((party, message))

    def serve(self, party: str, fetch: Fetch, content: bytes | Path, size: int) -> bool:
        """Begin to send the chunks of a fetch; False where the request does not fit the object or the limits."""
        limit = min(65_536, self._link.max_packet_bytes - PACKET_OVERHEAD_BYTES)
        if not 256 <= fetch.chunk_bytes <= limit or not 0 < fetch.count <= MAX_FETCH_CHUNKS:
            return False
        chunks = chunk_count(size, fetch.chunk_bytes)
        if not 0 <= fetch.first < chunks:
            return False
        key = (party, fetch.ref, fetch.first)
        if key not in self._serving and sum(k[0] == party for k in self._serving) >= MAX_FETCHES_PER_PARTY:
            return False
        end = min(chunks, fetch.first + fetch.count)
        self._serving[key] = _Serving(content, size, fetch.ref, fetch.chunk_bytes, fetch.first, end)
        return True

    def pump(self) -> int:
        """Send what the link takes now; returns the number of packets."""
        before = self.sent
        while self._link.connected:
            if self._ready is None:
                self._ready = self._next()
            if self._ready is None or not self._link.send(*self._ready):
                break
            self._ready = None
            self.sent += 1
        return self.sent - before

    def _next(self) -> tuple[str, bytes] | None:
        while self._queue:
            if sealed := self._seal(*self._queue.popleft()):
                return sealed
        while self._serving:
            key, serving = next(iter(self._serving.items()))
            chunk = Chunk(serving.ref, serving.following, self._read(serving))
            serving.following += 1
            self._serving.move_to_end(key)
            if serving.following >= serving.end:
                del self._serving[key]
            if sealed := self._seal(key[0], chunk):
                return sealed
            self._serving.pop(key, None)
        return None

    def _seal(self, party: str, message: Any) -> tuple[str, bytes] | None:
        session = self._sessions.current(party)
        if session is None:
            self.dropped += 1
            return None
        topic = topics.down(party)
        return topic, session.link.seal(topic, messages.encode(message))

    def _read(self, serving: _Serving) -> bytes:
        offset = serving.following * serving.chunk_bytes
        if isinstance(serving.content, bytes):
            return serving.content[offset : offset + serving.chunk_bytes]
        file = self._files.get(serving.content)
        if file is None:
            file = self._files[serving.content] = serving.content.open("rb")
            while len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        file.seek(offset)
        return bytes(file.read(min(serving.chunk_bytes, serving.size - offset)))

    def close(self) -> None:
        """Close files."""
        while self._files:
            self._files.popitem()[1].close()
