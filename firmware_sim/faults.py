"""A bad network, made on purpose: an in-memory broker whose links lose, repeat, reorder and alter packets.

`FaultyLink` implements the production protocol `edgepriv.mqtt.Link`, so the device's and the gateway's own code runs
over it unchanged. Everything is seeded and driven by the caller's clock: the same seed and calls give the same run.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepriv.mqtt import DEFAULT_MAX_PACKET_BYTES, Inbound

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Faults:
    """What the network does to each packet. ``drop``, ``duplicate``, ``corrupt``: probabilities.

    ``delay_s``: packets wait up to so long, each its own time, so that they overtake each other.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    delay_s: float = 0.0


class MemoryBroker:
    """Routes packets between its links by MQTT filters; ``taps`` see and may replace each packet (a hostile broker)."""

    def __init__(
        self,
        *,
        seed: int,
        clock: Callable[[], float],
        faults: Faults = Faults(),
        max_packet_bytes: int = DEFAULT_MAX_PACKET_BYTES,
    ) -> None:
        self.clock, self.faults, self.max_packet_bytes = clock, faults, max_packet_bytes
        self.taps: list[Callable[[Inbound], list[Inbound]]] = []
        self._rng = random.Random(seed)
        self._links: list[FaultyLink] = []
        self._waiting: list[tuple[float, int, Inbound]] = []
        self._number = 0

    def link(self, *, inbox: int = 2000) -> FaultyLink:
        """Connect one more party."""
        made = FaultyLink(self, inbox)
        self._links.append(made)
        return made

    def publish(self, packet: Inbound) -> None:
        """Take a packet; the taps, then the faults decide what becomes of it."""
        packets = [packet]
        for tap in self.taps:
            packets = [out for one in packets for out in tap(one)]
        for one in packets:
            for _ in range(2 if self._rng.random() < self.faults.duplicate else 1):
                if self._rng.random() >= self.faults.drop:
                    self._schedule(self._altered(one))
        self.deliver()

    def deliver(self) -> None:
        """Hand over what is due by the clock."""
        now = self.clock()
        while self._waiting and self._waiting[0][0] <= now:
            _, _, packet = heapq.heappop(self._waiting)
            for link in self._links:
                link.offer(packet)

    def _schedule(self, packet: Inbound) -> None:
        self._number += 1
        due = self.clock() + self._rng.random() * self.faults.delay_s
        heapq.heappush(self._waiting, (due, self._number, packet))

    def _altered(self, packet: Inbound) -> Inbound:
        if not packet.payload or self._rng.random() >= self.faults.corrupt:
            return packet
        raw = bytearray(packet.payload)
        raw[self._rng.randrange(len(raw))] ^= 1 << self._rng.randrange(8)
        return Inbound(packet.topic, bytes(raw))


class FaultyLink:
    """One party's `edgepriv.mqtt.Link` to a `MemoryBroker`."""

    def __init__(self, broker: MemoryBroker, inbox: int) -> None:
        self._broker, self._inbox_limit = broker, inbox
        self._inbox: deque[Inbound] = deque()
        self._filters: list[list[str]] = []
        self._connected, self._generation = True, 1
        self.refused = 0

    @property
    def connected(self) -> bool:
        """See Link."""
        return self._connected

    @property
    def generation(self) -> int:
        """See Link."""
        return self._generation

    @property
    def max_packet_bytes(self) -> int:
        """See Link."""
        return self._broker.max_packet_bytes

    def subscribe(self, topic_filter: str) -> None:
        """See Link."""
        levels = topic_filter.split("/")
        if levels not in self._filters:
            self._filters.append(levels)

    def send(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:  # noqa: ARG002
        """See Link."""
        if not self._connected or len(payload) > self.max_packet_bytes:
            self.refused += 1
            return False
        self._broker.publish(Inbound(topic, bytes(payload)))
        return True

    def receive(self, limit: int = 64) -> list[Inbound]:
        """See Link."""
        self._broker.deliver()
        return [self._inbox.popleft() for _ in range(min(limit, len(self._inbox)))]

    def close(self) -> None:
        """See Link."""
        self.cut()

    def cut(self) -> None:
        """Lose the connection and what was on its way here."""
        self._connected = False
        self._inbox.clear()

    def restore(self) -> None:
        """Connect again."""
        self._connected = True
        self._generation += 1

    def offer(self, packet: Inbound) -> None:
        """Take a packet of the broker where a filter matches and the inbox has room."""
        levels = packet.topic.split("/")
        wanted = any(_matches(one, levels) for one in self._filters)
        if self._connected and wanted and len(self._inbox) < self._inbox_limit:
            self._inbox.append(packet)


def _matches(levels: list[str], topic: list[str]) -> bool:
    """MQTT's rule: ``+`` is one level, a final ``#`` is any number."""
    if levels[-1:] == ["#"]:
        levels, topic = levels[:-1], topic[: len(levels) - 1]
    return len(levels) == len(topic) and all(a in {"+", b} for a, b in zip(levels, topic, strict=True))
