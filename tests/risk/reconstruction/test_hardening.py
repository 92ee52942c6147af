"""The optional defences of one model: the files that switch them on work, and their rows say what was measured."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import helper
from onnx_graphs import flat_model, value, write

from edgepriv.cli.audit_outputs import outputs as audit_command
from edgepriv.cli.harden import harden as command
from edgepriv.datasets import load
from edgepriv.device.indicator import OutputIndicator
from edgepriv.device.purify import OutputPurifier
from edgepriv.device.release import parse_policy
from edgepriv.errors import DataError
from edgepriv.risk.reconstruction.audit import AuditRequest
from edgepriv.risk.reconstruction.defences import Purifier, retrain_last_layer
from edgepriv.risk.reconstruction.graph_roles import UnsupportedGraphError
from edgepriv.risk.reconstruction.hardening import harden
from edgepriv.risk.reconstruction.indicator_fit import fit_indicator, windows_flagged
from edgepriv.risk.reconstruction.leakage import AuditSettings, Probe
from edgepriv.risk.reconstruction.onnx_reader import import_graph
from edgepriv.risk.reconstruction.onnx_writer import write_imported
from edgepriv.risk.reconstruction.supplied_model import SuppliedModel
from edgepriv.risk.reconstruction.vicious import TrainingSet

RAW = parse_policy("unsafe_raw_logits")


@pytest.fixture(scope="module")
def hardened(digit_models, tmp_path_factory):
    folder, _ = digit_models
    out = tmp_path_factory.mktemp("hardened")
    arguments = ["--model", str(folder / "vicious.onnx"), "--data", "digits", "--reference-models", "2"]
    done = CliRunner().invoke(command, [*arguments, "--policy", "argmax", "--policy", "unsafe_raw_logits",
                                        "--out", str(out), "--json"])  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder, out, json.loads(done.stdout)


def test_one_table_names_every_defence_with_its_price_and_what_it_leaves(hardened):
    _, out, report = hardened
    assert report["schema"] == "edgepriv.harden/1"
    rows = {(row["defence"], row["policy"]): row for row in report["defences"]}
    assert {defence for defence, _ in rows} == {"none", "purified 0.5", "purified 0.9", "last layer anew", "indicator"}
    raw = rows["none", "unsafe_raw_logits"]
    assert raw["accuracy_cost"] == 0
    assert raw["explained_variance"] > 0.3  # without a defence the attack works: the positive control
    assert rows["none", "argmax"]["explained_variance"] <= raw["explained_variance"] / 10
    assert rows["purified 0.9", "unsafe_raw_logits"]["explained_variance"] < raw["explained_variance"]
    assert rows["purified 0.9", "unsafe_raw_logits"]["accuracy_cost"] == pytest.approx(0)
    assert all(0 < row["released"] <= 1 for row in report["defences"])
    assert json.loads((out / "defences.json").read_text()) == report


def test_the_devices_purifier_and_indicator_read_the_files_and_agree_with_the_fit(hardened, digits_probes):
    folder, out, _ = hardened
    outputs = SuppliedModel.find(folder / "vicious.onnx").outputs(digits_probes[0].images)
    training = digits_probes[1].images[:4000]
    fitted = Purifier(SuppliedModel.find(folder / "vicious.onnx").outputs(training), 0.9)
    device = OutputPurifier.load(out / "purifier.json")
    assert np.allclose(device.apply(outputs), fitted.apply(outputs), atol=1e-4)
    raw = (out / "indicator.json").read_bytes()
    indicator, seen = OutputIndicator.from_bytes(raw), []
    for row in outputs:
        indicator.observe(row)
        seen.append(indicator.suspicious)
    assert windows_flagged(raw, outputs).tolist() == seen


def test_the_retrained_file_is_a_model_of_its_own_and_can_be_audited(hardened, digits_probes):
    folder, out, report = hardened
    images, labels = digits_probes[0].images, digits_probes[0].labels
    old, new = (SuppliedModel.find(path) for path in (folder / "vicious.onnx", out / "retrained.onnx"))
    assert old.sha256 != new.sha256
    right = (new.outputs(images).argmax(1) == labels).mean()
    row = next(r for r in report["defences"] if r["defence"] == "last layer anew")
    assert right == pytest.approx(row["accuracy"], abs=0.05)
    assert right > 0.8
    import_graph(new, images[:16])


def test_an_audit_behind_a_purifier_measures_what_the_device_then_does(hardened):
    folder, out, report = hardened
    arguments = ["--model", str(folder / "vicious.onnx"), "--data", "digits", "--policy", "unsafe_raw_logits"]
    arguments += ["--reference-models", "2", "--auditors", "ridge", "--json"]
    indicator = out / "fleet.json"
    done = CliRunner().invoke(
        audit_command, [*arguments, "--purifier", str(out / "purifier.json"), "--indicator", str(indicator)]
    )
    assert done.exit_code == 0, done.output
    audited = json.loads(done.stdout)
    row = next(r for r in report["defences"] if (r["defence"], r["policy"]) == ("purified 0.9", "unsafe_raw_logits"))
    assert audited["policies"][0]["explained_variance"] == pytest.approx(row["explained_variance"], abs=0.02)
    assert any("purifier" in note for note in audited["notes"])
    OutputIndicator.load(indicator)


def test_a_matrix_product_with_an_added_bias_is_found_whatever_the_order_of_the_weights(tmp_path, digits_probes):
    generator = np.random.default_rng(0)
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "first"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "last"], ["p"]),
        helper.make_node("Add", ["p", "bias"], ["s"]),
        helper.make_node("Softmax", ["s"], ["y"], axis=1),
    ]
    weights = [
        ("bias", np.zeros(10, np.float32)),
        ("last", generator.normal(0, 0.1, (32, 10)).astype(np.float32)),
        ("first", generator.normal(0, 0.3, (64, 32)).astype(np.float32)),
    ]
    path = write(tmp_path / "m.onnx", nodes, [value("x", 1, ["n", 1, 8, 8])], [value("y", 1, ["n", 10])], weights)
    network = import_graph(SuppliedModel.find(path), digits_probes[0].images[:8])
    data = TrainingSet.of(digits_probes[1].images, digits_probes[1].labels)
    fresh = retrain_last_layer(network, data, epochs=60)
    write_imported(fresh, tmp_path / "new.onnx")
    old, new = (
        dict(zip(("bias", "last", "first"), n.plain_graph()[1].values(), strict=True)) for n in (network, fresh)
    )
    assert np.array_equal(old["first"], new["first"])
    assert not np.array_equal(old["last"], new["last"])
    assert not np.array_equal(old["bias"], new["bias"])
    answers = SuppliedModel.find(tmp_path / "new.onnx").outputs(digits_probes[0].images)
    assert (answers.argmax(1) == digits_probes[0].labels).mean() > 0.8


def test_what_cannot_be_made_is_said(tmp_path, digits_probes, digit_models):
    path = flat_model(tmp_path / "m.onnx", tail=[helper.make_node("Erf", ["y"], ["e"])])
    request = AuditRequest(AuditSettings(trained=None), references=0)
    found = harden(SuppliedModel.find(path), *digits_probes, [RAW], request)
    assert found.retrained is None
    assert not found.indicator
    assert any("no last layer" in note for note in found.notes)
    assert any("no indicator" in note for note in found.notes)
    with pytest.raises(UnsupportedGraphError, match="matrix product"):
        import_graph(SuppliedModel.find(pooled(tmp_path / "p.onnx")), load("digits").images[:4]).last_parameters()
    unlabelled = Probe("digits", digits_probes[0].images, None)
    with pytest.raises(DataError, match="labelled"):
        harden(SuppliedModel.find(digit_models[0] / "honest.onnx"), unlabelled, None, [RAW], request)


def pooled(path):
    nodes = [helper.make_node("Flatten", ["x"], ["y"])]
    return write(path, nodes, [value("x", 1, ["n", 1, 8, 8])], [value("y", 1, ["n", 64])])


def test_an_indicator_of_two_models_flags_a_sequence_as_the_device_does():
    generator = np.random.default_rng(0)
    honest = [generator.normal(0, 1, (300, 4)) + 8 * np.eye(4)[generator.integers(0, 4, 300)] for _ in range(2)]
    raw = fit_indicator(honest, window=10)
    far = generator.normal(0, 1, (60, 4))  # no class stands out, whatever the scale
    assert not windows_flagged(raw, far)[:9].any()
    assert windows_flagged(raw, far)[30:].all()
    assert not windows_flagged(raw, far[:5]).any()
