"""A staged rollout reaches everybody when it goes well, and halts by itself when it does not."""

import pytest
from gateway_site import Site
from hypothesis import given
from hypothesis import strategies as st

from edgepriv.errors import ConfigError, EdgeprivError, MissingFileError
from edgepriv.wire import cbor
from gateway.commands import submit, wait
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


def test_in_a_small_fleet_every_stage_has_a_device_that_must_do_well_first():
    """Eight devices, 5 % of which is nobody in most rollouts: one of them still goes first."""
    fleet, empty = [f"dev-{n}" for n in range(8)], 0
    for number in range(40):
        state = Rollout(bytes([number]) * 32, PLAN, 0.0)
        empty += not any(state.offered(device) for device in fleet)
        state = advance(state, fleet, 1.0)
        first = [device for device in fleet if state.offered(device)]
        assert state.stage == 0
        assert first
        assert advance(state, fleet, 1e6) == state  # no report, no next stage
        assert from_fields(state.as_fields()) == state
        for device in first:
            state = report(state, device, good=True)
        state = advance(state, fleet, 1e6)
        assert state.stage == 1
        assert set(first) <= {device for device in fleet if state.offered(device)}
    assert empty > 10
    assert advance(rollout(), [], 1e6) == rollout()


def test_the_report_of_a_device_that_has_gone_counts_and_nobody_is_taken_in_its_place():
    fleet = [f"dev-{n}" for n in range(8)]
    state = advance(Rollout(b"a" * 32, Plan(stages=(1, 100), settle_s=0, min_good=1), 0.0), fleet, 1.0)
    (first,) = [device for device in fleet if state.offered(device)]
    rest = [device for device in fleet if device != first]
    bad = report(state, first, good=False, reason="slow")
    assert advance(bad, rest, 9.0) == bad
    assert advance(report(state, first, good=True), rest, 9.0).stage == 1


def test_a_rollout_that_an_older_gateway_stored_goes_on():
    fields = rollout().as_fields()
    del fields["reach"]
    assert from_fields(fields) == rollout()


def test_devices_that_were_not_offered_the_model_neither_halt_nor_dilute_it():
    state = rollout()
    members = offered(state)
    outside = [device for device in FLEET if device not in members]
    for device in outside[:50]:
        state = report(state, device, good=False, reason="invented")
    assert state.state == RUNNING
    state = report(rollout(), members[0], good=True)
    for device in outside[:50]:
        state = report(state, device, good=True)
    for device in members[1:3]:
        state = report(state, device, good=False, reason="slow")
    assert state.state == HALTED
    assert "2 of 3 devices failed" in state.reason


@pytest.fixture
def models(tmp_path):
    site = Site(tmp_path / "site", models={"require_verdict": False})
    yield Versions(site, tmp_path)
    site.close()


class Versions:
    """Plain models of one id at a gateway that demands no verdict."""

    def __init__(self, site, folder):
        self.site, self.folder, self.gateway = site, folder, site.gateway()
        self.held = self.gateway.models
        self.digests = []

    def add(self, **options):
        path = self.folder / "model.onnx"
        path.write_bytes(f"version {len(self.digests) + 1}".encode())
        version, self.site.now = str(len(self.digests) + 1), self.site.now + 1
        self.digests.append(self.held.add(path, name="eye", version=version, actor="op", now=self.site.now, **options))
        return self.digests[-1]

    def begin(self, digest, plan=PLAN):
        self.held.begin_rollout(digest, plan, actor="op", now=self.site.now)

    def command(self, action, **args):
        """What `edgepriv-gateway models` asks of the daemon."""
        number = submit(self.gateway.store, "op", action, args, self.site.now)
        self.gateway.commands.tick(self.site.now)
        return wait(self.gateway.store, number, 5.0)

    def state(self, digest):
        (found,) = [m for m in self.held.listed(self.site.now) if m["digest"] == digest]
        return found["withheld"] or found["state"]

    def offered(self, device="dev-cam1"):
        return [m["version"] for m in self.held.offers(device, "device", self.site.now)]


def test_a_further_version_is_held_until_its_rollout_begins(models):
    first, second = models.add(), models.add()
    assert models.offered() == ["1"]
    assert "held" in models.state(second)
    assert "held" in models.held.withheld(second[:16], "dev-cam1", "device", models.site.now)
    models.begin(second, Plan(stages=(100,)))
    assert models.offered() == ["1", "2"]
    models.held.set_state(first, "halted", actor="op", now=models.site.now)
    models.held.set_state(second, "halted", actor="op", now=models.site.now)
    third = models.add()
    assert models.offered() == []  # nobody has said yet that it is better than those that were halted
    assert "held" in models.state(third)
    models.begin(third, Plan(stages=(100,)))
    assert models.offered() == ["3"]


@pytest.mark.parametrize("stop", ["halt", "roll_back", "failures"])
def test_a_version_after_one_that_was_stopped_is_held_like_any_further_one(models, stop):
    models.add()
    stopped = models.add()
    models.begin(stopped, Plan(stages=(100,), min_failures=1))
    if stop == "failures":
        models.held.take_report(stopped, "dev-cam1", good=False, reason="slow", now=models.site.now)
    else:
        getattr(models.held, stop)(stopped, actor="op", now=models.site.now)
    models.held.halt(models.digests[0], actor="op", now=models.site.now)
    assert "held" in models.state(models.add())
    assert models.offered() == []


