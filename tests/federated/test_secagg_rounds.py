"""Masked rounds over the real code of both ends: the sum is right, whoever vanishes, bit for bit the plain one."""

from __future__ import annotations

import numpy as np
import pytest
from round_fleet import Fleet, fixed_trainer

from edgepriv.federated.fixed_point import Ring, decode_sum, quantise


def _fleet(tmp_path, n, size=40, seed=0):
    rng = np.random.default_rng(seed)
    deltas = [{"w": rng.standard_normal(size).astype(np.float32)} for _ in range(n)]
    return Fleet(tmp_path, [fixed_trainer(d, 1 + i % 5) for i, d in enumerate(deltas)]), deltas


def _expected(deltas, chosen, size=40):
    ring = Ring(32, 10, 100.0, 5, 200)
    total, weight = np.zeros(size, np.uint32), 0
    for i in chosen:
        total += quantise(deltas[i]["w"], 1 + i % 5, ring)
        weight += 1 + i % 5
    return (decode_sum(total, ring).astype(np.float32).astype(np.float64) / weight).astype(np.float32)


def test_a_masked_sum_equals_the_plain_sum_bit_for_bit(tmp_path):
    fleet, deltas = _fleet(tmp_path, 8)
    fleet.open(fleet.plan({"w": np.zeros(40, np.float32)}, privacy="masked", max_weight=5, min_cohort=4))
    record = fleet.run()
    assert record.outcome == "done", record.reason
    assert record.privacy == "masked"
    assert len(record.participants) == 8
    assert np.array_equal(fleet.weights(record)["w"], _expected(deltas, range(8)))


@pytest.mark.parametrize("seed", range(3))
def test_a_third_of_the_devices_vanishing_after_masking_still_gives_the_sum_of_the_rest(tmp_path, seed):
    fleet, deltas = _fleet(tmp_path, 12, seed=seed)
    gone = np.random.default_rng(seed).choice(12, 4, replace=False)
    fleet.hold = {f"dev-{i:03d}" for i in gone}
    fleet.open(fleet.plan({"w": np.zeros(40, np.float32)}, privacy="masked", max_weight=5, min_cohort=4, deadline_s=30))
    record = fleet.run()
    assert record.outcome == "done", record.reason
    rest = [i for i in range(12) if i not in gone]
    assert record.participants == tuple(f"dev-{i:03d}" for i in rest)
    assert np.array_equal(fleet.weights(record)["w"], _expected(deltas, rest))


def test_a_gateway_that_dies_before_the_weights_are_written_rebuilds_the_seeds(tmp_path):
    fleet, deltas = _fleet(tmp_path, 8)
    fleet.open(fleet.plan({"w": np.zeros(40, np.float32)}, privacy="masked", max_weight=5, min_cohort=4))
    finish, fleet.conductor._finish = fleet.conductor._finish, lambda current: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fleet.run()
    fleet.conductor._finish = finish
    fleet.conductor._unmaskers.clear()
    assert fleet.conductor.rounds[1].state == "finishing"
    fleet.store.save(1, fleet.conductor.rounds[1].to_bytes())
    fleet.conductor.rounds.clear()
    fleet._gateway(fleet.conductor.resume(fleet.now))
    record = fleet.store.closed[-1]
    assert record.outcome == "done", record.reason
    assert np.array_equal(fleet.weights(record)["w"], _expected(deltas, range(8)))


def test_too_many_vanishing_aborts_the_round(tmp_path):
    fleet, _ = _fleet(tmp_path, 8)
    fleet.hold = {f"dev-{i:03d}" for i in range(5)}
    fleet.open(fleet.plan({"w": np.zeros(40, np.float32)}, privacy="masked", max_weight=5, min_cohort=2, deadline_s=30))
    record = fleet.run()
    assert record.outcome == "aborted"
    assert "survived" in record.reason


def test_devices_that_vanish_between_confirming_and_revealing_do_not_stop_the_round(tmp_path):
    fleet, deltas = _fleet(tmp_path, 8)
    silent = {"dev-000", "dev-001"}
    fleet.lost = lambda kind, device: device in silent and fleet.conductor.rounds[1].state == "unmasking"
    fleet.open(fleet.plan({"w": np.zeros(40, np.float32)}, privacy="masked", max_weight=5, min_cohort=4))
    record = fleet.run()
    assert record.outcome == "done", record.reason
    assert np.array_equal(fleet.weights(record)["w"], _expected(deltas, range(8)))
