"""What lies in the broker: however many parties want an object, only a few windows of it are on their way at once."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from gateway_site import Device, Site

from edgepriv.wire.messages import Ack, Fetch, RoundMessage
from edgepriv.wire.update import encode_update
from gateway.downlink import IDLE_S, LINGER_S, MAX_STREAMS, TURN_S

CHUNK, CHUNKS, WINDOW = 1024, 64, 16
MANY = 2 * MAX_STREAMS + 1


class Fleet:
    """A gateway with weights of `CHUNKS` chunks, and `MANY` devices; ``now`` is the clock of its downlink."""

    def __init__(self, folder):
        self.site = Site(folder, devices=[f"d{i:02d}" for i in range(MANY)])
        weights = folder / "w"
        weights.write_bytes(encode_update({"w": np.zeros(CHUNK * (CHUNKS - 1) // 4, np.float32)}))
        self.ref = hashlib.sha256(weights.read_bytes()).digest()[:16]
        self.gateway, self.now = self.site.gateway(), 0.0
        self.gateway.rounds.set_weights(weights, "m")
        self.gateway.downlink._clock = lambda: self.now
        self.devices = [Device(self.site, name) for name in self.site.devices]
        self.turn(*(d.record() for d in self.devices))

    def turn(self, *packets):
        self.gateway.link.inbox += packets
        self.gateway.step()
        down, self.gateway.link.sent = self.gateway.link.sent, []
        for device in self.devices:
            device.take(down)

    def ask(self, devices, first):
        self.turn(*(d.seal(Fetch(self.ref, first, WINDOW, CHUNK)) for d in devices))

    def chunks(self):
        return [len(device.objects.get(self.ref, {})) for device in self.devices]


@pytest.fixture
def fleet(tmp_path):
    made = Fleet(tmp_path)
    yield made
    made.site.close()


def test_only_so_many_downloads_are_served_at_a_time_and_the_others_wait_their_turn(fleet):
    fleet.ask(fleet.devices, 0)
    fleet.turn()
    assert fleet.chunks() == [WINDOW] * MAX_STREAMS + [0] * (MANY - MAX_STREAMS)
    assert fleet.gateway.downlink.waiting == MANY - MAX_STREAMS


def test_a_download_that_goes_on_keeps_its_place_and_one_that_ends_gives_it_to_the_longest_waiting(fleet):
    fleet.ask(fleet.devices, 0)
    for first in range(WINDOW, CHUNKS, WINDOW):
        fleet.now += 0.5
        fleet.ask(fleet.devices[:MAX_STREAMS], first)
    assert fleet.chunks() == [CHUNKS] * MAX_STREAMS + [0] * (MANY - MAX_STREAMS)
    fleet.now += WINDOW * LINGER_S + 0.01
    fleet.turn()
    assert fleet.chunks()[MAX_STREAMS : 2 * MAX_STREAMS] == [WINDOW] * MAX_STREAMS


def test_parties_that_stop_asking_do_not_hold_up_the_others(fleet):
    fleet.ask(fleet.devices, 0)
    for _ in range(3):
        fleet.now += IDLE_S
        fleet.turn()
    assert fleet.chunks() == [WINDOW] * MANY


def test_a_request_that_is_repeated_while_it_waits_is_served_once(fleet):
    fleet.ask(fleet.devices[: MAX_STREAMS + 1], 0)
    for _ in range(5):
        fleet.ask(fleet.devices[MAX_STREAMS : MAX_STREAMS + 1], 0)
    assert fleet.gateway.downlink.waiting == 1
    before = fleet.gateway.downlink.sent
    fleet.now += IDLE_S
    fleet.turn()
    assert fleet.gateway.downlink.sent == before + WINDOW


def test_slow_devices_give_their_places_to_those_that_wait(fleet):
    fleet.ask(fleet.devices, 0)
    slow = fleet.devices[:MAX_STREAMS]
    for _ in range(8):  # each takes its time, but never so much that it would count as gone
        fleet.now += TURN_S / 4
        fleet.ask(slow, WINDOW)
    assert min(fleet.chunks()[: 2 * MAX_STREAMS]) >= WINDOW


def test_a_message_above_the_packet_limit_is_dropped_counted_and_logged_and_holds_up_nobody(fleet, caplog):
    downlink, (one, other, *_) = fleet.gateway.downlink, fleet.devices
    fleet.gateway.link.max_packet_bytes = 16_384
    downlink.put(one.name, RoundMessage(1, "cohort", b"x" * 20_000))
    downlink.put(other.name, Ack(b"1" * 32, "stored", ""))
    fleet.turn()
    assert other.acks[b"1" * 32].outcome == "stored"
    assert (downlink.waiting, downlink.dropped, one.other) == (0, 1, [])
    assert "over the broker's limit of 16384" in caplog.text
    downlink.put(one.name, Ack(b"2" * 32, "stored", ""))
    fleet.turn()
    assert one.acks[b"2" * 32].outcome == "stored", "what comes after a dropped message is still opened"


def test_weights_that_are_deleted_while_they_are_fetched_hold_up_nobody(fleet):
    fleet.ask(fleet.devices[:1], 0)
    fleet.gateway.link.refuse = True
    fleet.gateway.downlink.close()
    fleet.ask(fleet.devices[1:2], 0)
    for path in fleet.gateway.rounds.conductor.models.iterdir():
        path.unlink()
    fleet.gateway.downlink.close()
    fleet.gateway.link.refuse = False
    for _ in range(3):
        fleet.turn()
    assert fleet.gateway.downlink.waiting == 0
