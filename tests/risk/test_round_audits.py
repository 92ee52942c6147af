"""Canary devices for every round: from the gateway's record to the figure that is stored with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from concurrent.futures import Future

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from edgepriv import datasets  # noqa: E402
from edgepriv.cli.risk import risk  # noqa: E402
from edgepriv.errors import ConfigError, EdgeprivError  # noqa: E402
from edgepriv.mqtt import BrokerSettings  # noqa: E402
from edgepriv.risk import models  # noqa: E402
from edgepriv.risk.config import (  # noqa: E402
    AuditSection,
    RiskConfig,
    RiskSection,
    RoundsSection,
    load_config,
)
from edgepriv.risk.index_page import index_html  # noqa: E402
from edgepriv.risk.metrics import RiskMetrics  # noqa: E402
from edgepriv.risk.pages import answer  # noqa: E402
from edgepriv.risk.round_audit import played  # noqa: E402
from edgepriv.risk.round_watch import RoundWatch  # noqa: E402
from edgepriv.wire import cbor  # noqa: E402
from edgepriv.wire.update import encode_update  # noqa: E402


class AtOnce:
    def submit(self, fn, /, *args):
        future = Future()
        future.set_result(fn(*args))
        return future


class Dies:
    def submit(self, fn, /, *args):
        future = Future()
        future.set_exception(MemoryError("killed"))
        return future


class Rounds:
    """A gateway with ended rounds; honest unless told otherwise."""

    def __init__(self, *rows):
        self.rows = {row["round"]: row for row in rows}
        self.objects, self.reports = {}, {}

    def query(self, what, **args):
        if what == "rounds":
            return {"rounds": [row for n, row in self.rows.items() if n not in self.reports] + ["nonsense"]}
        assert what == "report"
        raw = cbor.encode(args["report"])
        self.reports[int(args["subject"])] = cbor.decode_map(raw, max_bytes=64 << 10)
        return {"accepted": True}

    def fetch_object(self, ref, size, *, max_bytes):
        return self.objects[ref]


def told(number, raw, **changes):
    row = {
        "round": number, "model": "m", "privacy": "clear", "rule": "mean", "outcome": "done", "publish": "weights",
        "before": hashlib.sha256(raw).digest(), "before_bytes": len(raw), "noise": "none", "noise_multiplier": 0.0,
        "clip": 10.0, "statistics": "shared", "training": {"learning_rate": 0.1, "batch_size": 4}, "devices": 5,
    }  # fmt: skip
    return {**row, **changes}


@pytest.fixture
def weights():
    torch.manual_seed(0)
    state = models.build("cnn-bn", 10, 1, 8).state_dict()
    return {name: value.numpy() for name, value in state.items() if value.dtype == torch.float32}


@pytest.fixture
def watch(tmp_path):
    data = datasets.load("digits", split="all")
    np.savez(tmp_path / "canaries.npz", images=data.images[:400], labels=data.labels[:400])

    def build(pool=None, **changes):
        settings = RoundsSection(str(tmp_path / "canaries.npz"), "cnn-bn", public_images=200, iterations=60)
        config = RiskConfig(
            RiskSection(tmp_path / "k", tmp_path / "o", tmp_path / "t", "gateway-main", tmp_path / "state"),
            BrokerSettings("mqtt://127.0.0.1:1"),
            AuditSection("digits"),
            rounds=dataclasses.replace(settings, **changes),
        )
        return RoundWatch(config, pool or AtOnce(), RiskMetrics())

    return build


def serving(raw, *rows):
    gateway = Rounds(*rows)
    gateway.objects[hashlib.sha256(raw).digest()[:16]] = raw
    return gateway


def turns(watch, gateway, n=6):
    for _ in range(n):
        watch.step(gateway)


def test_every_round_is_audited_on_canaries_and_noise_shows_in_the_figures(watch, weights):
    raw = encode_update(weights)
    noisy = {"privacy": "masked", "noise": "distributed", "noise_multiplier": 1.0, "clip": 0.5, "devices": 3}
    gateway = serving(raw, told(1, raw), told(2, raw, **noisy))
    turns(watch(images=2), gateway)
    one, two = gateway.reports[1], gateway.reports[2]
    assert one["verdict"] == "leaks"
    assert one["attack"]["iip"] == 1
    assert one["seen"] == "one device's own update"
    assert one["leakage_bound"] > one["leakage_floor"] + 20
    assert two["clients"] == 3
    assert two["attack"]["iip"] == 0
    assert two["leakage_bound"] < two["leakage_floor"] + 3
    assert "no device's images" in one["about"]


def test_a_head_only_round_is_audited_through_the_frozen_backbone(watch, weights, tmp_path):
    torch.manual_seed(0)
    models.save_weights(models.build("cnn-bn", 10, 1, 8), tmp_path / "backbone.safetensors")
    raw = encode_update({name: weights[name] for name in ("head.weight", "head.bias")})
    gateway = serving(raw, told(7, raw, statistics="home"))
    turns(watch(weights=tmp_path / "backbone.safetensors", images=1), gateway)
    assert gateway.reports[7]["verdict"] == "leaks"
    assert gateway.reports[7]["recipe"]["batch_normalisation"] == "frozen"


def test_what_was_found_survives_a_restart_and_is_not_computed_again(watch, weights):
    raw = encode_update(weights)
    gateway = serving(raw, told(1, raw))
    first = watch(iterations=5)
    first.step(gateway)
    first.step(gateway)
    kept = gateway.reports.pop(1)
    turns(watch(pool=Dies()), gateway, 2)
    assert gateway.reports[1] == kept


def test_a_round_that_cannot_be_audited_is_reported_with_the_reason(watch, weights):
    raw = encode_update({"w": np.zeros(5, np.float32)})
    gone = told(2, raw, before_bytes=0)
    odd = told(3, raw, training={"sorcery": 1})
    gateway = serving(raw, told(1, raw), gone, odd)
    turns(watch(), gateway, 9)
    assert "which cnn-bn has not" in gateway.reports[1]["error"]
    assert "cannot be had" in gateway.reports[2]["error"]
    assert "sorcery" in gateway.reports[3]["error"]


def test_other_weights_than_the_round_began_with_are_never_audited(watch, weights):
    raw, other = encode_update(weights), encode_update({**weights, "head.bias": weights["head.bias"] + 1})
    gateway = serving(raw, told(1, raw))
    gateway.objects[told(1, raw)["before"][:16]] = other
    turns(watch(), gateway)
    assert "other weights" in gateway.reports[1]["error"]


def test_a_worker_that_dies_is_tried_three_times_and_then_reported(watch, weights):
    raw = encode_update(weights)
    gateway = serving(raw, told(1, raw))
    turns(watch(pool=Dies()), gateway, 8)
    assert "the worker ended: MemoryError" in gateway.reports[1]["error"]


def test_without_canaries_nothing_is_asked_and_an_old_gateway_is_not_asked_twice(watch):
    silent = watch(canaries="")
    silent.step(None)
    asked = []

    class Old:
        def query(self, what, **args):
            asked.append(what)
            raise EdgeprivError("the gateway refuses: a risk cannot ask for 'rounds'")

    turns(watch(), Old(), 1)
    service = watch()
    turns(service, Old(), 3)
    assert asked == ["rounds", "rounds"]


def test_a_large_cohort_is_played_by_fewer_devices():
    row = told(1, b"x", privacy="masked", devices=64)
    assert played(row, 4) == 16
    assert played({**row, "devices": 3}, 4) == 3
    assert played({**row, "privacy": "clear"}, 4) == 1


def test_the_pages_and_the_command_show_audited_rounds(watch, weights, tmp_path):
    raw = encode_update(weights)
    gateway = serving(raw, told(1, raw))
    service = watch(iterations=5)
    turns(service, gateway, 2)

    class Service:
        rounds, folder = service, tmp_path / "state"

    assert json.loads(answer(Service, "/rounds")[2])[0]["report"] == gateway.reports[1]
    assert b"What an update of round 1 gives away" in answer(Service, "/rounds/1.html")[2]
    assert answer(Service, "/rounds/../../x.json")[0] == 404
    first = index_html([], service.found(), [])
    report = gateway.reports[1]
    assert f">{report['verdict']}</strong>" in first
    assert f"{report['leakage_bound']:.1f} dB; the prior alone {report['leakage_floor']:.1f} dB" in first
    assert f"{report['attack']['psnr_db']:.1f} dB, SSIM {report['attack']['ssim']:.2f}" in first
    config = tmp_path / "risk.toml"
    config.write_text(
        '[risk]\nidentity="k"\nowner="o"\ntrust="t"\ngateway="gateway-main"\nstate="state"\n'
        '[broker]\nurl="mqtt://127.0.0.1:1"\n[audit]\nprobe="digits"\n'
    )
    shown = CliRunner().invoke(risk, ["rounds", "--config", str(config)])
    assert shown.output.startswith("round 1: ")
    assert "bound" in shown.output
    as_json = CliRunner().invoke(risk, ["rounds", "--config", str(config), "--json"])
    assert json.loads(as_json.output)["rounds"][0]["round"] == 1


def test_canaries_without_an_architecture_are_a_configuration_error(tmp_path):
    config = tmp_path / "risk.toml"
    config.write_text(
        '[risk]\nidentity="k"\nowner="o"\ntrust="t"\ngateway="gateway-main"\nstate="state"\n'
        '[broker]\nurl="mqtt://127.0.0.1:1"\n[audit]\nprobe="digits"\n[rounds]\ncanaries="digits"\n'
    )
    with pytest.raises(ConfigError, match="model is missing"):
        load_config(config)
