"""A full disk at the moment when another model begins to run: it costs this device its part in rounds, nothing else."""

from __future__ import annotations

import errno
import sqlite3

import numpy as np
import pytest
from device_site import World, classifier
from gateway_site import Site

from edgepriv import files
from edgepriv.device.config import RoundsConfig, RunConfig
from edgepriv.device.learn import RETRY_S
from edgepriv.device.seal import SealedItem
from edgepriv.mqtt import Inbound
from edgepriv.wire import cbor, messages, rounds, topics
from edgepriv.wire.link import LinkSession
from edgepriv.wire.messages import Offer
from edgepriv.wire.update import encode_update

ROUND = 4


class FullDisk:
    """While ``full``, no file of the learner is replaced and the spool's database cannot commit (as ENOSPC does it)."""

    def __init__(self, monkeypatch):
        self.full, self.refused, replace = False, [], files.replace

        def refusing(path, content, *, mode=None):
            if self.full:
                self.refused.append(path.name)
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(path, content, mode=mode)

        monkeypatch.setattr(files, "replace", refusing)

    def fills(self, device):
        """Let this device's spool meet the full disk too."""
        device.stages.spool._db = _Database(device.stages.spool._db, self)


class _Database:
    """The spool's connection, whose commit fails on a full disk and leaves the rest to the real one."""

    def __init__(self, real, disk):
        self._real, self._disk = real, disk

    def __getattr__(self, name):
        return getattr(self._real, name)

    def commit(self):
        if self._disk.full:
            self._disk.refused.append("spool")
            raise sqlite3.OperationalError("database or disk is full")
        self._real.commit()


@pytest.fixture
def world(tmp_path):
    made = World(Site(tmp_path), classifier(tmp_path / "model"))
    yield made
    made.close()


@pytest.fixture
def disk(monkeypatch):
    return FullDisk(monkeypatch)


def _device(world):
    return world.device(run=RunConfig(frames=200), rounds=RoundsConfig(take_part=True))


def _with_a_head(device):
    """A head for the model that runs, and in the spool an upload that a later round could take."""
    learner, model = device.stages.learner, device.stages.inferer.digest
    weights = {"head.weight": np.ones((3, 64), np.float32), "head.bias": np.zeros(3, np.float32)}
    learner._heads.keep(model, encode_update(weights))
    learner._use_head()
    assert learner.head is not None
    learner.participant._uploads[ROUND] = ROUND + 2
    learner.participant.dirty = True
    item = SealedItem("update", bytes(32), device.stages.sealer.epoch_digest, b"made over the old model", ROUND)
    device.stages.spool.add([item])
    device.stages.spool.commit()
    return model


def _install_another(world, device):
    """The model's file is replaced and opened, as the keeper does it after a delivery."""
    classifier(world.model.parent, bias=(1.0, 0.0, 0.0))
    device.stages.keeper.reopen()
    return device.stages.keeper.inferer.digest


def _saved(device):
    return cbor.decode_map((device.config.device.state / "rounds.cbor").read_bytes(), max_bytes=1 << 20)


def _updates(device):
    return [item.round for item in device.stages.spool.waiting(100) if item.kind == "update"]


@pytest.mark.parametrize("spool_too", [False, True])
def test_a_disk_that_fills_when_a_model_was_installed_ends_nothing_and_no_old_head_serves(world, disk, spool_too):
    device = _device(world)
    world.run(until=lambda: device.counters["captured"] >= 3)
    old = _with_a_head(device)
    sent, send = [], device.stages.publisher.send_message
    device.stages.publisher.send_message = lambda message: sent.append(message) or send(message)
    new = _install_another(world, device)
    if spool_too:
        disk.fills(device)
    disk.full = True
    before = device.counters["captured"]
    for _ in range(20):
        world.turn()
    assert new != old
    assert device.stages.inferer.digest == new
    assert device.counters["captured"] == before + 20, "frames are still captured"
    assert device.counters["rejected_storage"] >= 1
    assert disk.refused
    assert _updates(device) == ([ROUND] if spool_too else [])
    assert [message.round for message in sent if isinstance(message, Offer) and message.what == "update"] == []
    learner = device.stages.learner
    assert (learner.head, learner.participant.model) == (None, new)
    assert learner.participant.dirty
    disk.full = False
    world.site.now += RETRY_S
    world.turn()
    assert not learner.participant.dirty
    assert (_saved(device)["model"], _saved(device)["ran"], _saved(device)["uploads"]) == (new, [old], [])
    assert _updates(device) == []


def test_a_device_that_starts_with_another_model_on_a_full_disk_starts_and_saves_it_later(world, disk):
    first = _device(world)
    old = _with_a_head(first)
    first.stages.learner._save()
    first.finish()
    classifier(world.model.parent, bias=(1.0, 0.0, 0.0))
    disk.full = True
    second = _device(world)
    learner, new = second.stages.learner, second.stages.inferer.digest
    assert (learner.head, learner.participant.model, _saved(second)["model"]) == (None, new, old)
    world.run(until=lambda: second.counters["captured"] >= 3)
    disk.full = False
    world.site.now += RETRY_S
    world.turn()
    assert (_saved(second)["model"], _saved(second)["ran"]) == (new, [old])


def test_the_end_of_a_round_that_comes_while_the_spool_is_full_is_counted_and_tidied_up_later(world, disk):
    device = _device(world)
    world.run(until=lambda: device.counters["captured"] >= 3)
    _with_a_head(device)
    device.stages.learner.participant._uploads[ROUND] = ROUND
    disk.fills(device)
    disk.full = True
    over = rounds.step_message(ROUND, "result", rounds.RoundResult("aborted", "the quorum is 9", b""))
    topic, session = topics.down(device.name), device.stages.sealer.session
    gateway = LinkSession(session._k_link, session.epoch_id, session.party, side="gateway")
    device.stages.link.offer(Inbound(topic, gateway.seal(topic, messages.encode(over))))
    device.step()
    assert device.counters["rejected_storage"] >= 1
    assert _updates(device) == [ROUND]
    disk.full = False
    world.site.now += RETRY_S
    device.step()
    assert (_updates(device), _saved(device)["uploads"]) == ([], [])
