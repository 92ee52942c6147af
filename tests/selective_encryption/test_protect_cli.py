"""The commands from end to end: protect, audit, grant, restore, publish, pull; and a clear error for each bad input."""

import json
import shutil
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional

from edgepriv import datasets
from edgepriv.cli import root
from edgepriv.errors import (
    AuthenticationError,
    DataError,
    EdgeprivError,
    KeyFileError,
    MissingFileError,
    RefusedError,
    TrustError,
)
from edgepriv.keys import Identity
from edgepriv.selective_encryption.select import architectures
from edgepriv.wire.trust import TrustList, sign_trust


def command(*words, code=0):
    """Run a command; returns its parsed JSON, or its text."""
    result = CliRunner().invoke(root, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if "--json" in words else result.stdout


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = datasets.load("digits", split="train")
    x = torch.from_numpy((data.images.astype(np.float32) / 255).transpose(0, 3, 1, 2).copy())
    y = torch.from_numpy(data.labels)
    parts, inputs = [], 1
    for width in (16, 24, 32, 48):
        parts += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    network = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(8):
        for pick in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(network(x[pick]), y[pick]).backward()
            optimizer.step()
    import onnx

    path = tmp_path_factory.mktemp("model") / "digits.onnx"
    onnx.save(architectures.to_onnx(network, (1, 8, 8)), str(path))
    return path


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Keys and a trust list of an owner, a device and a stranger."""
    folder = tmp_path_factory.mktemp("site")
    owner, device, other = (
        Identity.new("owner", "root"),
        Identity.new("device", "cam1"),
        Identity.new("device", "cam2"),
    )
    owner.save(folder / "owner.key")
    device.save(folder / "cam1.key")
    other.save(folder / "cam2.key")
    now = int(time.time())
    listed = TrustList(1, now - 5, now + 100_000, (device.public, other.public))
    (folder / "trust.cbor").write_bytes(sign_trust(listed, owner))
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
path = "{folder / "none.onnx"}"
[source]
kind = "directory"
"""
    )
    return folder


