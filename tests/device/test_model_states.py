"""The model store's states: what was confirmed is never lost, whatever is delivered, renewed, refused or cut short."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_site import CHILD_START, Maker, answers, install, new_store
from onnx import TensorProto, helper

from edgepriv.device import protected
from edgepriv.device.infer import Inferer, ModelSpec
from edgepriv.device.models import ModelStore
from edgepriv.device.packing import Golden, Limits, pack
from edgepriv.errors import DataError, EdgeprivError, MissingFileError, RefusedError, TemporaryError, TrustError
from edgepriv.keys import Identity
from edgepriv.selective_encryption.restore import Restored


@pytest.fixture(scope="module")
def maker():
    return Maker()


class Device:
    """One store and what its owner sends; ``start`` is what the runtime does, ``crash`` a start without end."""

    def __init__(self, maker, folder):
        folder.mkdir(exist_ok=True)
        self.maker, self.folder = maker, folder
        self.store = new_store(maker, folder / "s")

    def install(self, version, *, permission=None, **options):
        raw = self.maker.delivery(version, **options)
        return install(self.store, self.maker, self.folder, raw, version, permission=permission)

    def reread(self):
        self.store = ModelStore(self.store.folder, self.store.identity, self.store.trust)
        return self.store

    def crash(self):
        return self.reread().recover()

    def start(self):
        self.crash()
        candidate = self.store.current
        self.store.open_judged(candidate).wipe()
        self.store.confirm(candidate)

    def confirmed(self, version, **options):
        self.install(version, **options)
        self.start()
        return self.store.state.current

    @property
    def version(self):
        return self.reread().report()["version"]


@pytest.fixture
def device(maker, tmp_path):
    return Device(maker, tmp_path)


@pytest.mark.parametrize("kind", ["garbage", "expired", "of another device", "of another version"])
def test_a_bad_permission_for_the_running_delivery_is_refused_and_the_model_still_opens(maker, device, kind):
    device.confirmed(1)
    bad = {
        "garbage": lambda: b"garbage",
        "expired": lambda: maker.permission(1, device.store.identity, lasts=1),
        "of another device": lambda: maker.permission(1, Identity.new("device", "cam2")),
        "of another version": lambda: maker.permission(2, device.store.identity),
    }[kind]()
    before = device.store.state
    with pytest.raises(EdgeprivError):
        device.install(1, permission=bad)
    with pytest.raises(RefusedError, match="refused before"):
        device.install(1, permission=bad)
    assert answers(device.store, maker)
    for _ in range(3):
        device.start()
        assert answers(device.store, maker)
    assert dataclasses.replace(device.store.state, refused={}) == dataclasses.replace(before, refused={})
    assert not any(bad == path.read_bytes() for path in device.folder.rglob("*") if path.is_file())


def test_a_refusal_does_not_end_the_trial_of_what_runs(device):
    good = device.confirmed(1)
    device.install(2)
    for attempt in (lambda: device.install(3, verdict=None), lambda: device.install(2, permission=b"garbage")):
        with pytest.raises(EdgeprivError):
            attempt()
    assert device.store.report()["trial"]
    assert [device.crash() == good for _ in range(3)] == [False, False, True]


def test_installing_is_no_failed_start_of_what_is_on_trial(device):
    device.confirmed(1)
    device.install(2)
    for wrong in range(1, 6):
        with pytest.raises(EdgeprivError):
            device.install(3, limits=Limits(max_rss_bytes=0, min_accuracy=wrong / 10))
    assert device.store.state.attempts == 0
    assert device.version == 2
    device.start()
    assert (device.version, device.store.report()["trial"]) == (2, False)


def test_a_version_that_was_never_confirmed_is_not_the_last_good_one(device):
    good = device.confirmed(1)
    device.install(2)
    device.install(3)
    assert [device.crash() == good for _ in range(3)] == [False, False, True]


def test_a_renewed_permission_for_the_same_level_is_taken_without_a_trial(maker, device):
    device.confirmed(1)
    current = device.confirmed(2)
    renewed = maker.permission(2, device.store.identity, lasts=20_000)
    device.install(2, permission=renewed)
    for _ in range(4):
        assert device.crash() == current
    assert not device.store.report()["trial"]
    assert device.store.current.permission == renewed
    assert answers(device.store, maker)


def test_a_permission_that_the_owner_has_replaced_is_not_brought_back(maker, device):
    older = maker.permission(1, device.store.identity)
    renewed = Maker(maker.issuer, maker.risk, now=maker.now + 50)
    renewed.bundles = maker.bundles
    device.confirmed(1, permission=renewed.permission(1, device.store.identity))
    before = device.store.current
    with pytest.raises(TrustError, match="older than the one in use"):
        device.install(1, permission=older)
    assert device.reread().current == before
    assert answers(device.store, maker)


def test_a_permission_for_another_level_is_tried_and_the_one_before_comes_back(tmp_path):
    maker = Maker(levels=2)
    device = Device(maker, tmp_path)
    device.store.trust = maker.trust(require_verdict=False)
    device.confirmed(1, limits=Limits())
    first = maker.permission(2, device.store.identity, level=2)
    current = device.confirmed(2, limits=Limits(), permission=first)
    lower = maker.permission(2, device.store.identity, level=1)
    device.install(2, limits=Limits(), permission=lower)
    assert device.store.report()["trial"]
    assert device.store.open().level == 1
    for _ in range(3):
        assert device.crash() == current
    assert device.store.current.permission == first
    assert device.store.open().level == 2
    with pytest.raises(RefusedError, match="refused before"):
        device.install(2, limits=Limits(), permission=lower)


def test_a_rollback_of_a_confirmed_model_with_nothing_to_go_back_to_writes_nothing(maker, device):
    device.confirmed(1)
    device.confirmed(2)
    before = (device.store.folder / "state.json").read_bytes()
    with pytest.raises(RefusedError, match="it stays"):
        device.store.roll_back("by hand")
    assert (device.store.folder / "state.json").read_bytes() == before
    assert answers(device.reread(), maker)


def test_a_first_model_that_crashed_twice_goes_on_being_tried_and_the_reason_is_told(maker, device):
    device.install(1)
    running = [device.crash() for _ in range(4)]
    assert len(set(running)) == 1
    assert "went down twice" in " ".join(device.store.report()["refused"].values())
    device.start()
    assert not device.store.report()["refused"]
    assert answers(device.store, maker)


def test_only_revocation_leaves_no_model(maker, device):
    device.confirmed(1)
    current = device.confirmed(2)
    segment = device.store.place() / "level-1.segment"
    content = segment.read_bytes()
    segment.write_bytes(b"a bad block")
    assert not device.reread().revoked()
    assert device.store.withdraw("not so") == current
    with pytest.raises(EdgeprivError):
        device.start()
    segment.write_bytes(content)
    device.start()
    device.store.trust = maker.trust(revoked=[current])
    assert device.store.revoked()
    with pytest.raises(RefusedError, match="no good model is left"):
        device.store.withdraw("the owner has revoked it")
    assert device.store.report()["digest"] == ""
    assert "the owner has revoked it" in device.store.report()["refused"].values()
    with pytest.raises(MissingFileError, match="no model is installed"):
        device.store.roll_back("by hand")


def test_only_what_was_opened_is_confirmed_or_given_up(device):
    device.confirmed(1)
    device.install(2)
    opened = device.reread().current
    device.install(3)
    device.store.confirm(opened)
    assert device.store.report()["trial"]
    assert device.store.roll_back("it did not start", opened) == device.store.state.current
    assert device.version == 3


def test_a_store_of_the_version_before_keeps_its_model_its_trial_and_its_last_good_one(maker, device):
    device.confirmed(1)
    device.install(2)
    older(device.store)
    assert answers(device.reread(), maker)
    device.start()
    assert (device.version, device.store.report()["trial"]) == (2, False)
    with pytest.raises(EdgeprivError):
        device.install(2, permission=b"garbage")
    assert answers(device.reread(), maker)
    device.install(3)
    assert [device.crash() for _ in range(3)][-1] == device.store.state.last_good
    assert answers(device.reread(), maker)


def older(store):
    """Write the store as the version before wrote it."""
    path = store.folder / "state.json"
    state = json.loads(path.read_text())
    chosen = {state["current"]: state.pop("permission"), state["last_good"]: state.pop("good_permission")}
    for name, permission in chosen.items():
        place = store.folder / "versions" / name
        (place / f"permission-{permission}").rename(place / "permission")
    path.write_text(json.dumps(state))


def test_a_folder_that_was_left_half_is_not_taken_for_a_staged_delivery(maker, device):
    device.confirmed(1)
    delivery = device.folder / "next"
    delivery.write_bytes(maker.delivery(2))
    name = device.store.stage(delivery, b"p").name
    place = device.store.folder / "versions" / name
    (place / "carrier.onnx").unlink()
    device.install(2)
    device.start()
    (place / "carrier.onnx").write_bytes(b"a bad block")
    with pytest.raises(EdgeprivError):
        device.start()
    device.install(2)  # the same delivery mends it
    device.start()
    assert (device.version, answers(device.store, maker)) == (2, True)


def test_two_installations_at_once_do_not_touch_each_others_files(maker, device):
    device.confirmed(1)
    child = ModelStore(device.store.folder, device.store.identity, device.store.trust)
    with child.installing():
        part = device.store.folder / "versions" / "half.part"
        part.mkdir()
        with pytest.raises(TemporaryError, match="another installation"):
            device.install(2)
        device.crash()
        device.store.confirm()
        assert part.is_dir()
    device.crash()
    assert not part.exists()
    device.install(2)


def test_what_two_processes_change_at_once_is_not_lost(device):
    device.confirmed(1)
    runtime, child = device.reread(), ModelStore(device.store.folder, device.store.identity, device.store.trust)
    child.raise_floor(child.state.floor_s + 5)
    device.store = child
    device.install(2)
    runtime.raise_floor(child.state.floor_s + 7)
    assert device.version == 2
    assert device.store.state == runtime.state


def test_a_model_that_onnxruntime_refuses_is_refused_with_its_reason(tmp_path):
    maker = Maker()
    device = Device(maker, tmp_path)
    device.confirmed(1)
    maker.plain.opset_import[0].version = 99
    other = Maker(maker.issuer, maker.risk)
    golden = Golden(other.inputs[:, :, :7], other.labels)
    unfit = pack(other.files(2), golden, Limits(), other.issuer, verdicts={"verdict.cbor": other.verdict(2)})
    for made, raw in ((maker, maker.delivery(2)), (other, unfit)):
        (tmp_path / "delivery").write_bytes(raw)
        permission = made.permission(2, device.store.identity)
        with pytest.raises(DataError, match="self-test: the model does not run: "):
            device.store.install(tmp_path / "delivery", permission, protected.runner, clock=lambda: 0.0, rss=lambda: 1)
    assert device.version == 1
    assert sum("self-test: the model does not run: " in why for why in device.store.report()["refused"].values()) == 2
    assert answers(device.store, maker)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE])
def test_a_model_takes_inputs_in_its_own_floating_point_type(kind):
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("Flatten", ["x"], ["y"])]
    graph = helper.make_graph(nodes, "g", [info("x", kind, [1, 3, 4, 4])], [info("y", kind, [1, 48])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    inputs = np.random.default_rng(0).normal(size=(1, 3, 4, 4)).astype(np.float32)
    restored = Restored(1, b"", 0, ("carrier.onnx",), [np.frombuffer(model, np.uint8).copy()])
    assert np.allclose(protected.runner(restored)(inputs), inputs.reshape(-1), atol=1e-2)
    inferer = Inferer(model, ModelSpec("m", width=4, height=4))
    (output,) = inferer.run(inputs)
    assert np.allclose(output.reshape(-1), inputs.reshape(-1), atol=1e-2)
    assert output.dtype == np.float32
    assert ort.InferenceSession(model).get_inputs()[0].type.startswith("tensor(")


def test_a_runner_says_why_a_model_does_not_start():
    restored = Restored(1, b"", 0, ("carrier.onnx",), [np.frombuffer(b"no model", np.uint8).copy()])
    with pytest.raises(DataError, match="self-test: the model does not run: "):
        protected.runner(restored)


CHILD = (
    CHILD_START
    + """
