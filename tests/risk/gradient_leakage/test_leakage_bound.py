"""The bound: equal to a brute-force Jacobian and matrix inverse, and moving the right way."""

from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgepriv.errors import DataError  # noqa: E402
from edgepriv.federated.local_recipe import LocalRecipe, head_recipe  # noqa: E402
from edgepriv.federated.torch_trainer import train_locally  # noqa: E402
from edgepriv.risk.gradient_leakage import bound as bounds  # noqa: E402
from edgepriv.risk.gradient_leakage import protections  # noqa: E402


@pytest.fixture(scope="module")
def case(digits):
    model, recipe = digits.network(0), LocalRecipe(batch_size=2)
    update, x, y = digits.client(model, recipe, 4)
    return model, recipe, update, x, y, bounds.jacobian(model, x, y, recipe, digits.public)


def test_the_jacobian_equals_finite_differences_of_the_trainer(case):
    model, recipe, _, x, y, jac = case
    model = model.double()
    step = 1e-5
    for image, row, column in ((0, 3, 4), (3, 2, 2)):
        ends = []
        for sign in (1, -1):
            moved = x.astype(np.float64)
            moved[image, 0, row, column] += sign * step
            ends.append(train_locally(model, moved, y, recipe, seed=0, shuffle=False).tensors)
        index = image * 64 + row * 8 + column
        for name, block in jac.groups.items():
            numeric = (ends[0][name] - ends[1][name]).ravel() / (2 * step)
            np.testing.assert_allclose(block[:, index], numeric, atol=2e-3 * np.abs(numeric).max() + 1e-6)
    model.float()


def test_the_bound_equals_the_plain_matrix_formula(case):
    jac = case[-1]
    j = np.concatenate(list(jac.groups.values()))
    v = np.linalg.inv(j.T @ j / 0.01**2 + np.diag(1 / jac.prior_variance))
    expected = -10 * np.log10(np.trace(v) / len(v))
    assert bounds.bound(jac, 0.01).psnr_db == pytest.approx(expected, abs=1e-6)


def test_the_bound_falls_with_noise_to_the_floor_and_statistics_only_add(case):
    update, jac = case[2], case[-1]
    levels = [protections.RelativeNoise(level).sigmas(update) for level in (0.1, 1, 10, 1000)]
    with_bn = [bounds.bound(jac, s) for s in levels]
    without = [bounds.bound(jac, s, shares_statistics=False) for s in levels]
    assert all(a.psnr_db > b.psnr_db for a, b in pairwise(with_bn))
    assert all(a.psnr_db >= b.psnr_db for a, b in zip(with_bn, without, strict=True))
    assert with_bn[-1].psnr_db == pytest.approx(with_bn[-1].floor_db, abs=0.05)
    assert with_bn[0].rank > with_bn[2].rank
    assert 0 <= with_bn[-1].explained_variance < with_bn[0].explained_variance <= 1


def test_without_noise_the_bound_is_infinite_and_says_so_in_json(case):
    found = bounds.bound(case[-1], 0.0)
    assert found.psnr_db == float("inf")
    assert found.record()["psnr_db"] is None
    assert "not a certificate" in found.record()["caveat"]


def test_clipping_lowers_the_bound_at_equal_noise(case):
    jac = case[-1]
    assert bounds.bound(jac, 1e-3, clip=jac.norm / 10).psnr_db < bounds.bound(jac, 1e-3).psnr_db


def test_a_subspace_stays_a_ceiling_and_too_large_a_jacobian_is_refused(case, digits, monkeypatch):
    model, recipe, _, x, y, jac = case
    small = bounds.jacobian(model, x, y, recipe, digits.public, subspace=4)
    assert bounds.bound(small, 0.01).psnr_db >= bounds.bound(jac, 0.01).psnr_db
    full = bounds.jacobian(model, x, y, recipe, digits.public, subspace=8)
    assert bounds.bound(full, 1e-4).dimensions == bounds.bound(jac, 1e-4).dimensions
    monkeypatch.setattr(bounds, "MAX_JACOBIAN_BYTES", 1000)
    with pytest.raises(DataError, match="larger than"):
        bounds.jacobian(model, x, y, recipe, digits.public)


def test_a_head_only_update_says_less_than_the_full_one(case, digits):
    model, _, _, x, y, _ = case
    head = bounds.jacobian(model, x[:1], y[:1], head_recipe(), digits.public)
    full = bounds.jacobian(model, x[:1], y[:1], LocalRecipe(), digits.public)
    assert bounds.bound(head, 1e-3).psnr_db < bounds.bound(full, 1e-3).psnr_db


def test_percentile_noise_does_not_protect_statistics_on_a_trained_network(digits):
    model = digits.network(0)
    recipe = LocalRecipe(0.05, batch_size=16, epochs=8)
    trained = train_locally(model, digits.public, digits.public_labels, recipe, seed=0)
    changed = {name: value + torch.tensor(trained.tensors[name]) for name, value in model.state_dict().items()}
    model.load_state_dict(changed)
    x, y = digits.public[:1], digits.public_labels[:1]
    update = train_locally(model, x, y, LocalRecipe(), seed=0).tensors
    jac = bounds.jacobian(model, x, y, LocalRecipe(), digits.public)
    sigmas = protections.RelativeNoise(30).sigmas(update)
    shared, kept = bounds.bound(jac, sigmas), bounds.bound(jac, sigmas, shares_statistics=False)
    assert shared.psnr_db - kept.psnr_db >= 10
