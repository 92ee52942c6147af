"""Models on a device: bad deliveries are refused with a reason, good ones switch atomically, power may fail."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from model_site import CHILD_START, NOW, Maker, answers, install, new_store

from edgepriv import primitives
from edgepriv.device.models import ModelStore
from edgepriv.device.packing import Limits
from edgepriv.errors import EdgeprivError, RefusedError
from edgepriv.keys import Identity
from edgepriv.selective_encryption import levels


@pytest.fixture(scope="module")
def maker():
    return Maker()


def test_a_good_model_is_installed_confirmed_and_replaced_and_the_last_good_one_stays(maker, tmp_path):
    store = new_store(maker, tmp_path / "s")
    measured = install(store, maker, tmp_path, maker.delivery(1), 1)
    assert (measured.quality, measured.unit) == (1.0, "")
    assert store.report()["trial"]
    store.confirm()
    install(store, maker, tmp_path, maker.delivery(2), 2)
    store.confirm()
    assert store.report()["version"] == 2
    assert not store.report()["refused"]
    assert answers(store, maker)
    assert (tmp_path / "s" / "versions" / store.state.last_good).is_dir()
    assert store.state.floor_s >= NOW


def flipped(raw, at):
    broken = bytearray(raw)
    broken[int(at * len(raw))] ^= 1
    return bytes(broken)


def bad_deliveries(maker):
    stranger = Identity.new("owner", "stranger")
    slow = Limits(min_accuracy=0.9, max_latency_s=1e-9)
    wrong = (maker.labels + 1) % 5
    return {
        "corrupt": (lambda: flipped(maker.delivery(2), 0.6), {}, "signed"),
        "wrongly signed": (lambda: maker.delivery(2, issuer=stranger), {}, "not a pinned model issuer"),
        "downgraded": (lambda: maker.delivery(0 + 1, limits=Limits(min_accuracy=0.5)), {"version": 1}, "older than"),
        "unjudged": (lambda: maker.delivery(2, verdict=None), {}, "no verdict"),
        "judged leaking": (lambda: maker.delivery(2, verdict=maker.verdict(2, "vicious")), {}, "vicious"),
        "judged of other bytes": (
            lambda: maker.delivery(2, verdict=maker.verdict(2, model=bytes(32))),
            {},
            "other bytes",
        ),
        "judged by a stranger": (
            lambda: maker.delivery(2, verdict=maker.verdict(2, risk=Identity.new("risk", "x"))),
            {},
            "not signed by a risk service",
        ),
        "judged for another policy": (
            lambda: maker.delivery(2, verdict=maker.verdict(2, policy="softmax:1,topk:3")),
            {},
            "release policies softmax:1,topk:3, this device releases argmax",
        ),
        "judged behind a purifier": (
            lambda: maker.delivery(2, verdict=maker.verdict(2, purifier=b"p" * 32)),
            {},
            "behind the purifier 707070707070, this device releases without a purifier",
        ),
        "judged by an older risk service": (
            lambda: maker.delivery(2, verdict=maker.verdict(2, purifier=None, output=None, scale=None, mean=None)),
            {},
            "older form",
        ),
        "verdict expired": (lambda: maker.delivery(2, verdict=maker.verdict(2, expires=-1)), {}, "expired"),
        "too slow": (lambda: maker.delivery(2, limits=slow), {}, "ms is over"),
        "too large": (lambda: maker.delivery(2, limits=Limits(max_rss_bytes=10)), {"rss": lambda: 11}, "memory"),
        "accuracy broken": (lambda: maker.delivery(2, labels=wrong), {}, "accuracy 0.000"),
        "no permission": (lambda: maker.delivery(2), {"permission": b""}, "signed"),
        "not a delivery": (lambda: b"hello", {}, "not a model delivery"),
    }


BAD = tuple(bad_deliveries(type("M", (), {"labels": np.zeros(1)})()))


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_delivery_is_refused_on_each_of_twenty_devices_with_the_reason(maker, tmp_path, kind):
    maker.bundle(2)
    first = maker.delivery(1)
    make, options, reason = bad_deliveries(maker)[kind]
    raw = make()
    version = options.pop("version", 2) if isinstance(options, dict) else 2
    for number in range(20):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        store = new_store(maker, folder / "s")
        install(store, maker, folder, first, 1)
        store.confirm()
        if kind == "downgraded":
            install(store, maker, folder, maker.delivery(2), 2)
            store.confirm()
        running = store.state.current
        with pytest.raises(EdgeprivError, match=reason):
            install(store, maker, folder, raw, version, **options)
        assert store.state.current == running
        assert answers(store, maker)
        if kind != "not a delivery":
            assert any(reason in text for text in store.report()["refused"].values())
            with pytest.raises(RefusedError, match="refused before"):
                install(store, maker, folder, raw, version, **options)


def test_a_failed_trial_rolls_back_to_the_last_good_model_and_says_why(maker, tmp_path):
    store = new_store(maker, tmp_path / "s")
    install(store, maker, tmp_path, maker.delivery(1), 1)
    store.confirm()
    good = store.state.current
    install(store, maker, tmp_path, maker.delivery(2), 2)
    assert store.roll_back("the watchdog barked") == good
    assert "the watchdog barked" in store.report()["refused"].values()
    assert answers(store, maker)


def test_two_crashes_during_the_trial_roll_back_by_themselves(maker, tmp_path):
    folder = tmp_path / "s"
    store = new_store(maker, folder)
    install(store, maker, tmp_path, maker.delivery(1), 1)
    store.confirm()
    good = store.state.current
    install(store, maker, tmp_path, maker.delivery(2), 2)
    for _ in range(3):
        store = ModelStore(folder, store.identity, maker.trust())
        running = store.recover()
    assert running == good
    assert "went down twice" in " ".join(store.report()["refused"].values())


def test_a_revoked_last_good_model_does_not_come_back(maker, tmp_path):
    store = new_store(maker, tmp_path / "s")
    install(store, maker, tmp_path, maker.delivery(1), 1)
    store.confirm()
    old = store.state.current
    install(store, maker, tmp_path, maker.delivery(2), 2)
    store.trust = maker.trust(revoked=[old])
    with pytest.raises(RefusedError, match="no good model is left"):
        store.roll_back("broken")


def test_no_true_weight_lies_on_the_devices_disk(maker, tmp_path):
    store = new_store(maker, tmp_path / "s")
    install(store, maker, tmp_path, maker.delivery(1), 1)
    store.confirm()
    hidden = maker.hidden_rows()
    disk = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert len(hidden) > 20
    assert not any(row in disk for row in hidden)


CHILD = (
    CHILD_START
    + """
