"""Many virtual devices on few broker connections, each behind a bad network of its own.

`Hub` owns real connections and hands packets to the device whose topic they name; `VirtualLink` implements the
production protocol `edgepriv.mqtt.Link` over it and loses, repeats, delays, alters and throttles packets in both
directions, by a generator of its own. A virtual device can be cut off for a while or for ever.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from typing import TYPE_CHECKING

from edgepriv.mqtt import Inbound

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgepriv.mqtt import Link
    from firmware_sim.scenario import NetworkSection

MAX_INBOX = 2000
PERIOD_S = 0.1


class Hub:
    """Real connections shared by virtual devices; a device always uses the same one."""

    def __init__(self, links: list[Link]) -> None:
        self._links = links
        self._devices: dict[str, VirtualLink] = {}

    def attach(self, name: str, link: VirtualLink) -> Link:
        """Register a device by name; returns the connection that it uses."""
        self._devices[name] = link
        return self._links[len(self._devices) % len(self._links)]

    def pump(self, now: float) -> bool:
        """Hand over what has arrived; True when there was something."""
        worked = False
        for link in self._links:
            for packet in link.receive(256):
                worked = True
                name = packet.topic.split("/")[2] if packet.topic.count("/") >= 3 else ""
                if device := self._devices.get(name):
                    device.arrive(packet, now)
        return worked


class VirtualLink:
    """One virtual device's `Link`."""

    def __init__(
        self,
        hub: Hub,
        name: str,
        faults: NetworkSection,
        *,
        seed: int,
        clock: Callable[[], float],
        bytes_per_s: float = 0,
    ) -> None:
        self._rng, self._faults, self._clock = random.Random(seed), faults, clock
        self._inbox: deque[Inbound] = deque()
        self._late: list[tuple[float, int, bool, Inbound]] = []
        self._count = 0
        self._bytes_per_s, self._budget, self._refilled = bytes_per_s, bytes_per_s, clock()
        self._cut = self._gone = False
        self._extra_generations = 0
        self.sent_bytes = 0
        self._link = hub.attach(name, self)

    # --- Link ---------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """See Link."""
        return self._link.connected and not self._cut and not self._gone

    @property
    def generation(self) -> int:
        """See Link."""
        return self._link.generation + self._extra_generations

    @property
    def max_packet_bytes(self) -> int:
        """See Link."""
        return self._link.max_packet_bytes

    def subscribe(self, topic_filter: str) -> None:
        """See Link."""
        self._link.subscribe(topic_filter)

    def send(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """See Link."""
        now = self._clock()
        if not self.connected or not self._affordable(len(payload), now):
            return False
        self.sent_bytes += len(payload)
        for packet in self._through(Inbound(topic, payload)):
            if not self._delayed(packet, now, up=True) and not self._link.send(topic, packet.payload, retain=retain):
                return False
        return True

    def receive(self, limit: int = 64) -> list[Inbound]:
        """See Link."""
        self._release(self._clock())
        return [self._inbox.popleft() for _ in range(min(limit, len(self._inbox)))]

    def close(self) -> None:
        """See Link; the shared connection stays."""
        self._gone = True

    # --- faults -------------------------------------------------------------------------------------------

    def cut(self, *, off: bool) -> None:
        """Cut this device off, or connect it again."""
        if self._cut and not off:
            self._extra_generations += 1
        self._cut = off

    def vanish(self) -> None:
        """Fall silent for ever."""
        self._gone = True

    @property
    def gone(self) -> bool:
        """Whether this device has vanished."""
        return self._gone

    def arrive(self, packet: Inbound, now: float) -> None:
        """A packet of the broker for this device."""
        if self.connected:
            for one in self._through(packet):
                if not self._delayed(one, now, up=False):
                    self._take(one)

    def _take(self, packet: Inbound) -> None:
        if len(self._inbox) < MAX_INBOX:
            self._inbox.append(packet)

    def _through(self, packet: Inbound) -> list[Inbound]:
        faults, rng = self._faults, self._rng
        copies = 2 if rng.random() < faults.duplicate else 1
        return [self._altered(packet) for _ in range(copies) if rng.random() >= faults.drop]

    def _altered(self, packet: Inbound) -> Inbound:
        if self._rng.random() >= self._faults.corrupt or not packet.payload:
            return packet
        raw = bytearray(packet.payload)
        raw[self._rng.randrange(len(raw))] ^= 1 << self._rng.randrange(8)
        return Inbound(packet.topic, bytes(raw))

    def _delayed(self, packet: Inbound, now: float, *, up: bool) -> bool:
        """Hold a packet back for a time of its own, so that packets overtake each other."""
        if self._faults.delay_s <= 0:
            return False
        self._count += 1
        heapq.heappush(self._late, (now + self._rng.random() * self._faults.delay_s, self._count, up, packet))
        return True

    def _release(self, now: float) -> None:
        while self._late and self._late[0][0] <= now:
            due, number, up, packet = heapq.heappop(self._late)
            if not up:
                self._take(packet)
            elif not self._link.send(packet.topic, packet.payload):
                heapq.heappush(self._late, (due + PERIOD_S, number, up, packet))
                return

    def _affordable(self, size: int, now: float) -> bool:
        """Slow links: bytes come back with time, up to one second's worth or one packet."""
        if self._bytes_per_s <= 0:
            return True
        most = max(self._bytes_per_s, 70_000.0)
        self._budget = min(most, self._budget + (now - self._refilled) * self._bytes_per_s)
        self._refilled = now
        if self._budget < size:
            return False
        self._budget -= size
        return True
