"""The accountant against published rows, against Monte Carlo, and against its own monotonicity."""

import math

import numpy as np
import pytest

from edgepriv.errors import ConfigError
from edgepriv.synthesis import accountant, metric_privacy

# n, R, epsilon, epsilon' at delta 1e-5, total variation: two independent quadratures agree on these to 3 decimals
ROWS = [
    (16, 5, 0.25, 2.00, 0.249),
    (16, 5, 0.5, 4.18, 0.472),
    (16, 5, 1, 8.77, 0.784),
    (16, 5, 2, 18.38, 0.981),
    (16, 5, 4, 38.08, 1.000),
    (32, 6, 1, 8.68, 0.711),
    (64, 8, 1, 8.94, 0.683),
    (8, 4, 1, 7.735, 0.829),
    (8, 4, 2, 15.685, 0.987),
    (16, 6, 2, 22.29, 0.994),
]


@pytest.mark.parametrize(("n", "radius", "epsilon", "expected", "bound"), ROWS)
def test_the_curve_gives_the_published_rows(n, radius, epsilon, expected, bound):
    loss = accountant.loss_distribution(accountant.kappa(radius, epsilon), n)
    assert loss.epsilon(1e-5) == pytest.approx(expected, abs=0.01)
    assert loss.advantage_bound() == pytest.approx(bound, abs=0.001)


def sampled_losses(n, kappa, count, rng):
    """Privacy losses of the sampler itself, at two codes kappa apart (epsilon 1)."""
    v = metric_privacy.sample_noise(count, n, 1.0, rng)
    moved = v.copy()
    moved[:, 0] -= kappa
    return np.linalg.norm(moved, axis=1) - np.linalg.norm(v, axis=1)


@pytest.mark.parametrize(("n", "kappa", "e"), [(16, 10.0, 3.0), (8, 4.0, 1.0), (2, 2.0, 0.5)])
def test_delta_agrees_with_monte_carlo_on_the_sampler(n, kappa, e):
    losses = sampled_losses(n, kappa, 1_000_000, np.random.default_rng(n))
    measured = np.clip(-np.expm1(e - losses), 0, None).mean()
    assert accountant.loss_distribution(kappa, n).delta(e) == pytest.approx(measured, abs=0.002)


def test_two_copies_compose_to_what_monte_carlo_gives():
    rng = np.random.default_rng(5)
    losses = sampled_losses(12, 3.0, 600_000, rng) + sampled_losses(12, 3.0, 600_000, rng)
    composed = accountant.loss_distribution(3.0, 12).composed(2)
    for e in (0.5, 2.0):
        measured = np.clip(-np.expm1(e - losses), 0, None).mean()
        assert composed.delta(e) == pytest.approx(measured, abs=0.002)
    assert composed.epsilon(1e-5) <= 6.0 + 1e-3  # never above k * kappa


def test_composition_is_an_upper_bound_and_grows():
    one = accountant.loss_distribution(4.0, 8)
    epsilons = [one.composed(k).epsilon(1e-5) for k in (1, 2, 4)]
    assert epsilons == sorted(epsilons)
    assert one.composed(2).delta(1.0) >= one.delta(1.0)


def test_the_curve_ends_at_pure_epsilon():
    loss = accountant.loss_distribution(5.0, 8)
    assert loss.delta(5.0) == pytest.approx(0.0, abs=1e-9)
    assert loss.losses.max() <= 5.0 + 1e-9
    assert loss.weights.sum() == pytest.approx(1.0, abs=1e-6)


def test_no_threshold_attacker_on_the_noise_beats_the_bounds():
    n, kappa = 8, 4.0
    rng = np.random.default_rng(7)
    inside = sampled_losses(n, kappa, 400_000, rng)
    outside = -sampled_losses(n, kappa, 400_000, rng)  # the same loss seen from the other code
    loss = accountant.loss_distribution(kappa, n)
    epsilon = loss.epsilon(1e-3)
    for cut in np.linspace(-3.5, 3.5, 15):
        hit, alarm = float((inside > cut).mean()), float((outside > cut).mean())
        assert hit - alarm <= loss.advantage_bound() + 0.003
        assert hit <= accountant.true_positive_bound(alarm, epsilon, 1e-3) + 0.003


def test_randomised_response_keeps_labels_at_the_rate_of_its_epsilon():
    keep = accountant.randomised_response_keep(2.0, 10)
    assert keep == pytest.approx(math.exp(2) / (math.exp(2) + 9))
    assert accountant.randomised_response_epsilon(keep, 10) == pytest.approx(2.0)


def test_training_budget_is_put_on_the_replace_one_relation_before_it_is_added():
    epsilon, delta = accountant.compose_with_training((3.0, 1e-5), (1.0, 1e-6), 0.5)
    assert epsilon == pytest.approx(3.0 + 2.0 + 0.5)
    assert delta == pytest.approx(1e-5 + (1 + math.e) * 1e-6)
    assert accountant.advantage_of(0.0, 0.0) == 0.0
    assert accountant.advantage_of(50.0, 0.0) == pytest.approx(1.0)


def test_impossible_questions_are_refused():
    with pytest.raises(ConfigError, match="kappa"):
        accountant.loss_distribution(0.0, 8)
    with pytest.raises(ConfigError, match="at least 2 latent"):
        accountant.loss_distribution(1.0, 1)
    with pytest.raises(ConfigError, match="delta"):
        accountant.loss_distribution(1.0, 8).epsilon(0.0)
    with pytest.raises(ConfigError, match="copies"):
        accountant.loss_distribution(1.0, 8).composed(0)
