"""A late update counts only in rounds over the model that it was trained over."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from round_fleet import weighted_fleet

from edgepriv.errors import WireError
from edgepriv.federated.lineage import name_models, named_models
from edgepriv.wire.update import decode_update, encode_update

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


def _plan(fleet, number, *, over=(), model="m", value=0.0):
    plan = fleet.plan({"w": np.full(SIZE, value, np.float32)}, round=number, model=model, **OPTIONS)
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
    assert [a.outcome for n, a in fleet.acks if n == "dev-002"] == ["rejected", "stored"]


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