@pytest.fixture(scope="module")
def protected(digits_model, site, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "p"
    report = command(
        *("protect", digits_model, "--data", "digits", "--share", "0.15", "--levels", "0.5,full", "--out", out),
        *("--issuer", site / "owner.key", "--check", "none", "--json"),
    )
    return out, report


def permit(protected, site, level=2, expires="2099-01-01", device="cam1.key.pub"):
    out, _ = protected
    path = site / f"permission-{level}"
    command(
        *("grant", "--model", out, "--level", level, "--device", site / device, "--expires", expires),
        *("--out", path, "--issuer", site / "owner.key"),
    )
    return path


def restore(protected, site, permission, *more, key="cam1.key"):
    return command(
        *("restore", "--model", protected[0], "--permission", permission, "--key", site / key),
        *("--issuer", site / "owner.key.pub", *more),
    )


def fresh_device(site, folder):
    """A configuration with a state of its own: a device follows one repository."""
    config = folder / "device.toml"
    config.write_text((site / "device.toml").read_text().replace(str(site / "state"), str(folder / "state")))
    return config


def test_protect_reports_shares_levels_and_what_was_used(protected):
    _, report = protected
    assert report["schema"] == "edgepriv.protect/1"
    assert report["selection"] == "fisher"
    assert report["share"] <= 0.15
    assert report["masked"] <= report["chance"] + 0.02
    assert abs(report["levels"][0]["quality"] - 0.5) <= 0.02
    assert report["levels"][1]["quality"] == report["plain"] > 0.9


def test_grant_and_restore_open_what_was_granted(protected, site):
    report = restore(protected, site, permit(protected, site), "--json")
    assert (report["level"], report["levels"]) == (2, 2)
    low = restore(protected, site, permit(protected, site, level=1), "--json")
    assert low["level"] == 1
    assert low["sha256"] != report["sha256"]


def test_each_wrong_permission_has_its_own_words(protected, site):
    good = permit(protected, site)
    with pytest.raises(TrustError, match="another device"):
        restore(protected, site, good, key="cam2.key")
    with pytest.raises(TrustError, match="levels 1 to 2"):
        restore(protected, site, good, "--level", "3")
    with pytest.raises(TrustError, match="levels 1 to 2, not 9"):
        permit(protected, site, level=9)
    with pytest.raises(TrustError, match="already have expired"):
        permit(protected, site, expires="2001-01-01")
    with pytest.raises(MissingFileError, match="no such permission"):
        restore(protected, site, site / "nothing")


def test_restoring_writes_no_weight_unless_asked_by_name(protected, site, tmp_path):
    permission = permit(protected, site)
    before = {path: path.stat().st_mtime_ns for path in protected[0].rglob("*")}
    restore(protected, site, permission)
    assert before == {path: path.stat().st_mtime_ns for path in protected[0].rglob("*")}
    restore(protected, site, permission, "--export-unprotected", tmp_path / "clear")
    assert (tmp_path / "clear" / "carrier.onnx").is_file()


def test_protect_audit_prints_the_document(protected, digits_model):
    report = command(
        *("protect", "audit", protected[0], "--data", "digits", "--original", digits_model, "--limit", "60"),
        *("--labels", "20", "--shares", "", "--seeds", "1", "--no-startup", "--no-decoys", "--json"),
    )
    assert report["schema"] == "edgepriv.protect-audit/1"
    wanted = {"share", "masked_accuracy", "plain_accuracy", "chance", "attackers", "worst_gain", "decoys", "levels"}
    assert wanted <= set(report)
    names = {(run["name"], run["data"]) for run in report["attackers"]}
    assert ("BatchNorm re-calibration", 0) in names
    assert ("fine-tuning", 20) in names
    for run in report["attackers"]:
        assert run["gain"] == pytest.approx(run["accuracy"] - max(run["scratch"], run["all_conv"]))
    holders = report["opened_levels"]
    assert [(row["level"], row["name"], row["data"]) for row in holders] == [
        (1, "BatchNorm re-calibration", 0),
        (1, "fine-tuning", 60),  # as many as --limit leaves
    ]
    for row in holders:
        assert abs(row["opened"] - 0.5) <= 0.1
        assert row["gain"] == pytest.approx(row["accuracy"] - max(row["opened"], row["scratch"], row["all_conv"]))


def test_protect_refuses_when_an_attacker_gains_too_much(digits_model, tmp_path):
    with pytest.raises(RefusedError, match="gains too much"):
        command(
            *("protect", digits_model, "--data", "digits", "--share", "0.01", "--max-share", "0.01"),
            *("--select", "random", "--out", tmp_path / "p"),
        )
    assert not (tmp_path / "p" / "manifest.cbor").exists()


def test_an_encrypted_tensor_is_never_trainable(protected, digits_model, tmp_path):
    with pytest.raises(EdgeprivError, match="trainable tensors are encrypted"):
        command(
            *("protect", digits_model, "--share", "1.0", "--trainable", "0.weight", "--out", tmp_path / "p"),
            *("--check", "none"),
        )


def protect_denoiser(folder, *more, size="1,32,32"):
    from safetensors.torch import save_file

    network = architectures.build("dncnn")
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, str(folder / "w.safetensors"))
    return command(
        *("protect", "--arch", "dncnn", "--weights", folder / "w.safetensors", "--input", size),
        *("--out", folder / "p", "--task", "denoise", "--json", *more),
    )


def test_a_named_architecture_with_weights_is_protected_without_data(tmp_path):
    report = protect_denoiser(tmp_path)
    assert report["selection"] == "magnitude"
    assert report["plain"] is None
    assert (tmp_path / "p" / "carrier.onnx").is_file()


def test_a_denoiser_is_delivered_and_judged_by_its_psnr(site, tmp_path):
    options = ("--data", "digits", "--limit", "60", "--check", "none", "--issuer", site / "owner.key")
    protect_denoiser(tmp_path, *options, size="1,8,8")
    permission = tmp_path / "permission"
    command(
        *("grant", "--model", tmp_path / "p", "--level", 1, "--device", site / "cam1.key.pub"),
        *("--expires", "2099-01-01", "--out", permission, "--issuer", site / "owner.key"),
    )

    def publish(*more):
        command(
            *("model", "publish", tmp_path / "p", "--repository", tmp_path / "repo", "--owner", site / "owner.key"),
            *("--data", "digits", "--golden", "4", *more),
        )

    device = fresh_device(site, tmp_path)
    pull = ("model", "pull", "--config", device, "--repository", tmp_path / "repo", "--name", "dncnn")
    publish("--min-psnr-db", "99")
    with pytest.raises(RefusedError, match=r"dB is below 99\.00 dB"):
        command(*pull, "--permission", permission)
    publish("--min-psnr-db", "5")
    report = command(*pull, "--permission", permission, "--json")
    assert report["unit"] == "dB"
    assert 5 < report["quality"] < 60


