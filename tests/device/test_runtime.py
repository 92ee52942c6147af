"""The device's own step and the gateway's own step over a bad network in memory."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from device_site import World, classifier
from gateway_site import Site
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgepriv.device.config import ReleaseConfig, RunConfig, SealConfig, SpoolConfig
from edgepriv.device.release import parse_policy
from edgepriv.errors import ConfigError, StorageFullError, TrustError
from edgepriv.mqtt import Inbound
from edgepriv.wire import messages, topics
from edgepriv.wire.messages import Ack, Grant
from firmware_sim.faults import Faults


def counters_of(world, name="dev-cam1"):
    found = Counter()
    for party, epoch, _ in world.stored():
        if party == name:
            found[epoch] += 1
    return found


def test_every_frame_and_output_arrives_and_the_spool_is_empty(world):
    device = world.device()
    world.run()
    assert device.counters["accepted"] == device.counters["captured"] == 10
    assert [c for _, _, c in world.stored()] == list(range(10))
    assert len(world.stored("outputs")) == 10
    assert device.counters["acked_stored"] == 20
    assert [path for path in (world.site.folder / "dev-cam1" / "spool").iterdir() if path.suffix == ".part"] == []


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 30),
    drop=st.floats(0, 0.4),
    duplicate=st.floats(0, 0.4),
    corrupt=st.floats(0, 0.2),
    delay_s=st.floats(0, 3),
    small_packets=st.booleans(),
)
def test_no_network_loses_doubles_or_alters_anything(
    tmp_path_factory, seed, drop, duplicate, corrupt, delay_s, small_packets
):
    folder = tmp_path_factory.mktemp("site")
    site = Site(folder)
    faults = Faults(drop=drop, duplicate=duplicate, corrupt=corrupt, delay_s=delay_s)
    limit = 4096 if small_packets else 262_144
    world = World(site, classifier(folder / "model"), seed=seed, faults=faults, max_packet_bytes=limit)
    for name in ("dev-cam1", "dev-cam2"):
        world.device(name, run=RunConfig(frames=4))
    world.run(turns=12_000, seconds=0.25)
    for table in ("frames", "outputs"):
        assert Counter(party for party, _, _ in world.stored(table)) == {"dev-cam1": 4, "dev-cam2": 4}
    for device in world.devices.values():
        assert device.counters["acked_rejected"] == 0
    world.close()


def test_a_full_window_of_lost_packets_is_sent_again(tmp_path):
    world = World(Site(tmp_path), classifier(tmp_path / "model"), seed=4)
    device = world.device(run=RunConfig(frames=30), spool=SpoolConfig(commit_frames=30))
    world.run(until=lambda: world.gateway.totals["status_noted"])
    world.broker.faults = Faults(drop=1.0)
    while device.capturing:
        world.turn()
    assert device.stages.spool.pending() > 32
    world.broker.faults = Faults()
    world.run(seconds=0.5)
    assert len(world.stored()) == len(world.stored("outputs")) == 30
    world.close()


def test_a_gateway_that_is_replaced_by_its_own_store_goes_on(world):
    device = world.device()
    world.run(turns=500, until=lambda: len(world.stored()) >= 3)
    world.restart_gateway()
    world.run()
    assert [c for _, _, c in world.stored()] == list(range(10))
    assert device.counters["accepted"] == 10


def test_what_a_stopped_device_left_is_sent_by_the_next_process_that_holds_no_old_key(world):
    first = world.device()
    first.stages.link.cut()
    while first.capturing:
        world.turn()
    assert first.stages.spool.pending() == 20
    first.finish()
    second = world.device(run=RunConfig(frames=3))
    world.run()
    assert sorted(counters_of(world).values()) == [3, 10]
    assert second.stages.spool.items == 2  # two epoch records; the old one goes at the next renewal
    second._renew(force=True)
    assert second.stages.spool.items == 1
    assert second.stages.sealer._epoch.signed.record.seq == 3


def test_a_reconnect_sends_again_what_was_not_acknowledged(world):
    device = world.device()
    swallow = {"on": True}
    world.broker.taps.append(lambda p: [] if swallow["on"] and p.topic.endswith("down/msg") else [p])
    for _ in range(40):
        world.turn()
    assert device.stages.spool.pending() == 20
    swallow["on"] = False
    device.stages.link.cut()
    device.stages.link.restore()
    world.run()
    assert len(world.stored()) == 10
    assert world.gateway.totals["epoch_duplicate"] >= 1


def test_forged_and_replayed_acknowledgements_remove_nothing(world):
    device = world.device()
    heard, mute = [], {"on": True}

    def tap(packet):
        if packet.topic.endswith("down/msg"):
            heard.append(packet)
            return [] if mute["on"] and len(heard) > 1 else [packet]  # the record's acknowledgement passes
        return [packet]

    world.broker.taps.append(tap)
    for _ in range(60):
        world.turn()
    waiting = [item.digest for item in device.stages.spool.waiting(100)]
    assert len(waiting) == 20
    topic, session = topics.down(device.name), device.stages.sealer.session
    forged = [
        Inbound(topic, messages.encode(Ack(waiting[0], "stored", ""))),  # not sealed at all
        Inbound(topic, session.seal(topic, messages.encode(Ack(waiting[0], "stored", "")))),  # the device's own key
        Inbound(topics.down("dev-cam2"), heard[1].payload),  # real, on another topic
        Inbound(topic, heard[1].payload[:-1] + bytes([heard[1].payload[-1] ^ 1])),
        Inbound(topic, heard[0].payload),  # real, and seen before
        Inbound(topic, b""),
    ]
    for packet in forged:
        device.stages.link.offer(packet)
    device.step()
    assert [item.digest for item in device.stages.spool.waiting(100)] == waiting
    assert device.counters["down_forged"] == 2
    assert device.counters["down_replayed"] == 1
    assert device.counters["down_malformed"] == 2
    mute["on"] = False
    world.run(seconds=0.5)
    assert len(world.stored()) == 10


def test_an_acknowledgement_of_something_else_is_counted_and_void(world):
    device = world.device()
    world.broker.taps.append(lambda p: [p] if p.topic.endswith("/epoch") else [])
    for _ in range(10):
        world.turn()
    before = device.stages.spool.pending()
    device._dispatch(Ack(bytes(32), "stored", ""), world.site.now)
    device._dispatch(Ack(b"", "stored", ""), world.site.now)
    device._dispatch(Grant(bytes(16), (0, 99)), world.site.now)
    assert device.stages.spool.pending() == before
    assert device.counters["ack_of_nothing"] == 2


def test_a_conflict_is_kept_and_not_sent_again(world):
    device = world.device()
    world.broker.taps.append(lambda p: [p] if p.topic.endswith("/epoch") else [])
    for _ in range(10):
        world.turn()
    first, *_ = device.stages.spool.waiting(100)
    items = device.stages.spool.items
    device._dispatch(Ack(first.digest, "conflict", ""), world.site.now)
    assert first.digest not in {item.digest for item in device.stages.spool.waiting(100)}
    assert device.stages.spool.items == items
    assert device.stages.spool.payload(first.digest) is not None


def test_a_new_trust_list_opens_a_new_epoch_at_the_next_frame(world):
    device = world.device(run=RunConfig(frames=6))
    world.run(turns=400, until=lambda: device.counters["captured"] >= 3)
    world.site.write_trust()
    world.run()
    assert sorted(counters_of(world).values()) == [3, 3]
    assert device.counters["epochs"] == 2


def test_epochs_end_by_count_and_by_time(world):
    device = world.device(seal=SealConfig(frames_per_epoch=4))
    world.run()
    assert sorted(counters_of(world).values()) == [2, 4, 4]
    assert device.counters["epochs"] == 3
    other = world.device("dev-cam2", seal=SealConfig(epoch_s=100.0), run=RunConfig(frames=3, interval_s=60.0))
    world.run(seconds=5)
    assert other.counters["epochs"] == 2


@pytest.mark.parametrize(
    ("release", "words"),
    [
        ({"policy": "unsafe_raw_logits", "max_bits_per_inference": 32.0}, "up to 96.0 bits an inference.* is 32"),
        ({"policy": "softmax:2", "max_bits_per_inference": 12.0}, "softmax:2 of model tiny releases up to 12.3 bits"),
        ({"bits_per_scene": 1.5}, "bits_per_scene is 1.5"),
    ],
)
def test_a_policy_that_may_say_more_than_the_limit_does_not_start(world, release, words):
    with pytest.raises(ConfigError, match=words):
        world.device(release=ReleaseConfig(**release))


def test_a_policy_within_the_limit_starts_and_a_missing_budget_is_said(world, caplog):
    device = world.device(release=ReleaseConfig(max_bits_per_inference=1.6, bits_per_scene=1.6))
    assert device.stages.ledger is not None
    assert "without a bound" not in caplog.text
    world.device("dev-cam2", release=ReleaseConfig())
    assert "no [release] bits_per_scene" in caplog.text


def test_an_inference_that_says_more_than_the_limit_is_not_released_even_where_the_start_did_not_see_it(world):
    device = world.device(release=ReleaseConfig(policy="softmax:1", max_bits_per_inference=8.0))
    device.stages.policy = parse_policy("unsafe_raw_logits")
    world.run()
    assert device.counters["refused_bits"] > 0
    assert device.counters["accepted"] == 0


def test_a_bit_budget_stops_releases_and_not_the_device(world):
    device = world.device(release=ReleaseConfig(bits_per_scene=4.0, scene_window_s=1e6))
    world.run()
    assert device.counters["refused_budget"] == 8
    assert len(world.stored("outputs")) == len(world.stored()) == 2


def test_a_full_spool_that_refuses_can_still_be_drained_after_a_restart(world):
    spool = SpoolConfig(drop="refuse", max_rows=9, commit_frames=1)
    first = world.device(spool=spool)
    first.stages.link.cut()
    while first.capturing:
        world.turn()
    assert first.counters["rejected_storage"] == 6
    assert first.counters["accepted"] == 4
    first.finish()
    second = world.device(spool=spool, run=RunConfig(frames=2, interval_s=1.0))
    world.run()
    assert max(counters_of(world).values()) == 4
    assert second.stages.spool.pending() == 0


def test_an_epoch_whose_record_could_not_be_stored_is_not_used(world):
    device = world.device(seal=SealConfig(frames_per_epoch=3))
    spool, real = device.stages.spool, device.stages.spool.add
    failed = []

    def add(items):
        if items[0].kind == "epoch" and len(failed) < 2:
            failed.append(items)
            raise StorageFullError("the disk of the spool is full")
        real(items)

    spool.add = add
    world.run()
    assert device.counters["rejected_storage"] == 2
    assert device.counters["accepted"] == 8
    assert len(world.stored()) == len(world.stored("outputs")) == 8


def test_old_items_that_the_gateway_will_never_take_do_not_hold_up_new_ones(world):
    first = world.device(run=RunConfig(frames=40))
    first.stages.link.cut()
    while first.capturing:
        world.turn()
    old = first.stages.sealer.epoch_digest
    first.finish()
    record = {"raw": b""}
    second = world.device(run=RunConfig(frames=3))
    record["raw"] = second.stages.spool.epoch_record(old)
    world.broker.taps.append(lambda p: [] if p.payload == record["raw"] else [p])
    world.run(turns=600, until=lambda: second.stages.spool.pending() == 80)
    assert len(world.stored()) == 3


def test_an_unreadable_picture_is_counted_and_the_next_frame_follows(world, tmp_path):
    import numpy as np
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes(b"\x89PNG no picture")
    device = world.device(source={"kind": "directory", "path": "pictures"}, run=RunConfig())
    (folder / "2.png").unlink()  # gone between listing and reading
    world.run()
    assert device.counters["rejected_capture"] == 2
    assert device.counters["accepted"] == 2
    assert len(world.stored()) == 2


def test_a_model_that_answers_nan_releases_nothing(site, tmp_path):
    world = World(site, classifier(tmp_path / "nan", bias=(float("nan"), 0, 0)))
    device = world.device()
    world.run()
    assert device.counters["rejected_data"] == 10
    assert world.stored() == world.stored("outputs") == []
    world.close()


def test_a_revoked_device_does_not_start(world):
    world.site.revoked = ("dev-cam1",)
    world.site.write_trust()
    with pytest.raises(TrustError):
        world.device()


def test_status_tells_the_gateway_the_counters(world):
    device = world.device()
    world.run(turns=400, until=lambda: world.gateway.totals["status_noted"] >= 1 and world.settled())
    assert dataclasses.asdict(device.status(world.site.now))["counters"]["captured"] == 10


def test_a_gateway_that_lost_its_store_is_told_the_epoch_again(world):
    device = world.device(run=RunConfig(frames=40, interval_s=1.0))
    world.run(turns=60, until=lambda: len(world.stored()) >= 2)
    publisher = device.stages.publisher
    known = device.stages.sealer.epoch_digest
    assert publisher.epoch_known(known)
    sent, world.gateway.step = world.gateway.step, lambda: None  # nobody answers any more
    for _ in range(1000):
        world.turn(0.1)
    assert not publisher.epoch_known(known), "after a long silence the record must be announced anew"
    world.gateway.step = sent
    world.run(turns=4000)
