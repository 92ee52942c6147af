"""The commands, as a user runs them: files in, one JSON document out, exit codes that a build can use."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from edgepriv.cli import root  # noqa: E402
from edgepriv.errors import ConfigError, DataError, MissingFileError, RefusedError, RiskThresholdError, WireError  # noqa: E402
from edgepriv.wire.update import decode_update, encode_update  # noqa: E402


def _run(*args):
    return CliRunner().invoke(root, [str(a) for a in args])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("update")
    done = _run(
        "federated", "train", "--model", "cnn-bn", "--weights", folder / "w.safetensors", "--fresh", "--data", "digits",
        "--images", 6, "--batch-size", 3, "--out", folder / "u.upd", "--canaries", folder / "c.npz", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["steps"] == 2
    return folder


def _audit(folder, *more, model="cnn-bn", update="u.upd"):
    base = ["audit", "update", "--model", model, "--weights", folder / "w.safetensors", "--update", folder / update]
    return _run(*base, *more)


def test_an_update_is_audited_with_the_recipe_it_states(made):
    page = made / "a.html"
    done = _audit(made, "--data", made / "c.npz", "--public", "digits", "--json", "--html", page)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["schema"] == "edgepriv.audit-update/1"
    assert {"psnr_db", "ssim", "iip", "rdlv", "seconds"} <= set(record["attack"])
    assert record["attack"]["psnr_db"] >= 20
    assert record["bound_psnr_db"] >= record["attack"]["mean_mse_psnr_db"]
    assert record["verdict"] == "leaks"
    assert record["recipe"]["batch_size"] == 3
    assert "data:image/png" in page.read_text()


def test_without_canaries_only_the_bound_is_given(made):
    done = _audit(made, "--public", "digits", "--images", 2, "--classes", "--json")
    record = json.loads(done.stdout)
    assert record["attack"] is None
    assert record["bound_psnr_db"] > record["bound_floor_db"]
    assert "nothing is said about the images" in record["about"]
    assert 0 <= record["class_inversion"]["recognised"] <= 1


def test_a_threshold_stops_a_build(made):
    done = _audit(made, "--data", made / "c.npz", "--fail-on", "leaks", "--iterations", 60, "--no-bound")
    assert isinstance(done.exception, RiskThresholdError)
    assert done.exception.exit_code == 3


def test_one_canary_without_public_pictures_stops_a_build_and_is_never_contained(tmp_path):
    common = ("--model", "cnn-bn", "--weights", tmp_path / "w.safetensors")
    _run("federated", "train", *common, "--fresh", "--data", "digits", "--images", 1, "--out", tmp_path / "u.upd",
         "--canaries", tmp_path / "c.npz")  # fmt: skip
    page = tmp_path / "a.html"
    base = ("audit", "update", *common, "--update", tmp_path / "u.upd", "--data", tmp_path / "c.npz", "--json")
    done = _run(*base, "--fail-on", "leaks", "--html", page)
    assert isinstance(done.exception, RiskThresholdError)
    record = json.loads(done.stdout)
    assert record["attack"]["psnr_db"] > 40
    assert record["verdict"] == "leaks"
    assert "no public pictures were given" in record["reason"]
    assert "nearest public" not in page.read_text()
    blind = json.loads(_run(*base, "--attack", "fixed-bn", "--iterations", 1).stdout)
    assert (blind["verdict"], "no public pictures" in blind["reason"]) == ("at risk", True)
    needs = _run(*base, "--labels", "inferred", "--images", 1)
    assert needs.exit_code == 0, needs.output


def test_wrong_inputs_are_clear_errors(made, tmp_path):
    data = ("--data", made / "c.npz")
    assert isinstance(_audit(made, *data, model="cnn").exception, DataError)
    assert isinstance(_audit(made, *data, model="nope").exception, ConfigError)
    assert isinstance(_audit(made, *data, update="gone.upd").exception, MissingFileError)
    assert isinstance(_audit(made).exception, ConfigError)
    assert "epochs" in str(_audit(made, *data, "--batch-size", 6).exception.hint)
    (made / "broken.upd").write_bytes(b"EPU1\x00\x00")
    assert isinstance(_audit(made, *data, update="broken.upd").exception, WireError)
    update = decode_update((made / "u.upd").read_bytes(), max_bytes=1 << 20)
    spoiled = {**update.tensors, "head.bias": np.full(10, np.nan, np.float32)}
    (made / "nan.upd").write_bytes(encode_update(spoiled, update.meta))
    assert "NaN" in str(_audit(made, *data, update="nan.upd").exception)
    (made / "odd.upd").write_bytes(encode_update(update.tensors, {"recipe": {"speed": 3}}))
    assert "recipe" in str(_audit(made, *data, update="odd.upd").exception)


def test_self_check_drops_statistics_refuses_and_adds_noise(made, tmp_path):
    update = made / "u.upd"
    out = tmp_path / "sent.upd"
    done = _run("federated", "self-check", "--update", update, "--policy", "drop_bn", "--out", out, "--json")
    assert isinstance(done.exception, RiskThresholdError)  # six images are still few
    assert json.loads(done.stdout)["action"] == "drop_bn"
    sent = decode_update(out.read_bytes(), max_bytes=1 << 20).tensors
    assert not [name for name in sent if "running" in name or "num_batches" in name]
    done = _run("federated", "self-check", "--update", update, "--policy", "refuse")
    assert isinstance(done.exception, RefusedError)
    done = _run("federated", "self-check", "--update", update, "--json")
    assert isinstance(done.exception, RiskThresholdError)  # noise makes them no more
    record = json.loads(done.stdout)
    assert (record["action"], record["within_limits"]) == ("add_noise", False)
    assert record["sigma"] > 0


def test_the_tradeoff_command_writes_its_picture_and_settings(tmp_path):
    page, toml = tmp_path / "t.html", tmp_path / "t.toml"
    done = _run(
        "audit", "privacy-tradeoff", "--limit", 400, "--clients", 3, "--rounds", 1, "--noise", 3.0,
        "--statistics", "home", "--max-iip", 0.3, "--json", "--html", page, "--toml", toml,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["schema"] == "edgepriv.privacy-tradeoff/1"
    assert "<svg" in page.read_text()
    assert toml.read_text().count("[rounds") == 2


def test_carried_momentum_needs_its_buffers_and_is_inverted_with_them(tmp_path):
    base = ("--model", "cnn-bn", "--weights", tmp_path / "w.safetensors", "--data", "digits", "--momentum", 0.9)
    carried = (*base, "--carry-momentum", "--images", 2)
    first = _run(
        "federated", "train", *carried, "--fresh", "--out", tmp_path / "1.upd", "--momentum-out", tmp_path / "m"
    )
    assert first.exit_code == 0, first.output
    second = _run(
        "federated", "train", *carried, "--momentum-in", tmp_path / "m", "--out", tmp_path / "2.upd",
        "--canaries", tmp_path / "c.npz",
    )  # fmt: skip
    assert second.exit_code == 0, second.output
    audit = ("--update", tmp_path / "2.upd", "--data", tmp_path / "c.npz", "--public", "digits", "--no-bound", "--json")
    target = ("audit", "update", "--model", "cnn-bn", "--weights", tmp_path / "w.safetensors", *audit)
    missing = _run(*target)
    assert isinstance(missing.exception, DataError)
    assert "momentum" in str(missing.exception)
    found = _run(*target, "--momentum-state", tmp_path / "m")
    assert json.loads(found.stdout)["attack"]["psnr_db"] > 25


def test_a_model_without_batch_normalisation_is_audited_and_the_limit_is_said(tmp_path):
    common = ("--model", "cnn", "--weights", tmp_path / "w.safetensors")
    _run("federated", "train", *common, "--fresh", "--data", "digits", "--images", 1, "--out", tmp_path / "u.upd",
         "--canaries", tmp_path / "c.npz")  # fmt: skip
    done = _run("audit", "update", *common, "--update", tmp_path / "u.upd", "--data", tmp_path / "c.npz", "--public",
                "digits", "--iterations", 20)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "no BatchNorm layer: gradients alone" in done.stdout


def test_a_batch_over_the_limit_is_refused_and_its_bound_says_what_it_is_over(tmp_path):
    common = ("--model", "cnn-bn", "--weights", tmp_path / "w.safetensors")
    _run("federated", "train", *common, "--fresh", "--data", "digits", "--images", 40, "--batch-size", 40, "--out",
         tmp_path / "u.upd", "--canaries", tmp_path / "c.npz")  # fmt: skip
    audit = ("audit", "update", *common, "--update", tmp_path / "u.upd")
    refused = _run(*audit, "--data", tmp_path / "c.npz")
    assert isinstance(refused.exception, DataError)
    assert "batches up to 32" in str(refused.exception)
    bound = _run(*audit, "--public", "digits")
    assert bound.exit_code == 0, bound.output
    assert "frequencies of each channel" in bound.stdout
