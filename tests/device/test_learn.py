"""Learning on a device: what the gateway sends cannot end the process, and no round leaves anything on the disk."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
from types import SimpleNamespace

import numpy as np
import pytest
from gateway_site import Site

from edgepriv import files
from edgepriv.device.config import RoundsConfig
from edgepriv.device.fetch import Fetcher
from edgepriv.device.learn import Learner, Samples
from edgepriv.device.runtime import DeviceRuntime
from edgepriv.errors import ConfigError
from edgepriv.federated.lineage import name_models
from edgepriv.federated.local_update import LocalUpdate
from edgepriv.wire import message, rounds
from edgepriv.wire.messages import Chunk, Fetch
from edgepriv.wire.rounds import Join, RoundOpen, RoundResult
from edgepriv.wire.update import decode_update, encode_update

CLASSES, WIDTH = 3, 4
OLD, NEW = b"o" * 32, b"n" * 32  # digests of two models
HEAD_FILE = f"head-{OLD.hex()}.epu"


def _head(value, **extra):
    weights = {"head.weight": np.full((CLASSES, WIDTH), value, np.float32), "head.bias": np.zeros(CLASSES, np.float32)}
    return encode_update(weights | extra)


class Device:
    """A learner with a real fetcher; ``objects`` are what the gateway has."""

    def __init__(self, site, state, *, trainer=None, max_bytes=1 << 20, **settings):
        self.site, self.state, self.trainer, self.settings = site, state, trainer, settings
        self.objects, self.sent, self.uploads, self.fetched, self.now = {}, [], {}, [], 1.0
        self.max_bytes, self.model = max_bytes, OLD
        self.start()

    def start(self):
        link = SimpleNamespace(max_packet_bytes=262_144)
        self.fetcher = Fetcher(self.state / "objects", link, self._ask, max_bytes=self.max_bytes)
        self.learner = Learner(
            self.site.keys["dev-cam1"], self.site.trust, RoundsConfig(min_samples=1, **self.settings),
            state=self.state, fetcher=self.fetcher, send=lambda m: self.sent.append(m) or True,
            spool_upload=self.uploads.__setitem__, drop_upload=lambda n: self.uploads.pop(n, None),
            model=self.model, trainable=("*",), metas={}, trainer=self.trainer,
        )  # fmt: skip
        self._see()

    def _see(self):
        rng = np.random.default_rng(1)
        for i in range(6):
            self.learner.samples.add(f"{i}", np.abs(rng.standard_normal(WIDTH)).astype(np.float32), i % CLASSES)

    def switch(self, model):
        """Another model is installed, of the same width; frames go on."""
        self.model = model
        self.learner.model_changed((), model)
        self._see()

    @property
    def answers(self):
        """The number in the head that serves, or None while the model's own logits do."""
        logits = self.learner.logits(SimpleNamespace(features=np.eye(WIDTH, dtype=np.float32)[0]))
        return None if logits is None else float(logits[0])

    def _ask(self, fetch: Fetch):
        self.fetched.append(fetch)
        return True

    def add(self, raw):
        digest = hashlib.sha256(raw).digest()
        self.objects[digest[:16]] = raw
        return digest, len(raw)

    def step(self, count=4):
        for _ in range(count):
            self.now += 5.0
            self.learner.step(self.now)
            self.fetcher.step(self.now)
            asked, self.fetched = self.fetched, []
            for fetch in asked:
                if (raw := self.objects.get(fetch.ref)) is not None:
                    self.fetcher.on_chunk(Chunk(fetch.ref, 0, raw))

    def open(self, number, raw, **changes):
        digest, size = self.add(raw)
        opened = RoundOpen(
            round=number, cohort="0", model="m", base=digest, base_bytes=size,
            tensors=(["head.weight", [CLASSES, WIDTH]], ["head.bias", [CLASSES]]), privacy="clear", join_by=1e9,
            deadline=1e9, clip=100.0, fraction_bits=16, ring_bits=64, max_weight=100, devices=2, quorum=1,
            encoding="float32", keep=1.0, seed=b"", noise="none", noise_multiplier=0.0, survivors=1, colluders=0,
            delta=1e-5, participation="all", statistics="home", training={"learning_rate": 0.1},
        )  # fmt: skip
        self._receive(number, "open", dataclasses.replace(opened, **changes))

    def result(self, number, raw, size=None):
        digest, real = self.add(raw)
        self._receive(number, "result", RoundResult("done", "", digest, real if size is None else size))

    def _receive(self, number, step, body):
        self.learner.receive(rounds.step_message(number, step, body), self.now)

    @property
    def joins(self):
        bodies = [message.decode(m.body) for m in self.sent if m.step == "join"]
        return [body for body in bodies if isinstance(body, Join)]

    def on_disk(self):
        return sorted(p.name for p in self.state.rglob("*") if p.is_file())


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path / "site", devices=("cam1",))
    yield made
    made.close()


