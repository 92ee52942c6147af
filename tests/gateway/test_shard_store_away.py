"""A store that fails for a moment costs no shard the round, neither the shard's own nor the root's; one that stays away
costs it the round at the deadline, and the record says why."""

from __future__ import annotations

import numpy as np
import pytest
from gateway_site import Device, MemoryLink, Site
from round_site import Fails

from edgepriv.cipher.epochs import DeviceEpoch
from edgepriv.errors import StorageFullError, TemporaryError
from edgepriv.keys import Identity
from edgepriv.mqtt import Inbound
from edgepriv.wire import topics
from edgepriv.wire.update import decode_update, encode_update
from gateway import daemon
from gateway.config import load
from gateway.daemon import Gateway, open_store

SIZE, SHARD = 50, 7
SHARD_TOML = """
[gateway]
identity = "gateway-a.key"
owner = "owner.key.pub"
trust = "trust.cbor"
state = "state-a"
shard = 7
[broker]
url = "mqtt://127.0.0.1:1"
[http]
port = 0
[store]
min_free_bytes = 1
[rounds]
root = "gateway-main"
"""


class ShardDevice(Device):
    """A device of the shard gateway-a."""

    def new_epoch(self):
        self.epoch = DeviceEpoch.open(self.identity, self.site.trust, "gateway-a", seq=self.seq, now=self.site.now)
        self.session, self.seq, self.outputs = self.epoch.session, self.seq + 1, 0

    @property
    def topic(self):
        return topics.up(self.name, SHARD, "msg")

    def record(self):
        return Inbound(topics.up(self.name, SHARD, "epoch"), self.epoch.signed.raw)


class Farm(Site):
    """A root, a shard of it and the shard's two devices, in one process and on one clock."""

    def __init__(self, folder):
        rounds = {"shards": ["gateway-a"], "quorum": 2, "clip": 1000.0, "deadline_s": 40.0, "fraction_bits": 10}
        super().__init__(folder, rounds=rounds | {"resend_s": 1.0, "max_weight": 10, "shard_silence_s": 20.0})
        self.root = self.gateway()
        (folder / "shard.toml").write_text(SHARD_TOML)
        config = load(folder / "shard.toml")
        self.shard = Gateway(config, MemoryLink(), open_store(config), clock=lambda: self.now)
        self.gateways.append(self.shard)
        self.members = [ShardDevice(self, name) for name in self.devices]
        self.offers = {}
        (folder / "base").write_bytes(encode_update({"w": np.full(SIZE, 0.5, np.float32)}))
        self.root.rounds.set_weights(folder / "base", "m")

    def write_trust(self, **changes):
        if "gateway-a" not in self.keys:
            self.keys["gateway-a"] = Identity.new("gateway", "a")
            self.keys["gateway-a"].save(self.folder / "gateway-a.key")
        super().write_trust(**changes)

    def turn(self, count=1):
        """Let everybody talk; half a second goes by each time."""
        for _ in range(count):
            self.now += 0.5
            for device in self.members:
                if device.epoch.signed.digest not in device.acks:
                    self.shard.link.inbox.append(device.record())
                self._offer(device)
            for gateway, other in ((self.shard, self.root), (self.root, self.shard)):
                gateway.step()
                self._deliver(gateway, other)

    def _deliver(self, sender, other):
        sent, sender.link.sent = sender.link.sent, []
        for packet in sent:
            if "/gateway-a/" in packet.topic:
                other.link.inbox.append(packet)
            else:
                for device in self.members:
                    sender.link.inbox += device.take([packet])

    def _offer(self, device):
        for number in {m.round for m in device.other if getattr(m, "step", "") == "open"}:
            value = float(self.members.index(device))
            raw = encode_update({"w": np.full(SIZE, value, np.float32)})
            offer = self.offers.setdefault(
                (device.name, number), device.offer(raw, "update", number, 1024, meta={"examples": 1})
            )
            if offer.digest not in device.acks:
                self.shard.link.inbox.append(device.seal(offer))

    def ready(self):
        self.turn(6)
        assert self.shard.rounds.head().get("digest") == self.root.rounds.head()["digest"]

    def start(self):
        number = self.root.rounds.start({}, self.now)
        self.started = self.now
        return number

    def record(self, turns=300):
        for _ in range(turns):
            self.turn()
            if not self.root.rounds.running and not self.root.failed_batch:
                return self.root.rounds.table.records()[-1]
        raise AssertionError("the round did not end")


