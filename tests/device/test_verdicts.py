"""A verdict admits a model only for what was judged: policy, purifier, output and preprocessing as well as bytes."""

import hashlib
import json

import numpy as np
import pytest

from edgepriv.device import protected
from edgepriv.device.config import ReleaseConfig, load_config
from edgepriv.device.infer import ModelSpec
from edgepriv.device.verdicts import Release, check_verdict
from edgepriv.errors import TrustError
from edgepriv.keys import Identity, load_public
from edgepriv.wire import cbor
from edgepriv.wire.trust import TrustList

NOW = 1_900_000_000
ARGMAX = Release("argmax")
RISK = Identity.new("risk", "judge")
DIGEST = hashlib.sha256(b"the bytes").digest()
SAID = {
    "model": DIGEST, "verdict": "low leakage", "policy": "argmax,softmax:1", "purifier": b"", "output": ["", "logits"],
    "scale": [1 / 255], "mean": [0.0], "colour": "RGB", "serial": 1, "issued": NOW, "expires": NOW + 100,
}  # fmt: skip


def signed(path, **changed):
    body = cbor.encode({name: value for name, value in {**SAID, **changed}.items() if value is not None})
    path.write_bytes(cbor.encode([body, RISK.sign("verdict", body)]))
    return path


def check(path, *, release=ARGMAX, **spec):
    return check_verdict(path, DIGEST, [RISK.public.ed25519], NOW, release=release, spec=ModelSpec("m", **spec))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "verdict.cbor"


def test_what_was_judged_is_accepted_however_it_is_spelled(file):
    signed(file)
    assert check(file) == NOW
    assert check(file, release=Release("softmax:1")) == NOW
    assert check(file, logits="logits", scale=(0.003921569,), mean=(0.0, 0.0, 0.0)) == NOW
    signed(file, mean=[123.7, 116.3, 103.5], scale=[0.017, 0.0175, 0.0174], colour="BGR", output=["scores"])
    assert check(file, logits="scores", mean=(123.7, 116.3, 103.5), scale=(0.017, 0.0175, 0.0174), colour="BGR") == NOW


@pytest.mark.parametrize(
    ("release", "words"),
    [
        (Release("unsafe_raw_logits"), "policies argmax,softmax:1, this device releases unsafe_raw_logits"),
        (Release("softmax:2"), "this device releases softmax:2"),
        (Release("softmax"), "this device releases softmax"),
        (Release("topk:1"), "this device releases topk:1"),
        (Release("argmax", b"q" * 32), "judged without a purifier, this device releases behind the purifier 7171"),
        (None, "not known"),
    ],
)
def test_a_release_that_was_not_judged_is_refused_and_both_sides_are_named(file, release, words):
    with pytest.raises(TrustError, match=words):
        check(signed(file), release=release)


def test_a_model_judged_behind_a_purifier_runs_behind_no_other_and_not_without(file):
    signed(file, purifier=b"p" * 32)
    for release in (Release("argmax"), Release("argmax", b"q" * 32)):
        with pytest.raises(TrustError, match="judged behind the purifier 7070"):
            check(file, release=release)
    assert check(file, release=Release("argmax", b"p" * 32)) == NOW


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"logits": "embedding"}, "on the output 'logits', model.toml reads 'embedding'"),
        ({"scale": (1.0,)}, r"judged with scale \[0.0039.*model.toml has \[1.0\]"),
        ({"scale": (1 / 255, 1 / 255, 0.1)}, "scale"),
        ({"mean": (127.5,)}, r"judged with mean \[0.0\], model.toml has \[127.5\]"),
        ({"colour": "BGR"}, "judged on RGB pixels, model.toml has BGR"),
    ],
)
def test_another_output_or_preprocessing_than_the_judged_one_is_refused(file, spec, words):
    with pytest.raises(TrustError, match=words):
        check(signed(file), **spec)


def test_the_first_output_is_not_the_judged_one_where_another_was_judged(file):
    with pytest.raises(TrustError, match=r"on the output 'scores', model\.toml reads that comes first"):
        check(signed(file, output=["scores"]))


@pytest.mark.parametrize(
    "changed",
    [
        {"purifier": None}, {"policy": None}, {"output": None}, {"scale": None}, {"mean": None}, {"colour": None},
        {"output": []}, {"scale": 1.0}, {"scale": ["x"]}, {"mean": [None]}, {"colour": 3}, {"purifier": "p"},
        {"policy": ["argmax"]}, {"output": [1]},
    ],
)  # fmt: skip
def test_a_verdict_that_says_less_than_is_demanded_is_refused_and_breaks_nothing(file, changed):
    with pytest.raises(TrustError, match="older form"):
        check(signed(file, **changed))


def purifier(path, strength):
    centres = (5 * np.eye(3)).tolist()
    path.write_text(json.dumps({"schema": "edgepriv.output-purifier/1", "centres": centres, "strength": strength}))
    return path


def test_the_devices_own_configuration_says_what_it_releases(tmp_path):
    assert protected.release_of(ReleaseConfig("softmax")) == Release("softmax:1")
    file = purifier(tmp_path / "purifier.json", 1.0)
    found = protected.release_of(ReleaseConfig("argmax", purifier=file))
    assert found == Release("argmax", hashlib.sha256(file.read_bytes()).digest())


CONFIG = """
[device]
key = "cam1.key"
trust = "trust.cbor"
owner = "owner.key.pub"
gateway = "gateway-x"
state = "state"
[broker]
url = "mqtt://localhost"
[model]
path = "model.onnx"
[source]
kind = "directory"
[release]
policy = "POLICY"
"""


@pytest.fixture
def plain(tmp_path):
    """A device with a plain model file, its description and an owner who demands verdicts."""
    from model_site import TOML, tiny_model

    owner, device = Identity.new("owner", "root"), Identity.new("device", "cam1")
    for identity, name in ((owner, "owner"), (device, "cam1")):
        identity.save(tmp_path / f"{name}.key")
    raw = tiny_model().SerializeToString()
    (tmp_path / "model.onnx").write_bytes(raw)
    (tmp_path / "model.toml").write_text(TOML)
    signed(tmp_path / "verdict.cbor", model=hashlib.sha256(raw).digest(), policy="argmax", output=["", "y"])

    def opened(policy, *, required=True):
        (tmp_path / "device.toml").write_text(CONFIG.replace("POLICY", policy))
        parties = (load_public(tmp_path / "cam1.key.pub"), RISK.public)
        listed = TrustList(1, NOW, NOW + 100, parties, policy={"*": {"require_verdict": required}})
        config = load_config(tmp_path / "device.toml")
        return protected.open_inferer(config, device, listed, NOW)

    return opened


def test_a_verdict_for_argmax_does_not_admit_the_model_where_raw_logits_leave(plain):
    assert plain("argmax").classes == 5
    with pytest.raises(TrustError, match="policies argmax, this device releases unsafe_raw_logits"):
        plain("unsafe_raw_logits")
    assert plain("unsafe_raw_logits", required=False).classes == 5
