"""Following a model: which refusal is whose, what is tried again and how often, and what the gateway is told."""

import datetime as dt
import itertools
import json
import time

import pytest
from click.testing import CliRunner
from gateway_site import MemoryLink, Site
from model_site import Maker, Repository, install, new_store

from edgepriv.cli import root
from edgepriv.device import shipments
from edgepriv.device.fetch import Fetcher
from edgepriv.device.model_updates import MAX_RETRY_S, MAX_TRIES, RETRY_S, ModelUpdates, Tried
from edgepriv.device.models import ModelStore
from edgepriv.device.shipments import install_shipment, outcome
from edgepriv.errors import EdgeprivError, StorageFullError, TrustError
from edgepriv.wire.messages import Reply


class Scripted:
    """An installer that reports what the test says, at once."""

    def __init__(self):
        self.reports, self.started = [], []

    def start(self, shipment):
        assert shipment.is_file()
        self.started.append(shipment.name)

    def poll(self):
        return self.reports.pop(0)


class Follower:
    """One device that follows ``eye`` and a gateway that answers its questions; ``now`` is the runtime's clock."""

    def __init__(self, folder):
        self.maker, self.folder, self.now = Maker(), folder, 0.0
        self.store = new_store(self.maker, folder / "s")
        self.offered, self.told = [], []
        self.installer = Scripted()
        self.start()

    def start(self):
        self.store = ModelStore(self.store.folder, self.store.identity, self.store.trust)
        fetcher = Fetcher(self.folder / "objects", MemoryLink(), lambda _: True, max_bytes=1 << 20)
        self.updates = ModelUpdates(
            "eye", lambda: ModelStore(self.store.folder, self.store.identity, self.store.trust), fetcher,
            self.answer, self.installer, every_s=10.0,
        )  # fmt: skip

    def offer(self, *names, fetched=True):
        """What the gateway offers: objects that were fetched already."""
        self.offered = [{"id": "eye", "digest": name * 32, "size": 3} for name in names]
        for name in names:
            if fetched:
                (self.folder / "objects" / (name * 32).hex()).write_bytes(b"abc")

    def answer(self, query):
        if query.what == "models":
            body = {"models": self.offered}
        else:
            self.told.append((query.args["subject"], query.args["report"]["good"], query.args["report"]["reason"]))
            body = {}
        self.replies = [*getattr(self, "replies", []), Reply(query.id, True, body)]
        return True

    def run(self, seconds, *, every=5.0):
        for _ in range(int(seconds / every)):
            self.now += every
            self.updates.step(self.now)
            while getattr(self, "replies", []):
                self.updates.on_reply(self.replies.pop(0))

    def install(self, version, permission=None):
        """Installs directly; returns the report that `edgepriv model install` prints."""
        measured = install(
            self.store, self.maker, self.folder, self.maker.delivery(version), version, permission=permission
        )
        return outcome(self.store, None, measured)


@pytest.fixture
def follower(tmp_path):
    return Follower(tmp_path)


PASSING = {"installed": False, "reason": "the installation ended with code -9", "again": True}


def test_a_refusal_of_one_permission_is_not_held_against_another_one(follower):
    bad, good = follower.maker.permission(1, follower.store.identity, lasts=1), None
    follower.store.raise_floor(follower.maker.now + 5)
    with pytest.raises(TrustError):
        follower.install(1, permission=bad)
    follower.offer(b"a")
    follower.installer.reports = [{"installed": False, "reason": "the permission has expired", "again": False}]
    follower.run(20)
    report = follower.install(1, permission=good)
    follower.offer(b"a", b"b")
    follower.installer.reports = [report]
    follower.run(20)
    follower.store.confirm()
    follower.updates.settle()
    follower.run(200)
    assert follower.told == [((b"a" * 32).hex(), False, "the permission has expired"), ((b"b" * 32).hex(), True, "")]
    follower.start()  # and a restart does not change its mind
    follower.run(200)
    assert len(follower.told) == 2


def test_what_may_pass_is_tried_again_later_each_time_and_then_told(follower):
    follower.offer(b"a")
    follower.installer.reports = [PASSING] * MAX_TRIES
    times = []
    while not follower.told:
        count = len(follower.installer.started)
        follower.run(5)
        times += [follower.now] * (len(follower.installer.started) - count)
        assert follower.now < 2 * MAX_TRIES * MAX_RETRY_S
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert len(times) == MAX_TRIES
    assert gaps[0] >= RETRY_S
    assert all(later >= sooner for sooner, later in itertools.pairwise(gaps))
    assert follower.told == [((b"a" * 32).hex(), False, PASSING["reason"])]
    follower.run(10 * MAX_RETRY_S, every=600.0)
    assert len(follower.installer.started) == MAX_TRIES
    assert not list((follower.folder / "objects").iterdir())


def test_what_passed_is_installed_after_a_restart_too_and_its_tries_are_remembered(follower):
    follower.offer(b"a")
    follower.installer.reports = [PASSING, PASSING]
    follower.run(40 + RETRY_S)
    assert len(follower.installer.started) == 2
    follower.start()
    assert follower.updates._tried[(b"a" * 32).hex()].tries == 2
    follower.installer.reports = [follower.install(1)]
    follower.run(20)
    follower.store.confirm()
    follower.updates.settle()
    follower.run(20)
    assert follower.told == [((b"a" * 32).hex(), True, "")]


