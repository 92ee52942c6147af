"""The one-run bound: published values, and a wrong noise scale found at a small epsilon."""

import numpy as np
import pytest

from edgepriv.errors import ConfigError
from edgepriv.risk.membership import one_run
from edgepriv.synthesis import metric_privacy


@pytest.mark.parametrize(("correct", "expected"), [(100, 3.493), (90, 1.631), (75, 0.702), (60, 0.052), (50, 0.0)])
def test_the_published_values_of_a_hundred_guesses(correct, expected):
    assert one_run.epsilon_lower_bound(400, 100, correct) == pytest.approx(expected, abs=0.01)


def test_delta_only_weakens_the_bound():
    assert one_run.epsilon_lower_bound(400, 100, 90, delta=1e-5) < one_run.epsilon_lower_bound(400, 100, 90)


def audited(scale, seed):
    """Two thousand records, each at +R or -R by a fair coin, through noise of kappa 1; guess from the sign."""
    rng = np.random.default_rng(seed)
    radius, epsilon = 1.0, 0.5
    members = rng.random(2000) < 0.5
    codes = np.zeros((2000, 2))
    codes[:, 0] = np.where(members, radius, -radius)
    noised = codes + scale * metric_privacy.sample_noise(2000, 2, epsilon, rng)
    correct = one_run.count_correct(noised[:, 0], members, 600)
    return one_run.epsilon_lower_bound(2000, 600, correct)


def test_the_right_noise_is_never_refuted_and_a_tenth_of_it_is():
    kappa = 1.0
    assert max(audited(1.0, seed) for seed in range(20)) <= kappa
    assert min(audited(0.1, seed) for seed in range(5)) > kappa


def test_impossible_counts_are_refused():
    with pytest.raises(ConfigError, match="cannot be"):
        one_run.epsilon_lower_bound(10, 20, 5)
    with pytest.raises(ConfigError, match="even"):
        one_run.count_correct(np.arange(4.0), np.array([True, False, True, False]), 3)


def test_guesses_are_counted_from_both_ends():
    members = np.array([False, False, True, True, False, True])
    assert one_run.count_correct(np.arange(6.0), members, 4) == 3
