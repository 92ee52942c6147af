"""What an audit says of itself: when it is void, weak or of the wrong records, and where labels are not exact."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgepriv import cli, datasets
from edgepriv.cli import synthesis_study as studies
from edgepriv.errors import ConfigError, DataError
from edgepriv.risk.membership import attacks, audit, classifier, scores, shadows
from edgepriv.risk.membership.classifier import Recipe
from edgepriv.risk.membership.kept_rows import KeptRows
from edgepriv.risk.membership.shadow_file import read_shadow_scores


def call(capsys, *argv):
    """Exit code, standard output and standard error of one command."""
    with pytest.raises(SystemExit) as ended:
        cli.run(cli.root, "edgepriv", [str(a) for a in argv])
    out = capsys.readouterr()
    return ended.value.code, out.out, out.err


def auc_of(found, name):
    return next(a.auc for a in found.attacks if a.attack == name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits as files: public, test, members A and non-members B."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("verdicts")
    data = datasets.load("digits", split="all")
    order = np.random.default_rng(5).permutation(len(data))
    for name, rows in (("pub", order[:400]), ("test", order[400:500]), ("A", order[500:1150]), ("B", order[1150:])):
        np.savez(path / f"{name}.npz", images=data.images[rows], labels=data.labels[rows])
    return path


@pytest.fixture(scope="module")
def lab():
    """Parts and a release without noise whose labels are randomised, by a VAE that is given no labels."""
    torch.set_num_threads(1)
    parts = studies.take_parts(datasets.load("digits", split="all"), None, 0)
    settings = studies.Settings(
        mode="unsafe_no_noise", label_epsilon=1.0, conditional=False, extra=0, recipe=Recipe(epochs=1)
    )
    return parts, settings, studies.make_release(parts, settings)


def test_randomised_labels_hide_a_record_from_the_attack_on_its_class_and_not_from_the_one_that_asks_no_class(lab):
    parts, settings, release = lab
    found = studies.shadows_of(parts, settings, studies.pipeline_of(parts, settings, release), "row")
    judged = audit.audit_shadows(found, np.random.default_rng(0))
    assert auc_of(judged, "nearest_any_lira") >= 0.9
    assert auc_of(judged, "nearest_any_lira") - auc_of(judged, "nearest_lira") >= 0.1
    assert judged.strongest.surface == "release"
    assert judged.outcome() == "leak"
    exact = replace(settings, label_epsilon=None)
    found = studies.shadows_of(parts, exact, studies.pipeline_of(parts, exact, release), "row")
    assert found.nearness_any is None


def test_noise_stops_the_attack_that_asks_no_class_and_the_search_for_more_noise_uses_it(lab):
    parts, settings, release = lab
    quiet = replace(settings, mode="noised", noise_ratio=0.1)
    near = [
        shadows.shadow_nearness(
            *studies._pool(parts, quiet), studies.pipeline_of(parts, quiet, release), seed=1, any_class=c
        )
        for c in (False, True)
    ]
    masks = studies._pool(parts, quiet)[1]
    judged = audit.audit_released_sets(near[0], masks, np.random.default_rng(0), nearness_any=near[1])
    assert judged.strongest.attack.startswith("nearest_any")
    release = replace(release, mechanism=studies.mechanism_of(release.vae, parts, quiet))
    wide = replace(quiet, noise_ratio=1.0)
    loud = replace(release, mechanism=studies.mechanism_of(release.vae, parts, wide))
    told = studies.suggest_ratio(parts, wide, loud, judged)
    assert told.noise_ratio is not None
    assert told.auc <= 0.57


def synthesize(capsys, folder, out, *more):
    code, _, err = call(
        capsys, "synthesize", "--data", folder / "A.npz", "--test-data", folder / "test.npz", "--out", out,
        "--no-audit", "--threads", 1, "--vae-epochs", 25, *more,
    )  # fmt: skip
    assert code == 0, err


def audited(capsys, folder, release, *more):
    argv = ("--release", release, "--members", folder / "A.npz", "--non-members", folder / "B.npz", "--json", *more)
    code, out, err = call(capsys, "audit", "membership", *argv)
    return code, json.loads(out) if out else err


def test_the_audit_of_a_released_set_asks_no_class_where_labels_are_not_exact(capsys, folder, tmp_path):
    more = ("--mode", "unsafe_no_noise", "--no-conditional", "--label-epsilon", 1)
    synthesize(capsys, folder, tmp_path / "r", "--public-data", folder / "pub.npz", *more)
    code, found = audited(capsys, folder, tmp_path / "r")
    assert code == 3
    assert found["strongest"].startswith("nearest_any")
    assert found["auc"] >= 0.85
    assert found["outcome"] == "leak"
    assert found["one_run_epsilon_lower_bound"] is None  # the user chose the members
    assert found["noise_null_interval"][0] < found["noise_null"] < found["noise_null_interval"][1]


def test_a_sample_of_the_members_and_a_vae_that_they_trained_make_the_verdict_weak(capsys, folder, tmp_path):
    synthesize(capsys, folder, tmp_path / "r", "--public-data", folder / "pub.npz")
    code, found = audited(capsys, folder, tmp_path / "r", "--limit", 400)
    assert (code, found["outcome"]) == (0, "weak")
    assert "400 members were given and the release was made from 650 records" in found["verdict"]
    code, found = audited(capsys, folder, tmp_path / "r")
    assert (code, found["outcome"]) == (0, "none")
    card = json.loads((tmp_path / "r" / "card.json").read_text())
    (tmp_path / "r" / "card.json").write_text(json.dumps({**card, "vae_trained_on": "dp"}))
    code, found = audited(capsys, folder, tmp_path / "r")
    assert (code, found["outcome"]) == (0, "weak")
    assert any("reuse the VAE" in line for line in found["warnings"])


def test_the_held_out_part_is_said_to_be_unprotected_and_its_vae_stays_unless_told(capsys, folder, tmp_path):
    synthesize(capsys, folder, tmp_path / "given", "--public-data", folder / "pub.npz")
    synthesize(capsys, folder, tmp_path / "held")
    synthesize(capsys, folder, tmp_path / "kept", "--keep-vae")
    synthesize(capsys, folder, tmp_path / "dp", "--vae", "dp", "--vae-epsilon", 8, "--vae-epochs", 1)
    there = {name for name in ("given", "held", "kept", "dp") if (tmp_path / name / "vae.safetensors").exists()}
    assert there == {"given", "kept", "dp"}
    words = "the 216 held-out images are not protected: treat them as published"
    for name in ("held", "kept", "dp"):
        assert words in json.loads((tmp_path / name / "card.json").read_text())["warnings"]
        assert words in (tmp_path / name / "card.html").read_text()
    assert "held-out" not in (tmp_path / "given" / "card.html").read_text()


def test_a_whole_run_that_is_caught_ends_with_code_3_and_a_card_that_says_so_in_one_voice(capsys, folder, tmp_path):
    code, out, err = call(
        capsys, "synthesize", "--data", folder / "A.npz", "--public-data", folder / "pub.npz", "--test-data",
        folder / "test.npz", "--out", tmp_path / "r", "--threads", 1, "--vae-epochs", 20, "--epochs", 1,
        "--targets", 13, "--mode", "unsafe_no_noise", "--max-auc", "0.7",
    )  # fmt: skip
    card = json.loads((tmp_path / "r" / "card.json").read_text())
    assert (code, card["audit"]["outcome"], card["audit"]["limits"]["auc"]) == (3, "leak", 0.7)
    assert card["recommendation"].startswith("Do not release: nearest")
    assert card["audit"]["verdict"].startswith("Leak")
    assert card["audit"]["verdict"] in err
    for place in (out, (tmp_path / "r" / "card.html").read_text(), card["measured_on"]):
        assert "13 fresh runs of this pipeline, each on a random half of 650 private records" in place


def test_shadows_that_hold_nearly_every_record_are_refused_with_the_share_that_they_cannot_judge():
    with pytest.raises(ConfigError, match=r"81\.1% of the records would have fewer than two") as told:
        scores.check_shadow_count(16, 0.01, rate=0.95)
    assert "more nearly as many members as non-members" in told.value.hint
    scores.check_shadow_count(16, 0.01, rate=0.6)
    with pytest.raises(ConfigError, match="too few"):
        scores.check_shadow_count(16, 0.01, rate=1.0)


def test_masks_that_leave_many_records_without_shadows_make_the_verdict_weak():
    rng = np.random.default_rng(0)
    masks, members = rng.random((16, 600)) < 0.5, rng.random(600) < 0.5
    masks[:, :60] = True  # as many ones as before elsewhere, so that the mean tells nothing
    found = one_target(rng.normal(size=600), members, masks, rng.normal(size=(16, 600)))
    assert found.outcome() == "weak"
    assert "10.0% of the records have fewer than two shadows" in found.verdict()


def one_target(margins, members, masks, shadow_margins, **more):
    view = audit.TargetView(margins=margins, shadow_masks=masks, shadow_margins=shadow_margins)
    return audit.report([audit.attack_target(view)], [members], np.random.default_rng(0), shadow_masks=[masks], **more)


def test_a_null_that_is_off_makes_the_audit_void_whichever_it_is():
    rng = np.random.default_rng(3)
    masks, members = rng.random((16, 600)) < 0.5, rng.random(600) < 0.5
    found = one_target(rng.normal(size=600), members, masks, rng.normal(size=(16, 600)))
    assert found.noise_null_interval[0] < found.noise_null < found.noise_null_interval[1]
    assert found.outcome() == "none"
    off = replace(found, noise_null=0.4)
    assert off.outcome() == "void"
    assert off.verdict() == "Void: the null of random scores reads 0.400, so the evaluation itself is wrong."


def test_a_balanced_design_is_void_because_the_null_of_random_scores_is_off():
    rng = np.random.default_rng(6)
    masks = np.argsort(rng.random((8, 4000)), axis=0) < 4
    noise = rng.standard_normal(masks.shape)
    found = audit.audit_released_sets(noise, masks, rng)
    assert found.noise_null < found.noise_null_interval[0]
    assert found.outcome() == "void"


def test_nulls_are_judged_on_the_records_that_the_attack_could_judge():
    rng = np.random.default_rng(0)
    masks, members = rng.random((16, 600)) < 0.5, np.arange(600) < 300
    masks[:, 100:500] = True
    found = one_target(rng.normal(size=600), members, masks, rng.normal(size=(16, 600)) + masks)
    low, high = found.noise_null_interval
    assert high - low == pytest.approx(2 * 3.29 * (201 / (12 * 100 * 100)) ** 0.5, rel=0.05)
    assert found.strongest.attack in {"threshold", "lira"}


def test_equal_models_give_equal_agreement_whatever_their_place_among_the_shadows(monkeypatch):
    data = datasets.load("digits", split="all", limit=300)
    pool, unseen = (data.images[:200], data.labels[:200]), (data.images[200:], data.labels[200:])
    model = classifier.train_classifier(*pool, 10, Recipe(epochs=3), seed=1)
    monkeypatch.setattr(classifier, "train_classifier", lambda *args, **more: model)
    masks = scores.draw_masks(3, 200, np.random.default_rng(0))
    found = shadows.run_shadows(
        pool, unseen, masks, shadows.no_defence, Recipe(epochs=1), seed=7, released=False
    ).agreements
    assert (found == found[0]).all()
    assert 0.2 < found[0].mean() < 1.0
    target = attacks.agreement(lambda x: classifier.logits(model, x).argmax(1), *pool)
    assert (target == found[0]).all()


def linear_model(path, divisor):
    """Digits by nearest mean, as ONNX; ``divisor`` is what it divides pixels by itself."""
    data = datasets.load("digits", split="all")
    flat = data.images.reshape(len(data), -1) / 255.0
    means = np.stack([flat[data.labels == c].mean(axis=0) for c in range(10)]).astype(np.float32)
    weights = [
        numpy_helper.from_array(2 * means / np.float32(divisor), "w"),
        numpy_helper.from_array(-(means**2).sum(axis=1), "b"),
    ]
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w", "b"], ["y"], transB=1)]
    graph = helper.make_graph(
        nodes, "m", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])], weights,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def test_a_model_that_is_asked_with_the_wrong_scale_is_found_by_its_accuracy(capsys, folder, tmp_path):
    told = {}
    for name, divisor in (("right", 1.0), ("wrong", 255.0)):
        linear_model(tmp_path / f"{name}.onnx", divisor)
        argv = ("--model", tmp_path / f"{name}.onnx", "--members", folder / "A.npz", "--non-members", folder / "B.npz")
        code, out, _ = call(capsys, "audit", "membership", *argv, "--json")
        told[name] = json.loads(out)
        assert code == 0
        assert "the model's accuracy" in call(capsys, "audit", "membership", *argv)[1]
    assert told["right"]["accuracy_members"] > 0.8
    assert told["right"]["accuracy_non_members"] > 0.8
    assert not any("about chance" in line for line in told["right"]["warnings"])
    assert told["wrong"]["accuracy_members"] < 0.22
    assert any("about chance for 10 classes" in line for line in told["wrong"]["weak_because"])


def test_a_rate_of_one_in_a_thousand_is_read_and_shown_where_there_are_records_enough(capsys, tmp_path):
    """Random pictures; planted scores of 20 shadows decide nothing, the target's own margins do."""
    rng = np.random.default_rng(0)
    for name, count in (("A", 5200), ("B", 7600)):
        images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(count) % 10)
    linear_model(tmp_path / "m.onnx", 1.0)
    records = 5200 + 7600 - 7600 // 3
    masks = rng.random((20, records)) < 0.5
    np.savez(tmp_path / "s.npz", masks=masks, margins=rng.normal(size=masks.shape) + masks)
    argv = [
        "audit", "membership", "--model", tmp_path / "m.onnx", "--members", tmp_path / "A.npz", "--non-members",
        tmp_path / "B.npz", "--shadow-scores", tmp_path / "s.npz", "--fpr", "0.001",
    ]  # fmt: skip
    code, out, err = call(capsys, *argv)
    assert code == 0, err
    assert "TPR at 0.1 % FPR" in out
    document = json.loads(call(capsys, *argv, "--json")[1])
    assert document["fpr"] == 0.001
    rates = {row["attack"]: row["tpr_at_01pct"] for row in document["attacks"]}
    assert None not in rates.values()
    worst = document["max_tpr_at_01pct"]
    assert rates[worst["attack"]] == worst["tpr"] == max(rates.values())
    assert f"{100 * rates['lira']:.1f} %" in next(line for line in out.splitlines() if line.startswith("lira"))


