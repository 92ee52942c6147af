"""The red team's models: the attack works, its twin keeps its accuracy, a stopped run goes on, exports are faithful."""

import json

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from edgepriv.cli.audit_outputs import outputs as audit_command
from edgepriv.cli.redteam import redteam
from edgepriv.errors import ConfigError, DataError
from edgepriv.risk.reconstruction.attack import attack_scores, digit_attributes, padded, succeeded
from edgepriv.risk.reconstruction.augment import TRANSFORMS, augmented
from edgepriv.risk.reconstruction.detectors import outputs_of, pictures_of
from edgepriv.risk.reconstruction.leakage import AuditSettings, Bench
from edgepriv.risk.reconstruction.networks import ARCHITECTURES, attack_decoder, classifier
from edgepriv.risk.reconstruction.onnx_writer import write_onnx
from edgepriv.risk.reconstruction.supplied_model import SuppliedModel
from edgepriv.risk.reconstruction.vicious import Recipe, Trainer, TrainingSet, train


@pytest.fixture(scope="module")
def small(digits_probes):
    probe = digits_probes[1]
    return TrainingSet.of(probe.images[:300], probe.labels[:300])


def test_the_secret_decoder_beats_every_auditor_of_the_honest_twin(digit_models, digits_probes):
    _, pairs = digit_models
    bench = Bench(digits_probes[0], AuditSettings(trained=None))
    own, mean = attack_scores(pairs["vicious"], bench, bench.labels)

    class Raw:
        name = "raw"

        def bits(self, k):
            return 32.0 * k

        def apply(self, logits):
            return logits.astype(float)

    honest = bench.leakage(outputs_of(pairs["honest"].classifier, pictures_of(bench.images)), Raw())
    assert succeeded(own, honest.score.explained_variance)
    assert own.psnr_db > mean.psnr_db + 1
    assert own.ssim > mean.ssim


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_is_written_as_onnx_that_onnxruntime_runs_alike(name, tmp_path):
    shape = (32, 32, 3)
    torch.manual_seed(0)
    network = classifier(name, shape, 7).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    path = tmp_path / "m.onnx"
    write_onnx(network, shape, 7, path)
    model = onnx.load(str(path))
    assert model.ir_version <= 9
    assert model.opset_import[0].version == 17
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    images = np.random.default_rng(0).integers(0, 256, (5, *shape), np.uint8)
    theirs = SuppliedModel.find(path).outputs(images)
    assert np.allclose(outputs_of(network, pictures_of(images)), theirs, atol=1e-3 * max(1, np.abs(theirs).max()))


def test_an_unknown_layer_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="Softplus"):
        write_onnx(torch.nn.Sequential(torch.nn.Softplus()), (4, 4, 1), 2, tmp_path / "m.onnx")


def test_the_wide_decoder_makes_pictures_of_32_by_32():
    decoder = attack_decoder("wrn28-1", (32, 32, 3), 10).eval()
    assert decoder(torch.zeros(2, 10)).shape == (2, 3, 32, 32)
    with pytest.raises(ConfigError, match="32x32"):
        classifier("wrn28-1", (28, 28, 1), 10)
    with pytest.raises(ConfigError, match="unknown architecture"):
        classifier("resnet-9000", (28, 28, 1), 10)


