"""The runtime takes a carrier and a permission: the true model runs, and never the decoys."""

import time

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepriv.device import protected
from edgepriv.device.config import load_config
from edgepriv.device.infer import Inferer
from edgepriv.errors import DataError, TrustError
from edgepriv.keys import Identity, load_public
from edgepriv.selective_encryption import carrier, manifest, protection
from edgepriv.selective_encryption.select.scores import random_scores
from edgepriv.wire.trust import TrustList

NOW = int(time.time())


def model():
    rng = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(rng.normal(size=(32, 3, 3, 3)).astype(np.float32), "w"),
        numpy_helper.from_array(rng.normal(size=(32, 5)).astype(np.float32), "m"),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["p"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["p", "m"], ["y"]),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, [1, 3, 8, 8])], [info("y", TensorProto.FLOAT, [1, 5])], tensors
    )
    return carrier.normalised(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


@pytest.fixture(params=[False, True], ids=["one file", "external weights"])
def site(tmp_path, request):
    owner, device = Identity.new("owner", "root"), Identity.new("device", "cam1")
    owner.save(tmp_path / "owner.key")
    device.save(tmp_path / "cam1.key")
    plain = model()
    layers = carrier.layers(plain)
    made = protection.draft(
        plain, layers, random_scores(layers, 0), 0.5, secret=b"s" * 32, model_id=b"m" * 16, external=request.param
    )
    bundle = protection.finish(
        made,
        [protection.LevelPlan(None, None, made.choice.units)],
        owner,
        model_id=b"m" * 16,
        version=1,
        mode="levels",
        name="eye",
        now_s=NOW,
        about={},
    )
    folder = tmp_path / "eye"
    folder.mkdir()
    for name, content in {**bundle.files, "manifest.cbor": bundle.manifest}.items():
        (folder / name).write_bytes(content)
    (folder / "model.toml").write_text('id = "eye"\nwidth = 8\nheight = 8\nlabels = ["a", "b", "c", "d", "e"]\n')
    permission = manifest.grant(
        bundle.decoded.binding, 1, bundle.key, device.public, owner, now_s=NOW, expires_s=NOW + 1000
    )
    (tmp_path / "permission").write_bytes(permission)
    return tmp_path, owner, device, plain


def open_inferer(site, *, permission=True, policy=None, now=NOW):
    folder, _, device, _ = site
    line = f'permission = "{folder / "permission"}"' if permission else ""
    (folder / "device.toml").write_text(
        f"""
[device]
key = "{folder / "cam1.key"}"
trust = "{folder / "trust.cbor"}"
owner = "{folder / "owner.key.pub"}"
gateway = "gateway-x"
state = "{folder / "state"}"
[broker]
url = "mqtt://localhost"
[model]
path = "{folder / "eye" / "carrier.onnx"}"
{line}
[source]
kind = "directory"
"""
    )
    listed = TrustList(1, NOW, NOW + 100, (load_public(folder / "cam1.key.pub"),), policy=policy or {})
    return protected.open_inferer(load_config(folder / "device.toml"), device, listed, lambda: now)


def test_the_true_model_runs(site):
    plain = site[3]
    x = np.random.default_rng(2).normal(size=(1, 3, 8, 8)).astype(np.float32)
    expected = ort.InferenceSession(plain.SerializeToString()).run(None, {"x": x})[0]
    inferer = open_inferer(site)
    assert np.array_equal(inferer._session.run(None, {"x": x})[0], expected)


def test_no_session_starts_on_decoys(site):
    with pytest.raises(DataError, match="protected model"):
        open_inferer(site, permission=False)
    with pytest.raises(DataError, match="carrier of a protected model"):
        Inferer.from_file(site[0] / "eye" / "carrier.onnx")
    with pytest.raises(TrustError, match="expired"):
        open_inferer(site, now=NOW + 1000)


def test_the_owners_policy_demands_a_verdict(site):
    with pytest.raises(TrustError, match="no verdict"):
        open_inferer(site, policy={"*": {"require_verdict": True}})


def test_an_altered_carrier_is_refused(site):
    path = site[0] / "eye" / "carrier.onnx"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(Exception, match=r"signed|ONNX"):
        open_inferer(site)
