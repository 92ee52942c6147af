"""The torch trainer: equal to torch's own optimiser, pure, and honest about what leaves the device."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgepriv.errors import ConfigError, DataError  # noqa: E402
from edgepriv.federated.local_recipe import LocalRecipe, head_recipe  # noqa: E402
from edgepriv.federated.torch_trainer import train_locally  # noqa: E402
from edgepriv.risk import models  # noqa: E402


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.build("cnn-bn", 10, 1, 8)


def _images(n=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((n, 1, 8, 8), np.float32), rng.integers(0, 10, n)


def test_an_update_equals_torch_sgd_with_momentum_and_weight_decay(model):
    x, y = _images()
    recipe = LocalRecipe(0.05, batch_size=4, epochs=2, momentum=0.9, weight_decay=1e-2)
    update = train_locally(model, x, y, recipe, seed=3, shuffle=False)
    reference = copy.deepcopy(model).train()
    optimiser = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for _ in range(2):
        for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(reference(torch.tensor(x[rows])), torch.tensor(y[rows])).backward()
            optimiser.step()
    assert update.steps == recipe.steps(10) == 6
    for name, value in reference.state_dict().items():
        expected = (value - model.state_dict()[name]).numpy()
        np.testing.assert_allclose(update.tensors[name], expected, atol=2e-6, err_msg=name)


def test_the_global_model_is_never_changed(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train_locally(model, *_images(), LocalRecipe(), seed=0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_fedprox_stays_closer_to_the_global_model(model):
    x, y = _images()
    norms = []
    for mu in (0.0, 10.0):
        update = train_locally(model, x, y, LocalRecipe(0.05, 2, epochs=6, proximal_mu=mu), seed=1)
        norms.append(sum(float((v**2).sum()) for k, v in update.tensors.items() if "_" not in k.rsplit(".")[-1]))
    assert norms[1] < 0.9 * norms[0]


def test_statistics_kept_at_home_are_not_in_the_update(model):
    update = train_locally(model, *_images(), LocalRecipe(shares_statistics=False), seed=0)
    assert not [name for name in update.tensors if "running" in name or "num_batches" in name]


def test_a_head_only_update_holds_the_head_only(model):
    update = train_locally(model, *_images(), head_recipe(), seed=0)
    assert set(update.tensors) == {"head.weight", "head.bias"}


def test_carried_momentum_changes_the_next_update(model):
    x, y = _images()
    recipe = LocalRecipe(momentum=0.9, carries_momentum=True)
    first = train_locally(model, x, y, recipe, seed=0)
    again = train_locally(model, x, y, recipe, seed=0, momentum=first.momentum)
    assert not np.allclose(first.tensors["head.weight"], again.tensors["head.weight"])


def test_the_same_seed_gives_the_same_bytes(model):
    a, b = (train_locally(model, *_images(), LocalRecipe(batch_size=3), seed=5) for _ in range(2))
    assert all(a.tensors[k].tobytes() == b.tensors[k].tobytes() for k in a.tensors)


@pytest.mark.parametrize(
    "bad", [{"learning_rate": 0}, {"batch_size": 0}, {"momentum": 1.0}, {"batch_normalisation": "x"}]
)
def test_a_recipe_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ConfigError):
        LocalRecipe(**bad)


def test_no_images_diverging_training_and_unknown_layers_are_clear_errors(model):
    with pytest.raises(DataError, match="cannot be trained"):
        train_locally(model, *_images(0), LocalRecipe(), seed=0)
    with pytest.raises(DataError, match="starts with"):
        train_locally(model, *_images(), LocalRecipe(trainable=("tail.",)), seed=0)
    x, y = _images()
    with pytest.raises(DataError, match="diverged"):
        train_locally(model, x * np.float32("nan"), y, LocalRecipe(), seed=0)


def test_a_trainer_of_the_whole_model_serves_a_round_and_keeps_its_statistics(model):
    from edgepriv.federated.local_update import RoundSettings
    from edgepriv.federated.torch_trainer import TorchTrainer

    x, y = _images()
    weights = {n: v.numpy().copy() for n, v in model.state_dict().items() if "running" not in n and "num" not in n}
    before = model.state_dict()["features.1.running_mean"].clone()
    trainer = TorchTrainer(model, x, y)
    recipe = LocalRecipe(shares_statistics=False)
    update = trainer(weights, RoundSettings(recipe, round=1, seed=0))
    assert set(update.tensors) == set(weights)
    assert update.examples == 10
    assert not torch.equal(model.state_dict()["features.1.running_mean"], before)
    assert int(model.state_dict()["features.1.num_batches_tracked"]) == 2
    assert trainer(weights, RoundSettings(recipe, round=2, seed=0)).examples == 10
    assert TorchTrainer(model, x[:0], y[:0])(weights, RoundSettings(recipe, 1, 0)).examples == 0
    with pytest.raises(DataError, match="has not"):
        trainer({"tail.weight": y}, RoundSettings(recipe, 1, 0))