def test_a_model_that_was_only_to_be_judged_holds_nothing_back(models):
    models.add(only_judge=True)
    models.add()
    assert models.offered() == ["2"]


def test_a_model_that_cannot_be_read_is_one_refusal(models, monkeypatch):
    def unreadable(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.is_file", unreadable)
    with pytest.raises(EdgeprivError, match=r"cannot read .*m\.onnx: Permission denied"):
        models.command("model-add", path=str(models.folder / "m.onnx"), name="eye", version="1")


def test_an_operator_is_told_that_a_version_is_held_and_where_a_rollback_leads(models):
    told = []
    for version in (b"one", b"two"):
        (models.folder / "m.onnx").write_bytes(version)
        models.site.now += 1
        told.append(
            models.command("model-add", path=str(models.folder / "m.onnx"), name="eye", version=version.decode())
        )
    assert [one["held"] for one in told] == [False, True]
    models.command("model-rollout", model="eye@two", stages=[50, 100])
    back = models.command("model-rollback", model="eye@two")
    assert (back["version"], back["share"], back["offered"]) == ("one", 100, told[0]["digest"])
    with pytest.raises(EdgeprivError, match="before one is on offer"):
        models.command("model-rollback", model="eye@one")


def test_a_rollback_goes_to_the_newest_earlier_version_that_is_on_offer_and_widens_nothing(models):
    first = models.add()
    halted, judge, failed, partly = models.add(), models.add(only_judge=True), models.add(), models.add()
    models.held.halt(halted, actor="op", now=models.site.now)
    models.begin(failed, Plan(stages=(100,), min_failures=1))
    models.held.take_report(failed, "dev-cam1", good=False, reason="slow", now=models.site.now)
    models.begin(partly)
    bad = models.add()
    models.begin(bad, Plan(stages=(100,)))
    done = models.held.roll_back(bad, actor="op", now=models.site.now)
    assert (done["version"], done["share"]) == ("5", 5)
    done = models.held.roll_back(partly, actor="op", now=models.site.now)
    assert (done["version"], done["offered"], done["share"]) == ("1", first, 100)
    assert models.offered() == ["1"]
    assert [models.state(m) for m in (halted, judge)] == ["halted", "only to be judged"]


def test_a_rollback_with_nothing_to_go_back_to_changes_nothing(models):
    first = models.add()
    models.held.halt(first, actor="op", now=models.site.now)
    second = models.add()
    models.begin(second, Plan(stages=(100,)))
    with pytest.raises(MissingFileError, match="on offer"):
        models.held.roll_back(second, actor="op", now=models.site.now)
    assert models.offered() == ["2"]


def everything_about(models, digest):
    """The listed model, its stored verdict and rollout, and the order in which it came."""
    listed = models.held.listed(models.site.now)
    return [m["digest"] for m in listed], next(m for m in listed if m["digest"] == digest)


def test_adding_the_same_file_again_leaves_state_rollout_and_verdict_alone_and_says_so(models):
    first = models.add()
    second = models.add()
    models.begin(second, Plan(stages=(5, 100), min_failures=1))
    models.held.take_report(second, "dev-cam1", good=True, reason="", now=models.site.now)
    body = cbor.encode({
        "model": second, "verdict": "low leakage", "policy": "argmax", "serial": 3, "issued": 1, "expires": 2**40,
    })  # fmt: skip
    signed = cbor.encode([body, models.site.keys["risk-lab"].sign("verdict", body)])
    models.held.take_verdict(signed, "risk-lab", models.site.now)
    before = everything_about(models, second)
    path = str(models.folder / "model.onnx")
    for args in ({"name": "eye", "version": "2"}, {"name": "eye", "version": ""}, {"name": "", "version": ""}):
        models.site.now += 10
        for extra in ({}, {"only_judge": True}):
            told = models.command("model-add", path=path, **args, **extra)
            assert (told["digest"], told["id"], told["version"], told["unchanged"]) == (second, "eye", "2", True)
            assert everything_about(models, second) == before
    models.held.halt(first, actor="op", now=models.site.now)
    (models.folder / "model.onnx").write_bytes(b"version 1")
    told = models.command("model-add", path=path, name="eye", version="1")
    assert (told["unchanged"], told["state"], models.state(first)) == (True, "halted", "halted")


def test_a_version_names_the_same_bytes_for_ever_and_a_file_has_one_name(models):
    first = models.add()
    before = everything_about(models, first)
    for content, name, version, said in (
        (b"others", "eye", "1", "eye 1 is here already with other bytes"),
        (b"version 1", "eye", "2", "these bytes are here already, as eye 1"),
        (b"version 1", "ear", "1", "these bytes are here already, as eye 1"),
    ):
        (models.folder / "m.onnx").write_bytes(content)
        with pytest.raises(EdgeprivError, match=said) as refused:
            models.command("model-add", path=str(models.folder / "m.onnx"), name=name, version=version)
        assert refused.value.hint
        assert everything_about(models, first) == before
    told = models.command("model-add", path=str(models.folder / "model.onnx"), name="eye", version="1")
    assert told["unchanged"]
