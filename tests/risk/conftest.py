"""One honest and one vicious small model on scikit-learn's digits, as files, trained once a session."""

import pytest
import torch

from edgepriv.datasets import load
from edgepriv.risk.reconstruction.leakage import Probe
from edgepriv.risk.reconstruction.onnx_writer import write_onnx
from edgepriv.risk.reconstruction.vicious import Recipe, TrainingSet, train


@pytest.fixture(scope="session")
def digits_probes():
    test, training = load("digits", split="test"), load("digits", split="train")
    return Probe("digits", test.images, test.labels), Probe("digits", training.images, training.labels)


@pytest.fixture(scope="session")
def digit_models(tmp_path_factory, digits_probes):
    """Paths honest.onnx and vicious.onnx, and the pairs they were written from."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("digit-models")
    data = TrainingSet.of(digits_probes[1].images, digits_probes[1].labels)
    recipe = Recipe(epochs=16, batch=50)
    pairs = {"vicious": train(recipe, data), "honest": train(recipe.honest(), data)}
    for name, pair in pairs.items():
        write_onnx(pair.classifier, data.shape, 10, folder / f"{name}.onnx")
    return folder, pairs
