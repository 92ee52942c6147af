"""Batch statistics out of running statistics: exact for K steps, and a contradiction is noticed."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgepriv.errors import DataError  # noqa: E402
from edgepriv.federated.local_recipe import LocalRecipe  # noqa: E402
from edgepriv.risk.gradient_leakage import statistics  # noqa: E402
from edgepriv.risk.gradient_leakage.inversion import read_update  # noqa: E402
from edgepriv.risk.gradient_leakage.simulate import Simulation  # noqa: E402


def _error(found, wanted):
    return max(
        float(
            (getattr(found[k], part) - getattr(wanted[k], part).detach()).norm()
            / getattr(wanted[k], part).detach().norm()
        )
        for k in wanted
        for part in ("mean", "variance")
    )


def _simulated(model, recipe, x, y):
    targets = torch.nn.functional.one_hot(torch.tensor(y), 10).float()
    return Simulation(model, recipe).update(torch.tensor(x), targets)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_recovered_statistics_equal_the_weighted_batch_statistics(digits, steps):
    model, recipe = digits.network(0), LocalRecipe(batch_size=4)
    update, x, y = digits.client(model, recipe, 4 * steps)
    target = read_update(model, update, recipe, 4 * steps)
    assert _error(target.statistics, _simulated(model, recipe, x, y).statistics) <= 1e-5


def test_the_published_one_step_formula_fails_at_two_steps(digits):
    model, recipe = digits.network(0), LocalRecipe(batch_size=4)
    update, x, y = digits.client(model, recipe, 8)
    without_counter = {k: v for k, v in update.items() if "num_batches" not in k}
    found = statistics.recover(model.state_dict(), without_counter, statistics.momenta(model), 1)
    assert _error(found, _simulated(model, recipe, x, y).statistics) >= 0.5


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_cumulative_and_other_momenta_are_recovered_too(digits, momentum):
    model, recipe = digits.network(0), LocalRecipe(batch_size=4)
    for module in model.modules():
        if hasattr(module, "momentum"):
            module.momentum = momentum
            module.num_batches_tracked += 3
    update, x, y = digits.client(model, recipe, 8)
    target = read_update(model, update, recipe, 8)
    assert _error(target.statistics, _simulated(model, recipe, x, y).statistics) <= 1e-5


def test_a_counter_that_contradicts_the_recipe_is_an_audit_error(digits):
    model = digits.network(0)
    update, _, _ = digits.client(model, LocalRecipe(batch_size=4), 12)
    with pytest.raises(DataError, match="counted 3 batches"):
        read_update(model, update, LocalRecipe(batch_size=8), 12)


class _Twice(torch.nn.Module):
    """A network that uses one BatchNorm layer twice in a pass."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.second = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(256, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.norm(self.second(x))).flatten(1))


def test_a_layer_used_twice_a_pass_is_recovered_exactly(digits):
    torch.manual_seed(0)
    model, recipe = _Twice(), LocalRecipe(batch_size=4)
    update, x, y = digits.client(model, recipe, 8)
    uses = statistics.uses_per_pass(model, (1, 8, 8))
    assert uses == {"norm": 2}
    target = read_update(model, update, recipe, 8, uses=uses)
    assert _error(target.statistics, _simulated(model, recipe, x, y).statistics) <= 1e-5
    with pytest.raises(DataError, match="counted 4"):
        read_update(model, update, recipe, 8)


def test_frozen_layers_and_plain_networks_give_no_statistics(digits):
    recipe = LocalRecipe(batch_size=4, batch_normalisation="frozen")
    model = digits.network(0)
    update, _, _ = digits.client(model, recipe, 4)
    assert read_update(model, update, recipe, 4).statistics == {}
    plain = digits.network(0, "cnn")
    update, _, _ = digits.client(plain, LocalRecipe(), 4)
    assert read_update(plain, update, LocalRecipe(), 4).statistics == {}


@pytest.mark.parametrize(
    "recipe",
    [
        LocalRecipe(0.05, batch_size=4, epochs=2),
        LocalRecipe(0.05, batch_size=3, momentum=0.9, weight_decay=0.01, proximal_mu=0.5),
        LocalRecipe(0.05, batch_size=8, batch_normalisation="frozen"),
        LocalRecipe(0.05, trainable=("head.",), batch_normalisation="frozen"),
    ],
)
def test_the_simulation_is_the_trainer(digits, recipe):
    from edgepriv.federated.torch_trainer import train_locally

    model = digits.network(2)
    x, y = digits.private[:8], digits.private_labels[:8]
    update = train_locally(model, x, y, recipe, seed=0, shuffle=False).tensors
    simulated = _simulated(model, recipe, x, y)
    for name, value in simulated.changes.items():
        np.testing.assert_allclose(value.detach().numpy(), update[name], atol=2e-6, err_msg=name)


def test_noise_on_a_buffer_is_amplified_as_stated():
    assert statistics.noise_gain(0.1, 1) == pytest.approx(10)
    assert statistics.noise_gain(None, 4) == pytest.approx(0.25)
    assert statistics.step_weights(0.1, 3).sum() == pytest.approx(1)
