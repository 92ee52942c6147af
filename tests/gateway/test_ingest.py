"""What the gateway does with packets, over the real parts and an in-memory link."""

from __future__ import annotations

import hashlib

import pytest
from gateway_site import Device, Postgres, Recipient, Site, exchange, frame_digest

from edgepriv.cipher.cipher import open_frame
from edgepriv.errors import StorageFullError
from edgepriv.mqtt import Inbound
from edgepriv.wire.messages import Chunk, Fetch, FrameMessage


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    server = Postgres(tmp_path_factory.mktemp("postgres"))
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def site(request, tmp_path):
    settings = {}
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres")
        server.reset()
        settings = {"store": {"url_file": str(server.url_file)}}
    made = Site(tmp_path, **settings)
    yield made
    made.close()


def digest(raw):
    return hashlib.sha256(raw).digest()


def test_a_frame_an_output_and_their_record_are_stored_and_acknowledged(site):
    gateway, device = site.gateway(), Device(site)
    frame, output = device.frame(), device.seal(device.output())
    exchange(gateway, device, device.record(), output, device.seal(FrameMessage(frame)))
    assert {ack.outcome for ack in device.acks.values()} == {"stored"}
    assert set(device.acks) == {device.epoch.signed.digest, frame_digest(frame), digest(output.payload)}
    assert gateway.status(site.now)["store"]["frames"] == 1


def test_the_same_items_again_are_duplicates_and_change_nothing(site):
    gateway, device = site.gateway(), Device(site)
    frame, output = device.frame(), device.seal(device.output())
    for _ in range(3):
        exchange(gateway, device, device.record(), output, device.seal(FrameMessage(frame)))
    assert {ack.outcome for ack in device.acks.values()} == {"duplicate"}
    status = gateway.status(site.now)["store"]
    assert (status["frames"], status["outputs"]) == (1, 1)


def test_a_large_frame_arrives_in_granted_chunks(site):
    gateway, device = site.gateway(), Device(site)
    frame = device.frame(side=300)
    exchange(gateway, device, device.record(), turns=3)
    exchange(gateway, device, device.seal(device.offer(frame)), turns=60)
    assert device.acks[frame_digest(frame)].outcome == "stored"
    assert gateway.transfers.open_credits == 0
    assert len(gateway.transfers) == 0


def test_a_recipient_lists_fetches_and_opens_its_frames_and_another_sees_none(site):
    gateway, device = site.gateway(), Device(site)
    small, large = device.frame(value=1), device.frame(side=200, value=2)
    exchange(
        gateway, device, device.record(), device.seal(FrameMessage(small)), device.seal(device.offer(large)), turns=60
    )
    alice, bob = Recipient(site, "op-alice"), Recipient(site, "op-bob")
    exchange(gateway, alice, alice.record(), alice.query("frames"))
    listed = alice.reply().body["frames"]
    assert [row["digest"] for row in listed] == [frame_digest(small), frame_digest(large)]
    exchange(gateway, alice, alice.query("epoch", digest=listed[0]["epoch"]))
    record = alice.reply().body["record"]
    for row, original in zip(listed, (small, large), strict=True):
        exchange(gateway, alice, alice.seal(Fetch(row["digest"][:16], 0, 256, 4096)))
        chunks = alice.objects[row["digest"][:16]]
        fetched = b"".join(chunks[i] for i in range(len(chunks)))
        assert fetched == original
        open_frame(fetched, record, alice.identity, site.trust)
    exchange(gateway, bob, bob.record(), bob.query("frames"))
    assert bob.reply().body["frames"] == []
    exchange(gateway, bob, bob.seal(Fetch(listed[0]["digest"][:16], 0, 1, 4096)))
    assert bob.notices[-1].code == "unknown-object"
    exchange(gateway, bob, bob.query("epoch", digest=listed[0]["epoch"]))
    assert not bob.reply().ok


def test_a_restarted_device_is_answered_under_its_new_epoch_for_items_of_the_old_one(site):
    gateway, device = site.gateway(), Device(site)
    old_record, frame, output = device.record(), device.frame(), device.seal(device.output())
    device.new_epoch()  # the process started again: the keys of the old epoch are gone
    exchange(gateway, device, device.record())
    exchange(gateway, device, old_record, output, device.seal(FrameMessage(frame)))
    assert device.acks[digest(output.payload)].outcome == "stored"
    assert device.acks[frame_digest(frame)].outcome == "stored"