store.recover()
print("ready", flush=True)
store.install(folder / "next", (folder / "permission").read_bytes(), run, clock=time.perf_counter, rss=lambda: 1)
store.confirm()
print("done", flush=True)
"""
)


def test_a_cut_of_power_at_any_point_of_the_switch_leaves_a_model_that_runs(maker, tmp_path):
    device = Identity.new("device", "cam1")
    base = tmp_path / "base"
    base.mkdir()
    device.save(base / "device.key")
    store = ModelStore(base / "s", device, maker.trust())
    install(store, maker, base, maker.delivery(1), 1)
    store.confirm()
    old = store.state.current
    (base / "next").write_bytes(maker.delivery(2))
    (base / "permission").write_bytes(maker.permission(2, device))
    (base / "issuer").write_bytes(maker.issuer.public.ed25519)
    (base / "risk").write_bytes(maker.risk.public.ed25519)
    np.save(base / "labels.npy", maker.labels)
    rng = random.Random(7)
    outcomes = set()
    for number in range(20):
        folder = tmp_path / f"cut-{number}"
        shutil.copytree(base, folder)
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.06))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        after = ModelStore(folder / "s", device, maker.trust())
        after.recover()
        outcomes.add(after.state.current == old)
        assert answers(after, maker)
        if after.state.current == old:
            install(after, maker, folder, (folder / "next").read_bytes(), 2)
        after.confirm()
        assert after.report()["version"] == 2
        assert answers(after, maker)
    assert outcomes  # both outcomes are right; which one occurs is up to the moment of the cut


def test_the_keys_of_a_level_come_from_the_permission_only(maker):
    bundle = maker.bundle(1)
    with pytest.raises(EdgeprivError):
        levels.unseal(primitives.random_bytes(32), bundle.decoded.binding, 1, bundle.files["level-1.segment"])
