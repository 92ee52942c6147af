"""The device looks at each update before it leaves, and acts as its owner's policy says."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from device_site import classifier, device_config
from gateway_site import Site

from edgepriv.device.config import RoundsConfig, SelfCheckConfig, load_config
from edgepriv.device.learn import Learner
from edgepriv.errors import ConfigError
from edgepriv.federated import head
from edgepriv.federated.local_update import LocalUpdate
from edgepriv.wire import rounds
from edgepriv.wire.update import decode_update, encode_update

CLASSES, FEATURES = 4, 6
GLOBAL = {
    "head.weight": np.random.default_rng(1).normal(0, 0.1, (CLASSES, FEATURES)).astype(np.float32),
    "head.bias": np.zeros(CLASSES, np.float32),
}


class Files:
    """A fetcher that has the weights already."""

    max_bytes = 1 << 20

    def __init__(self, path):
        self.path = path

    def want(self, digest, size):
        return self.path

    def forget(self, keep):
        """It has nothing else."""


class Device:
    """A learner of one device with what it wants to send."""

    def __init__(self, site, tmp_path, policy, *, images=3, weights=None, trainer=None, trainable=("head.*",), **check):
        self.sent, self.uploads, self.weights = [], {}, weights or GLOBAL
        path = tmp_path / "weights.epu"
        path.write_bytes(encode_update(self.weights))
        self.raw = path.read_bytes()
        self.learner = Learner(
            site.keys["dev-cam1"], site.trust, RoundsConfig(min_samples=1), state=tmp_path, fetcher=Files(path),
            send=lambda message: self.sent.append(message) or True,
            spool_upload=self.uploads.__setitem__, drop_upload=lambda number: None,
            model=bytes(32), trainable=trainable, metas={}, trainer=trainer, check=SelfCheckConfig(policy, **check),
        )  # fmt: skip
        rng = np.random.default_rng(0)
        for i in range(images):
            self.learner.samples.add(str(i), np.abs(rng.normal(size=FEATURES)).astype(np.float32), i % CLASSES)

    def take_part(self, number=1, privacy="clear", statistics="home", encoding="float32", **training):
        opened = rounds.RoundOpen(
            round=number, cohort="0", model="m", base=hashlib.sha256(self.raw).digest(), base_bytes=len(self.raw),
            tensors=tuple([n, list(v.shape)] for n, v in self.weights.items()), privacy=privacy, join_by=5.0,
            deadline=60.0, clip=1000.0, fraction_bits=16, ring_bits=64, max_weight=100, devices=2, quorum=1,
            encoding=encoding, keep=1.0, seed=b"", noise="none", noise_multiplier=0.0, survivors=1, colluders=0,
            delta=1e-5, participation="all", statistics=statistics, training={"learning_rate": 0.1, **training},
        )  # fmt: skip
        self.learner.receive(rounds.step_message(number, "open", opened), 1.0)
        self.learner.step(2.0)
        raw = self.uploads.get(number)
        return None if raw is None else decode_update(raw, max_bytes=1 << 20).tensors

    def plain(self, number=1, **training):
        """What the trainer alone would have sent."""
        from edgepriv.federated.local_recipe import LocalRecipe

        x, y = self.learner.samples.arrays()
        return head.train_head(self.weights, x, y, LocalRecipe(0.1, **training), seed=number)


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path / "site")


def test_send_reports_what_is_above_a_limit_and_sends_as_it_is(site, tmp_path):
    device = Device(site, tmp_path, "send")
    sent = device.take_part()
    for name, value in device.plain().items():
        assert np.array_equal(sent[name], value)
    assert device.learner.counters == {"self_check_send": 1, "self_check_above_limit": 1}


def test_refuse_keeps_the_update_at_home_says_so_and_is_counted(site, tmp_path):
    device = Device(site, tmp_path, "refuse")
    assert device.take_part() is None
    assert device.learner.counters["self_check_refused"] == 1
    answer = rounds.read_step(device.sent[-1], up=True)
    assert not answer.accept
    assert "stays on the device" in answer.reason
    assert device.take_part(2) is None
    assert device.learner.counters["self_check_refused"] == 2


def test_refuse_lets_an_update_within_the_limits_pass(site, tmp_path):
    device = Device(site, tmp_path, "refuse", images=200, max_explained_variance=1.0)
    assert device.take_part() is not None
    assert device.learner.counters["self_check_refused"] == 0


def test_add_noise_adds_the_noise_that_meets_the_limit(site, tmp_path, caplog):
    device = Device(site, tmp_path, "add_noise", images=12)
    with caplog.at_level("INFO", logger="edgepriv.device.learn"):
        sent = device.take_part()
    moved = np.abs(sent["head.weight"] - device.plain()["head.weight"]).mean()
    record = json.loads(caplog.records[-1].message.split(": ", 1)[1])
    assert record["action"] == "add_noise"
    assert record["explained_variance"] <= 0.2
    assert 0.4 * record["sigma"] < moved < 1.3 * record["sigma"]
    assert device.learner.counters["self_check_add_noise"] == 1


def test_by_default_a_clear_round_gets_no_head_from_which_one_image_can_be_read(site, tmp_path):
    from edgepriv.federated.head_leakage import recover_features

    def error(folder, **kwargs):
        (tmp_path / folder).mkdir()
        device = Device(site, tmp_path / folder, images=1, **kwargs)
        sent = device.take_part()
        wanted, _ = device.learner.samples.arrays()
        rows, _ = recover_features(sent)
        return min((np.linalg.norm(row - wanted[0]) / np.linalg.norm(wanted[0]) for row in rows), default=np.inf)

    assert error("open", policy="send") < 0.01
    assert error("default", policy=SelfCheckConfig().policy) > 0.3


def test_the_encoding_of_the_round_is_what_the_check_counts_with(site, tmp_path, caplog):
    device, said = Device(site, tmp_path, "send", images=20), []
    for number, encoding in ((1, "float32"), (2, "int8")):
        with caplog.at_level("INFO", logger="edgepriv.device.learn"):
            device.take_part(number, encoding=encoding)
        said.append(json.loads(caplog.records[-1].message.split(": ", 1)[1])["explained_variance"])
    assert said[0] > 0.9
    assert said[1] < said[0]


def test_drop_bn_keeps_batch_statistics_at_home_where_the_round_asks_for_them(site, tmp_path):
    weights = {
        "conv.weight": np.zeros((2, 2), np.float32),
        "norm.running_mean": np.zeros(2, np.float32),
        "norm.running_var": np.ones(2, np.float32),
    }

    def trainer(_weights, _settings):
        return LocalUpdate({name: np.full(v.shape, 0.5, np.float32) for name, v in weights.items()}, 40)

    def joins(policy):
        folder = tmp_path / policy
        folder.mkdir()
        device = Device(site, folder, policy, weights=weights, trainer=trainer, trainable=("*",))
        return device, device.take_part(statistics="shared")

    assert set(joins("send")[1]) == set(weights)
    assert set(joins("add_noise")[1]) == {"conv.weight"}
    device, sent = joins("drop_bn")
    assert set(sent) == {"conv.weight"}
    assert device.learner.counters == {"self_check_drop_bn": 1, "self_check_above_limit": 0}
    assert joins("refuse")[1] is None


def test_statistics_that_stay_at_home_anyway_are_no_finding(site, tmp_path):
    weights = {"conv.weight": np.zeros((2, 2), np.float32)}

    def trainer(_weights, _settings):
        tensors = {"conv.weight": np.ones((2, 2), np.float32), "norm.running_mean": np.ones(2, np.float32)}
        return LocalUpdate(tensors, 40)

    device = Device(site, tmp_path, "refuse", weights=weights, trainer=trainer, trainable=("conv.*",))
    assert set(device.take_part()) == {"conv.weight"}


def test_a_head_too_large_for_the_board_is_checked_without_the_bound_and_counted(site, tmp_path, monkeypatch):
    monkeypatch.setattr("edgepriv.federated.head_leakage.AFFORDABLE", 10)
    device = Device(site, tmp_path, "send", images=20)
    assert device.take_part() is not None
    assert device.learner.counters["self_check_without_bound"] == 1


def test_the_check_reaches_the_learner_from_the_configuration_and_the_gateway_hears_its_counters(site, tmp_path):
    from edgepriv.device.start import assemble
    from firmware_sim.faults import MemoryBroker

    config = device_config(
        site, "dev-cam1", classifier(tmp_path / "model"), rounds=RoundsConfig(), self_check=SelfCheckConfig("refuse")
    )
    runtime = assemble(
        config, link=MemoryBroker(seed=0, clock=lambda: site.now).link(), folder=tmp_path, clock=lambda: site.now
    )
    assert runtime.stages.learner._check_policy.action == "refuse"
    runtime.stages.learner.counters["self_check_refused"] += 1
    assert runtime.status(site.now).counters["self_check_refused"] == 1
    runtime.finish()


def test_an_unknown_policy_is_a_configuration_error(tmp_path):
    path = tmp_path / "device.toml"
    text = (
        '[device]\nkey="k"\ntrust="t"\nowner="o"\ngateway="gateway-main"\nstate="s"\n[broker]\nurl="mqtt://h:1"\n'
        '[model]\npath="m"\n[source]\nkind="simulated"\n[self_check]\npolicy = "panic"\n'
    )
    path.write_text(text)
    with pytest.raises(ConfigError, match="panic"):
        load_config(path)
    path.write_text(text.replace("panic", "refuse"))
    assert load_config(path).self_check == SelfCheckConfig("refuse")
