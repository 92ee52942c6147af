"""The runtime takes a carrier and a permission: the true model runs, and never the decoys."""

import json
import time

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from model_site import Maker

from edgepriv.cli import root
from edgepriv.device import protected
from edgepriv.device.config import load_config
from edgepriv.device.infer import Inferer
from edgepriv.errors import DataError, TrustError
from edgepriv.keys import Identity, load_public
from edgepriv.wire.trust import TrustList, sign_trust

NOW = int(time.time())


@pytest.fixture(params=[False, True], ids=["one file", "external weights"])
def site(tmp_path, request):
    owner, device = Identity.new("owner", "root"), Identity.new("device", "cam1")
    owner.save(tmp_path / "owner.key")
    device.save(tmp_path / "cam1.key")
    maker = Maker(owner, now=NOW, external=request.param)
    maker.write(tmp_path / "eye")
    (tmp_path / "permission").write_bytes(maker.permission(1, device, lasts=1000))
    return tmp_path, owner, device, maker.plain


def write_config(site, *, permission=True):
    folder = site[0]
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
    return folder / "device.toml"


def open_inferer(site, *, permission=True, policy=None, now=NOW):
    folder, _, device, _ = site
    config = write_config(site, permission=permission)
    listed = TrustList(1, NOW, NOW + 100, (load_public(folder / "cam1.key.pub"),), policy=policy or {})
    return protected.open_inferer(load_config(config), device, listed, now)


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


@pytest.mark.parametrize("site", [True], indirect=True, ids=["external weights"])
def test_the_doctor_and_the_bench_open_the_protected_model_and_write_nothing_in_clear(site):
    folder, owner, device, _ = site
    (folder / "trust.cbor").write_bytes(sign_trust(TrustList(1, NOW - 5, NOW + 10_000, (device.public,)), owner))
    config = str(write_config(site))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    looked = CliRunner().invoke(root, ["doctor", "--config", config, "--no-network", "--no-camera", "--json"])
    (model,) = [f for f in json.loads(looked.stdout)["findings"] if f["name"] == "model"]
    assert (model["state"], "eye, level 1 in memory" in model["text"]) == ("warning", True)
    assert "expires in 0.0 days" in model["text"]
    measured = CliRunner().invoke(root, ["device", "bench", "--config", config, "--frames", "8", "--json"])
    assert measured.exit_code == 0, measured.output
    assert json.loads(measured.stdout)["ratio_local"] > 0
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "permission").unlink()
    looked = CliRunner().invoke(root, ["doctor", "--config", config, "--no-network", "--no-camera", "--json"])
    (model,) = [f for f in json.loads(looked.stdout)["findings"] if f["name"] == "model"]
    assert (model["state"], "no such permission" in model["text"]) == ("failed", True)