def test_bad_models_are_clear_errors(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not an ONNX model"):
        command("protect", tmp_path / "x.onnx", "--out", tmp_path / "p")
    with pytest.raises(MissingFileError, match="no such model"):
        command("protect", tmp_path / "y.onnx", "--out", tmp_path / "p")
    with pytest.raises(EdgeprivError, match="give a model file"):
        command("protect", "--out", tmp_path / "p")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--share", "2"), "--share 2 is not a share"),
        (("--select", "foo"), "unknown --select 'foo'"),
        (("--scope", "foo"), "unknown --scope"),
        (("--decoys", "foo"), "unknown --decoys"),
        (("--mode", "foo"), "unknown --mode"),
        (("--check", "foo"), "unknown --check"),
        (("--task", "foo"), "unknown --task"),
        (("--levels", "0.9,0.6"), "targets must rise"),
        (("--levels", "0.5,full"), "need data"),
        (("--share", "0.00001"), "less than one kernel"),
        (("--device", "nowhere"), "torch cannot compute"),
    ],
)
def test_a_wrong_flag_of_protect_is_named(digits_model, tmp_path, flags, words):
    with pytest.raises(EdgeprivError, match=words):
        command("protect", digits_model, "--out", tmp_path / "p", *flags)
    assert not (tmp_path / "p" / "manifest.cbor").exists()