@pytest.fixture
def farm(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon, "FAILED_PAUSE_S", 0.0)
    made = Farm(tmp_path)
    made.ready()
    yield made
    made.close()


def _is_whole(farm, record):
    assert (record["outcome"], record["reason"]) == ("done", "")
    assert record["participants"] == ["dev-cam1", "dev-cam2"]
    raw = farm.root.rounds.conductor.model_path(record["after"]).read_bytes()
    assert np.array_equal(decode_update(raw, max_bytes=1 << 20).tensors["w"], np.full(SIZE, 1.0, np.float32))


def _fail_saves(gateway, error, times):
    """The next ``times`` saves of a round fail; everything else works."""
    real, failed = gateway.rounds.table.save, []

    def save(*args):
        if len(failed) < times:
            failed.append(gateway._clock())
            raise error
        return real(*args)

    gateway.rounds.table.save = save
    return failed


ERRORS = [TemporaryError("the store is busy"), StorageFullError("the store cannot write"), OSError(28, "No space left")]


def test_without_any_failure_the_round_is_whole(farm):
    farm.start()
    _is_whole(farm, farm.record())


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_shard_whose_store_fails_as_it_begins_tries_again_and_brings_its_part(farm, error):
    failed = _fail_saves(farm.shard, error, 5)
    farm.start()
    _is_whole(farm, farm.record())
    assert len(failed) == 5


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_shard_that_can_never_begin_sits_out_at_the_deadline_and_says_why(farm, error):
    failed = _fail_saves(farm.shard, error, 10**9)
    farm.start()
    record = farm.record()
    assert record["outcome"] == "aborted"
    assert "gateway-a: its store failed until the round's deadline" in record["reason"]
    assert len(failed) > 5
    assert 39.0 <= farm.now - farm.started <= 45.0
    farm.shard.rounds.table.save = type(farm.shard.rounds.table).save.__get__(farm.shard.rounds.table)
    farm.start()
    _is_whole(farm, farm.record())


def test_a_shard_whose_whole_store_is_away_for_longer_than_the_roots_silence_is_not_given_up(farm):
    fails = Fails(farm.shard.store.database)
    farm.start()
    farm.turn(2)
    fails.away = 10**9
    farm.turn(60)  # 30 s; the root is patient for 20 s with a shard that is silent
    assert farm.root.rounds.running
    fails.away = 0
    _is_whole(farm, farm.record())


def test_a_shard_whose_whole_store_stays_away_sits_out_at_the_deadline_and_says_why(farm):
    fails = Fails(farm.shard.store.database)
    farm.turn()
    fails.away = 10**9
    farm.turn(2)
    farm.start()
    record = farm.record()
    assert record["outcome"] == "aborted"
    assert "gateway-a: its store failed until the round's deadline: still away" in record["reason"]
    assert 39.0 <= farm.now - farm.started <= 45.0
    fails.away = 0
    farm.turn(4)
    assert farm.shard.rounds.running == []
    farm.start()
    _is_whole(farm, farm.record())


@pytest.mark.parametrize("seconds", [2, 30])
def test_a_root_whose_store_is_away_for_a_while_loses_no_shard(farm, seconds):
    farm.start()
    fails = Fails(farm.root.store.database)
    farm.turn(3)
    fails.away = 10**9
    farm.turn(2 * seconds)
    fails.away = 0
    _is_whole(farm, farm.record())


@pytest.mark.parametrize("at", range(1, 22, 2))
def test_a_root_whose_store_fails_at_any_commit_ends_the_round_right(farm, at):
    fails, count = Fails(farm.root.store.database), [0]
    farm.start()

    def due():
        count[0] += 1
        return count[0] == at

    fails.when = due
    _is_whole(farm, farm.record())
    assert fails.when is None, "it did fail"


def test_a_root_whose_store_fails_while_it_notes_that_a_shard_sits_out_does_not_forget_to_end_the_round(farm):
    number = farm.start()
    close, failed = farm.root.rounds.table.close, []

    def fails_once(record):
        if not failed:
            failed.append(record)
            raise TemporaryError("away")
        close(record)

    farm.root.rounds.table.close = fails_once
    farm.shard.uplink._refused = number, "no device"
    record = farm.record()
    assert failed
    assert (record["round"], record["outcome"]) == (number, "aborted")
    assert "gateway-a: no device" in record["reason"]
