"""The metrics of the image-cipher literature with correct critical values, two-sided.

Sources: NPCR and UACI after Wu, Noonan, Agaian 2011; local Shannon entropy after Wu et al. 2013 with the standard
deviation of a mean of 30 blocks (the interval that is widely quoted is too narrow by the square root of 30); entropy
with the expectation of a finite sample. All are necessary and none is sufficient: a cipher that passes may be broken
by three chosen pictures (tests/attacks has one).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

F = 255  # the largest byte value; n below is always the number of bytes
LOCAL_BLOCKS, LOCAL_BLOCK_BYTES = 30, 1936
LOCAL_MEAN, LOCAL_SD = 7.902469317, 0.008694 / math.sqrt(LOCAL_BLOCKS)
EXACT_BELOW = 16384
NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Interval:
    """What a random ciphertext gives with probability 1 - alpha."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def npcr(a: Bytes, b: Bytes) -> float:
    """Percentage of bytes that differ."""
    return 100.0 * float(np.count_nonzero(a != b)) / a.size


def uaci(a: Bytes, b: Bytes) -> float:
    """Mean absolute difference in per cent of the largest byte."""
    difference = np.maximum(a, b) - np.minimum(a, b)
    return 100.0 * float(difference.sum(dtype=np.int64)) / (F * a.size)


def npcr_interval(n: int, alpha: float) -> Interval:
    """Two-sided interval of NPCR in per cent: exact binomial below 16,384 bytes, normal from there."""
    if n < EXACT_BELOW:
        low, high = _equal_bytes_bounds(n, alpha)
        return Interval(100.0 * (n - high) / n, 100.0 * (n - low) / n)
    mean, sd = F / (F + 1), math.sqrt(F / ((F + 1) ** 2 * n))
    z = NORMAL.inv_cdf(1 - alpha / 2)
    return Interval(100 * (mean - z * sd), 100 * (mean + z * sd))


def npcr_one_sided(n: int, alpha: float) -> float:
    """The lower critical value that the literature tabulates, in per cent."""
    return 100 * (F - NORMAL.inv_cdf(1 - alpha) * math.sqrt(F / n)) / (F + 1)


def uaci_interval(n: int, alpha: float) -> Interval:
    """Two-sided interval of UACI in per cent."""
    mean = (F + 2) / (3 * F + 3)
    sd = math.sqrt((F + 2) * (F * F + 2 * F + 3) / (18 * (F + 1) ** 2 * F * n))
    z = NORMAL.inv_cdf(1 - alpha / 2)
    return Interval(100 * (mean - z * sd), 100 * (mean + z * sd))


def entropy(data: Bytes) -> float:
    """Shannon entropy of the bytes in bits."""
    p = np.bincount(data.reshape(-1), minlength=256) / data.size
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


def entropy_interval(n: int, alpha: float) -> Interval:
    """Two-sided interval of the entropy of n random bytes, with the finite-sample mean and deviation."""
    mean, sd = entropy_moments(n)
    z = NORMAL.inv_cdf(1 - alpha / 2)
    return Interval(mean - z * sd, mean + z * sd)


