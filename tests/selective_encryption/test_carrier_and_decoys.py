"""What can be encrypted, folding, and decoys that keep the file ordinary."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from edgepriv.errors import ConfigError, DataError, MissingFileError
from edgepriv.selective_encryption import carrier, decoys, protection
from edgepriv.selective_encryption.select.choose import choose, weight_share
from edgepriv.selective_encryption.select.scores import random_scores


def test_convolutions_depthwise_and_dense_weights_are_listed_in_graph_order(models):
    model = carrier.normalised(models["float32"]())
    found = carrier.layers(model, dense=True)
    assert [(x.name, x.kind, x.unit_size) for x in found] == [
        ("a.w", "conv", 9),
        ("b.w", "conv", 9),
        ("c.w", "conv", 32),
        ("d.w", "depthwise", 9),
        ("head.w", "dense", 16),
    ]
    assert [x.name for x in carrier.layers(model)] == ["a.w", "b.w", "c.w", "d.w"]


def test_folding_batchnorm_keeps_the_outputs(models, inputs):
    model = carrier.normalised(models["float32"]())
    folded, count = carrier.fold_batchnorm(model)
    assert count == 4
    assert not any(node.op_type == "BatchNormalization" for node in folded.graph.node)
    before = ort.InferenceSession(model.SerializeToString()).run(None, {"x": inputs})[0]
    after = ort.InferenceSession(folded.SerializeToString()).run(None, {"x": inputs})[0]
    assert np.allclose(before, after, atol=1e-5)


def test_a_model_without_convolution_and_a_file_that_is_no_model_are_clear_errors(tmp_path):
    node = helper.make_node("Relu", ["x"], ["y"])
    info = [helper.make_tensor_value_info(n, 1, [1, 2]) for n in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", info[:1], info[1:]))
    with pytest.raises(DataError, match="no convolution"):
        carrier.layers(carrier.normalised(model))
    (tmp_path / "x.onnx").write_text("hello")
    with pytest.raises(DataError, match="not an ONNX model"):
        carrier.load(tmp_path / "x.onnx")
    with pytest.raises(MissingFileError):
        carrier.load(tmp_path / "none.onnx")


def test_external_weight_files_of_the_input_are_read(models, tmp_path):
    model = models["float32"]()
    onnx.save(model, str(tmp_path / "m.onnx"), save_as_external_data=True, location="m.bin", size_threshold=64)
    loaded = carrier.load(tmp_path / "m.onnx")
    assert all(not t.external_data for t in loaded.graph.initializer)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("kind", decoys.KINDS)
def test_a_carrier_is_an_ordinary_model_of_the_same_size_with_only_the_chosen_units_changed(
    models, inputs, onnx_checker, dtype, kind
):
    model = carrier.normalised(models[dtype]())
    layers = carrier.layers(model)
    made = protection.draft(
        model, layers, random_scores(layers, 0), 0.25, secret=b"s" * 32, model_id=b"i" * 16, kind=kind
    )
    masked = made.masked[0].tobytes()
    assert len(masked) == len(made.plain[0])
    onnx_checker(onnx.load_from_string(masked))
    ort.InferenceSession(masked)
    changed = carrier.normalised(onnx.load_from_string(masked))
    for layer in layers:
        same = (carrier.weight_rows(changed, layer) == carrier.weight_rows(model, layer)).all(1)
        assert same[~made.choice.selected[layer.name]].all()
        assert not same[made.choice.selected[layer.name]].any() or dtype == "int8"


def test_decoys_are_the_same_for_every_customer_and_differ_between_models():
    rows = np.random.default_rng(0).normal(size=(400, 9))
    selected = np.arange(400) < 60

    def made(secret, model_id):
        return decoys.decoy_rows(rows, 20, selected, decoys.PrfNoise(secret, model_id, "w"))

    assert np.array_equal(made(b"a" * 32, b"m" * 16), made(b"a" * 32, b"m" * 16))
    assert not np.array_equal(made(b"a" * 32, b"m" * 16), made(b"a" * 32, b"n" * 16))
    assert not np.array_equal(made(b"a" * 32, b"m" * 16), made(b"b" * 32, b"m" * 16))


def test_decoys_say_nothing_about_the_kernels_that_they_replace():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(500, 9))
    selected = np.arange(500) < 100
    other = rows.copy()
    other[selected] = rng.permutation(rows[selected] * 3, axis=0)
    for_one = decoys.decoy_rows(rows, 20, selected, decoys.PrfNoise(b"a" * 32, b"m" * 16, "w"))
    for_other = decoys.decoy_rows(other, 20, selected, decoys.PrfNoise(b"a" * 32, b"m" * 16, "w"))
    assert np.array_equal(for_one[selected], for_other[selected])


def test_prf_noise_is_standard_normal():
    noise = decoys.PrfNoise(b"k" * 32, b"m" * 16, "w").normal(200_000)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.1


def test_the_mixture_follows_correlated_kernels():
    rng = np.random.default_rng(2)
    factor = rng.normal(size=(9, 9))
    rows = rng.normal(size=(4000, 9)) @ factor.T
    mixture = decoys.fit_mixture(rows, decoys.PrfNoise(b"k" * 32, b"m" * 16, "w"))
    drawn = mixture.sample(4000, decoys.PrfNoise(b"k" * 32, b"m" * 16, "v"))
    assert np.abs(np.cov(drawn.T) - np.cov(rows.T)).max() < 0.15 * np.abs(np.cov(rows.T)).max()


@pytest.mark.parametrize("share", [0.01, 0.08, 0.5, 1.0])
def test_a_global_budget_is_never_exceeded_and_the_best_scores_come_first(models, share):
    model = carrier.normalised(models["float32"]())
    layers = carrier.layers(model)
    scores = random_scores(layers, 2)
    choice = choose(scores, layers, share)
    assert weight_share(choice, layers) <= share
    ordered = [scores[layers[n].name][u] for n, u in choice.order]
    assert ordered == sorted(ordered, reverse=True)
    with pytest.raises(ConfigError):
        choose(scores, layers, 0.0)


def test_the_published_rule_takes_one_ratio_of_each_layer(models):
    model = carrier.normalised(models["float32"]())
    layers = carrier.layers(model)
    choice = choose(random_scores(layers, 2), layers, 0.1, scope="layer")
    for layer in layers:
        assert choice.selected[layer.name].sum() == min(layer.units, int(layer.units * 0.1) + 1)
