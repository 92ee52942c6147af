"""A staged rollout reaches everybody when it goes well, and halts by itself when it does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepriv.errors import ConfigError
from gateway.rollout import DONE, HALTED, RUNNING, Plan, Rollout, advance, bucket, from_fields, halt, report, resume

FLEET = [f"dev-{n}" for n in range(200)]
PLAN = Plan(stages=(5, 25, 100), settle_s=60, min_good=3)


def rollout():
    return Rollout(b"m" * 32, PLAN, 0.0)


def offered(state):
    return [device for device in FLEET if state.offered(device)]


def test_stages_grow_and_contain_the_smaller_ones():
    state, seen = rollout(), []
    for step in range(1, 4):
        members = offered(state)
        assert set(seen) <= set(members)
        seen = members
        for device in members:
            state = report(state, device, good=True)
        state = advance(state, FLEET, 100.0 * step)
    assert state.state == DONE
    assert seen == FLEET


def test_the_share_is_about_what_was_asked():
    few = offered(rollout())
    assert 1 <= len(few) <= 25
    assert bucket(b"m" * 32, "dev-1") == bucket(b"m" * 32, "dev-1")
    assert {bucket(bytes([n]) * 32, "dev-1") for n in range(20)} != {bucket(b"m" * 32, "dev-1")}


def test_it_waits_for_time_and_for_good_reports():
    state = rollout()
    assert advance(state, FLEET, 1e6) == state
    for device in offered(state):
        state = report(state, device, good=True)
    assert advance(state, FLEET, 59.0).stage == 0
    assert advance(state, FLEET, 60.0).stage == 1


def test_failures_halt_it_at_once_with_the_reason_and_nobody_new_is_offered_the_model():
    state = rollout()
    members = offered(state)
    state = report(state, members[0], good=True)
    state = report(state, members[1], good=False, reason="self-test: accuracy 0.1")
    assert state.state == RUNNING
    state = report(state, members[2], good=False, reason="self-test: accuracy 0.1")
    assert state.state == HALTED
    assert "self-test" in state.reason
    assert offered(state) == [members[0]]
    assert advance(state, FLEET, 1e9) == state


def test_a_good_report_may_turn_bad_and_halts_even_a_finished_rollout():
    state = Rollout(b"m" * 32, Plan(stages=(100,), settle_s=0, min_good=1), 0.0)
    for device in FLEET:
        state = report(state, device, good=True)
    state = advance(state, FLEET, 1.0)
    assert state.state == DONE
    for device in FLEET[:21]:
        state = report(state, device, good=False, reason="slow")
    assert state.state == HALTED


def test_a_halt_by_hand_and_going_on():
    state = resume(halt(rollout(), "operator"), 5.0)
    assert state.state == RUNNING
    assert state.began_s == 5.0


@given(st.lists(st.tuples(st.sampled_from(FLEET[:30]), st.booleans(), st.floats(0, 1e4)), max_size=60))
def test_any_history_survives_the_store_and_never_goes_back(events):
    state = rollout()
    for device, good, now in events:
        before = state
        state = advance(report(state, device, good=good, reason="r"), FLEET, now)
        assert state.stage >= before.stage
        assert from_fields(state.as_fields()) == state
        if before.state == HALTED:
            assert state.state == HALTED


@pytest.mark.parametrize("stages", [(), (10,), (50, 20, 100), (0, 100)])
def test_wrong_stages_are_refused(stages):
    with pytest.raises(ConfigError):
        Plan(stages=stages)