@lru_cache(maxsize=64)
def entropy_moments(n: int) -> tuple[float, float]:
    """Mean and standard deviation of the entropy of n random bytes: exact below 16,385 bytes, asymptotic above."""
    if n > EXACT_BELOW:
        return 8 - 255 / (2 * n * math.log(2)), math.sqrt(510) / (2 * n * math.log(2))
    k = np.arange(1, min(n, n // 256 + 60 + n // 64) + 1)
    h = -(k / n) * np.log2(k / n)
    one = np.exp(_log_binomial(n, k) - k * math.log(256) + (n - k) * math.log(255 / 256))
    mean = float((one * h).sum())
    first, second = np.meshgrid(k, k, indexing="ij")
    rest = n - first - second
    inside = rest >= 0
    log_pair = np.where(
        inside,
        _log_factorial(n) - _log_factorial(first) - _log_factorial(second) - _log_factorial(np.maximum(rest, 0)),
        -np.inf,
    )
    pair = np.exp(log_pair - (first + second) * math.log(256) + rest * math.log(254 / 256))
    product = float((pair * h[:, None] * h[None, :]).sum())
    variance = 256 * float((one * h * h).sum()) + 256 * 255 * product - (256 * mean) ** 2
    return 256 * mean, math.sqrt(max(variance, 0.0))


def local_entropy(data: Bytes, random: np.random.Generator) -> float:
    """Mean entropy of 30 random disjoint blocks of 1,936 bytes."""
    flat = data.reshape(-1)
    blocks = flat.size // LOCAL_BLOCK_BYTES
    chosen = random.choice(blocks, LOCAL_BLOCKS, replace=False)
    rows = flat[: blocks * LOCAL_BLOCK_BYTES].reshape(blocks, LOCAL_BLOCK_BYTES)[chosen]
    return float(np.mean([entropy(row) for row in rows]))


def local_entropy_interval(alpha: float) -> Interval:
    """Two-sided interval of `local_entropy`; the same for every size from 58,080 bytes."""
    z = NORMAL.inv_cdf(1 - alpha / 2)
    return Interval(LOCAL_MEAN - z * LOCAL_SD, LOCAL_MEAN + z * LOCAL_SD)


def chi_square(data: Bytes) -> float:
    """Chi-square of the histogram against 256 equal counts (255 degrees of freedom)."""
    counts = np.bincount(data.reshape(-1), minlength=256)
    expected = data.size / 256
    return float(((counts - expected) ** 2).sum() / expected)


def chi_square_interval(alpha: float) -> Interval:
    """Two-sided: a histogram that is too even is no random one either."""
    return Interval(chi_square_quantile(alpha / 2), chi_square_quantile(1 - alpha / 2))


@lru_cache(maxsize=64)
def chi_square_quantile(p: float, df: int = 255) -> float:
    """Quantile of the chi-square distribution by bisection of its distribution function."""
    low, high = 0.0, 20.0 * df
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _gamma_p(df / 2, middle / 2) < p else (low, middle)
    return (low + high) / 2


def correlation(image: Bytes, direction: str) -> float:
    """Correlation of all pairs of adjacent pixels of one channel: ``h``, ``v`` or ``d``; image is [h, w, c]."""
    a, b = _neighbours(image, direction)
    if a.size < 2:
        return 0.0
    x, y = a.astype(np.float32).reshape(-1) - 127.5, b.astype(np.float32).reshape(-1) - 127.5
    mx, my = x.mean(dtype=np.float64), y.mean(dtype=np.float64)
    sxy = float(np.dot(x, y)) / x.size - mx * my
    sxx, syy = float(np.dot(x, x)) / x.size - mx * mx, float(np.dot(y, y)) / y.size - my * my
    return 1.0 if sxx <= 0 or syy <= 0 else float(sxy / math.sqrt(sxx * syy))  # a constant picture predicts itself


def correlation_interval(pairs: int, alpha: float) -> Interval:
    """Two-sided interval of the correlation of independent pixels."""
    bound = NORMAL.inv_cdf(1 - alpha / 2) / math.sqrt(max(pairs, 1))
    return Interval(-bound, bound)


def adjacent_pairs(image: Bytes, direction: str) -> int:
    """How many pairs `correlation` looks at."""
    return _neighbours(image, direction)[0].size


def _neighbours(image: Bytes, direction: str) -> tuple[Bytes, Bytes]:
    if direction == "h":
        return image[:, :-1], image[:, 1:]
    if direction == "v":
        return image[:-1], image[1:]
    return image[:-1, :-1], image[1:, 1:]


def tail_at_least(k: int, trials: int, p: float) -> float:
    """P(X >= k) for a binomial X: how surprising k failures are."""
    if k <= 0:
        return 1.0
    i = np.arange(k, trials + 1)
    return float(min(1.0, np.exp(_log_binomial(trials, i) + i * math.log(p) + (trials - i) * math.log1p(-p)).sum()))


def two_sided_p(z: float) -> float:
    """Two-sided p-value of a standard normal statistic."""
    return math.erfc(abs(z) / math.sqrt(2))


@lru_cache(maxsize=64)
def _equal_bytes_bounds(n: int, alpha: float) -> tuple[int, int]:
    """Smallest and largest number of equal bytes whose tails each keep at most alpha / 2."""
    k = np.arange(n + 1)
    cdf = np.cumsum(np.exp(_log_binomial(n, k) - k * math.log(256) + (n - k) * math.log(255 / 256)))
    return int(np.searchsorted(cdf, alpha / 2, side="right")), int(np.searchsorted(cdf, 1 - alpha / 2, side="left"))


_LOG_FACTORIALS = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, EXACT_BELOW + 2)))])


def _log_factorial(k: NDArray[np.int64] | int) -> NDArray[np.float64]:
    return np.asarray(_LOG_FACTORIALS[k])


def _log_binomial(n: int, k: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(_log_factorial(n) - _log_factorial(k) - _log_factorial(n - k))


def _gamma_p(a: float, x: float) -> float:
    """Regularised lower incomplete gamma function: series below a + 1, continued fraction above."""
    if x <= 0:
        return 0.0
    scale = math.exp(-x + a * math.log(x) - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        for i in range(1, 5000):
            term *= x / (a + i)
            total += term
            if term < total * 1e-15:
                break
        return total * scale
    b = x + 1 - a
    c, d = 1e300, 1 / b
    fraction = d
    for i in range(1, 5000):
        an = -i * (i - a)
        b += 2
        d = 1 / (an * d + b)
        c = b + an / c
        fraction *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return 1 - scale * fraction