def test_a_newer_delivery_ends_the_tries_of_an_older_one(follower):
    follower.offer(b"a")
    follower.installer.reports = [PASSING]
    follower.run(20)
    follower.offer(b"a", b"b")
    follower.installer.reports = [PASSING] * 3
    follower.run(200)
    assert follower.installer.started[1:] == [(b"b" * 32).hex()] * (len(follower.installer.started) - 1)
    assert not (follower.folder / "objects" / (b"a" * 32).hex()).exists()


def test_a_fetch_of_what_is_offered_no_longer_gives_way(follower):
    follower.offer(b"a", fetched=False)
    follower.run(20)
    follower.offer(b"b")
    follower.installer.reports = [{"installed": False, "reason": "no", "again": False}]
    follower.run(50)
    assert follower.installer.started == [(b"b" * 32).hex()]


def test_what_an_older_edgepriv_noted_is_read(follower):
    report = follower.install(1)
    rows = [{"object": "aa", "delivery": report["digest"], "good": None, "reason": "", "told": False}]
    (follower.store.folder / "tried.json").write_text(json.dumps(rows))
    follower.store.confirm()
    follower.start()
    assert follower.updates._tried["aa"] == Tried("aa", report["digest"], good=True)


# --- real shipments -------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path):
    maker = Maker(now=int(time.time()))
    store = new_store(maker, tmp_path / "s")
    return Repository(maker, tmp_path / "owner"), store


def fails(store, shipment, owner, **options):
    with pytest.raises(EdgeprivError) as caught:
        install_shipment(shipment, store, owner, **options)
    assert outcome(store, caught.value, None)["installed"] is False
    return caught.value, outcome(store, caught.value, None)["again"]


def test_metadata_that_a_clock_calls_expired_may_pass_and_is_not_refused_for_ever(shipped):
    repository, store = shipped
    owner = repository.maker.issuer.public.ed25519
    late = repository.ship(1, store.identity, age=dt.timedelta(days=30))
    store.raise_floor(int(time.time()))  # the device's own lower bound of the time decides, not its clock
    error, again = fails(store, late, owner)
    assert "ExpiredMetadataError" in str(error)
    assert again
    assert not store.report()["refused"]
    raw = bytearray(repository.ship(1, store.identity).read_bytes())
    raw[-9] ^= 1
    late.write_bytes(raw)
    error, again = fails(store, late, owner)
    assert "delivery metadata is refused" in str(error)
    assert not again


def test_a_full_disk_may_pass(shipped, monkeypatch):
    repository, store = shipped
    shipment = repository.ship(1, store.identity)
    usage = shipments.shutil.disk_usage
    monkeypatch.setattr(shipments.shutil, "disk_usage", lambda path: usage(path)._replace(free=10))
    error, again = fails(store, shipment, repository.maker.issuer.public.ed25519)
    assert isinstance(error, StorageFullError)
    assert again
    assert not store.report()["refused"]


def test_another_model_than_the_followed_one_is_refused_whatever_its_target_is_called(shipped):
    repository, store = shipped
    owner = repository.maker.issuer.public.ed25519
    shipment = repository.ship(1, store.identity)
    error, again = fails(store, shipment, owner, model="ear")
    assert ("'eye'" in str(error), "'ear' is followed" in str(error), again) == (True, True, False)
    disguised = repository.ship(2, store.identity, name="ear.delivery")
    error, _ = fails(store, disguised, owner, model="ear")
    assert "this is the model 'eye', and 'ear' is followed" in str(error)
    install_shipment(repository.ship(1, store.identity), store, owner, model="eye")
    assert store.report()["model"] == "eye"


def test_the_commands_roll_back_and_install_by_the_same_rules(tmp_path):
    site = Site(tmp_path / "site", devices=("cam1",))
    maker = Maker(site.owner, site.keys["risk-lab"], now=int(time.time()))
    repository = Repository(maker, tmp_path / "owner")
    config = tmp_path / "site" / "device.toml"
    config.write_text(
        '[device]\nkey = "dev-cam1.key"\ntrust = "trust.cbor"\nowner = "owner.key.pub"\ngateway = "gateway-main"\n'
        'state = "state"\n[broker]\nurl = "mqtt://127.0.0.1:1"\n'
        '[model]\npath = "state/models"\nfollow = "eye"\n[source]\nkind = "simulated"\n'
    )

    def model(*args):
        return CliRunner().invoke(root, ["model", *map(str, args), "--config", str(config)])

    device = site.keys["dev-cam1"]
    for version in (1, 2):
        done = model("install", repository.ship(version, device), "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["attempt"].startswith(json.loads(done.stdout)["digest"] + ":")
        assert model("confirm").exit_code == 0
    failed = model("rollback", "--reason", "by hand")
    assert isinstance(failed.exception, EdgeprivError), failed.output
    assert "it stays" in str(failed.exception)
    assert "eye version 2 runs" in model("status").output
    refused = model("install", repository.ship(3, device, name="ear.delivery"), "--json")
    assert "'eye' is followed" in json.loads(refused.stdout)["reason"]
    assert json.loads(refused.stdout)["again"] is False
