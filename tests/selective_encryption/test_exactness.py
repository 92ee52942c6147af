"""Decoys among weights of low precision, on a grid, or pruned: their last bits do not give them away."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from edgepriv.selective_encryption import carrier, decoys, exactness
from edgepriv.selective_encryption.attack import detect
from edgepriv.selective_encryption.attack.document import detection
from edgepriv.selective_encryption.select.choose import choose
from edgepriv.selective_encryption.select.scores import random_scores

INPUTS, UNITS, HIDDEN = 40, 1600, 200


def dense():
    rng = np.random.default_rng(0)
    gains = np.exp(0.5 * rng.normal(size=(INPUTS, 1))) * np.exp(0.3 * rng.normal(size=(1, INPUTS)))
    return (rng.standard_t(4, (UNITS, 9)) * 0.05 * gains.reshape(-1, 1)).astype(np.float32)


def bfloat16(rows):
    return (rows.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def expanded_int8(rows):
    """Weights that were quantised for each output channel and expanded again."""
    grid = rows.reshape(INPUTS, -1)
    step = np.abs(grid).max(1, keepdims=True) / 127
    return (np.round(grid / step).astype(np.float32) * step).reshape(rows.shape)


def pruned(rows):
    return np.where(np.abs(rows) < np.quantile(np.abs(rows), 0.6), np.float32(0), rows)


def without_kernels(rows):
    """Pruned by whole output channels and by single kernels."""
    rows = rows.copy().reshape(INPUTS, INPUTS, 9)
    rows[::4] = 0
    rows[np.random.default_rng(5).random((INPUTS, INPUTS)) < 0.2] = 0
    return rows.reshape(-1, 9)


LAYERS = {
    "float16": lambda: dense().astype(np.float16).astype(np.float32),
    "bfloat16": lambda: bfloat16(dense()),
    "int8": lambda: expanded_int8(dense()),
    "pruned": lambda: pruned(dense()),
    "pruned float16": lambda: pruned(dense()).astype(np.float16).astype(np.float32),
    "without kernels": lambda: without_kernels(dense()),
}


def hidden_of(rows):
    alive = np.flatnonzero(rows.any(1))
    return np.isin(np.arange(UNITS), np.random.default_rng(1).choice(alive, HIDDEN, replace=False))


def exact_auc(published, hidden):
    """The best that zeros, precision or repeated values say by themselves."""
    asked = exactness.features(published.astype(np.float64)).T
    return max(max(auc, 1 - auc) for auc in (roc_auc_score(hidden, values) for values in asked))


def noise():
    return decoys.PrfNoise(b"s" * 32, b"m" * 16, "w")


@pytest.mark.parametrize("name", LAYERS)
def test_the_last_bits_find_plain_decoys_exactly_and_ours_not(name):
    rows = LAYERS[name]()
    hidden = hidden_of(rows)
    plain = rows.copy()  # positive control: a mixture with full mantissas and no zeros
    plain[hidden] = decoys.mixture_rows(rows.astype(np.float64), INPUTS, hidden, noise())
    assert exact_auc(plain, hidden) > (0.6 if name == "without kernels" else 0.95)
    ours = decoys.decoy_rows(rows, INPUTS, hidden, noise())
    assert exact_auc(ours, hidden) <= 0.6
    assert np.array_equal(ours[~hidden], rows[~hidden])
    assert not np.all(ours == rows, axis=1)[hidden].any()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_the_detectors_ask_for_precision_too(name):
    rows = LAYERS[name]()
    hidden = hidden_of(rows)
    found = {
        kind: detect.layer_auc(
            decoys.decoy_rows(rows, INPUTS, hidden, noise(), kind=kind), INPUTS, hidden, "A", kind=kind, seed=0
        )
        for kind in ("mixture", "dprm")
    }
    assert found["dprm"] >= 0.98
    assert max(found["mixture"], 1 - found["mixture"]) <= 0.6


def test_a_dense_layer_of_full_precision_keeps_its_decoys_as_drawn():
    rows = dense()
    hidden = hidden_of(rows)
    drawn = decoys.mixture_rows(rows.astype(np.float64), INPUTS, hidden, noise()).astype(np.float32)
    assert np.array_equal(decoys.decoy_rows(rows, INPUTS, hidden, noise())[hidden], drawn)


def test_precision_is_measured_by_row_and_layer():
    rows = np.array([[1.0, -0.5, 0.0], [1.5, 2.0, 4.0], [1 + 2**-10, 8.0, 1.0], [0.1, 0.2, 0.3]])
    assert exactness.used_bits(rows).tolist()[:3] == [0, 1, 10]
    assert exactness.used_bits(rows)[3] >= 50
    assert exactness.last_place(rows[:3]) == -10
    assert exactness.repeated_share(rows).tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0])


def test_a_model_without_a_layer_to_test_has_no_auc(models):
    model = carrier.normalised(models["float32"]())
    layers = carrier.layers(model)
    selected = choose(random_scores(layers, 0), layers, 1.0).selected
    assert detect.detect(model, layers, selected, "A", kind="mixture") == (None, 0)
    row = {"detector": "A", "bn_folded": True, "auc": None, "auc_on_dprm": None, "layers": 0}
    assert "no layer" in detection(row)


def test_an_auc_far_below_a_half_in_one_layer_does_not_hide_one_above_it_in_another(models, monkeypatch):
    model = carrier.normalised(models["float32"]())
    layers = [layer for layer in carrier.layers(model) if layer.unit_size == 9][:2]
    selected = {layer.name: np.arange(layer.units) % 2 == 0 for layer in layers}
    monkeypatch.setattr(detect, "MIN_EACH", 10)
    given = iter([0.2, 0.8])
    monkeypatch.setattr(detect, "layer_auc", lambda *_, **__: next(given))
    auc, tested = detect.detect(model, layers, selected, "A", kind="mixture")
    assert (round(auc, 9), tested) == (0.8, 2)