@pytest.fixture
def device(site, tmp_path):
    return Device(site, tmp_path / "state")


def test_the_disk_does_not_grow_over_rounds_and_each_result_is_pulled_once(device):
    raw, held = _head(0.0), []
    for number in range(1, 8):
        device.open(number, raw)
        device.step()
        assert number in device.uploads
        raw = _head(float(number))
        device.result(number, raw)
        device.step()
        held.append(device.on_disk())
        assert device.learner.head["head.weight"][0, 0] == number
    assert held == [[HEAD_FILE, "rounds.cbor"]] * 7
    assert device.learner.counters["weights_refused"] == 0


def test_weights_without_a_head_leave_one_file_on_the_disk_however_many_rounds(site, tmp_path):
    trainer = lambda weights, settings: LocalUpdate({"w": np.ones(3, np.float32)}, 1)
    device = Device(site, tmp_path / "state", trainer=trainer)
    raw = encode_update({"w": np.zeros(3, np.float32)})
    for number in range(1, 6):
        device.open(number, raw, tensors=(["w", [3]],))
        device.step()
        assert number in device.uploads
        raw = encode_update({"w": np.full(3, number, np.float32)})
        device.result(number, raw)
        device.step()
        assert len(list((device.state / "objects").iterdir())) == 1


def test_what_an_ended_round_was_pulling_and_what_an_earlier_process_left_goes(device):
    device.open(1, _head(1.0))
    device.objects.clear()  # the gateway does not answer
    device.step()
    assert len(list((device.state / "objects").iterdir())) == 1
    device._receive(1, "result", RoundResult("aborted", "the quorum is 9", b""))
    assert list((device.state / "objects").iterdir()) == []
    (device.state / "objects" / ("0" * 64)).write_bytes(b"left")
    device.start()
    assert list((device.state / "objects").iterdir()) == []


def test_weights_over_the_limit_are_counted_and_cost_nothing_else(device):
    device.result(9, b"xx", size=600 << 20)
    device.step()
    assert device.learner.counters["weights_refused"] == 1
    device.open(10, _head(0.0), base_bytes=1 << 21)
    assert "over this device's limit" in device.joins[-1].reason
    device.open(11, _head(0.0))
    device.step()
    assert 11 in device.uploads


