"""The audit of a file: what it finds, what it refuses, and what it says when it knows less."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from onnx_graphs import flat_model, value, write
from PIL import Image

from edgepriv.cli.audit_outputs import outputs as command
from edgepriv.device.release import parse_policy
from edgepriv.errors import ConfigError, DataError, MissingFileError, RefusedError, RiskThresholdError
from edgepriv.risk.reconstruction.audit import AuditRequest, audit_outputs
from edgepriv.risk.reconstruction.auditors import RidgeDecoder
from edgepriv.risk.reconstruction.graph_roles import UnsupportedGraphError
from edgepriv.risk.reconstruction.leakage import AuditSettings, Bench, Probe, shrink
from edgepriv.risk.reconstruction.onnx_reader import import_graph
from edgepriv.risk.reconstruction.supplied_model import OpeningLimits, SuppliedModel
from edgepriv.risk.report import audit_html

FAST = AuditSettings(trained=None)
RAW, ARGMAX = parse_policy("unsafe_raw_logits"), parse_policy("argmax")


def audit(path, probes, *, references=3, policies=None, settings=FAST):
    request = AuditRequest(settings=settings, references=references)
    return audit_outputs(
        SuppliedModel.find(path), probes[0], policies or (ARGMAX, RAW), request, reference_data=probes[1]
    )


def test_the_vicious_file_is_flagged_against_references_and_its_honest_twin_is_not(digit_models, digits_probes):
    folder, _ = digit_models
    vicious, honest = (audit(folder / f"{name}.onnx", digits_probes) for name in ("vicious", "honest"))
    assert vicious.verdict.word == "vicious"
    assert honest.verdict.word != "vicious"
    assert vicious.verdict.p_value is None
    leak = {policy.policy: policy.score.explained_variance for policy in vicious.policies}
    assert leak["argmax"] <= leak["unsafe_raw_logits"] / 10
    assert leak["unsafe_raw_logits"] > 0.1 + honest.policies[1].score.explained_variance


def test_without_references_the_cause_stays_unknown(digit_models, digits_probes):
    folder, _ = digit_models
    found = audit(folder / "vicious.onnx", digits_probes, references=0)
    assert found.verdict.word == "high leakage"
    assert "cause unknown" in found.verdict.reason
    assert audit(folder / "vicious.onnx", digits_probes, references=0, policies=(ARGMAX,)).verdict.word == "low leakage"


def test_pictures_without_labels_are_audited_and_the_report_says_what_is_unknown(digit_models, digits_probes):
    folder, _ = digit_models
    unlabelled = Probe("digits", digits_probes[0].images, None)
    found = audit(folder / "vicious.onnx", (unlabelled, None))
    assert any("no labels" in note for note in found.notes)
    assert found.policies[0].accuracy is None
    assert found.policies[1].score.explained_variance > 0.2


def test_the_report_has_the_promised_keys_and_pictures(digit_models, digits_probes):
    folder, _ = digit_models
    found = audit(folder / "honest.onnx", digits_probes, references=0)
    report = json.loads(json.dumps(found.as_dict()))
    assert report["schema"] == "edgepriv.audit-outputs/1"
    assert {"model", "verdict", "p_value", "policies"} <= set(report)
    expected = {"policy", "bits", "explained_variance", "ssim", "psnr_db", "risk_r", "accuracy"}
    assert all(expected <= set(policy) for policy in report["policies"])
    shown = found.pictures["unsafe_raw_logits"]
    assert shown.inputs.shape == shown.reconstructions.shape == shown.class_means.shape
    page = audit_html(found)
    assert page.count("data:image/png;base64,") == 2


def test_the_imported_graph_equals_onnxruntime_and_can_start_afresh(digit_models, digits_probes):
    folder, _ = digit_models
    images = digits_probes[0].images[:40]
    network = import_graph(SuppliedModel.find(folder / "vicious.onnx"), images)
    before = [p.detach().clone() for p in network.parameters()]
    network.reinitialise(1)
    assert all(p.shape == q.shape for p, q in zip(before, network.parameters(), strict=True))
    assert any((p != q).any() for p, q in zip(before, network.parameters(), strict=True))


def test_the_command_prints_one_json_document_and_gates_a_build(digit_models, tmp_path):
    folder, _ = digit_models
    arguments = ["--data", "digits", "--policy", "argmax", "--reference-models", "3", "--auditors", "ridge", "--json"]
    page = tmp_path / "page.html"
    done = CliRunner().invoke(command, ["--model", str(folder / "vicious.onnx"), *arguments, "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["verdict"] == "vicious"
    assert page.read_text().startswith("<!doctype html>")
    gated = CliRunner().invoke(command, ["--model", str(folder / "vicious.onnx"), *arguments, "--fail-on", "vicious"])
    assert isinstance(gated.exception, RiskThresholdError)
    assert gated.exception.exit_code == 3


def test_an_indicator_that_cannot_be_made_is_refused_before_the_audit_or_after_its_report(
    digit_models, tmp_path, digits_probes
):
    model = ["--model", str(digit_models[0] / "honest.onnx"), "--data", "digits", "--auditors", "ridge", "--json"]
    file = tmp_path / "indicator.json"
    for early in (["--reference-models", "1"], ["--unlabelled"]):
        done = CliRunner().invoke(command, [*model, *early, "--indicator", str(file)])
        assert isinstance(done.exception, ConfigError)
        assert not done.stdout
        assert "explained variance" not in done.stderr
    nowhere = CliRunner().invoke(command, [*model, "--html", str(tmp_path / "absent" / "page.html")])
    assert isinstance(nowhere.exception, MissingFileError)
    assert not nowhere.stdout
    folder = tmp_path / "pictures"
    folder.mkdir()
    for at, image in enumerate(digits_probes[0].images[:80]):
        Image.fromarray(image[..., 0]).save(folder / f"{at}.png")
    model[3] = str(folder)
    late = CliRunner().invoke(command, [*model, "--indicator", str(file)])
    assert isinstance(late.exception, DataError)
    assert json.loads(late.stdout)["schema"] == "edgepriv.audit-outputs/1"
    assert not file.exists()


def test_nineteen_references_give_a_p_value(digit_models, digits_probes):
    folder, _ = digit_models
    found = audit(folder / "vicious.onnx", digits_probes, references=19, policies=(ARGMAX,))
    assert found.verdict.p_value == pytest.approx(1 / 20)


# --- bad input ----------------------------------------------------------------------------------------------


def refused(path, probes, words):
    with pytest.raises(DataError, match=words):
        audit(path, probes, references=0)


def test_a_model_without_batch_axis_is_refused(tmp_path, digits_probes):
    matrix = np.ones((8, 10), np.float32)
    path = write(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [value("x", TensorProto.FLOAT, [1, 8, 8])],
        [value("y", TensorProto.FLOAT, None)],
        [("w", matrix)],
    )
    one_row = flat_model(tmp_path / "fixed.onnx", batch=7)
    refused(one_row, digits_probes, "batch size is fixed at 7")
    only = Probe("p", np.zeros((100, 8, 8, 1), np.uint8), None)
    with pytest.raises(DataError, match="batch"):
        audit(
            write(
                tmp_path / "n.onnx",
                [helper.make_node("MatMul", ["x", "w"], ["y"])],
                [value("x", TensorProto.FLOAT, [8, 8])],
                [value("y", TensorProto.FLOAT, None)],
                [("w", matrix)],
            ),
            (only, None),
        )
    assert path.is_file()


def test_a_batch_of_one_is_audited_picture_by_picture(tmp_path, digits_probes):
    few = Probe("few", digits_probes[0].images[:80], digits_probes[0].labels[:80])
    found = audit(flat_model(tmp_path / "one.onnx", batch=1), (few, None))
    assert found.policies[0].accuracy is not None


def test_integer_outputs_are_refused(tmp_path, digits_probes):
    tail = [helper.make_node("ArgMax", ["y"], ["best"], axis=1)]
    refused(flat_model(tmp_path / "i.onnx", tail=tail, kind=TensorProto.INT64), digits_probes, "not scores")


def test_outputs_that_are_no_numbers_are_refused(tmp_path, digits_probes):
    tail = [helper.make_node("Sub", ["y", "y"], ["zero"]), helper.make_node("Log", ["zero"], ["bad"])]
    refused(flat_model(tmp_path / "nan.onnx", tail=tail), digits_probes, "NaN or infinite")


def test_labels_outside_the_outputs_are_refused(tmp_path, digits_probes):
    refused(flat_model(tmp_path / "five.onnx", k=5), digits_probes, "labels reach from 0 to 9")


def test_too_few_pictures_are_refused_and_too_few_for_the_covariance_are_said(tmp_path, digits_probes):
    path = flat_model(tmp_path / "m.onnx")
    tiny = Probe("tiny", digits_probes[0].images[:20], digits_probes[0].labels[:20])
    with pytest.raises(DataError, match="too few"):
        audit(path, (tiny, None))
    few = Probe("few", digits_probes[0].images[:62], digits_probes[0].labels[:62])
    found = audit(path, (few, None))
    assert found.policies[0].score.risk_r is None
    assert any("R is not given" in note for note in found.notes)


def test_pictures_of_another_size_are_refused(tmp_path):
    pictures = Probe("big", np.zeros((100, 16, 16, 1), np.uint8), None)
    with pytest.raises(DataError, match="does not take pictures of 16x16x1"):
        audit(flat_model(tmp_path / "m.onnx"), (pictures, None))


def test_a_file_that_is_no_model_is_refused(tmp_path, digits_probes):
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"PK\x03\x04 certainly no model")
    refused(junk, digits_probes, "not an ONNX file")
    with pytest.raises(MissingFileError):
        SuppliedModel.find(tmp_path / "absent.onnx")


def test_operators_of_other_domains_are_refused(tmp_path, digits_probes):
    node = helper.make_node("Evil", ["x"], ["y"], domain="com.supplier")
    made = helper.make_graph([node], "g", [value("x", 1, ["b", 1, 8, 8])], [value("y", 1, None)])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.supplier", 1)]
    onnx.save(helper.make_model(made, opset_imports=imports), str(tmp_path / "e.onnx"))
    refused(tmp_path / "e.onnx", digits_probes, "outside the ONNX standard")


def test_external_data_elsewhere_is_refused(tmp_path, digits_probes):
    path = flat_model(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    path.write_bytes(model.SerializeToString())
    refused(path, digits_probes, "its weights are said to lie in")


def test_a_model_larger_than_the_machine_allows_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "big.onnx"
    with path.open("wb") as stream:
        stream.truncate(3 * 2**30)
    with pytest.raises(RefusedError, match="3072 MiB"):
        SuppliedModel.find(path)


def test_a_model_that_wants_more_memory_than_its_limit_ends_in_an_error_not_a_crash(tmp_path, digits_probes):
    path = flat_model(
        tmp_path / "m.onnx",
        tail=[helper.make_node("Expand", ["y", "shape"], ["huge"])],
        weights=[("shape", np.array([2000, 2000, 256, 10], np.int64))],
    )
    model = SuppliedModel.find(path, limits=OpeningLimits(memory_bytes=2 * 2**30, timeout_s=60))
    with pytest.raises(DataError):
        model.outputs(digits_probes[0].images[:256])


def test_an_unknown_operator_leaves_a_black_box_audit(tmp_path, digits_probes):
    path = flat_model(tmp_path / "m.onnx", tail=[helper.make_node("Erf", ["y"], ["e"])])
    with pytest.raises(UnsupportedGraphError, match="Erf"):
        import_graph(SuppliedModel.find(path), digits_probes[0].images[:8])
    found = audit(path, digits_probes, references=2)
    assert any("black box only" in note for note in found.notes)


def test_a_weights_file_without_its_architecture_is_a_usage_error(digit_models):
    folder, _ = digit_models
    done = CliRunner().invoke(
        command, ["--model", str(folder / "honest.onnx"), "--data", "digits", "--weights", "w.safetensors"]
    )
    assert isinstance(done.exception, ConfigError)


# --- the bench ----------------------------------------------------------------------------------------------


def test_a_label_alone_explains_nothing_and_a_copy_everything(digits_probes):
    probe, _ = digits_probes
    bench = Bench(probe, FAST)

    class Label:
        name, bits = "label", staticmethod(lambda k: 3.3)

        def apply(self, logits):
            return np.eye(10)[bench.labels]

    fake = np.random.default_rng(0).normal(size=(len(bench.images), 10)).astype(np.float32)
    leak = bench.leakage(fake, Label())
    assert leak.by_auditor["message table"] == pytest.approx(0, abs=1e-9)
    assert abs(leak.score.explained_variance) < 0.02
    copies = RidgeDecoder(bench.pixels, bench.pixels, ridge=1e-6).rebuild(bench.pixels)
    assert np.abs(copies - bench.pixels).max() < 1e-3


def test_large_pictures_are_block_averaged():
    images = np.arange(64 * 96, dtype=np.uint8).reshape(1, 64, 96, 1)
    small = shrink(images)
    assert small.shape == (1, 21, 32, 1)
    assert small[0, 0, 0, 0] == pytest.approx(images[0, :3, :3, 0].mean() / 255)
