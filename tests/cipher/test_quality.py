"""The critical values equal the tabulated and simulated ones; the metrics equal their brute-force definitions."""

import numpy as np
import pytest
from scipy import stats

from edgepriv.cipher import quality as q


@pytest.mark.parametrize(
    ("n", "npcr_05", "npcr_001", "uaci_05", "h_mean", "h_sd"),
    [
        (65536, 99.5693, 99.5341, (33.2824, 33.6447), 7.997193, 0.000249),
        (786432, 99.5978, 99.5876, (33.4112, 33.5158), 7.999766, 0.000021),
        (6220800, 99.6053, 99.6016, (33.4449, 33.4821), 7.999970, 0.000003),
    ],
)
def test_critical_values_are_the_tabulated_ones(n, npcr_05, npcr_001, uaci_05, h_mean, h_sd):
    assert q.npcr_one_sided(n, 0.05) == pytest.approx(npcr_05, abs=6e-5)
    assert q.npcr_one_sided(n, 0.001) == pytest.approx(npcr_001, abs=6e-5)
    interval = q.uaci_interval(n, 0.05)
    assert (interval.low, interval.high) == pytest.approx(uaci_05, abs=6e-5)
    assert q.entropy_moments(n) == pytest.approx((h_mean, h_sd), abs=6e-7)


@pytest.mark.parametrize(
    ("n", "mean", "sd"),
    [(784, 7.743676, 0.022779), (3072, 7.939203, 0.005393), (4096, 7.954589, 0.004025), (16384, 7.988743, 0.000997)],
)
def test_the_entropy_of_small_samples_has_its_exact_moments(n, mean, sd):
    assert q.entropy_moments(n) == pytest.approx((mean, sd), abs=4e-5)


@pytest.mark.parametrize(("alpha", "bound"), [(0.05, 293.2478), (0.01, 310.4574), (0.001, 330.5197)])
def test_chi_square_quantiles_are_the_tabulated_ones(alpha, bound):
    assert q.chi_square_quantile(1 - alpha) == pytest.approx(bound, abs=1e-4)
    assert q.chi_square_quantile(alpha) == pytest.approx(stats.chi2.ppf(alpha, 255), abs=1e-6)


@pytest.mark.parametrize(
    ("alpha", "low", "high"), [(0.05, 7.899358, 7.905580), (0.01, 7.898381, 7.906558), (0.001, 7.897246, 7.907693)]
)
def test_local_entropy_uses_the_corrected_interval(alpha, low, high):
    interval = q.local_entropy_interval(alpha)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=2e-6)


def test_npcr_bounds_of_small_images_are_the_exact_binomial_ones():
    for n in (784, 3072, 4096):
        interval = q.npcr_interval(n, 0.05)
        low, high = stats.binom.ppf([0.025, 0.975], n, 1 / 256)
        assert (interval.low, interval.high) == pytest.approx((100 * (n - high) / n, 100 * (n - low) / n))


def test_binomial_tails_are_exact():
    for k in (0, 1, 7, 13, 200):
        assert q.tail_at_least(k, 200, 0.05) == pytest.approx(stats.binom.sf(k - 1, 200, 0.05), rel=1e-9)


def test_metrics_equal_their_definitions():
    random = np.random.default_rng(3)
    a, b = random.integers(0, 256, (2, 12, 9, 3), dtype=np.uint8)
    pairs = list(zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True))
    assert q.npcr(a, b) == pytest.approx(100 * sum(x != y for x, y in pairs) / len(pairs))
    assert q.uaci(a, b) == pytest.approx(100 * sum(abs(x - y) for x, y in pairs) / len(pairs) / 255)
    for direction, (dy, dx) in {"h": (0, 1), "v": (1, 0), "d": (1, 1)}.items():
        x = [int(a[i, j, c]) for i in range(12 - dy) for j in range(9 - dx) for c in range(3)]
        y = [int(a[i + dy, j + dx, c]) for i in range(12 - dy) for j in range(9 - dx) for c in range(3)]
        assert q.correlation(a, direction) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
        assert q.adjacent_pairs(a, direction) == len(x)


def test_random_bytes_fail_each_test_about_once_in_twenty():
    random = np.random.default_rng(5)
    fails = dict.fromkeys(("npcr", "uaci", "entropy", "chi", "local", "h"), 0)
    for _ in range(200):
        a, b = random.integers(0, 256, (2, 180, 360, 1), dtype=np.uint8)
        n = a.size
        fails["npcr"] += q.npcr(a, b) not in q.npcr_interval(n, 0.05)
        fails["uaci"] += q.uaci(a, b) not in q.uaci_interval(n, 0.05)
        fails["entropy"] += q.entropy(a) not in q.entropy_interval(n, 0.05)
        fails["chi"] += q.chi_square(a) not in q.chi_square_interval(0.05)
        fails["local"] += q.local_entropy(a, random) not in q.local_entropy_interval(0.05)
        fails["h"] += q.correlation(a, "h") not in q.correlation_interval(q.adjacent_pairs(a, "h"), 0.05)
    assert all(1 <= count <= 25 for count in fails.values()), fails


def test_a_constant_picture_correlates_fully():
    assert q.correlation(np.zeros((8, 8, 1), np.uint8), "h") == 1.0
