"""Rounds under any order of events: each ends as a record, with the right sum over exactly the devices it names.

Hypothesis loses, repeats and delays messages, silences devices, and kills the gateway between any two calls; what a
crash keeps is the store, the sum and the staged files.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from round_fleet import weighted_fleet, weighted_mean

from edgepriv.errors import ConfigError
from edgepriv.federated.fixed_point import Ring, decode_sum, quantise
from gateway.round_events import Cancelled, Folded, Offered, Progressed, Stepped, Tick, UnmaskFailed, UploadComplete
from gateway.round_plan import RoundPlan
from gateway.rounds import ENDED, Round

SIZE = 24


def _fleet(tmp_path, n, rng):
    return weighted_fleet(tmp_path, n, SIZE, rng)


def _check(fleet, record, deltas, quorum):
    assert record is not None, "a round must end"
    if record.outcome == "aborted":
        assert record.reason
        return
    assert len(record.participants) >= quorum
    assert np.array_equal(fleet.weights(record)["w"], weighted_mean(deltas, record.participants))
    assert {n for n, _ in record.rejected}.isdisjoint(record.participants)


@pytest.mark.parametrize("privacy", ["clear", "masked"])
@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_lost_and_whoever_is_killed_a_round_ends_right(tmp_path_factory, privacy, seed):
    rng = np.random.default_rng(seed)
    fleet, deltas = _fleet(tmp_path_factory.mktemp("round"), 6, rng)
    loss, kill = rng.uniform(0, 0.4), rng.uniform(0, 0.15)
    fleet.lost = lambda kind, device: rng.random() < loss
    options = {
        "privacy": privacy,
        "max_weight": 4,
        "quorum": 3,
        "min_cohort": 3,
        "deadline_s": 60,
        "uploads_at_once": 2,
    }
    fleet.open(fleet.plan({"w": np.zeros(SIZE, np.float32)}, **options))
    for _ in range(300):
        if fleet.store.closed:
            break
        fleet.turn(float(rng.uniform(0.2, 3)))
        if rng.random() < 0.02:
            fleet.gone.add(f"dev-{rng.integers(6):03d}")
        if rng.random() < kill:
            fleet.restart()
    _check(fleet, fleet.store.closed[-1] if fleet.store.closed else None, deltas, 3)


def test_uploads_in_staging_survive_a_restart_and_count_once(tmp_path):
    fleet, deltas = _fleet(tmp_path, 4, np.random.default_rng(0))
    fleet.open(fleet.plan({"w": np.zeros(SIZE, np.float32)}, max_weight=4, quorum=4))
    fleet.turn()
    assert list(fleet.folder.glob("?" * 64))
    fleet.restart()
    fleet.restart()
    record = fleet.run()
    assert len(record.participants) == 4
    _check(fleet, record, deltas, 4)


def test_a_late_update_goes_into_the_next_round_with_less_weight(tmp_path):
    fleet, _deltas = _fleet(tmp_path, 3, np.random.default_rng(1))
    base = {"w": np.zeros(SIZE, np.float32)}
    fleet.hold = {"dev-002"}
    fleet.open(fleet.plan(base, max_weight=4, quorum=2, deadline_s=20))
    first = fleet.run()
    assert first.participants == ("dev-000", "dev-001")
    late, fleet.hold = fleet.sent["dev-002"], set()
    plan = fleet.plan(base, round=2, max_weight=4, quorum=2, late="next", deadline_s=40)
    fleet._gateway(fleet.conductor.open_round(plan, ["dev-000", "dev-001", "dev-002"], fleet.now))
    fleet.uploads["dev-002"] = late
    fleet._offer("dev-002", late)
    fleet.uploads.pop("dev-002", None)
    second = fleet.run()
    assert "dev-002~1" in second.participants
    assert "dev-002" in second.participants


@pytest.mark.parametrize("restart", [False, True])
def test_a_device_keeps_its_late_update_and_brings_it_to_the_next_round_beside_its_own(tmp_path, restart):
    fleet, deltas = _fleet(tmp_path, 3, np.random.default_rng(1))
    base = {"w": np.zeros(SIZE, np.float32)}
    options = {"max_weight": 4, "quorum": 2, "deadline_s": 20, "late": "next"}
    fleet.hold = {"dev-002"}  # its upload does not get through in time
    fleet.open(fleet.plan(base, **options))
    first = fleet.run()
    assert first.participants == ("dev-000", "dev-001")
    if restart:
        fleet.restart()
    fleet.hold = set()
    for _ in range(30):  # nothing runs: the offer is neither taken nor refused
        fleet.turn()
    assert [a.outcome for n, a in fleet.acks if n == "dev-002"] == []
    assert fleet.uploads["dev-002"].round == 1
    fleet.open(fleet.plan(base, round=2, **options))
    second = fleet.run()
    assert second.participants == ("dev-000", "dev-001", "dev-002", "dev-002~1")
    ring = Ring(64, 10, 100.0, 4, 200)
    weights = {0: 1, 1: 2, 2: 3 + int(3 / np.sqrt(2))}
    total = sum(quantise(deltas[i], w, ring) for i, w in ((0, 1), (1, 2), (2, 3), (2, int(3 / np.sqrt(2)))))
    mean = decode_sum(total, ring).astype(np.float32).astype(np.float64) / sum(weights.values())
    assert np.array_equal(fleet.weights(second)["w"], mean.astype(np.float32))
    fleet.turn()
    assert not fleet.older


def test_an_update_that_is_later_than_the_plan_allows_is_let_go(tmp_path):
    fleet, _ = _fleet(tmp_path, 3, np.random.default_rng(1))
    base = {"w": np.zeros(SIZE, np.float32)}
    options = {"quorum": 2, "deadline_s": 20, "late": "next"}
    fleet.hold = {"dev-002"}
    fleet.open(fleet.plan(base, **options))
    fleet.run()
    late = fleet.uploads["dev-002"]
    fleet.gone = {"dev-002"}
    fleet.open(fleet.plan(base, round=2, **options))
    fleet.run()
    fleet.gone, fleet.hold = set(), set()
    fleet.open(fleet.plan(base, round=3, **options))
    fleet._offer("dev-002", late)
    fleet.turn()
    assert late not in [*fleet.uploads.values(), *fleet.older.values()], "its device lets it go"
    third = fleet.run()
    assert third.participants == ("dev-000", "dev-001", "dev-002")
    assert [a.outcome for n, a in fleet.acks if n == "dev-002"] == ["rejected", "stored"]


def test_noise_and_late_updates_together_are_a_configuration_error(tmp_path):
    fleet, _ = _fleet(tmp_path, 2, np.random.default_rng(1))
    options = {"noise": "central", "noise_multiplier": 1.0, "max_weight": 1, "late": "next"}
    with pytest.raises(ConfigError, match="second one of its device"):
        fleet.plan({"w": np.zeros(SIZE, np.float32)}, **options)


def test_a_late_update_is_dropped_by_default(tmp_path):
    fleet, _ = _fleet(tmp_path, 3, np.random.default_rng(1))
    fleet.hold = {"dev-002"}
    fleet.open(fleet.plan({"w": np.zeros(SIZE, np.float32)}, quorum=2, deadline_s=20))
    fleet.run()
    late, fleet.hold = fleet.sent["dev-002"], set()
    fleet._offer("dev-002", late)
    fleet.turn()
    assert {a.outcome for n, a in fleet.acks if n == "dev-002"} == {"rejected"}


names = st.sampled_from(["dev-0", "dev-1", "dev-2", "dev-x"])
digests = st.sampled_from([b"a" * 32, b"b" * 32])
events = st.one_of(
    st.just(Tick()),
    st.builds(Offered, names, digests, st.integers(0, 1 << 40), st.integers(-5, 1 << 40), st.integers(0, 3)),
    st.builds(UploadComplete, names, digests),
    st.builds(Progressed, names, digests),
    st.builds(Folded, names, digests, st.sampled_from(["", "bad"])),
    st.builds(UnmaskFailed),
    st.builds(Cancelled, st.just("stop")),
)


@given(st.lists(st.tuples(events, st.floats(-5, 40)), max_size=40), st.sampled_from(["clear", "masked"]), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_events_keep_the_rules_and_survive_storage(script, privacy, late):
    late_policy = "next" if late and privacy == "clear" else "drop"
    plan = RoundPlan(
        round=3, model="m", base=b"b" * 32, base_bytes=9, tensors=(["w", [4]],), privacy=privacy, min_cohort=2,
        late=late_policy, uploads_at_once=1,
    )  # fmt: skip
    current, now = Round(plan, ["dev-0", "dev-1", "dev-2"], 0.0), 0.0
    for event, step in script:
        now += step
        before = current.state
        current.handle(event, now)
        assert sum(d.state == "open" for d in current.devices.values()) <= 1
        assert not (before in ENDED and current.state != before)
        restored = Round.from_bytes(current.to_bytes())
        assert restored.to_bytes() == current.to_bytes()
        current = restored
    current.handle(Tick(), now + 1e6)
    if current.state == "finishing":
        current.handle(Cancelled("not written"), now + 1e6)
    elif current.state not in ENDED:
        assert any(d.state == "complete" for d in current.devices.values())


def test_a_join_of_a_stranger_changes_nothing():
    from edgepriv.wire.rounds import Join

    plan = RoundPlan(round=1, model="m", base=b"b" * 32, base_bytes=9, tensors=(["w", [4]],))
    current = Round(plan, ["dev-0"], 0.0)
    raw = current.to_bytes()
    current.handle(Stepped("dev-9", Join(True, "", b"")), 1.0)
    assert current.to_bytes() == raw