def half(path, folder, kind=10):
    """The same model with float16 weights and input, or with an input of another type."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    for tensor in model.graph.initializer if kind == 10 else ():
        if tensor.data_type == 1:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    del model.graph.value_info[:]
    onnx.save(model, str(folder / "half.onnx"))
    return folder / "half.onnx"


def test_a_float16_model_is_protected_delivered_and_judged(digits_model, site, tmp_path):
    out, source = tmp_path / "p", half(digits_model, tmp_path)
    report = command(
        *("protect", source, "--data", "digits", "--share", "0.15", "--levels", "0.5,full", "--out", out),
        *("--issuer", site / "owner.key", "--check", "none", "--json"),
    )
    assert (report["input_type"], report["selection"]) == ("float16", "fisher")
    assert report["masked"] <= report["chance"] + 0.02
    command(
        *("model", "publish", out, "--repository", tmp_path / "repo", "--owner", site / "owner.key"),
        *("--data", "digits", "--golden", "24", "--min-accuracy", "0.8"),
    )
    pull = ("model", "pull", "--config", fresh_device(site, tmp_path), "--repository", tmp_path / "repo")
    found = command(*pull, "--name", "half", "--permission", permit((out, None), site), "--json")
    assert found["quality"] >= 0.8
    with pytest.raises(DataError, match="takes uint8: devices feed"):
        command("protect", half(digits_model, tmp_path, kind=2), "--out", tmp_path / "q")


def test_a_further_version_goes_on_with_name_issuer_and_positions_of_the_one_before(digits_model, tmp_path):
    flags = ("--share", "0.1", "--check", "none", "--json")
    command("protect", digits_model, "--name", "eye", "--out", tmp_path / "one", *flags)
    report = command("protect", digits_model, "--previous", tmp_path / "one", "--out", tmp_path / "two", *flags)
    assert (report["name"], report["previous_version"]) == ("eye", 1)
    carriers = [(tmp_path / name / "carrier.onnx").read_bytes() for name in ("one", "two")]
    assert carriers[0] == carriers[1]
    issuers = [(tmp_path / name / "owner" / "issuer.key.pub").read_bytes() for name in ("one", "two")]
    assert issuers[0] == issuers[1]
    again = ("protect", digits_model, "--out", tmp_path / "three", *flags, "--previous", tmp_path / "two")
    with pytest.raises(EdgeprivError, match="version 2 does not follow version 2"):
        command(*again, "--version", "2")
    with pytest.raises(EdgeprivError, match="folded in one of the two"):
        command(*again, "--keep-bn")
    with pytest.raises(MissingFileError, match="holds no protected model"):
        command(*again[:-1], tmp_path)


def test_a_model_without_convolution_and_a_wrong_shape_are_clear_errors(tmp_path):
    from onnx import TensorProto, helper, numpy_helper, save

    info = helper.make_tensor_value_info
    shape = [info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", shape[:1], shape[1:], [weight])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(tmp_path / "m.onnx"))
    with pytest.raises(DataError, match="no convolution"):
        command("protect", tmp_path / "m.onnx", "--out", tmp_path / "p")
    with pytest.raises(DataError, match=r"does not run on this data: .*Expected: 2"):
        command("protect", tmp_path / "m.onnx", "--dense", "--data", "digits", "--out", tmp_path / "p")
    weights = tmp_path / "w.safetensors"
    with pytest.raises(EdgeprivError, match="--input '3,a' is not"):
        protect_denoiser(tmp_path, size="3,a")
    assert weights.is_file()


def test_a_tampered_segment_and_another_file_for_a_permission_are_named(protected, site, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(protected[0], copy)
    good = permit(protected, site)
    segment = copy / "level-1.segment"
    segment.write_bytes(segment.read_bytes()[:-1] + b"x")
    with pytest.raises(AuthenticationError, match=r"level-1\.segment is not authentic"):
        restore((copy, None), site, good)
    (copy / "carrier.onnx").unlink()
    with pytest.raises(MissingFileError, match=r"lacks carrier\.onnx"):
        restore((copy, None), site, good)
    (tmp_path / "rubbish").write_bytes(b"hello")
    with pytest.raises(DataError, match="not a signed permission"):
        restore(protected, site, tmp_path / "rubbish")
    with pytest.raises(MissingFileError, match="holds no protected model"):
        command("grant", "--model", tmp_path, "--level", 1, "--device", "x", "--expires", "2099-01-01", "--out", "y")
    with pytest.raises(EdgeprivError, match="not of an owner"):
        command(
            *("model", "publish", protected[0], "--repository", tmp_path / "r", "--owner", site / "cam1.key"),
            *("--data", "digits"),
        )


def test_a_model_is_published_pulled_tested_switched_and_reported(protected, site, tmp_path):
    out, _ = protected
    command(
        *("model", "publish", out, "--repository", tmp_path / "repo", "--owner", site / "owner.key"),
        *("--data", "digits", "--golden", "24", "--min-accuracy", "0.8"),
    )
    config = ("--config", fresh_device(site, tmp_path))
    pull = ("model", "pull", *config, "--repository", tmp_path / "repo", "--name", "digits")
    with pytest.raises(EdgeprivError, match="no permission"):
        command(*pull)
    assert "no permission" in command("model", "status", *config)
    report = command(*pull, "--permission", permit(protected, site), "--confirm", "--json")
    assert report["quality"] >= 0.8
    assert not report["trial"]
    assert command("model", "status", *config, "--json")["version"] == 1


def test_two_versions_from_two_bundle_folders_reach_a_device(protected, digits_model, site, tmp_path):
    config, second = fresh_device(site, tmp_path), tmp_path / "second"
    command(
        *("protect", digits_model, "--data", "digits", "--share", "0.15", "--levels", "0.5,full", "--out", second),
        *("--issuer", site / "owner.key", "--check", "none", "--previous", protected[0], "--json"),
    )
    pull = ("model", "pull", "--config", config, "--repository", tmp_path / "repo", "--name", "digits", "--confirm")
    for number, folder in enumerate((protected[0], second), 1):
        command(
            *("model", "publish", folder, "--repository", tmp_path / "repo", "--owner", site / "owner.key"),
            *("--data", "digits", "--golden", "8"),
        )
        report = command(*pull, "--permission", permit((folder, None), site), "--json")
        assert (report["version"], report["installed"]) == (number, True)
    before = {path: path.read_bytes() for path in (tmp_path / "repo").rglob("*") if path.is_file()}
    with pytest.raises(KeyFileError, match="devices would refuse"):
        command(
            *("model", "publish", second, "--repository", tmp_path / "repo", "--owner", site / "owner.key"),
            *("--data", "digits", "--tuf-keys", tmp_path / "lost.json"),
        )
    assert before == {path: path.read_bytes() for path in (tmp_path / "repo").rglob("*") if path.is_file()}


def test_a_shipment_carries_permissions_and_is_installed_as_the_runtime_does(protected, site, tmp_path):
    config = fresh_device(site, tmp_path)
    publish = (
        *("model", "publish", protected[0], "--repository", tmp_path / "repo", "--owner", site / "owner.key"),
        *("--data", "digits", "--golden", "8", "--shipment", tmp_path / "digits.shipment"),
    )
    command(*publish)
    install = ("model", "install", tmp_path / "digits.shipment", "--config", config)
    with pytest.raises(TrustError, match="no permission"):
        command(*install)
    other = permit(protected, site, device="cam2.key.pub")
    with pytest.raises(EdgeprivError, match="is not a verdict"):
        command(*publish, "--verdict", other)
    command(*publish, "--permission", other, "--permission", permit(protected, site, level=1))
    report = command(*install, "--json")
    assert (report["installed"], report["version"], report["trial"]) == (True, 1, True)
    assert command("model", "confirm", "--config", config).startswith("digits version 1 runs (")
    assert not (tmp_path / "state" / "models" / "incoming").exists()
    (tmp_path / "rubbish").write_bytes(b"hello")
    with pytest.raises(DataError, match="not a model delivery"):
        command("model", "install", tmp_path / "rubbish", "--config", config)
