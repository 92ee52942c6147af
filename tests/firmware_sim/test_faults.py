"""The bad network: MQTT's filters, faults by seed, and the same run again for the same seed."""

from __future__ import annotations

import pytest

from edgepriv.mqtt import Inbound
from firmware_sim.faults import Faults, MemoryBroker


def run(seed, faults, count=400):
    clock = [0.0]
    broker = MemoryBroker(seed=seed, clock=lambda: clock[0], faults=faults)
    writer, reader = broker.link(), broker.link()
    reader.subscribe("a/+/b")
    got = []
    for i in range(count):
        assert writer.send(f"a/{i}/b", i.to_bytes(2, "big"))
        clock[0] += 0.1
        got += reader.receive()
    clock[0] += 100
    while packets := reader.receive():
        got += packets
    return got


def test_a_good_network_delivers_everything_once_and_in_order():
    assert [int.from_bytes(p.payload, "big") for p in run(1, Faults())] == list(range(400))


def test_the_same_seed_gives_the_same_run():
    faults = Faults(drop=0.2, duplicate=0.2, corrupt=0.2, delay_s=1)
    assert run(3, faults) == run(3, faults)
    assert run(3, faults) != run(4, faults)


@pytest.mark.parametrize(
    ("faults", "few", "many"),
    [(Faults(drop=0.3), 240, 320), (Faults(duplicate=0.3), 480, 560), (Faults(delay_s=5), 400, 400)],
)
def test_each_fault_happens_about_as_often_as_asked(faults, few, many):
    assert few <= len(run(5, faults)) <= many


def test_delays_reorder_and_corruption_changes_one_bit():
    numbers = [int.from_bytes(p.payload, "big") for p in run(6, Faults(delay_s=5))]
    assert numbers != sorted(numbers)
    altered = [p for p in run(7, Faults(corrupt=1.0)) if int(p.topic.split("/")[1]) != int.from_bytes(p.payload, "big")]
    assert len(altered) == 400
    for packet in altered:
        wrong = int(packet.topic.split("/")[1]) ^ int.from_bytes(packet.payload, "big")
        assert wrong.bit_count() == 1


def test_a_cut_link_neither_sends_nor_receives_and_a_restored_one_counts():
    broker = MemoryBroker(seed=0, clock=lambda: 0.0, max_packet_bytes=10)
    one, two = broker.link(), broker.link(inbox=2)
    two.subscribe("x/#")
    two.cut()
    assert one.send("x", b"lost")
    assert not two.send("x", b"")
    two.restore()
    assert (two.generation, two.receive()) == (2, [])
    assert not one.send("x", bytes(11))
    for _ in range(3):
        one.send("x/y/z", b"1")
    assert two.receive() == [Inbound("x/y/z", b"1")] * 2  # the inbox is bounded


@pytest.mark.parametrize(
    ("pattern", "topic", "wanted"),
    [("a/#", "a", True), ("a/#", "a/b/c", True), ("#", "a/b", True), ("a/+", "a/b/c", False), ("+/b", "a/b", True),
     ("a/b", "a/c", False), ("a/+/#", "a", False)],
)  # fmt: skip
def test_filters_are_mqtts(pattern, topic, wanted):
    broker = MemoryBroker(seed=0, clock=lambda: 0.0)
    link = broker.link()
    link.subscribe(pattern)
    broker.publish(Inbound(topic, b""))
    assert bool(link.receive()) is wanted
