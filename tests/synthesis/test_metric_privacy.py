"""The noise has the moments and the radius of the L2 Laplace mechanism, and the clip bounds every code."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepriv.errors import ConfigError
from edgepriv.synthesis import metric_privacy


def test_a_million_draws_have_the_mean_radius_and_variance_of_the_mechanism():
    n, epsilon = 16, 2.0
    v = metric_privacy.sample_noise(1_000_000, n, epsilon, np.random.default_rng(0))
    assert np.linalg.norm(v, axis=1).mean() == pytest.approx(n / epsilon, rel=5e-3)
    assert np.allclose(v.var(axis=0), (n + 1) / epsilon**2, rtol=1e-2)
    assert np.abs(v.mean(axis=0)).max() < 0.02


def test_the_noise_is_not_per_coordinate_laplace():
    # its density depends on the norm alone: any rotation of it has the same fourth moments
    v = metric_privacy.sample_noise(400_000, 3, 1.0, np.random.default_rng(1))
    turned = v @ np.linalg.qr(np.random.default_rng(2).standard_normal((3, 3)))[0]
    assert (v**4).mean() == pytest.approx((turned**4).mean(), rel=0.03)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
def test_no_clipped_code_is_longer_than_the_radius(seed, radius):
    codes = np.random.default_rng(seed).standard_normal((20, 7)) * 50
    clipped = metric_privacy.clip(codes, radius)
    assert np.linalg.norm(clipped, axis=1).max() <= radius * (1 + 1e-6)
    short = codes / np.linalg.norm(codes, axis=1, keepdims=True) * radius / 2
    assert np.allclose(metric_privacy.clip(short, radius), short)


def test_the_noise_ratio_sets_the_noise_over_the_latent_spread():
    epsilon = metric_privacy.epsilon_for_ratio(2.0, 12, 0.8)
    assert metric_privacy.noise_sd(12, epsilon) == pytest.approx(1.6)


def test_rescaling_brings_noised_unit_codes_back_to_unit_variance():
    rng = np.random.default_rng(3)
    codes = metric_privacy.add_noise(rng.standard_normal((200_000, 8)), 1.0, rng)
    assert metric_privacy.rescale(codes, 1.0).var() == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), float("inf")])
def test_an_epsilon_that_is_not_positive_is_refused(epsilon):
    with pytest.raises(ConfigError, match="epsilon must be a positive number"):
        metric_privacy.sample_noise(1, 4, epsilon, np.random.default_rng(0))


def test_a_noise_ratio_or_radius_that_is_not_positive_is_refused():
    with pytest.raises(ConfigError, match="noise ratio"):
        metric_privacy.epsilon_for_ratio(0.0, 8, 1.0)
    with pytest.raises(ConfigError, match="clip radius"):
        metric_privacy.clip(np.ones((1, 2)), 0.0)
    with pytest.raises(ConfigError, match="collapsed"):
        metric_privacy.epsilon_for_ratio(2.0, 8, 0.0)
