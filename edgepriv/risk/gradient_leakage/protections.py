"""What can be done to an update before it leaves, as functions of a dict of arrays; numpy only.

Each protection states its noise per tensor to :mod:`bound` through ``sigmas``. ``RelativeNoise`` is the published
code's "GaussianPrivacy": no clipping, no accountant, so it is **not** differential privacy and gets no epsilon.
``ClippedNoise`` is the Gaussian mechanism, for which an epsilon exists. Counters are never noised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgepriv.federated.torch_trainer import is_statistic

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Tensors = Mapping[str, NDArray[Any]]


class Protection(Protocol):
    """Changes an update; ``sigmas`` says how much noise each tensor got (0 = none), for the bound."""

    @property
    def name(self) -> str:
        """Short name for reports."""

    def apply(self, update: Tensors, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Return the protected update."""

    def sigmas(self, update: Tensors) -> dict[str, float]:
        """Return the noise std of each tensor that is still sent."""


@dataclass(frozen=True, slots=True)
class NoProtection:
    """The update as it is."""

    name: str = "none"

    def apply(self, update: Tensors, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Return a copy."""
        del rng
        return dict(update)

    def sigmas(self, update: Tensors) -> dict[str, float]:
        """Return zeros: the bound does not exist without noise."""
        return dict.fromkeys(_floats(update), 0.0)


@dataclass(frozen=True, slots=True)
class WithoutStatistics:
    """BatchNorm's buffers stay at home (FedBN's choice)."""

    name: str = "statistics kept at home"

    def apply(self, update: Tensors, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Drop running means, variances and counters."""
        del rng
        return {name: value for name, value in update.items() if not is_statistic(name)}

    def sigmas(self, update: Tensors) -> dict[str, float]:
        """Return zeros for what is still sent."""
        return {name: 0.0 for name in _floats(update) if not is_statistic(name)}


@dataclass(frozen=True, slots=True)
class RelativeNoise:
    """Gaussian noise of std ``level * P95`` of the non-zero magnitudes over all tensors together."""

    level: float
    percentile: float = 95.0

    @property
    def name(self) -> str:
        """Short name for reports."""
        return f"relative noise {self.level:g}"

    def apply(self, update: Tensors, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Add the noise."""
        return _noised(update, self.sigmas(update), rng)

    def sigmas(self, update: Tensors) -> dict[str, float]:
        """Return one std for all tensors."""
        values = np.abs(np.concatenate([v.ravel() for v in _floats(update).values()]))
        moved = values[values > 0]
        scale = float(np.percentile(moved, self.percentile)) if len(moved) else 0.0
        return dict.fromkeys(_floats(update), self.level * scale)


@dataclass(frozen=True, slots=True)
class ClippedNoise:
    """The Gaussian mechanism on one update: clip the L2 norm of all tensors together, add ``multiplier * clip``."""

    clip: float
    multiplier: float
    shares_statistics: bool = False

    @property
    def name(self) -> str:
        """Short name for reports."""
        return f"clip {self.clip:g}, noise {self.multiplier:g}"

    def apply(self, update: Tensors, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Clip and add noise; counters and (by default) statistics are not sent at all."""
        kept = self._kept(update)
        factor = min(1.0, self.clip / max(update_norm(kept), 1e-30))
        scaled = {name: (value * factor).astype(value.dtype) for name, value in kept.items()}
        return _noised(scaled, self.sigmas(update), rng)

    def sigmas(self, update: Tensors) -> dict[str, float]:
        """Return the same std for everything that is sent."""
        return dict.fromkeys(self._kept(update), self.multiplier * self.clip)

    def _kept(self, update: Tensors) -> dict[str, NDArray[Any]]:
        values = _floats(update)
        return {n: v for n, v in values.items() if self.shares_statistics or not is_statistic(n)}


def update_norm(update: Tensors) -> float:
    """Return the L2 norm over all floating tensors together."""
    return float(np.sqrt(sum(float((v.astype(np.float64) ** 2).sum()) for v in _floats(update).values())))


def _floats(update: Tensors) -> dict[str, NDArray[Any]]:
    return {name: value for name, value in update.items() if np.issubdtype(value.dtype, np.floating)}


def _noised(update: Tensors, sigmas: Mapping[str, float], rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    out = {}
    for name, value in update.items():
        sigma = sigmas.get(name, 0.0)
        noise = rng.standard_normal(value.shape) * sigma if sigma else 0.0
        out[name] = (value + noise).astype(value.dtype)
    return out