def test_a_restarted_gateway_knows_its_sessions_transfers_and_items(site):
    gateway, device = site.gateway(), Device(site)
    frame, output = device.frame(side=200), device.seal(device.output())
    exchange(gateway, device, device.record(), output)
    exchange(gateway, device, device.seal(device.offer(frame, chunk_bytes=1024)), turns=3)
    assert 0 < gateway.transfers.get(device.name, frame_digest(frame)[:16]).incoming.have.count < 100
    again = site.gateway()
    exchange(again, device, output)
    assert device.acks[digest(output.payload)].outcome == "duplicate"
    exchange(again, device, device.seal(device.offer(frame, chunk_bytes=1024)), turns=80)
    assert device.acks[frame_digest(frame)].outcome == "stored"


def test_a_gateway_killed_after_the_last_chunk_finishes_the_frame_when_it_is_offered_again(site):
    gateway, device = site.gateway(), Device(site)
    frame = device.frame(side=60)
    exchange(gateway, device, device.record(), device.seal(device.offer(frame, chunk_bytes=65_536)), turns=1)
    gateway.link.inbox.clear()
    transfer = gateway.transfers.get(device.name, frame_digest(frame)[:16])
    gateway.transfers.chunk(device.name, Chunk(transfer.ref, 0, frame), site.now)
    with gateway.store.batch():
        gateway.transfers.flush()
    assert transfer.incoming.have.full
    again = site.gateway()
    exchange(again, device, device.seal(device.offer(frame, chunk_bytes=65_536)))
    assert device.acks[frame_digest(frame)].outcome == "stored"


