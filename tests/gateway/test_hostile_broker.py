"""A broker that drops, doubles, delays, alters, replays and moves packets: nothing is lost, doubled or believed."""

from __future__ import annotations

import hashlib
import random

import pytest
from gateway_site import Device, Site, frame_digest

from edgepriv.errors import AuthenticationError, ReplayError, WireError
from edgepriv.mqtt import Inbound
from edgepriv.wire.messages import FrameMessage


class HostileBroker:
    """Stands between parties and gateway; everything it ever saw it may send again, to anybody."""

    def __init__(self, seed):
        self.rng, self.waiting, self.seen = random.Random(seed), [], []

    def pass_on(self, packets):
        """What comes out for what goes in, this time."""
        rng = self.rng
        self.seen += packets
        self.waiting += packets
        rng.shuffle(self.waiting)
        out, kept = [], []
        for packet in self.waiting:
            fate = rng.random()
            if fate < 0.15:
                continue  # lost
            if fate < 0.35:
                kept.append(packet)  # later
                continue
            out.append(packet)
            if fate < 0.5:
                out.append(packet)
            if fate > 0.85:
                out.append(self._altered(packet))
        self.waiting = kept
        if self.seen:
            out += [self._moved(rng.choice(self.seen)) for _ in range(2)]
            out += [rng.choice(self.seen) for _ in range(2)]
        return out

    def _altered(self, packet):
        raw = bytearray(packet.payload)
        if not raw:
            return packet
        for _ in range(self.rng.randint(1, 3)):
            raw[self.rng.randrange(len(raw))] ^= 1 << self.rng.randrange(8)
        return Inbound(packet.topic, bytes(raw[: self.rng.randint(1, len(raw))] if self.rng.random() < 0.3 else raw))

    def _moved(self, packet):
        ends = (
            "dev-cam1/up/0/msg",
            "dev-cam2/up/0/msg",
            "dev-cam2/up/0/epoch",
            "dev-cam1/down/msg",
            "op-alice/up/0/msg",
        )
        return Inbound(self.rng.choice([f"edgepriv/v1/{end}" for end in ends] + [packet.topic]), packet.payload)


class Cautious(Device):
    """Counts what it refuses, as the runtime does."""

    refused = 0

    def take(self, packets):
        up = []
        for packet in packets:
            try:
                up += super().take([packet])
            except (AuthenticationError, WireError, ReplayError):
                self.refused += 1
        return up


@pytest.mark.parametrize("seed", range(4))
def test_every_item_arrives_exactly_once_and_no_acknowledgement_is_believed_that_the_gateway_did_not_make(
    tmp_path, seed
):
    site = Site(tmp_path)
    gateway, up, down = site.gateway(), HostileBroker(seed), HostileBroker(seed + 100)
    devices = [Cautious(site, name) for name in site.devices]
    items = {d.name: {} for d in devices}
    frames = set()
    for device in devices:
        for index in range(6):
            output = device.seal(device.output(label=index % 2))
            items[device.name][hashlib.sha256(output.payload).digest()] = output
            raw = device.frame(value=index)
            frames.add(frame_digest(raw))
            items[device.name][frame_digest(raw)] = raw
        large = device.frame(side=90, value=99)
        frames.add(frame_digest(large))
        items[device.name][frame_digest(large)] = device.offer(large, chunk_bytes=4096)
    wanted = {name: set(found) for name, found in items.items()}
    for _turn in range(900):
        sending = []
        for device in devices:
            record = device.record()
            if hashlib.sha256(record.payload).digest() not in device.acks:
                sending.append(record)
                continue
            for digest, item in items[device.name].items():
                if digest not in device.acks and up.rng.random() < 0.3:
                    sealed = (
                        item
                        if isinstance(item, Inbound)
                        else device.seal(FrameMessage(item) if isinstance(item, bytes) else item)
                    )
                    sending.append(sealed)
        gateway.link.inbox += up.pass_on(sending)
        gateway.step()
        answers, gateway.link.sent = gateway.link.sent, []
        answers = down.pass_on(answers)
        for device in devices:
            gateway.link.inbox += up.pass_on(device.take(answers))
        site.now += 0.5
        if all(wanted[d.name] <= d.acks.keys() for d in devices):
            break
    for device in devices:
        assert wanted[device.name] <= device.acks.keys()
        assert {ack.outcome for ack in device.acks.values()} <= {"stored", "duplicate"}
        own = wanted[device.name] | {device.epoch.signed.digest}
        assert device.acks.keys() <= own
    stored = [bytes(d) for (d,) in gateway.store.database.query("SELECT digest FROM frames")]
    assert sorted(stored) == sorted(frames)
    assert gateway.store.database.query("SELECT count(*), count(DISTINCT digest) FROM outputs") == [(12, 12)]
    gateway.ingest._windows.flush()
    assert gateway.store.database.query("SELECT sum(count) FROM windows") == [(12,)]
    assert gateway.totals["rejected_not-authentic"] > 5  # the broker did meddle, both ways
    assert devices[0].refused
    site.close()
