"""Clear rounds from the announcement to the new global weights, over the real code of both ends."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from round_fleet import Fleet, fixed_trainer

from edgepriv.wire.update import encode_update
from gateway import aggregate, robust_sum
from gateway.conductor import Conductor


def _deltas(n, rng, size=7):
    return [
        {"w": rng.standard_normal((size, 3)).astype(np.float32), "b": rng.standard_normal(5).astype(np.float32)}
        for _ in range(n)
    ]


def test_a_clear_round_ends_with_the_weighted_mean_of_its_devices(tmp_path):
    rng = np.random.default_rng(0)
    deltas = _deltas(5, rng)
    fleet = Fleet(tmp_path, [fixed_trainer(d, 10 * (i + 1)) for i, d in enumerate(deltas)])
    base = {"w": np.ones((7, 3), np.float32), "b": np.zeros(5, np.float32)}
    fleet.open(fleet.plan(base, quorum=3, max_weight=30))
    record = fleet.run()
    assert record.outcome == "done"
    assert len(record.participants) == 5
    weights = np.array([10, 20, 30, 30, 30])
    steps = sum(np.rint(d["w"].astype(np.float64) * w * 1024) for d, w in zip(deltas, weights, strict=True))
    mean = (steps / 1024).astype(np.float32).astype(np.float64) / weights.sum()
    assert np.array_equal(fleet.weights(record)["w"], (base["w"] + mean).astype(np.float32))
    assert {a.outcome for _, a in fleet.acks} == {"stored"}


def test_a_round_below_its_quorum_aborts_with_a_reason(tmp_path):
    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.ones(4)}, 1) for _ in range(3)])
    fleet.gone = {"dev-000", "dev-001"}
    fleet.open(fleet.plan({"w": np.zeros(4, np.float32)}, quorum=2, deadline_s=20))
    record = fleet.run()
    assert record.outcome == "aborted"
    assert "quorum is 2" in record.reason
    assert not record.after


def test_a_device_without_examples_declines_and_the_others_finish(tmp_path):
    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.ones(4)}, 1), fixed_trainer({}, 0)])
    fleet.open(fleet.plan({"w": np.zeros(4, np.float32)}, deadline_s=1000))
    record = fleet.run(seconds=100)
    assert record.participants == ("dev-000",)
    assert ("dev-001", "no labelled examples") in record.rejected


def test_nan_in_an_update_is_a_counted_rejection_and_the_round_goes_on(tmp_path):
    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.ones(4)}, 1), fixed_trainer({"w": np.ones(4)}, 1)])
    fleet.tamper["dev-001"] = lambda _: encode_update({"w": np.array([1, np.nan, 0, 0], np.float32)})
    fleet.open(fleet.plan({"w": np.zeros(4, np.float32)}))
    record = fleet.run()
    assert record.participants == ("dev-000",)
    assert fleet.conductor.counters["updates_refused"] == 1
    assert dict(record.rejected)["dev-001"] == "an update has NaN or infinity"


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_a_sum_that_cannot_be_read_to_its_end_aborts_with_a_reason_also_after_a_restart(tmp_path, monkeypatch, rule):
    def no_files(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files", "/secret/path")

    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.ones(4)}, 1) for _ in range(3)])
    fleet.open(fleet.plan({"w": np.zeros(4, np.float32)}, quorum=2, rule=rule))
    monkeypatch.setattr(aggregate, "finish", no_files)
    monkeypatch.setattr(robust_sum, "robust_finish", no_files)
    with monkeypatch.context() as patch:  # killed at the very end: the next process has to finish it
        patch.setattr(Conductor, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fleet.run()
    fleet.restart()
    record = fleet.run()
    assert (record.outcome, record.reason) == ("aborted", "the sum could not be finished: Too many open files")


def test_a_durable_sum_that_is_not_the_rounds_ends_it_and_not_the_gateway(tmp_path):
    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.ones(4)}, 1) for _ in range(3)])
    fleet.hold = {"dev-002"}
    fleet.open(fleet.plan({"w": np.zeros(4, np.float32)}, quorum=2))
    for _ in range(4):
        fleet.turn()
    (path,) = (tmp_path / "gateway").glob("round-1/sum.bin")
    path.write_bytes(path.read_bytes()[4:])
    fleet.hold = set()
    record = fleet.run()
    assert record.outcome == "aborted"
    assert "is not the sum of round 1" in record.reason