@pytest.mark.parametrize("kind", ["record", "output", "frame"])
def test_forged_moved_and_altered_packets_are_refused_and_never_acknowledged(site, kind):
    gateway, device, other = site.gateway(), Device(site), Device(site, "dev-cam2")
    packet = {
        "record": device.record(),
        "output": device.seal(device.output()),
        "frame": device.seal(FrameMessage(device.frame())),
    }[kind]
    if kind != "record":
        exchange(gateway, device, device.record())
    exchange(gateway, other, other.record())
    known = dict(device.acks)
    moved = Inbound(packet.topic.replace("dev-cam1", "dev-cam2"), packet.payload)
    exchange(gateway, other, moved)
    for index in range(0, len(packet.payload), max(1, len(packet.payload) // 40)):
        altered = bytearray(packet.payload)
        altered[index] ^= 1
        exchange(gateway, device, Inbound(packet.topic, bytes(altered)))
    exchange(gateway, device, Inbound(packet.topic, packet.payload[:-1]), Inbound(packet.topic, b""))
    assert device.acks == known
    status = gateway.status(site.now)["store"]
    assert (status["frames"], status["outputs"]) == (0, 0)
    assert sum(v for k, v in gateway.totals.items() if k.startswith("rejected_")) >= 40


def test_a_frame_of_another_devices_epoch_is_refused(site):
    gateway, device, thief = site.gateway(), Device(site), Device(site, "dev-cam2")
    exchange(gateway, device, device.record())
    frame = device.frame()
    exchange(gateway, thief, thief.record(), thief.seal(FrameMessage(frame)))
    assert thief.acks[frame_digest(frame)].outcome == "rejected"
    assert gateway.status(site.now)["store"]["frames"] == 0


def test_the_same_counter_with_another_frame_is_a_conflict(site):
    gateway, device = site.gateway(), Device(site)
    twin = Device(site)
    twin.epoch._sealer, twin.session = device.epoch._sealer, device.session
    first, second = device.frame(value=1), twin.frame(value=2)
    exchange(gateway, device, device.record(), device.seal(FrameMessage(first)), device.seal(FrameMessage(second)))
    assert device.acks[frame_digest(first)].outcome == "stored"
    assert device.acks[frame_digest(second)].outcome == "conflict"


def test_a_revoked_device_is_refused_from_the_moment_the_new_list_is_read(site):
    gateway, device = site.gateway(), Device(site)
    exchange(gateway, device, device.record())
    site.revoked = ("dev-cam1",)
    site.write_trust()
    site.now += 1
    gateway.step()
    exchange(gateway, device, device.seal(device.output()))
    assert gateway.totals["rejected_not-trusted"] == 1
    assert gateway.status(site.now)["store"]["outputs"] == 0


def test_a_record_outside_the_owners_policy_is_refused_and_its_frames_stay_at_the_device(site):
    device = Device(site)  # opened its epoch before, or does not care
    site.write_trust(policy={"*": {"profiles": ["flep3-strong"]}})
    gateway = site.gateway()
    exchange(gateway, device, device.record())
    assert not device.acks
    assert gateway.totals["rejected_not-trusted"] == 1
    assert gateway.status(site.now)["store"]["frames"] == 0


def test_a_rolled_back_or_forged_trust_list_changes_nothing(site):
    gateway = site.gateway()
    old = (site.folder / "trust.cbor").read_bytes()
    site.write_trust()
    site.now += 1
    gateway.step()
    assert gateway.roster.trust.version == 2
    for raw in (old, old[:-1] + bytes([old[-1] ^ 1]), b"", b"x" * 100):
        (site.folder / "trust.cbor").write_bytes(raw)
        site.now += 1
        gateway.step()
        assert gateway.roster.trust.version == 2
        assert gateway.roster.last_error


def test_a_full_store_is_never_acknowledged_and_takes_the_item_once_there_is_room(site):
    gateway, device = site.gateway(), Device(site)
    exchange(gateway, device, device.record())
    gateway.store.max_bytes = gateway.store.used_bytes
    frame, output = device.frame(side=60), device.seal(device.output())
    exchange(
        gateway, device, output, device.seal(FrameMessage(frame)), device.seal(device.offer(device.frame(side=200)))
    )
    assert len(device.acks) == 1
    assert device.notices[-1].code == "store-full"
    assert gateway.metrics.not_acknowledged._value.get() == 3
    gateway.store.max_bytes = 1 << 30
    exchange(gateway, device, output, device.seal(FrameMessage(frame)))
    assert device.acks[digest(output.payload)].outcome == "stored"
    assert device.acks[frame_digest(frame)].outcome == "stored"


def test_a_batch_that_cannot_be_committed_promises_nothing(site, monkeypatch):
    gateway, device = site.gateway(), Device(site)
    exchange(gateway, device, device.record())
    output = device.seal(device.output())
    database = gateway.store.database

    def full(sql, rows):
        raise StorageFullError("no space left")

    monkeypatch.setattr(database, "executemany", full)
    monkeypatch.setattr("gateway.daemon.FAILED_PAUSE_S", 0)
    exchange(gateway, device, output)
    assert digest(output.payload) not in device.acks
    assert "store" in gateway.readiness()
    monkeypatch.undo()
    assert database.query("SELECT count(*) FROM outputs") == [(0,)]
    exchange(gateway, device, output)
    assert device.acks[digest(output.payload)].outcome == "stored"
    assert not gateway.readiness()


def test_roles_cannot_do_what_is_not_theirs(site):
    gateway, device, alice = site.gateway(), Device(site), Recipient(site, "op-alice")
    exchange(gateway, device, device.record(), device.query("frames") if hasattr(device, "query") else device.record())
    exchange(
        gateway,
        alice,
        alice.record(),
        alice.seal(Device.output(device)),
        alice.seal(device.offer(b"x" * 9, what="update")),
    )
    assert gateway.totals["rejected_malformed"] == 2
    exchange(gateway, alice, alice.query("verdict", verdict=b""))
    assert not alice.reply().ok


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 0}, {"size": 1 << 40}, {"size": -1}, {"chunk_bytes": 1}, {"chunk_bytes": 1 << 20},
        {"digest": b"short"}, {"ref": bytes(16)}, {"what": "firmware"},
    ],
)  # fmt: skip
def test_an_offer_that_lies_is_refused_before_anything_is_reserved(site, changes):
    gateway, device = site.gateway(), Device(site)
    exchange(gateway, device, device.record(), device.seal(device.offer(device.frame(), **changes)))
    assert len(gateway.transfers) == 0
    assert list(gateway.store.blobs.iterdir()) == []
    assert "rejected" in {ack.outcome for ack in device.acks.values()}


