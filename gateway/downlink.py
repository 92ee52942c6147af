"""What goes back to the parties: acknowledgements and grants first, then the chunks that they asked for.

Rules: a message is sealed when it leaves, under the party's current session. The queue is bounded; what does not fit
is dropped and counted, because every party repeats what it still waits for; a message that is larger than the broker's
packets is dropped likewise and logged, and holds up nobody. Chunks are made when there is room on the
link, so a fetch of any size costs one row here. Requests of several parties take turns, and only ``MAX_STREAMS``
downloads are served at a time: what a party has not taken yet lies in the broker's memory, so the broker's queue is
bounded by ``MAX_STREAMS`` windows however many devices want the same weights. A download gives its place back shortly
after its last chunk, when nothing was asked of it for ``IDLE_S``, or, where others wait, after ``TURN_S``, so that slow
devices do not hold up the rest; the others wait in the order in which they asked.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv.wire import messages, topics
from edgepriv.wire.messages import Chunk, Fetch
from edgepriv.wire.transfer import PACKET_OVERHEAD_BYTES, chunk_count

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgepriv.mqtt import Link
    from gateway.sessions import Sessions

log = logging.getLogger("gateway.downlink")
MAX_QUEUED = 20_000
MAX_FETCH_CHUNKS = 256
MAX_FETCHES_PER_PARTY = 8
MAX_OPEN_FILES = 32
MAX_STREAMS = 4
IDLE_S = 2.0
TURN_S = 5.0
LINGER_S = 0.01  # for each chunk of a download's last fetch

Stream = tuple[str, bytes]


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

    def __init__(self, link: Link, sessions: Sessions, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._link, self._sessions, self._clock = link, sessions, clock
        self._queue: deque[tuple[str, Any]] = deque()
        self._ready: tuple[str, bytes] | None = None
        self._serving: OrderedDict[tuple[str, bytes, int], _Serving] = OrderedDict()
        self._parked: OrderedDict[tuple[str, bytes, int], _Serving] = OrderedDict()
        self._streams: dict[Stream, float] = {}  # downloads that are served now, and when they last moved
        self._since: dict[Stream, float] = {}  # and since when they are
        self._files: OrderedDict[Path, Any] = OrderedDict()
        self.dropped = 0
        self.sent = 0

    @property
    def waiting(self) -> int:
        """Messages and fetches that wait to be sent."""
        return len(self._queue) + len(self._serving) + len(self._parked) + (self._ready is not None)

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
        known = key in self._serving or key in self._parked
        if not known and sum(k[0] == party for k in (*self._serving, *self._parked)) >= MAX_FETCHES_PER_PARTY:
            return False
        end = min(chunks, fetch.first + fetch.count)
        where = self._serving if self._admit((party, fetch.ref)) else self._parked
        where[key] = _Serving(content, size, fetch.ref, fetch.chunk_bytes, fetch.first, end)
        return True

    def _admit(self, stream: Stream) -> bool:
        """Whether a download has, or gets, one of the places."""
        now = self._clock()
        if stream in self._streams and self._parked and now - self._since[stream] >= TURN_S:
            self._drop_stream(stream)  # its turn is over; it waits behind those that wait already
            return False
        if stream not in self._streams:
            if len(self._streams) >= MAX_STREAMS:
                return False
            self._since[stream] = now
        self._streams[stream] = now
        return True

    def _drop_stream(self, stream: Stream) -> None:
        del self._streams[stream], self._since[stream]

    def _leave(self, stream: Stream, chunks: int) -> None:
        """All of a download is at the broker: its place is free when the last chunks can have left there."""
        if stream in self._streams:
            self._streams[stream] = self._clock() - IDLE_S + chunks * LINGER_S

    def _unpark(self) -> None:
        """Give places that are free, or whose download stands still, to those that wait longest."""
        if not self._parked:
            return
        now, busy = self._clock(), {key[:2] for key in self._serving}
        for stream, moved in list(self._streams.items()):
            if stream not in busy and now - moved >= IDLE_S:
                self._drop_stream(stream)
        for key in list(self._parked):
            if not self._admit(key[:2]):
                return
            self._serving[key] = self._parked.pop(key)

    def pump(self) -> int:
        """Send what the link takes now; returns the number of packets."""
        before = self.sent
        while self._link.connected:
            if self._ready is None:
                self._ready = self._next()
            if self._ready is not None and len(self._ready[1]) > self._link.max_packet_bytes:
                self._drop_ready(*self._ready)
                continue
            if self._ready is None or not self._link.send(*self._ready):
                break
            self._ready = None
            self.sent += 1
        return self.sent - before

    def _drop_ready(self, topic: str, payload: bytes) -> None:
        limit = self._link.max_packet_bytes
        log.error("a message of %d bytes for %s is over the broker's limit of %d", len(payload), topic, limit)
        self._ready = None
        self.dropped += 1

    def _next(self) -> tuple[str, bytes] | None:
        while self._queue:
            if sealed := self._seal(*self._queue.popleft()):
                return sealed
        self._unpark()
        while self._serving:
            key, serving = next(iter(self._serving.items()))
            try:
                chunk = Chunk(serving.ref, serving.following, self._read(serving))
            except OSError as error:  # deleted since: weights of a round long past
                log.warning("cannot read what %s fetches: %s", key[0], error)
                del self._serving[key]
                self.dropped += 1
                continue
            serving.following += 1
            self._serving.move_to_end(key)
            if key[:2] in self._streams:
                self._streams[key[:2]] = self._clock()
            if serving.following >= serving.end:
                del self._serving[key]
                if serving.end == chunk_count(serving.size, serving.chunk_bytes):
                    self._leave(key[:2], serving.end - key[2])
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
