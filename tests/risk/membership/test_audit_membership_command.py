"""``edgepriv audit membership`` and ``edgepriv synthesize`` as a user calls them, with right and with wrong input."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgepriv import cli, datasets
from edgepriv.risk.membership import scores, shadows
from edgepriv.risk.membership.classifier import Recipe, train_classifier
from edgepriv.risk.membership.onnx_model import OnnxClassifier
from edgepriv.synthesis.training import load_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits cut into public, test, members A and non-members B, and an over-fitted model of A."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("membership")
    data = datasets.load("digits", split="all")
    order = np.random.default_rng(5).permutation(len(data))
    images, labels = data.images[order], data.labels[order]
    for name, start, end in (("pub", 0, 500), ("test", 500, 700), ("A", 700, 1250), ("B", 1250, 1797)):
        np.savez(path / f"{name}.npz", images=images[start:end], labels=labels[start:end])
    model = train_classifier(images[700:1250], labels[700:1250], 10, Recipe(epochs=60), seed=1)
    write_onnx(path / "m.onnx", model)
    return path


def write_onnx(path, model, softmax=False):
    names, nodes, weights = ["flat"], [helper.make_node("Flatten", ["x"], ["flat"])], []
    for i, layer in enumerate(m for m in model if isinstance(m, torch.nn.Linear)):
        weights += [numpy_helper.from_array(layer.weight.detach().numpy(), f"w{i}")]
        weights += [numpy_helper.from_array(layer.bias.detach().numpy(), f"b{i}")]
        nodes.append(helper.make_node("Gemm", [names[-1], f"w{i}", f"b{i}"], [f"g{i}"], transB=1))
        nodes.append(helper.make_node("Relu", [f"g{i}"], [f"r{i}"]))
        names.append(f"r{i}")
    last = nodes.pop().input[0]
    if softmax:
        nodes.append(helper.make_node("Softmax", [last], ["p"]))
        last = "p"
    graph = helper.make_graph(
        nodes, "m", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["n", 10])], weights,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def call(capsys, *argv):
    """Exit code, standard output and standard error of one command."""
    with pytest.raises(SystemExit) as ended:
        cli.run(cli.root, "edgepriv", [str(a) for a in argv])
    out = capsys.readouterr()
    return ended.value.code, out.out, out.err


def test_shadows_of_a_named_architecture_find_the_leak_and_end_with_code_3(capsys, folder):
    code, out, _ = call(
        capsys, "audit", "membership", "--model", folder / "m.onnx", "--members", folder / "A.npz",
        "--non-members", folder / "B.npz", "--arch", "auto", "--epochs", 60, "--json", "--threads", 1,
    )  # fmt: skip
    document = json.loads(out)
    assert code == 3
    assert document["schema"] == "edgepriv.audit-membership/1"
    assert document["auc"] > 0.6
    assert document["strongest"] in {"rmia_all", "rmia_out", "lira"}
    assert document["above_threshold"]
    assert document["null_interval"][0] < document["null_auc"] < document["null_interval"][1]


def test_without_shadows_only_weak_attacks_run_and_the_verdict_says_so(capsys, folder):
    code, out, _ = call(
        capsys, "audit", "membership", "--model", folder / "m.onnx", "--members", folder / "A.npz",
        "--non-members", folder / "B.npz",
    )  # fmt: skip
    assert code == 0
    assert "Weak evidence" in out
    assert "quantile" in out
    assert "label_only" in out


def judged_records(folder):
    """Members, then the judged non-members, as the documentation of the shadow file numbers them."""
    a, b = (np.load(folder / name) for name in ("A.npz", "B.npz"))
    kept = np.arange(len(b["images"])) % 3 != 2
    return tuple(np.concatenate([a[key], b[key][kept]]) for key in ("images", "labels"))


def test_shadows_that_were_trained_elsewhere_find_the_leak_too(capsys, folder):
    pool, test = judged_records(folder), np.load(folder / "test.npz")
    masks = scores.draw_masks(16, len(pool[0]), np.random.default_rng(0))
    made = shadows.run_shadows(
        pool, (test["images"], test["labels"]), masks, shadows.no_defence, Recipe(epochs=60), seed=9, released=False
    )
    file = folder / "elsewhere.npz"
    np.savez(file, masks=masks, margins=made.margins, log_probabilities=made.log_probabilities)
    code, out, _ = call(
        capsys, "audit", "membership", "--model", folder / "m.onnx", "--members", folder / "A.npz",
        "--non-members", folder / "B.npz", "--json", "--shadow-scores", file,
    )  # fmt: skip
    document = json.loads(out)
    assert code == 3
    assert document["strongest"] in {"rmia_all", "rmia_out", "lira"}
    assert document["auc"] > 0.6


def test_shadow_scores_that_do_not_fit_are_clear_errors(capsys, folder):
    rng, count = np.random.default_rng(0), len(judged_records(folder)[0])
    masks, margins = rng.random((16, count)) < 0.5, rng.normal(size=(16, count))
    argv = [
        "audit", "membership", "--model", folder / "m.onnx", "--members", folder / "A.npz", "--non-members",
        folder / "B.npz", "--shadow-scores",
    ]  # fmt: skip
    np.savez(folder / "s.npz", masks=masks, margins=margins)
    assert "either --shadow-scores or --arch" in call(capsys, *argv, folder / "s.npz", "--arch", "auto")[2]
    np.savez(folder / "few.npz", masks=masks[:6], margins=margins[:6])
    assert "too few for a false-positive rate" in call(capsys, *argv, folder / "few.npz")[2]
    np.savez(folder / "short.npz", masks=masks[:, :9], margins=margins[:, :9])
    assert "records" in call(capsys, *argv, folder / "short.npz")[2]
    np.savez(folder / "nan.npz", masks=masks, margins=margins * np.nan)
    assert "must be finite" in call(capsys, *argv, folder / "nan.npz")[2]
    for junk in (b"junk", b"", (folder / "s.npz").read_bytes()[:2000]):
        (folder / "junk.npz").write_bytes(junk)
        assert call(capsys, *argv, folder / "junk.npz")[0] == 65
    assert call(capsys, *argv, folder / "absent.npz")[0] == 66


def test_changed_bytes_and_text_in_shadow_scores_or_data_are_clear_errors(capsys, folder, tmp_path):
    count = len(judged_records(folder)[0])
    masks, margins = np.random.default_rng(0).random((16, count)) < 0.5, np.zeros((16, count))
    argv = ("audit", "membership", "--model", folder / "m.onnx", "--members", folder / "A.npz", "--non-members")
    np.savez(tmp_path / "text.npz", masks=masks, margins=margins.astype("U5"))
    np.savez(tmp_path / "numbers.npz", masks=masks.astype("U5"), margins=margins)
    for name in ("text.npz", "numbers.npz"):
        code, _, err = call(capsys, *argv, folder / "B.npz", "--shadow-scores", tmp_path / name)
        assert (code, "masks are booleans, scores are numbers" in err) == (65, True)
    whole = (folder / "B.npz").read_bytes()
    for at in np.random.default_rng(1).integers(0, len(whole), 30):
        (tmp_path / "flipped.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        code, _, err = call(capsys, *argv, tmp_path / "flipped.npz", "--limit", 300)
        assert code in {0, 65}, err


def synthesize(folder, out, *more):
    return (
        "synthesize", "--data", folder / "A.npz", "--public-data", folder / "pub.npz", "--test-data",
        folder / "test.npz", "--out", out, "--no-audit", "--threads", 1, "--vae-epochs", 40, *more,
    )  # fmt: skip


def test_the_released_set_attack_finds_a_release_without_noise_and_not_one_with(capsys, folder, tmp_path):
    verdicts = {}
    for mode in ("noised", "unsafe_no_noise"):
        assert call(capsys, *synthesize(folder, tmp_path / mode, "--mode", mode))[0] == 0
        code, out, _ = call(
            capsys, "audit", "membership", "--release", tmp_path / mode, "--members", folder / "A.npz",
            "--non-members", folder / "B.npz", "--json",
        )  # fmt: skip
        verdicts[mode] = (code, json.loads(out))
    assert verdicts["unsafe_no_noise"][0] == 3
    assert verdicts["unsafe_no_noise"][1]["auc"] >= 0.85
    assert verdicts["noised"][0] == 0
    assert verdicts["noised"][1]["auc"] < 0.6


def test_a_release_whose_vae_stayed_at_home_gives_only_a_weak_verdict(capsys, folder, tmp_path):
    call(capsys, *synthesize(folder, tmp_path / "r", "--drop-vae"))
    code, out, _ = call(
        capsys, "audit", "membership", "--release", tmp_path / "r", "--members", folder / "A.npz",
        "--non-members", folder / "B.npz",
    )  # fmt: skip
    assert code == 0
    assert "Weak evidence" in out


def test_a_vae_of_private_records_stays_and_its_release_claims_nothing(capsys, folder, tmp_path):
    out = tmp_path / "r"
    code, text, _ = call(capsys, *synthesize(folder, out, "--vae", "private"))
    assert code == 0
    assert not (out / "vae.safetensors").exists()
    everything = text + (out / "card.json").read_text() + (out / "card.html").read_text()
    assert "differentially" not in everything.lower()
    assert "saw the private records" in everything


def test_a_dp_trained_vae_is_named_with_its_budget(capsys, folder, tmp_path):
    out = tmp_path / "r"
    code, _, _ = call(capsys, *synthesize(folder, out, "--vae", "dp", "--vae-epsilon", 4, "--vae-epochs", 2))
    card = json.loads((out / "card.json").read_text())
    assert code == 0
    assert card["vae_trained_on"] == "dp"
    assert card["vae_budget"] == [4.0, 1e-05]
    assert card["epsilon"] > 8.0  # twice the budget of add-or-remove-one, and the noise
    assert "DP-SGD" in card["claim"]


def test_public_data_without_some_classes_need_a_vae_without_labels(capsys, folder, tmp_path):
    data = np.load(folder / "pub.npz")
    low = data["labels"] < 5
    np.savez(tmp_path / "low.npz", images=data["images"][low], labels=data["labels"][low])
    argv = ("--public-data", tmp_path / "low.npz", "--no-conditional", "--vae-epochs", 2)
    code, _, _ = call(capsys, *synthesize(folder, tmp_path / "r", *argv))
    card = json.loads((tmp_path / "r" / "card.json").read_text())
    assert code == 0
    assert card["extra"] == 0
    assert card["accuracy_prior_samples"] is None
    assert set(np.load(tmp_path / "r" / "release.npz")["labels"]) == set(range(10))


def test_too_few_targets_are_refused_before_anything_is_trained(capsys, folder, tmp_path):
    argv = ("--data", folder / "A.npz", "--out", tmp_path / "r", "--targets", 8)
    code, _, err = call(capsys, "synthesize", *argv)
    assert code == 78
    assert "VAE" not in err


def test_a_release_is_written_into_folders_that_are_not_there_yet_and_over_no_file(capsys, folder, tmp_path):
    assert call(capsys, *synthesize(folder, tmp_path / "new" / "folder", "--vae-epochs", 1))[0] == 0
    assert (tmp_path / "new" / "folder" / "card.json").exists()
    (tmp_path / "file").touch()
    code, _, err = call(capsys, *synthesize(folder, tmp_path / "file"))
    assert (code, "exists already" in err) == (78, True)


def test_too_few_private_records_to_audit_are_refused_before_anything_is_trained(capsys, folder, tmp_path):
    code, _, err = call(capsys, "synthesize", "--data", folder / "A.npz", "--limit", 400, "--out", tmp_path / "r")
    assert code == 65
    assert "too few to audit" in err
    assert "VAE" not in err


def test_the_same_seed_repeats_a_release_and_no_seed_does_not(capsys, folder, tmp_path):
    for name, more in (("a", ("--seed", 3)), ("b", ("--seed", 3)), ("c", ()), ("d", ())):
        call(capsys, *synthesize(folder, tmp_path / name, "--vae-epochs", 2, *more))
    pictures = {name: datasets.load(tmp_path / name, split="all").images for name in "abcd"}
    assert (pictures["a"] == pictures["b"]).all()
    assert (pictures["c"] != pictures["d"]).any()


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--epsilon", 0), 78, "epsilon must be a positive number"),
        (("--epsilon", -1), 78, "epsilon must be a positive number"),
        (("--noise-ratio", 0), 78, "noise ratio must be a positive number"),
        (("--noise-ratio", 2, "--epsilon", 1), 78, "not both"),
        (("--latent-dim", 600), 65, "fewer than the 600 latent dimensions"),
        (("--vae", "dp"), 78, "needs its epsilon"),
        (("--label-epsilon", 0), 78, "label epsilon"),
        (("--max-auc", 0.5), 78, "needs the audit"),
        (("--device", "nowhere"), 78, "torch cannot use the device"),
        (("--beta", -1), 2, "not in the range"),
        (("--seed", -1), 2, "not in the range"),
        (("--limit", 0), 2, "not in the range"),
        (("--no-conditional", "--extra", 1), 78, "given labels"),
        (("--no-conditional", "--mode", "prior"), 78, "given labels"),
        (("--vae-epsilon", 2), 78, "no effect without --vae dp"),
        (("--vae-delta", 1e-6, "--vae", "private"), 78, "no effect without --vae dp"),
        (("--mode", "prior", "--epsilon", -1), 78, "has no effect"),
        (("--mode", "unsafe_no_noise", "--noise-ratio", 0), 78, "has no effect"),
    ],
)
def test_a_wrong_setting_of_synthesize_is_a_clear_error(capsys, folder, tmp_path, more, code, words):
    found = call(capsys, *synthesize(folder, tmp_path / "r", "--vae-epochs", 1, *more))
    assert found[0] == code
    assert words in found[2]
    assert not (tmp_path / "r").exists()


def test_missing_classes_and_data_that_are_no_pictures_are_clear_errors(capsys, folder, tmp_path):
    data = np.load(folder / "A.npz")
    some = data["labels"] != 4
    np.savez(tmp_path / "no4.npz", images=data["images"][some], labels=data["labels"][some])
    public = np.load(folder / "pub.npz")
    low = public["labels"] < 5
    np.savez(tmp_path / "low.npz", images=public["images"][low], labels=public["labels"][low])
    np.savez(tmp_path / "sound.npz", images=np.zeros((50, 9)), labels=np.zeros(50, np.int64))
    (tmp_path / "text.npz").write_text("these are no pictures")
    cases = [
        (("--data", tmp_path / "no4.npz"), 65, "no private image of class 4"),
        (("--data", tmp_path / "sound.npz"), 65, "must be uint8"),
        (("--data", tmp_path / "text.npz"), 65, "not a release"),
        (("--data", tmp_path / "absent"), 66, "no such data set"),
        (("--data", folder / "A.npz", "--public-data", tmp_path / "low.npz"), 65, "no image of class"),
        (("--data", folder / "A.npz", "--public-data", folder / "A.npz"), 65, "of the 550 public pictures are private"),
        (("--data", folder / "A.npz", "--test-data", folder / "A.npz"), 65, "test pictures are private ones too"),
    ]
    for argv, code, words in cases:
        found = call(capsys, "synthesize", *argv, "--out", tmp_path / "out", "--no-audit", "--vae-epochs", 1)
        assert (found[0], words in found[2]) == (code, True), found


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("--members", "A.npz", "--non-members", "A.npz", "--model", "m.onnx"), 65, "both among the members"),
        (("--members", "A.npz", "--non-members", "B.npz"), 78, "either --model or --release"),
        (("--members", "A.npz", "--non-members", "B.npz", "--model", "absent"), 66, "no such model"),
        (("--members", "A.npz", "--non-members", "B.npz", "--model", "A.npz"), 65, "not an ONNX model"),
        (
            ("--members", "A.npz", "--non-members", "B.npz", "--model", "m.onnx", "--fpr", "0.001"),
            65,
            "too few to read",
        ),
        (("--members", "A.npz", "--non-members", "B.npz", "--release", "absent"), 66, "no such"),
        (
            ("--members", "A.npz", "--non-members", "B.npz", "--model", "m.onnx", "--shadows", "0"),
            2,
            "not in the range",
        ),
        (
            ("--members", "A.npz", "--non-members", "B.npz", "--model", "m.onnx", "--max-auc", "7"),
            2,
            "not in the range",
        ),
    ],
)
def test_wrong_input_to_the_audit_is_a_clear_error(capsys, folder, argv, code, words):
    argv = [a if a.startswith("--") or a[0].isdigit() else folder / a for a in argv]
    found = call(capsys, "audit", "membership", *argv)
    assert found[0] == code
    assert words in found[2]


def test_eight_shadows_are_too_few_for_one_per_cent(capsys, folder):
    code, _, err = call(
        capsys, "audit", "membership", "--model", folder / "m.onnx", "--members", folder / "A.npz",
        "--non-members", folder / "B.npz", "--arch", "auto", "--shadows", 8,
    )  # fmt: skip
    assert code == 78
    assert "train at least 14 shadows" in err  # 12 where members are half of the records; here they are 60 %


def test_probabilities_and_logits_of_one_model_give_the_same_margins(folder, tmp_path):
    data = datasets.load(folder / "A.npz", split="all", limit=100)
    model = train_classifier(data.images, data.labels, 10, Recipe(epochs=5), seed=1)
    write_onnx(tmp_path / "logits.onnx", model)
    write_onnx(tmp_path / "softmax.onnx", model, softmax=True)
    found = [
        scores.margin(OnnxClassifier(tmp_path / f"{kind}.onnx").logits(data.images), data.labels)
        for kind in ("logits", "softmax")
    ]
    assert np.allclose(*found, atol=1e-3)


def test_a_killed_run_goes_on_with_its_vae_and_ends_as_if_it_had_not_been_killed(capsys, folder, tmp_path):
    out, whole = tmp_path / "r", tmp_path / "whole"
    checkpoint = tmp_path / "r.vae-checkpoint"
    argv = [str(a) for a in synthesize(folder, out, "--seed", 4, "--vae-epochs", 60)]
    process = subprocess.Popen([sys.executable, "-m", "edgepriv", *argv], stderr=subprocess.DEVNULL)
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()  # no time to tidy up
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    code, _, err = call(capsys, *argv)
    assert code == 0
    assert "resuming" in err
    assert not checkpoint.exists()
    call(capsys, *synthesize(folder, whole, "--seed", 4, "--vae-epochs", 60))
    first, second = (load_vae(path / "vae.safetensors").state_dict() for path in (out, whole))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert (np.load(out / "release.npz")["images"] == np.load(whole / "release.npz")["images"]).all()