def test_an_upload_that_is_not_what_was_offered_is_refused_and_deleted(site):
    gateway, device = site.gateway(), Device(site)
    frame = device.frame(side=60)
    offer = device.offer(frame)
    device.uploads[offer.ref] = (bytes(len(frame)), 4096)
    exchange(gateway, device, device.record(), device.seal(offer), turns=40)
    assert device.acks[offer.digest].outcome == "rejected"
    assert list(gateway.store.blobs.iterdir()) == []


def test_credits_of_all_devices_together_stay_within_their_bound(tmp_path):
    site = Site(tmp_path, devices=[f"d{i}" for i in range(8)], ingest={"total_credits": 20, "window": 8})
    gateway = site.gateway()
    devices = [Device(site, name) for name in site.devices]
    for device in devices:
        exchange(gateway, device, device.record(), turns=2)
    frames = {d.name: d.frame(side=150) for d in devices}
    for device in devices:
        gateway.link.inbox.append(device.seal(device.offer(frames[device.name], chunk_bytes=1024)))
    for _ in range(400):
        gateway.step()
        assert gateway.transfers.open_credits <= 20
        down, gateway.link.sent = gateway.link.sent, []
        for device in devices:
            gateway.link.inbox += device.take(down)
        if all(frame_digest(frames[d.name]) in d.acks for d in devices):
            break
    assert gateway.status(site.now)["store"]["frames"] == 8
    site.close()


def test_erased_frames_are_gone_audited_and_a_replay_of_them_is_a_duplicate(site):
    gateway, device = site.gateway(), Device(site)
    frame, large, output = device.frame(), device.frame(side=300), device.seal(device.output())
    exchange(
        gateway,
        device,
        device.record(),
        output,
        device.seal(FrameMessage(frame)),
        device.seal(device.offer(large)),
        turns=90,
    )
    site.now += 10
    counts = gateway.store.erase("dev-cam1", site.now, actor="test", now=site.now)
    assert (counts["frames"], counts["outputs"]) == (2, 1)
    assert list(gateway.store.blobs.iterdir()) == []
    assert gateway.store.database.query(
        "SELECT count(*) FROM frames WHERE envelope IS NOT NULL OR path IS NOT NULL"
    ) == [(0,)]
    assert gateway.store.database.query("SELECT action FROM audit")[-1] == ("erase",)
    exchange(gateway, device, output, device.seal(FrameMessage(frame)))
    assert device.acks[frame_digest(frame)].outcome == "duplicate"
    assert gateway.status(site.now)["store"]["frames"] == 0


def test_what_is_older_than_the_age_limit_goes_and_a_replayed_record_stays_closed(site):
    gateway, device = site.gateway(), Device(site)
    exchange(gateway, device, device.record(), device.seal(FrameMessage(device.frame())))
    site.now += 40 * 86_400
    assert gateway.store.expire(site.now - 30 * 86_400, now=site.now) == 1
    assert gateway.status(site.now)["store"] | {"bytes": 0} == {
        "bytes": 0, "limit_bytes": gateway.store.max_bytes, "frames": 0, "outputs": 0, "epochs": 0,
    }  # fmt: skip
    gateway.sessions.forget()
    site.write_trust()
    gateway.roster.reload(site.now)
    known = len(device.acks)
    exchange(gateway, device, device.record())
    assert len(device.acks) == known
    assert gateway.totals["rejected_malformed"] == 1


def test_an_upload_that_is_offered_again_in_other_chunks_starts_over(site):
    gateway, device = site.gateway(), Device(site)
    frame = device.frame(side=200)
    exchange(gateway, device, device.record(), device.seal(device.offer(frame, chunk_bytes=1024)), turns=3)
    gateway.link.inbox.clear()
    exchange(gateway, device, device.seal(device.offer(frame, chunk_bytes=2048)), turns=80)
    assert device.acks[frame_digest(frame)].outcome == "stored"
