"""What the noise proves: local epsilon, the (epsilon, delta) curve, and a bound on every attacker.

Source: Joseph, Kulesza, Yu, "Approximate Differential Privacy of the l2 Mechanism", arXiv 2502.15929. For two codes at
distance 2R the privacy loss is L = sqrt(r^2 - 2 kappa r t + kappa^2) - r with r ~ Gamma(n, 1), t the cosine of a
uniform direction and kappa = 2 R epsilon; delta(e) = E[(1 - exp(e - L))+]. Everything here holds *for a fixed VAE*
and for equal labels; ``compose_with_training`` and ``randomised_response_epsilon`` add what the other two cost.
numpy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "LossDistribution",
    "advantage_of",
    "compose_with_training",
    "kappa",
    "loss_distribution",
    "randomised_response_epsilon",
    "randomised_response_keep",
    "replace_one",
    "true_positive_bound",
]

QUADRATURE_NODES = 900
COMPOSITION_GRID = 1 << 14


def kappa(clip_radius: float, epsilon: float, copies: int = 1) -> float:
    """Pure local epsilon of a record: the largest latent distance 2R times the metric epsilon, once for each copy."""
    return 2.0 * clip_radius * epsilon * copies


@dataclass(frozen=True, slots=True)
class LossDistribution:
    """The privacy loss between two outcomes, as atoms with weights; ``delta(e)`` falls from the TV bound to 0."""

    losses: NDArray[np.float64]
    weights: NDArray[np.float64]

    def delta(self, epsilon: float) -> float:
        """Smallest delta for which (epsilon, delta) holds."""
        above = self.losses > epsilon
        total = float(self.weights[above] @ -np.expm1(epsilon - self.losses[above]))
        return min(1.0, total)

    def epsilon(self, delta: float) -> float:
        """Smallest epsilon for which (epsilon, delta) holds, by bisection to 1e-6."""
        if not 0 < delta < 1:
            raise ConfigError(f"delta must lie between 0 and 1, not {delta}")
        low, high = 0.0, float(self.losses.max())
        if self.delta(low) <= delta:
            return 0.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if self.delta(middle) > delta else (low, middle)
        return high

    def advantage_bound(self) -> float:
        """Total variation: no attacker on one record has TPR - FPR above it, whatever it knows."""
        return self.delta(0.0)

    def composed(self, copies: int) -> LossDistribution:
        """The loss of ``copies`` independent noisy copies of one record; losses are rounded up, so this is a bound."""
        if copies == 1:
            return self
        if copies < 1:
            raise ConfigError(f"the number of copies must be at least 1, not {copies}")
        top = float(np.abs(self.losses).max())
        step = 2 * top / (COMPOSITION_GRID - 1)
        cell = np.minimum(np.ceil((self.losses + top) / step).astype(np.int64), COMPOSITION_GRID - 1)
        mass = np.bincount(cell, weights=self.weights, minlength=COMPOSITION_GRID)
        mass[-1] += max(0.0, 1.0 - mass.sum())  # what the quadrature missed counts as the worst loss
        size = copies * (COMPOSITION_GRID - 1) + 1
        spectrum = np.fft.rfft(mass, 1 << (size - 1).bit_length())
        total = np.clip(np.fft.irfft(spectrum**copies)[:size], 0.0, None)
        return LossDistribution(np.arange(size, dtype=np.float64) * step - copies * top, total)


@lru_cache(maxsize=16)
def loss_distribution(kappa_one: float, dim: int) -> LossDistribution:
    """Privacy loss of one noisy copy: local epsilon ``kappa_one``, ``dim`` latent coordinates (at least 2)."""
    if dim < 2:
        raise ConfigError(f"the accountant needs at least 2 latent dimensions, not {dim}")
    if not (kappa_one > 0 and math.isfinite(kappa_one)):
        raise ConfigError(f"kappa must be a positive number, not {kappa_one}")
    x, w = np.polynomial.legendre.leggauss(QUADRATURE_NODES)
    low, high = max(0.0, dim - 12 * dim**0.5), dim + 60 + 12 * dim**0.5
    r, angle = (high - low) / 2 * x + (high + low) / 2, np.pi / 2 * (x + 1)
    radial = np.exp((dim - 1) * np.log(r) - r - math.lgamma(dim)) * w * (high - low) / 2
    sphere = math.exp(math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2)) / math.pi**0.5
    angular = sphere * np.sin(angle) ** (dim - 2) * w * np.pi / 2
    square = r[:, None] ** 2 - 2 * kappa_one * r[:, None] * np.cos(angle) + kappa_one**2
    losses = np.sqrt(np.maximum(square, 0.0)) - r[:, None]
    return LossDistribution(losses.ravel(), np.outer(radial, angular).ravel())


def true_positive_bound(false_positive_rate: float, epsilon: float, delta: float) -> float:
    """Largest true-positive rate that (epsilon, delta) allows at a false-positive rate."""
    grown = math.exp(min(epsilon, 700.0)) * false_positive_rate + delta
    mirrored = 1.0 - math.exp(-epsilon) * (1.0 - delta - false_positive_rate)
    return min(1.0, grown, mirrored)


def advantage_of(epsilon: float, delta: float) -> float:
    """Bound on TPR - FPR that follows from (epsilon, delta) alone: (e^eps - 1 + 2 delta) / (e^eps + 1)."""
    return min(1.0, math.tanh(epsilon / 2) + 2 * delta / (1.0 + math.exp(min(epsilon, 700.0))))


def randomised_response_keep(label_epsilon: float, classes: int) -> float:
    """Probability with which a label is kept: e^ey / (e^ey + C - 1)."""
    if not (label_epsilon > 0 and math.isfinite(label_epsilon)):
        raise ConfigError(f"the label epsilon must be a positive number, not {label_epsilon}")
    return 1.0 / (1.0 + (classes - 1) * math.exp(-label_epsilon))


def randomised_response_epsilon(keep: float, classes: int) -> float:
    """Local epsilon of labels kept with probability ``keep``: ln(p (C - 1) / (1 - p))."""
    return math.log(keep * (classes - 1) / (1.0 - keep))


def replace_one(epsilon: float, delta: float) -> tuple[float, float]:
    """Turn an add-or-remove-one guarantee (DP-SGD accountants) into replace-one, the latent mechanism's relation."""
    return 2 * epsilon, min(1.0, (1.0 + math.exp(min(epsilon, 700.0))) * delta)


def compose_with_training(
    release: tuple[float, float], training: tuple[float, float], label_epsilon: float = 0.0
) -> tuple[float, float]:
    """(epsilon, delta) of a release whose VAE was trained by DP-SGD on the same records, and of released labels."""
    epsilon, delta = replace_one(*training)
    return release[0] + epsilon + label_epsilon, min(1.0, release[1] + delta)