BROKEN = {
    "one dimension": {"head.weight": np.zeros(4, np.float32), "head.bias": np.zeros(3, np.float32)},
    "bias of another length": {"head.weight": np.zeros((3, 4), np.float32), "head.bias": np.zeros(2, np.float32)},
    "no classes": {"head.weight": np.zeros((0, 4), np.float32), "head.bias": np.zeros(0, np.float32)},
    "half precision": {"head.weight": np.zeros((3, 4), np.float16), "head.bias": np.zeros(3, np.float16)},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_head_is_neither_adopted_nor_kept_and_one_that_was_kept_goes_at_the_next_start(device, kind):
    device.result(1, _head(5.0))
    device.step()
    device.result(2, encode_update(BROKEN[kind]))
    device.step()
    assert device.learner.counters["weights_refused"] == 1
    assert device.learner.head["head.weight"][0, 0] == 5
    (device.state / HEAD_FILE).write_bytes(encode_update(BROKEN[kind]))
    device.start()
    assert device.learner.head is None
    assert device.learner.logits(SimpleNamespace(features=np.ones(WIDTH, np.float32))) is None
    assert not (device.state / HEAD_FILE).exists()


@pytest.mark.parametrize("error", [ValueError, KeyError, IndexError, MemoryError, OSError, ZeroDivisionError])
def test_whatever_a_trainer_raises_costs_one_round_and_its_text_stays_on_the_device(site, tmp_path, error):
    def trainer(_weights, settings):
        if settings.round == 1:
            raise error("what the pictures show")
        return LocalUpdate({"head.bias": np.ones(CLASSES, np.float32)}, 1)

    device = Device(site, tmp_path / "state", trainer=trainer)
    device.open(1, _head(0.0))
    device.step()
    assert not device.joins[-1].accept
    assert device.joins[-1].reason == f"training failed: {error.__name__}"
    device.open(2, _head(0.0))
    device.step()
    assert 2 in device.uploads


@pytest.mark.parametrize(
    "training",
    [
        {"batch_size": 2.5},
        {"epochs": 1.0},
        {"epochs": 10**9},
        {"epochs": True},
        {"learning_rate": "fast"},
        {"batch_normalisation": ["batch"]},
        {"momentum": -1},
    ],
)
def test_training_settings_that_make_no_sense_are_declined_with_the_reason(device, training):
    device.open(1, _head(0.0), training=training)
    device.step()
    assert [(j.accept, bool(j.reason)) for j in device.joins] == [(False, True)]
    assert device.uploads == {}


def test_a_gateway_that_was_set_back_is_told_the_last_round_of_its_devices(device):
    device.open(7, _head(0.0))
    device.step()
    device.open(3, _head(0.0))
    assert not device.joins[-1].accept
    assert "last round is 7" in device.joins[-1].reason
    assert device.learner.participant.round == 7, "the running round goes on"
    device.start()
    device.open(3, _head(0.0))
    assert "last round is 7" in device.joins[-1].reason


def test_features_of_another_width_are_another_models(device):
    samples = Samples(10, None)
    samples.add("1", np.zeros(4, np.float32), 0)
    samples.add("2", np.zeros(4, np.float32), None)
    samples.add("3", np.zeros(8, np.float32), 1)
    features, labels = samples.arrays()
    assert (features.shape, labels.tolist()) == ((1, 8), [1])


def test_a_new_model_forgets_the_features_of_the_old_one_and_brings_its_own_trainable_tensors(device):
    old, new = (SimpleNamespace(digest=d, spec=SimpleNamespace(trainable=t)) for d, t in ((OLD, ()), (NEW, ("x.*",))))
    keeper = SimpleNamespace(step=lambda now: None, inferer=old)
    stages = SimpleNamespace(keeper=keeper, learner=device.learner, inferer=old)
    runtime = SimpleNamespace(stages=stages, _spared=contextlib.nullcontext)
    assert device.learner.participant.model == OLD
    DeviceRuntime._keep_model(runtime, 1.0)
    assert len(device.learner.samples) == 6
    keeper.inferer = new
    DeviceRuntime._keep_model(runtime, 2.0)
    assert len(device.learner.samples) == 0
    assert runtime.stages.inferer is new
    assert device.learner.participant.policy.trainable == ("x.*",)
    assert device.learner.participant.model == NEW


def test_the_owners_floors_reach_the_policy_and_are_safe_by_default(site, tmp_path):
    policy = Device(site, tmp_path / "a").learner.participant.policy
    assert (policy.min_cohort, policy.active, policy.colluders) == (32, False, 0)
    policy = Device(site, tmp_path / "b", min_cohort=40, active_gateway=True, colluders=5).learner.participant.policy
    assert (policy.min_cohort, policy.active, policy.colluders) == (40, True, 5)
    with pytest.raises(ConfigError, match="colluders"):
        RoundsConfig(min_cohort=3, colluders=3)


# --- a head belongs to the model whose features it was trained over --------------------------------------------


def _round(device, number, value, **changes):
    device.open(number, _head(0.0), **changes)
    device.step()
    device.result(number, _head(value))
    device.step()


def test_a_head_serves_no_other_model_of_the_same_width_and_the_next_round_brings_that_models_own(device, caplog):
    _round(device, 1, 5.0)
    assert device.answers == 5.0
    device.switch(NEW)
    assert device.answers is None
    assert device.learner.counters["heads_set_aside"] == 1
    assert "the next round over this model brings its own" in caplog.text
    _round(device, 2, 7.0)
    assert device.answers == 7.0


def test_after_a_rollback_the_earlier_models_head_serves_again_also_over_a_restart(device, caplog):
    _round(device, 1, 5.0)
    device.switch(NEW)
    _round(device, 2, 7.0)
    assert device.learner.counters["heads_set_aside"] == 1
    caplog.clear()
    device.switch(OLD)
    assert device.answers == 5.0
    assert device.learner.counters["heads_set_aside"] == 1, "this model's own head serves: nothing is missing"
    assert "is not used" not in caplog.text
    device.start()
    assert device.answers == 5.0
    device.model = NEW
    device.start()
    assert device.answers == 7.0


def test_a_model_that_was_installed_while_no_process_ran_gets_no_head_of_another(device):
    _round(device, 1, 5.0)
    device.model = NEW
    device.start()
    assert device.answers is None
    assert device.learner.counters["heads_set_aside"] == 1


def test_two_heads_are_kept_and_one_of_an_earlier_release_whose_model_nobody_knows_is_not(device):
    (device.state / "head.epu").write_bytes(_head(9.0))
    device.start()
    assert (device.answers, device.on_disk()) == (None, [])
    for number, model in enumerate((OLD, NEW, b"3" * 32), 1):
        device.switch(model)
        _round(device, number, float(number))
    assert [name for name in device.on_disk() if name.startswith("head")] == [
        f"head-{model.hex()}.epu" for model in (b"3" * 32, NEW)
    ]
    device.switch(OLD)
    assert device.answers is None


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("clock", ["forward", "back"])
def test_the_head_of_the_model_that_ran_before_is_kept_whichever_was_written_last(device, clock, restart):
    broken = b"3" * 32
    _round(device, 1, 5.0)
    device.switch(NEW)
    _round(device, 2, 7.0)
    age = 1e9 if clock == "forward" else -1e9
    os.utime(device.state / HEAD_FILE, (2e9 - age, 2e9 - age))
    for model in (OLD, broken, OLD):
        device.switch(model)
        if restart:
            device.start()
    assert device.answers == 5.0


def test_a_model_without_a_head_of_its_own_does_not_cost_the_one_before_it_its_head(device):
    _round(device, 1, 5.0)
    for model in (NEW, b"3" * 32, OLD):
        device.switch(model)
    assert device.answers == 5.0


def test_a_state_that_does_not_say_what_ran_before_costs_no_head(device):
    (device.state / f"head-{NEW.hex()}.epu").write_bytes(_head(7.0))
    device.start()
    device.switch(NEW)
    assert device.answers == 7.0


def test_a_round_without_an_upload_is_left_when_the_model_changes(device):
    device.open(1, _head(0.0))
    device.switch(NEW)
    device.step()
    assert (device.joins[-1].accept, device.joins[-1].reason) == (False, "another model runs now")
    assert (device.uploads, device.learner.participant.round) == ({}, None)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(("late_rounds", "kept"), [(0, [1]), (2, [])])
def test_an_upload_over_the_old_model_enters_no_later_round(device, late_rounds, kept, restart):
    device.open(1, _head(0.0), late_rounds=late_rounds)
    device.step()
    assert list(device.uploads) == [1]
    if restart:
        device.model = NEW
        device.start()
    else:
        device.switch(NEW)
    assert list(device.uploads) == kept, "its own round may still take it"
    device.open(2, _head(0.0), late_rounds=late_rounds)
    assert 1 not in device.uploads


def test_a_late_upload_outlives_a_restart_of_the_same_model_and_goes_when_no_round_takes_it(device):
    device.open(1, _head(0.0), late_rounds=1)
    device.step()
    device.start()
    device.open(2, _head(0.0))
    assert 1 in device.uploads
    device.result(2, _head(1.0))
    assert device.uploads == {}


def test_a_result_is_kept_for_the_model_that_ran_when_its_round_was_announced(device):
    device.open(1, _head(0.0))
    device.step()
    device.switch(NEW)
    device.result(1, _head(5.0))
    device.step()
    assert device.answers is None
    device.switch(OLD)
    assert device.answers == 5.0


def test_a_result_of_a_round_that_ran_unheard_of_around_a_change_of_the_model_is_not_adopted(device):
    device.open(1, _head(0.0))
    device.step()
    device.switch(NEW)
    device.result(3, _head(5.0))
    device.step()
    assert device.answers is None
    device.switch(OLD)
    assert device.answers is None
    assert device.learner.counters["heads_set_aside"] == 1
    assert device.learner.counters["weights_refused"] == 0


def test_weights_that_name_their_models_train_and_serve_no_other(device):
    named = name_models(_head(0.0), [NEW])
    device.open(1, named)
    device.step()
    assert (device.joins[-1].accept, device.uploads) == (False, {})
    assert "for another model" in device.joins[-1].reason
    device.result(1, name_models(_head(5.0), [NEW]))
    device.step()
    assert device.answers is None
    device.switch(NEW)
    device.open(2, named)
    device.step()
    assert 2 in device.uploads
    device.result(2, name_models(_head(6.0), [b"1" * 32, NEW]))
    device.step()
    assert device.answers == 6.0


@pytest.mark.parametrize("over", [7, [b"short"], ["text"], [bytes(32)] * 65])
def test_weights_whose_list_of_models_is_none_are_not_trained_on(device, over):
    device.open(1, encode_update(decode_update(_head(0.0), max_bytes=1 << 20).tensors, {"over": over}))
    device.step()
    assert "not usable" in device.joins[-1].reason


def test_a_round_that_the_disk_was_too_full_for_is_answered_only_when_that_is_saved_and_then_declined(
    device, monkeypatch
):
    def full(path, content, *, mode=None):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "replace", full)
        for _ in range(3):  # the announcement is repeated until it is answered
            with pytest.raises(OSError, match="No space"):
                device.open(1, _head(0.0))
        assert device.joins == []
    device.open(1, _head(0.0))
    assert [(join.accept, join.reason) for join in device.joins] == [(False, "this device's disk is full")]
    device.open(2, _head(0.0))
    device.step()
    assert list(device.uploads) == [2]


def test_what_error_feedback_owes_is_forgotten_with_the_model(device):
    device.open(1, _head(0.0), encoding="topk", keep=0.2)
    device.step()
    assert device.learner.participant.feedback
    device.switch(NEW)
    assert device.learner.participant.feedback == {}