def test_a_run_that_was_stopped_ends_like_one_that_was_not(small, tmp_path):
    recipe = Recipe(epochs=4, batch=50)
    whole = train(recipe, small)
    state = tmp_path / "s.safetensors"
    first = Trainer(recipe, small)
    first.run_epoch()
    first.run_epoch()
    first.save(state)
    lines = []
    resumed = train(recipe, small, state=state, progress=lines.append)
    assert lines[0] == "goes on after epoch 2"
    for a, b in zip(whole.classifier.state_dict().values(), resumed.classifier.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_recipe_is_not_resumed(small, tmp_path):
    state = tmp_path / "s.safetensors"
    train(Recipe(epochs=1, batch=50, reconstruction_weight=0.0), small, state=state)
    assert not Trainer(Recipe(epochs=1, batch=60, reconstruction_weight=0.0), small).resume(state)


def test_a_state_of_other_pictures_or_targets_starts_anew_and_says_so(small, digits_probes, tmp_path):
    state, recipe = tmp_path / "s.safetensors", Recipe(epochs=1, batch=50, reconstruction_weight=0.0)
    first = train(recipe, small, state=state)
    probe = digits_probes[1]
    others = {
        "pictures": TrainingSet.of(255 - probe.images[:300], probe.labels[:300]),
        "targets": TrainingSet.of(probe.images[:300], probe.labels[:300][::-1].copy()),
    }
    for data in others.values():
        train(recipe, small, state=state)
        lines = []
        second = train(recipe, data, state=state, progress=lines.append)
        assert lines[0] == "starts anew: what is saved there was trained on other pictures or targets"
        pairs = zip(first.classifier.parameters(), second.classifier.parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs)


def test_fewer_epochs_are_refused_and_more_only_follow_a_constant_schedule(small, tmp_path):
    def recipe(epochs, schedule="constant", last=1.0):
        return Recipe(epochs=epochs, batch=50, schedule=schedule, last_weight=last)

    state = tmp_path / "s.safetensors"
    train(recipe(2), small, state=state)
    before = state.read_bytes()
    with pytest.raises(ConfigError, match="a training of 2 epochs, more than 1"):
        train(recipe(1), small, state=state)
    assert state.read_bytes() == before
    extended = train(recipe(3), small, state=state)
    assert len(extended.history) == 3
    for schedule, last in (("cosine", 1.0), ("constant", 0.5)):
        falling = tmp_path / f"{schedule}.safetensors"
        train(recipe(2, schedule, last), small, state=falling)
        with pytest.raises(ConfigError, match="fall towards the last one"):
            train(recipe(3, schedule, last), small, state=falling)


def test_a_stopped_run_with_dropout_ends_like_one_that_was_not(small, tmp_path):
    recipe = Recipe(architecture="cnn-dropout", epochs=2, batch=50, reconstruction_weight=0.0)
    whole = train(recipe, small)
    first = Trainer(recipe, small)
    first.run_epoch()
    first.save(tmp_path / "s.safetensors")
    torch.rand(100)  # another process would have drawn other numbers meanwhile
    resumed = train(recipe, small, state=tmp_path / "s.safetensors")
    for a, b in zip(whole.classifier.parameters(), resumed.classifier.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_damaged_state_is_named(small, tmp_path):
    state = tmp_path / "s.safetensors"
    state.write_bytes(b"no tensors")
    with pytest.raises(DataError, match="no saved training"):
        train(Recipe(epochs=1), small, state=state)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(small):
    a, b, c = (train(Recipe(epochs=1, batch=50, seed=s), small).classifier.state_dict() for s in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a.values(), c.values(), strict=True))


def test_softmax_outputs_and_attributes_train(digits_probes):
    probe = digits_probes[1]
    softmax = train(Recipe(epochs=1, outputs="softmax"), TrainingSet.of(probe.images[:200], probe.labels[:200]))
    assert softmax.decoder is not None
    data = TrainingSet.of(probe.images[:200], digit_attributes(probe.labels[:200]))
    attributes = train(Recipe(epochs=1, outputs="softmax"), data)
    assert data.outputs == 3
    assert 0 <= attributes.history[0]["accuracy"] <= 1


@pytest.fixture(scope="module")
def attribute_models(tmp_path_factory, digits_probes):
    """Paths of a vicious and an honest model of three attributes."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("attributes")
    probe = digits_probes[1]
    data = TrainingSet.of(probe.images, digit_attributes(probe.labels))
    recipe = Recipe(epochs=16, batch=50)
    for name, chosen in (("vicious", recipe), ("honest", recipe.honest())):
        write_onnx(train(chosen, data).classifier, data.shape, 3, folder / f"{name}.onnx")
    return folder


@pytest.mark.parametrize("name", ["vicious", "honest"])
def test_a_model_of_attributes_is_audited_against_references_of_attributes(name, attribute_models):
    arguments = ["--model", str(attribute_models / f"{name}.onnx"), "--data", "digits", "--targets", "digit-attributes"]
    done = CliRunner().invoke(audit_command, [*arguments, "--auditors", "ridge", "--reference-models", "3", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [policy["policy"] for policy in report["policies"]] == ["steps:4", "unsafe_raw_logits"]
    assert report["architecture"] == "as in the file"
    assert report["policies"][1]["accuracy"] > 0.85
    assert (report["verdict"] == "vicious") == (name == "vicious"), report["detector"]
    assert report["class_counts"] == []


def test_what_does_not_fit_attributes_is_refused(attribute_models, digit_models):
    for model, more, words in (
        (attribute_models / "honest.onnx", ["--policy", "argmax"], "not a policy for attributes"),
        (attribute_models / "honest.onnx", ["--unlabelled"], "needs ten digit classes"),
        (digit_models[0] / "honest.onnx", [], "10 outputs for 3 attributes"),
    ):
        arguments = ["--model", str(model), "--data", "digits", "--targets", "digit-attributes", *more]
        done = CliRunner().invoke(audit_command, arguments)
        assert isinstance(done.exception, (ConfigError, DataError))
        assert words in str(done.exception)


def test_attributes_of_digits_are_parity_size_and_loops():
    found = digit_attributes(np.arange(10))
    assert found[:, 0].tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    assert found[:, 1].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert found[:, 2].nonzero()[0].tolist() == [0, 6, 8, 9]


def test_labels_outside_the_classes_are_refused(digits_probes):
    with pytest.raises(DataError, match="out of range for 5 classes"):
        TrainingSet.of(digits_probes[1].images, digits_probes[1].labels, classes=5)


def test_padding_centres_pictures_and_refuses_larger_ones():
    assert padded(np.ones((1, 28, 28, 1), np.uint8), 32)[0, 2:30, 2:30].all()
    with pytest.raises(DataError, match="do not fit"):
        padded(np.ones((1, 40, 40, 1), np.uint8), 32)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.__name__)
def test_each_augmentation_keeps_shape_and_finite_values(transform):
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(3, 20, 18, generator=generator)
    out = transform(picture, generator)
    assert out.shape == picture.shape
    assert torch.isfinite(out).all()
    assert not torch.equal(out, picture)


def test_augmented_batches_stay_in_range_and_follow_the_seed():
    x = torch.rand(14, 1, 16, 16)
    a, b = (augmented(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert float(a.min()) >= 0
    assert float(a.max()) <= 1


def test_the_command_writes_both_models_and_goes_on_where_it_was(tmp_path):
    arguments = ["train-vicious", "--data", "digits", "--epochs", "2", "--out", str(tmp_path), "--json"]
    first = CliRunner().invoke(redteam, arguments)
    assert first.exit_code == 0, first.output
    report = json.loads(first.stdout)
    assert report["schema"] == "edgepriv.redteam-vicious/1"
    assert {p.name for p in tmp_path.glob("*.onnx")} == {"vicious.onnx", "honest.onnx"}
    again = CliRunner().invoke(redteam, arguments)
    assert "goes on after epoch 2" in again.stderr
