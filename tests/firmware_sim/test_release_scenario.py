"""The shipped scenario ``release``: devices train on a synthetic release, which is then the probe of their model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edgepriv import datasets
from edgepriv.errors import ConfigError, DataError, MissingFileError
from edgepriv.federated.head import BIAS, WEIGHT
from firmware_sim.fleet import HELD_OUT, labels_seen, rows_of
from firmware_sim.release import write_model
from firmware_sim.scenario import load_scenario

ROOT = Path(__file__).resolve().parents[2]
MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")


def scenario(folder, text):
    path = folder / "s.toml"
    path.write_text(text)
    return load_scenario(path)


def write_set(folder, labels):
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 1), np.uint8)
    np.savez(folder / "release.npz", images=images, labels=np.asarray(labels))


def test_a_release_directory_counts_from_the_scenarios_folder_and_all_of_it_may_be_seen(tmp_path):
    write_set(tmp_path / "given", np.arange(50) % 10)
    told = scenario(tmp_path, '[fleet]\nframes = 500\nclasses_each = 10\n[data]\nspec = "given"\n')
    labels = labels_seen(Path("elsewhere"), told)
    assert len(labels) == 50
    assert set(rows_of(told, 0, labels)) == set(range(50))


def test_digits_that_are_held_out_are_never_seen():
    told = load_scenario(Path("smoke"))
    labels = labels_seen(Path("elsewhere"), told)
    assert min(row for index in range(50) for row in rows_of(told, index, labels)) >= HELD_OUT


def test_a_release_without_one_of_the_ten_classes_is_refused(tmp_path):
    write_set(tmp_path / "given", np.arange(50) % 9)
    with pytest.raises(DataError, match=r"0\.\.9"):
        labels_seen(tmp_path, scenario(tmp_path, '[data]\nspec = "given"\n'))


def test_a_release_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere"):
        labels_seen(tmp_path, scenario(tmp_path, '[data]\nspec = "nowhere"\n'))


def test_a_noise_ratio_of_nought_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="noise_ratio"):
        scenario(tmp_path, "[data]\nnoise_ratio = 0\n")


def test_the_model_that_is_audited_holds_the_trained_head(tmp_path):
    rng = np.random.default_rng(1)
    head = {WEIGHT: rng.normal(size=(10, 64)).astype(np.float32), BIAS: rng.normal(size=10).astype(np.float32)}
    session = onnxruntime.InferenceSession(str(write_model(tmp_path / "m.onnx", head)))
    x = rng.random((1, 1, 8, 8), np.float32)
    logits, features = session.run(None, {session.get_inputs()[0].name: x})
    assert np.allclose(features, x.reshape(1, 64))
    assert np.allclose(logits, x.reshape(1, 64) @ head[WEIGHT].T + head[BIAS], atol=1e-4)
    with pytest.raises(DataError):
        write_model(tmp_path / "m.onnx", {WEIGHT: np.zeros((9, 64)), BIAS: np.zeros(9)})


@pytest.mark.system
@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
def test_devices_learn_real_digits_from_a_release_which_then_probes_their_model(tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "o"
    command = [sys.executable, "-m", "firmware_sim.cli", "run", "release", "--json", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [r["participants"] for r in told["rounds"]] == [8, 8]
    assert told["untrained_accuracy"] < 0.2
    assert told["rounds"][-1]["accuracy"] > 0.5
    made, seen = told["data"]["release"], datasets.load(out / "release", split="all")
    assert made["vae_trained_on"] == "public"
    assert made["audit"]["auc"] < 0.65
    assert made["audit"]["null_interval"][0] < 0.5 < made["audit"]["null_interval"][1]
    assert told["data"]["pictures"] == made["released"] == len(seen)
    private = datasets.load(out / "private.npz", split="all")
    held = datasets.load("digits", split="all").images[:HELD_OUT]
    known = {image.tobytes() for image in private.images}
    assert sum(image.tobytes() in known for image in held) == 0
    probed = told["data"]["probe"]
    assert probed["schema"] == "edgepriv.audit-outputs/1"
    assert probed["pictures"] == len(datasets.load(out / "release", split="test"))
    shown = {name: one["explained_variance"] for name, one in probed["policies"].items()}
    assert shown["unsafe_raw_logits"] > shown["argmax"] + 0.3
    assert probed["verdict"] == "high leakage"