from edgepriv.errors import EdgeprivError
print("ready", flush=True)
for delivery in sorted(folder.glob("next-*"), reverse=True) * 100:
    for permission in sorted(folder.glob(f"permission-{delivery.name[5:]}-*")):
        try:
            store.install(delivery, permission.read_bytes(), run, clock=lambda: 0.0, rss=lambda: 1)
        except EdgeprivError:
            pass
"""
)


def test_a_cut_of_power_at_any_point_of_renewals_and_refusals_leaves_the_confirmed_model_or_a_newer_one(tmp_path):
    maker = Maker()
    device = Device(maker, tmp_path)
    device.store.identity.save(tmp_path / "device.key")
    device.confirmed(1)
    for version in (1, 2):
        (tmp_path / f"next-{version}").write_bytes(maker.delivery(version))
        (tmp_path / f"permission-{version}-0").write_bytes(b"garbage")
        for number in range(1, 4):
            renewed = maker.permission(version, device.store.identity, lasts=10_000 + number)
            (tmp_path / f"permission-{version}-{number}").write_bytes(renewed)
    (tmp_path / "issuer").write_bytes(maker.issuer.public.ed25519)
    (tmp_path / "risk").write_bytes(maker.risk.public.ed25519)
    np.save(tmp_path / "labels.npy", maker.labels)
    rng, confirmed = random.Random(3), 1
    for number in range(8):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.1))
        assert answers(device.reread(), maker)  # while the other process installs
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        (device.crash, device.start)[number % 2]()
        assert answers(device.store, maker)
        assert device.version >= confirmed
        confirmed = confirmed if device.store.report()["trial"] else device.version
        assert not list((device.store.folder / "versions").glob("*.part"))


EVENTS = ("good", "bad", "garbage", "renewed", "crash", "start", "by hand", "older delivery")


@given(st.lists(st.sampled_from(EVENTS), max_size=12))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_happens_a_confirmed_model_is_never_lost(maker, tmp_path_factory, events):
    device = Device(maker, tmp_path_factory.mktemp("device"))
    device.confirmed(1)
    newest = 1
    for number, event in enumerate(events):
        lowest, running = device.store.state.min_version["eye"], device.version
        on_trial = bool(device.store.state.trial)
        newest = min(newest + (event == "good"), 6)
        try:
            happen(device, event, running, newest, lasts=10_001 + number)
        except (RefusedError, TrustError, DataError):
            assert event not in {"crash", "start", "renewed"}
            assert device.version == running
            assert bool(device.store.state.trial) == on_trial
        assert device.reread().state.min_version["eye"] >= lowest
        assert device.version >= lowest
        assert answers(device.store, maker)
    for _ in range(3):
        device.crash()
    device.start()
    assert answers(device.store, maker)


def happen(device, event, running, newest, *, lasts):
    """One thing that an owner, a gateway, an operator or the current may do."""
    match event:
        case "good":
            device.install(newest)
        case "bad":
            device.install(newest + 1, verdict=None)
        case "garbage":
            device.install(running, permission=b"garbage")
        case "renewed":
            device.install(running, permission=device.maker.permission(running, device.store.identity, lasts=lasts))
        case "crash":
            device.crash()
        case "start":
            device.start()
        case "by hand":
            device.store.roll_back("by hand")
        case "older delivery":
            device.install(1, limits=Limits(min_accuracy=0.5))