def test_the_command_and_the_card_start_from_the_same_limits():
    from edgepriv.cli.audit_membership import membership

    given = {option.name: option.default for option in membership.params}
    assert audit.Limits(given["max_auc"], given["max_tpr"], float(given["fpr"])) == audit.LIMITS


def test_a_leak_at_one_in_a_thousand_is_a_leak_at_that_rate_alone():
    rng = np.random.default_rng(1)
    members = np.arange(12000) < 6000
    values = rng.normal(size=12000)
    values[:600] += 20  # one member in ten stands out, and the AUC hardly shows it
    view = audit.TargetView(margins=values)
    found = audit.report([audit.attack_target(view)], [members], rng)
    assert found.attacks[0].tpr_at_01pct == pytest.approx(0.1, abs=0.01)
    assert found.outcome(audit.Limits(rate=0.001)) == "leak"
    assert "the largest TPR at 0.1% FPR is 10" in found.verdict(audit.Limits(rate=0.001))
    assert found.as_json()["max_tpr_at_01pct"]["attack"] == "threshold"


def test_any_changed_byte_of_an_archive_is_an_error_or_changes_nothing(tmp_path):
    rng = np.random.default_rng(0)
    masks, values = rng.random((4, 30)) < 0.5, rng.normal(size=(4, 30))
    np.savez_compressed(tmp_path / "s.npz", masks=masks, margins=values)
    np.savez(tmp_path / "d.npz", images=rng.integers(0, 256, (30, 4, 4), np.uint8), labels=np.arange(30))
    rows = KeptRows(tmp_path / "rows", "name")
    rows.write(0, (values[0],))
    (kept,) = (tmp_path / "rows").glob("*.npz")
    for path in (tmp_path / "s.npz", tmp_path / "d.npz", kept):
        whole = path.read_bytes()
        for at in range(0, len(whole), 3):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            rows.read(0)
            for read in (lambda: read_shadow_scores(tmp_path / "s.npz", 30), lambda: datasets.load(tmp_path / "d.npz")):
                with contextlib.suppress(DataError):
                    read()
        path.write_bytes(whole)
    assert rows.read(0)[0].tolist() == values[0].tolist()
    for bad in (np.array(["a"] * 30), np.arange(30) - 1, np.zeros(30), np.zeros((30, 2), int)):
        np.savez(tmp_path / "d.npz", images=np.zeros((30, 4, 4), np.uint8), labels=bad)
        with pytest.raises(DataError, match="label"):
            datasets.load(tmp_path / "d.npz")
    with pytest.raises(DataError, match="scores must be numbers"):
        scores.check_arrays(np.array(["a"]), np.array([["a"]]), np.ones((1, 1), bool))


def test_members_and_non_members_of_one_class_are_refused(capsys, tmp_path):
    rng = np.random.default_rng(0)
    for name in "AB":
        images = rng.integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.full(300, 3))
    linear_model(tmp_path / "m.onnx", 1.0)
    argv = ("--model", tmp_path / "m.onnx", "--members", tmp_path / "A.npz", "--non-members", tmp_path / "B.npz")
    code, _, err = call(capsys, "audit", "membership", *argv)
    assert (code, "needs at least two classes" in err) == (65, True)
