"""A late update counts only in rounds over the model that it was trained over."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
from round_fleet import weighted_fleet

from edgepriv.errors import WireError
from edgepriv.federated.lineage import name_models, named_models
from edgepriv.wire.messages import Offer
from edgepriv.wire.update import decode_update, encode_update
from gateway.round_ports import Tell

SIZE = 20
BASE = {"w": np.zeros(SIZE, np.float32)}
A, B = b"a" * 32, b"b" * 32
OPTIONS = {"max_weight": 4, "quorum": 2, "deadline_s": 20, "late": "next"}


@pytest.fixture
def fleet(tmp_path):
    """Three devices after a first round for which the third one was too late; all run the model A."""
    made, _ = weighted_fleet(tmp_path, 3, SIZE, np.random.default_rng(1))
    for device in made.devices.values():
        device.model = A
    made.hold = {"dev-002"}
    made.open(_plan(made, 1, over=[A]))
    assert made.run().participants == ("dev-000", "dev-001")
    made.hold = set()
    return made


def _plan(fleet, number, *, over=(), model="m", value=0.0, **options):
    plan = fleet.plan({"w": np.full(SIZE, value, np.float32)}, round=number, model=model, **OPTIONS, **options)
    raw = fleet.conductor.model_path(plan.base).read_bytes()
    raw = name_models(raw, over) if over else raw
    return dataclasses.replace(plan, base=fleet.conductor.add_model(raw), base_bytes=len(raw))


@pytest.mark.parametrize("restart", [False, True])
def test_a_late_update_counts_in_the_next_round_over_the_same_models(fleet, restart):
    if restart:
        fleet.restart()
    fleet.open(_plan(fleet, 2, over=[A], value=1.0))
    assert "dev-002~1" in fleet.run().participants


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("change", [{"model": "other", "over": [A]}, {"over": [A, B]}, {}])
def test_a_late_update_of_another_model_is_refused_and_the_round_goes_on(fleet, change, restart):
    if restart:
        fleet.restart()
    fleet.open(_plan(fleet, 2, **{"value": 1.0, **change}))
    record = fleet.run()
    assert record.participants == ("dev-000", "dev-001", "dev-002")
    told = [a for n, a in fleet.acks if n == "dev-002"]
    assert [a.outcome for a in told] == ["rejected", "stored"]
    assert "the weights in force are for another model" in told[0].reason


def _offered(fleet, device, number):
    """What the gateway does with an update of an earlier round, once the next one takes updates."""
    while not any(r.state == "collecting" for r in fleet.conductor.singles()):
        fleet.turn(1.0)
    raw = encode_update(BASE)
    digest = hashlib.sha256(raw).digest()
    offer = Offer(digest[:16], "update", len(raw), 65536, digest, number, fleet.now + 600, {"examples": 1})
    (done, *_) = fleet.conductor.on_offer(device, offer, fleet.now)
    return done.message.reason if isinstance(done, Tell) else type(done).__name__


@pytest.mark.parametrize(("most", "done"), [(5, "OpenUpload"), (4, "late: updates of earlier rounds are not taken")])
def test_an_update_as_late_as_it_may_be_counts_though_many_rounds_have_ended_since(fleet, most, done):
    fleet.gone, fleet.hold = {"dev-002"}, {"dev-002"}
    for number in range(2, 6):
        fleet.open(_plan(fleet, number, over=[A], value=number, max_staleness=most))
        fleet.run()
        fleet.conductor.prune_models(set())
    fleet.open(_plan(fleet, 6, over=[A], value=6.0, max_staleness=most))
    assert _offered(fleet, "dev-002", 1) == done


def test_whose_line_a_late_update_is_of_is_read_by_its_number_alone(fleet):
    fleet.restart()
    fleet.open(_plan(fleet, 2, over=[A], value=1.0))

    def every():
        raise AssertionError("every record ever kept was read")

    fleet.store.records = every
    assert "dev-002~1" in fleet.run().participants


def test_an_update_that_counted_before_a_restart_does_not_count_again_as_a_late_one(fleet):
    fleet.restart()
    fleet.open(_plan(fleet, 2, over=[A], value=1.0))
    assert _offered(fleet, "dev-000", 1) == "round 1 is not running"


def test_a_device_of_another_model_sits_out_of_a_round_whose_weights_name_theirs(fleet):
    fleet.devices["dev-000"].model_changed(B)
    fleet.open(_plan(fleet, 2, over=[A], value=1.0))
    record = fleet.run()
    assert dict(record.rejected) == {"dev-000": "the global weights are for another model than this device runs"}
    assert "dev-001" in record.participants


def test_the_weights_that_a_round_makes_name_the_models_of_those_it_began_with(fleet):
    after = fleet.conductor.model_path(fleet.store.closed[-1].after).read_bytes()
    assert named_models(decode_update(after, max_bytes=1 << 20).meta) == (A,)


def test_naming_models_changes_no_weight_and_takes_digests_only():
    raw = encode_update(BASE, {"model": "m"})
    named = decode_update(name_models(raw, [A, B]), max_bytes=1 << 20)
    assert (named.meta, named_models(named.meta)) == ({"model": "m", "over": [A, B]}, (A, B))
    assert np.array_equal(named.tensors["w"], BASE["w"])
    with pytest.raises(WireError, match="no SHA-256"):
        name_models(raw, [b"short"])
