"""The final global model, audited by one command: its classes, and who was in its training set."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from edgepriv import datasets  # noqa: E402
from edgepriv.cli import root  # noqa: E402
from edgepriv.errors import ConfigError, DataError, RiskThresholdError  # noqa: E402
from edgepriv.federated.local_recipe import LocalRecipe  # noqa: E402
from edgepriv.federated.torch_trainer import train_locally  # noqa: E402
from edgepriv.risk import models  # noqa: E402
from edgepriv.risk.gradient_leakage.class_inversion import ClassInversion, judge_classes  # noqa: E402
from edgepriv.wire.update import encode_update  # noqa: E402


def _run(*args):
    return CliRunner().invoke(root, ["audit", "model", *[str(a) for a in args]])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small network that was trained long on few digits, so that it remembers them; a fresh one; pictures."""
    folder = tmp_path_factory.mktemp("model")
    data = datasets.load("digits", split="all")
    for name, rows in (("in", slice(0, 150)), ("out", slice(150, 700)), ("public", slice(700, 1300))):
        np.savez(folder / f"{name}.npz", images=data.images[rows], labels=data.labels[rows])
    x = (data.images[:150].transpose(0, 3, 1, 2) / 255).astype(np.float32)
    torch.manual_seed(0)
    model = models.build("cnn-bn", 10, 1, 8)
    models.save_weights(model, folder / "fresh.safetensors")
    moved = train_locally(model, x, data.labels[:150], LocalRecipe(0.05, 16, 25, 0.9), seed=0).tensors
    state = {name: value + torch.tensor(moved[name]) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    floats = {name: value.numpy() for name, value in state.items() if value.dtype == torch.float32}
    (folder / "global.epu").write_bytes(encode_update(floats))
    heads = {name: floats[name] for name in ("head.weight", "head.bias")}
    (folder / "head.epu").write_bytes(encode_update(heads))
    return folder


def test_a_trained_global_model_shows_its_classes_and_members(made):
    page = made / "m.html"
    done = _run(
        "--model", "cnn-bn", "--global", made / "global.epu", "--public", made / "public.npz",
        "--members", made / "in.npz", "--non-members", made / "out.npz", "--html", page, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["classes_leak"]
    assert record["class_inversion"]["recognised"] >= 0.7
    assert record["membership"]["above_threshold"]
    assert "data:image/png" in page.read_text()
    stopped = _run(
        "--model", "cnn-bn", "--global", made / "global.epu", "--public", made / "public.npz", "--fail-on-leak"
    )
    assert isinstance(stopped.exception, RiskThresholdError)


def test_a_fresh_model_shows_nothing(made):
    done = _run("--model", "cnn-bn", "--weights", made / "fresh.safetensors", "--public", made / "public.npz")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("classes do not show")
    assert "members: not asked" in done.stdout


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """The paper's own task has two classes: here zeros against ones, a trained network and a fresh one."""
    folder = tmp_path_factory.mktemp("two")
    data = datasets.load("digits", split="all")
    rows = np.flatnonzero(data.labels < 2)
    np.savez(folder / "public.npz", images=data.images[rows[150:]], labels=data.labels[rows[150:]])
    alone = rows[data.labels[rows] == 0]
    np.savez(folder / "alone.npz", images=data.images[alone], labels=data.labels[alone])
    x = (data.images[rows[:150]].transpose(0, 3, 1, 2) / 255).astype(np.float32)
    torch.manual_seed(1)
    model = models.build("cnn-bn", 2, 1, 8)
    models.save_weights(model, folder / "fresh.safetensors")
    moved = train_locally(model, x, data.labels[rows[:150]], LocalRecipe(0.05, 16, 15, 0.9), seed=0).tensors
    model.load_state_dict({name: value + torch.tensor(moved[name]) for name, value in model.state_dict().items()})
    models.save_weights(model, folder / "trained.safetensors")
    return folder


def test_two_classes_are_told_on_a_trained_model_and_not_on_a_fresh_one(two_classes):
    base = ("--model", "cnn-bn", "--public", two_classes / "public.npz", "--iterations", 60, "--fail-on-leak", "--json")
    stopped = _run(*base, "--weights", two_classes / "trained.safetensors")
    assert isinstance(stopped.exception, RiskThresholdError)
    record = json.loads(stopped.stdout)
    assert (record["classes_leak"], record["classes"]["word"]) == (True, "leak")
    assert "of 19 networks that have seen nothing" in record["classes"]["reason"]
    passed = _run(*base, "--weights", two_classes / "fresh.safetensors")
    assert passed.exit_code == 0, passed.output
    assert json.loads(passed.stdout)["classes_leak"] is False


def test_one_class_is_undecidable_and_no_build_passes_on_it(two_classes):
    done = _run(
        "--model", "cnn-bn", "--public", two_classes / "alone.npz", "--weights", two_classes / "trained.safetensors",
        "--iterations", 5, "--fail-on-leak", "--json",
    )  # fmt: skip
    assert isinstance(done.exception, RiskThresholdError)
    assert "undecidable" in str(done.exception)
    assert json.loads(done.stdout)["classes_leak"] is None


@pytest.mark.parametrize(("present", "needed"), [(3, 3), (4, 4), (5, 4), (10, 4), (100, 4)])
def test_the_test_over_classes_can_be_passed_and_failed_for_any_number_of_them(present, needed):
    def judged(right):
        shown = ClassInversion(np.zeros(0), 0.5, 0.4, 0.6, right / present, right, present, 0.1, 0.9, 1.0)
        return judge_classes(shown).word

    assert [judged(right) for right in (0, needed - 1, needed, present)] == ["do not show"] * 2 + ["leak"] * 2
    two = ClassInversion(np.zeros(0), 0.5, 0.4, 0.6, 1.0, 2, 2, 0.1, 0.9, 1.0)
    assert judge_classes(two).word == "undecidable"


def test_a_federated_head_is_put_over_its_backbone(made):
    done = _run(
        "--model", "cnn-bn", "--weights", made / "fresh.safetensors", "--global", made / "head.epu",
        "--public", made / "public.npz", "--iterations", 20, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["schema"] == "edgepriv.audit-model/1"


def test_wrong_inputs_are_clear_errors(made):
    base = ("--model", "cnn-bn", "--public", made / "public.npz")
    assert "no weights" in str(_run(*base).exception)
    assert "lack" in str(_run(*base, "--global", made / "head.epu").exception)
    half = _run(*base, "--weights", made / "fresh.safetensors", "--members", made / "in.npz")
    assert isinstance(half.exception, ConfigError)
    other = _run("--model", "cnn", "--public", made / "public.npz", "--global", made / "global.epu")
    assert isinstance(other.exception, DataError)
    assert "which cnn has not" in str(other.exception)
