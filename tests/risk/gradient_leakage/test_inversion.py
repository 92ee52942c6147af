"""The attack: works where it must, changes nothing, and says clearly what it cannot do."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgepriv.errors import ConfigError, DataError  # noqa: E402
from edgepriv.federated.local_recipe import LocalRecipe  # noqa: E402
from edgepriv.risk.gradient_leakage import inversion, labels, measures  # noqa: E402
from edgepriv.risk.gradient_leakage.inversion import PRESETS, Attack, invert  # noqa: E402
from edgepriv.risk.gradient_leakage.simulate import Simulation  # noqa: E402


def _psnr(result, truth):
    images = truth.transpose(0, 2, 3, 1)
    rows = measures.match(result.images, images)
    errors = ((result.images[rows] - images) ** 2).reshape(len(images), -1).mean(1)
    return float(np.mean(-10 * np.log10(np.maximum(errors, 1e-10))))


def test_gradient_matching_reaches_the_images_and_nothing_is_mutated(digits):
    model, recipe = digits.network(0), LocalRecipe(batch_size=2)
    update, x, y = digits.client(model, recipe, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    target = inversion.read_update(model, update, recipe, 2)
    leaf = torch.full(x.shape, 0.5).requires_grad_()
    simulated = Simulation(model, recipe).update(leaf, torch.nn.functional.one_hot(torch.tensor(y), 10).float())
    loss = inversion.match_loss(simulated.changes, target.changes, "cosine", torch.tensor(1.0))
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert float(gradient.abs().max()) > 0
    invert(model, update, recipe, x.shape, Attack(iterations=5), labels=y)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_same_seed_gives_the_same_images(digits):
    model, recipe = digits.network(0), LocalRecipe()
    update, x, y = digits.client(model, recipe, 2)
    a, b = (invert(model, update, recipe, x.shape, Attack(iterations=10, seed=4), labels=y) for _ in range(2))
    assert a.images.tobytes() == b.images.tobytes()


def test_an_attacker_who_assumes_frozen_batchnorm_is_far_worse(digits):
    model, recipe = digits.network(1), LocalRecipe()
    update, x, y = digits.client(model, recipe, 1)
    aware = _psnr(invert(model, update, recipe, x.shape, labels=y), x)
    assert aware - _psnr(invert(model, update, recipe, x.shape, PRESETS["fixed-bn"], labels=y), x) >= 20


def test_momentum_weight_decay_and_proximal_updates_are_inverted(digits):
    model = digits.network(1)
    recipe = LocalRecipe(0.02, batch_size=2, momentum=0.9, weight_decay=1e-3, proximal_mu=0.1)
    update, x, y = digits.client(model, recipe, 4)
    assert _psnr(invert(model, update, recipe, x.shape, Attack(iterations=200), labels=y), x) >= 25


def test_carried_momentum_needs_its_state_and_works_with_it(digits):
    from edgepriv.federated.torch_trainer import train_locally

    model = digits.network(1)
    recipe = LocalRecipe(momentum=0.9, carries_momentum=True)
    x, y = digits.private[:1], digits.private_labels[:1]
    state = train_locally(model, digits.private[5:6], digits.private_labels[5:6], recipe, seed=0).momentum
    update = train_locally(model, x, y, recipe, seed=0, momentum=state).tensors
    with pytest.raises(DataError, match="momentum"):
        invert(model, update, recipe, x.shape, labels=y)
    tensors = {k: torch.tensor(v) for k, v in state.items()}
    assert _psnr(invert(model, update, recipe, x.shape, labels=y, momentum=tensors), x) >= 25


def test_labels_are_read_from_the_head(digits):
    recipe = LocalRecipe(batch_size=32)
    right = []
    for seed in range(3):
        model = digits.network(seed)
        update, _, y = digits.client(model, LocalRecipe(), 1, seed)
        assert labels.infer_labels(model, update, LocalRecipe(), 1, digits.public).tolist() == y.tolist()
        update, _, y = digits.client(model, recipe, 16, seed)
        counts = np.bincount(labels.infer_labels(model, update, recipe, 16, digits.public), minlength=10)
        right.append(np.minimum(counts, np.bincount(y, minlength=10)).sum() / 16)
    assert np.mean(right) >= 0.85


def test_unknown_labels_are_optimised_with_the_images(digits):
    model, recipe = digits.network(1), LocalRecipe()
    update, x, _ = digits.client(model, recipe, 1)
    assert _psnr(invert(model, update, recipe, x.shape, Attack(labels="joint")), x) >= 30
    known = invert(model, update, recipe, x.shape, Attack(labels="inferred"))
    assert _psnr(known, x) >= 45


@pytest.mark.parametrize("preset", ["dlg", "idlg"])
def test_the_classic_attacks_invert_the_networks_they_were_made_for(digits, preset):
    model, recipe = digits.network(0, "lenet"), LocalRecipe()
    with torch.no_grad():
        for parameter in model.parameters():  # Zhu et al. draw the weights of their LeNet from U(-0.5, 0.5)
            parameter.uniform_(-0.5, 0.5)
    update, x, _ = digits.client(model, recipe, 1)
    attack = replace(PRESETS[preset], iterations=60, restarts=3)
    assert _psnr(invert(model, update, recipe, x.shape, attack), x) >= 25


def test_a_network_without_batchnorm_is_attacked_by_its_gradient_alone(digits):
    model, recipe = digits.network(0, "cnn"), LocalRecipe()
    update, x, y = digits.client(model, recipe, 1)
    found = invert(model, update, recipe, x.shape, labels=y)
    assert found.recovered_layers == 0
    assert found.statistics_loss == 0
    assert _psnr(found, x) >= 25


def test_restarts_keep_the_lowest_loss(digits):
    model, recipe = digits.network(0), LocalRecipe(batch_size=4)
    update, x, y = digits.client(model, recipe, 4)
    one = invert(model, update, recipe, x.shape, Attack(iterations=20), labels=y)
    three = invert(model, update, recipe, x.shape, Attack(iterations=20, restarts=3), labels=y)
    assert min(three.trace) <= min(one.trace)


def test_bad_updates_are_clear_errors(digits):
    model, recipe = digits.network(0), LocalRecipe(batch_size=4)
    update, x, y = digits.client(model, recipe, 4)
    other, _, _ = digits.client(digits.network(0, "mlp"), recipe, 4)
    spoiled = {**update, "head.bias": update["head.bias"] * np.float32("nan")}
    wide = {**update, "head.bias": np.zeros(11, np.float32)}
    for bad, words in ((other, "in the model|has not"), (spoiled, "NaN"), (wide, "shape")):
        with pytest.raises(DataError, match=words):
            invert(model, bad, recipe, x.shape, labels=y)
    with pytest.raises(DataError, match="disagree"):
        invert(model, update, LocalRecipe(batch_size=4, trainable=("head.",)), x.shape, labels=y)
    with pytest.raises(DataError, match="labels"):
        invert(model, update, recipe, x.shape, labels=y[:2])
    with pytest.raises(DataError, match="holds no parameter"):
        invert(model, {}, recipe, x.shape, labels=y)


def test_batches_above_the_supported_size_are_refused_with_the_limit(digits):
    model = digits.network(0)
    with pytest.raises(DataError, match="up to 32"):
        invert(model, {}, LocalRecipe(batch_size=33), (33, 1, 8, 8))


def test_attack_settings_are_checked():
    with pytest.raises(ConfigError, match="match must be one of"):
        Attack(match="manhattan")
    with pytest.raises(ConfigError):
        Attack(iterations=0)
