"""Publishing: bounded windows, chunks only as granted, and nothing before its epoch record."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from gateway_site import Device, MemoryLink, Site

from edgepriv.device.fetch import Fetcher
from edgepriv.device.publish import FAILED_BACKOFF_S, MAX_UPLOADS, RESEND_S, WINDOW_BYTES, WINDOW_ITEMS, Publisher
from edgepriv.device.seal import SealedItem
from edgepriv.device.spool import Spool
from edgepriv.errors import WireError
from edgepriv.wire import envelope, messages
from edgepriv.wire.link import LinkSession
from edgepriv.wire.messages import Ack, Chunk, FrameMessage, Grant, Offer
from edgepriv.wire.transfer import chunk_count


class Bench:
    """A publisher over two lists; `sent` opens what left as the gateway would."""

    def __init__(self, folder, max_packet_bytes=262_144):
        self.site = Site(folder)
        self.device = Device(self.site)
        self.spool = Spool(folder / "spool", max_bytes=1 << 30)
        self.link = MemoryLink(max_packet_bytes)
        self.record = self.device.epoch.signed
        self.put("epoch", self.record.digest, self.record.raw)
        self.publisher = Publisher(
            self.spool, self.link, lambda: self.device.session, party="dev-cam1", shard=0,
            meta=lambda number: {"examples": number},
        )  # fmt: skip
        key = self.device.session._k_link
        self.gateway = LinkSession(key, self.device.session.epoch_id, "dev-cam1", side="gateway")

    def put(self, kind, digest, raw, number=0):
        self.spool.add([SealedItem(kind, digest, self.record.digest, raw, number)])

    def frame(self, side=12, value=0):
        raw = self.device.frame(side=side, value=value)
        digest = envelope.parse(raw).digest()
        self.put("frame", digest, raw)
        return digest, raw

    def output(self):
        packet = self.device.seal(self.device.output())
        self.put("output", hashlib.sha256(packet.payload).digest(), packet.payload)
        return packet.payload

    def known(self):
        self.publisher.on_ack(Ack(self.record.digest, "stored", ""))

    def sent(self, now):
        self.publisher.step(self.record.digest, now)
        packets, self.link.sent = self.link.sent, []
        return [
            p.payload if p.topic.endswith("/epoch") else messages.decode(self.gateway.open(p.topic, p.payload))
            for p in packets
        ]


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    made.spool.close()


def test_nothing_leaves_before_the_record_is_acknowledged(bench):
    bench.frame()
    assert bench.sent(0.0) == [bench.record.raw]
    assert bench.sent(1.0) == []
    assert bench.sent(RESEND_S + 1) == [bench.record.raw]
    bench.publisher.on_ack(Ack(bench.record.digest, "rejected", "no"))
    assert not bench.publisher.epoch_known(bench.record.digest)
    assert bench.sent(2 * RESEND_S + 2) == []
    assert bench.sent(RESEND_S + FAILED_BACKOFF_S + RESEND_S + 2) == [bench.record.raw]
    bench.known()
    assert [type(m) for m in bench.sent(100.0)] == [FrameMessage]
    assert bench.spool.epoch_record(bench.record.digest)  # an acknowledged record stays while it is needed


def test_the_window_is_bounded_in_items_and_moves_with_acknowledgements(bench):
    raws = [bench.output() for _ in range(WINDOW_ITEMS + 10)]
    bench.known()
    assert len(bench.sent(0.0)) == WINDOW_ITEMS
    assert bench.sent(1.0) == []
    for raw in raws[:3]:
        assert bench.publisher.on_ack(Ack(hashlib.sha256(raw).digest(), "stored", "")) == "stored"
    assert len(bench.sent(2.0)) == 3
    assert len(bench.sent(RESEND_S + 0.5)) == WINDOW_ITEMS - 3  # those of second 0 again: their answers were lost
    assert bench.spool.pending() == WINDOW_ITEMS + 7


def test_the_window_is_bounded_in_bytes(bench):
    for value in range(30):
        bench.frame(side=270, value=value)  # about 219 kB each: they fit one packet
    bench.known()
    sent = bench.sent(0.0)
    assert {type(m) for m in sent} == {FrameMessage}
    assert sum(len(m.envelope) for m in sent) <= WINDOW_BYTES
    assert len(sent) == WINDOW_BYTES // (270 * 270 * 3 + 500)


def test_what_the_spool_dropped_does_not_fill_the_window_for_ever(bench):
    raws = [bench.output() for _ in range(WINDOW_ITEMS)]
    bench.known()
    assert len(bench.sent(0.0)) == WINDOW_ITEMS
    for raw in raws:
        bench.spool.remove(hashlib.sha256(raw).digest())  # as the drop policy does
    bench.output()
    assert bench.sent(1.0) == []
    assert len(bench.sent(RESEND_S)) == 1


def test_a_large_frame_is_offered_and_leaves_only_as_granted(bench):
    digest, raw = bench.frame(side=400)
    bench.known()
    (offer,) = bench.sent(0.0)
    assert (offer.ref, offer.digest, offer.size, offer.what) == (digest[:16], digest, len(raw), "frame")
    assert bench.sent(1.0) == []
    chunks = chunk_count(offer.size, offer.chunk_bytes)
    got = {}
    bench.publisher.on_grant(Grant(offer.ref, (1, 2, 1, 1)), 2.0)  # a chunk granted twice is sent once
    for message in bench.sent(2.0):
        assert isinstance(message, Chunk)
        assert message.index not in got
        got[message.index] = message.data
    assert sorted(got) == [1, 2]
    bench.publisher.on_grant(Grant(offer.ref, (0, 1, 3, chunks - 3)), 3.0)
    got.update({m.index: m.data for m in bench.sent(3.0)})
    assert b"".join(got[i] for i in range(chunks)) == raw
    assert bench.spool.pending() == 1
    bench.publisher.on_ack(Ack(digest, "stored", ""))
    assert bench.spool.pending() == 0


def test_grants_outside_the_object_are_refused_and_unknown_ones_ignored(bench):
    digest, _ = bench.frame(side=400)
    bench.known()
    bench.sent(0.0)
    for ranges in ((0, 999), (-1, 1), (99, 1), (0,), (0, 0)):
        with pytest.raises(WireError):
            bench.publisher.on_grant(Grant(digest[:16], ranges), 1.0)
    bench.publisher.on_grant(Grant(bytes(16), (0, 1)), 1.0)
    assert bench.sent(1.0) == []


def test_few_uploads_are_open_at_a_time_and_small_items_pass_them(bench):
    for value in range(MAX_UPLOADS + 3):
        bench.frame(side=400, value=value)
    bench.output()
    bench.known()
    kinds = [type(m).__name__ for m in bench.sent(0.0)]
    assert kinds == ["Offer"] * MAX_UPLOADS + ["Output"]


def test_offers_that_the_gateway_does_not_take_give_their_places_to_the_first_in_line(bench):
    early = [bench.frame(side=400, value=v)[0] for v in range(WINDOW_ITEMS + 2)]
    bench.known()
    for digest in early:  # not sent yet when the later ones were offered, as before an older record is acknowledged
        bench.spool.hold(digest)
    late = [bench.frame(side=400, value=99 + v)[0] for v in range(MAX_UPLOADS)]
    assert {o.digest for o in bench.sent(0.0)} == set(late)
    bench.spool._execute("UPDATE items SET held = 0")
    assert bench.sent(RESEND_S / 2) == []
    assert [o.digest for o in bench.sent(RESEND_S + 1)] == early[:MAX_UPLOADS]


def test_a_reconnect_offers_again_and_forgets_grants(bench):
    digest, _ = bench.frame(side=400)
    bench.known()
    bench.sent(0.0)
    bench.link.refuse = True
    bench.publisher.on_grant(Grant(digest[:16], (0, 3)), 1.0)
    assert bench.sent(1.0) == []
    bench.link.refuse, bench.link.generation = False, 2
    assert [type(m) for m in bench.sent(2.0)] == [Offer]


def test_an_update_is_always_offered_with_its_rounds_meta(bench):
    raw = b"update" * 10
    bench.put("update", hashlib.sha256(raw).digest(), raw, number=7)
    bench.known()
    (offer,) = bench.sent(0.0)
    assert (offer.what, offer.round, offer.meta) == ("update", 7, {"examples": 7})


def test_a_frame_that_the_disk_altered_is_counted_and_not_sent(bench):
    digest, _ = bench.frame()
    bench.known()
    bench.spool._db.execute("UPDATE items SET payload = zeroblob(size) WHERE digest = ?", (digest,))
    assert bench.sent(0.0) == []
    assert bench.spool.counters()["damaged_frames"] == 1
    assert bench.spool.pending() == 0


def test_a_gateway_that_lost_its_store_gets_all_records_again(bench):
    bench.output()
    bench.known()
    assert len(bench.sent(0.0)) == 1
    bench.publisher.forget_epochs()
    assert bench.sent(0.1) == [bench.record.raw]
    bench.known()
    assert len(bench.sent(0.2)) == 1


def fetcher(folder, link, asked):
    def send(message):
        asked.append(message)
        return True

    return Fetcher(folder, link, send, max_bytes=1 << 20)


def test_an_object_is_pulled_in_ranges_and_handed_on_only_when_its_digest_is_right(tmp_path):
    raw = np.random.default_rng(0).bytes(300_000)
    digest, asked = hashlib.sha256(raw).digest(), []
    pull = fetcher(tmp_path / "objects", MemoryLink(), asked)
    for wrong in (True, False):
        assert pull.want(digest, len(raw)) is None
        while not (tmp_path / "objects" / digest.hex()).is_file() and len(asked) < 40:
            asked.clear()
            pull.step(float(len(asked)))
            if not asked:
                break
            for fetch in asked:
                for i in range(fetch.first, fetch.first + fetch.count):
                    data = raw[i * fetch.chunk_bytes : (i + 1) * fetch.chunk_bytes]
                    pull.on_chunk(Chunk(fetch.ref, i, data[:-1] + b"x" if wrong and i == 2 else data))
        assert pull.failed == 1
        assert (tmp_path / "objects" / digest.hex()).is_file() is not wrong
    assert pull.want(digest, len(raw)).read_bytes() == raw
    with pytest.raises(WireError):
        pull.want(bytes(32), (1 << 20) + 1)
    pull.on_chunk(Chunk(b"q" * 16, 0, b"unknown"))
    pull.forget(set())
    assert pull.want(digest, len(raw)) is None
    with pytest.raises(WireError):
        pull.on_chunk(Chunk(digest[:16], 99, b""))


def serve(pull, raw, asked, most=10**9):
    """Answer what is asked for until nothing is, or ``most`` chunks were sent; returns how many."""
    sent = 0
    while sent < most:
        asked.clear()
        pull.step(0.0)
        if not asked:
            break
        for fetch in asked:
            for i in range(fetch.first, min(fetch.first + fetch.count, fetch.first + most - sent)):
                pull.on_chunk(Chunk(fetch.ref, i, raw[i * fetch.chunk_bytes : (i + 1) * fetch.chunk_bytes]))
                sent += 1
    return sent


def test_a_download_goes_on_after_a_restart_and_survives_a_damaged_disk(tmp_path):
    raw = np.random.default_rng(0).bytes(100 * 65_536)
    digest, asked = hashlib.sha256(raw).digest(), []
    folder = tmp_path / "objects"
    options = {"max_bytes": len(raw)}
    pull = fetcher(folder, MemoryLink(), asked)
    assert pull.want(digest, len(raw), **options) is None
    assert serve(pull, raw, asked, most=70) == 70
    pull = fetcher(folder, MemoryLink(), asked)  # a new process
    assert pull.want(digest, len(raw), **options) is None
    assert serve(pull, raw, asked) == 100 - 64  # what was noted at 64 chunks is not asked for again
    assert pull.want(digest, len(raw)).read_bytes() == raw
    pull.discard(digest)

    assert pull.want(digest, len(raw), **options) is None
    serve(pull, raw, asked, most=70)
    part = folder / f"{digest.hex()}.part"
    part.write_bytes(b"x" + part.read_bytes()[1:])
    pull = fetcher(folder, MemoryLink(), asked)
    assert pull.want(digest, len(raw), **options) is None
    serve(pull, raw, asked)
    assert pull.failed == 1  # the digest finds it, and all is fetched anew
    assert pull.want(digest, len(raw), **options) is None
    assert serve(pull, raw, asked) == 100
    assert pull.want(digest, len(raw)).read_bytes() == raw
    assert [path.name for path in folder.iterdir()] == [digest.hex()]
