"""Rules that bound what a few dishonest devices can do to a clear round. All work on blocks of coordinates.

Trimmed mean and median: Yin et al. 2018, definitions 1 and 2 (unweighted, one vote for each device). FLTrust: Cao et
al. 2021, algorithm 2: weight by the positive part of the cosine with a trusted reference update, rescale to its norm.
They need single updates, so rounds that use them are clear; under masks only clipping and the sum's norm remain.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRIM_SHARE = 0.25


def trimmed_mean(stack: NDArray[Any], share: float = TRIM_SHARE) -> NDArray[np.float64]:
    """Mean of each column of [devices, coordinates] without the ``share`` largest and smallest values.

    Raises:
        ConfigError: nothing would be left.
    """
    cut = math.floor(share * len(stack))
    if not 0 <= share < 0.5 or len(stack) <= 2 * cut:
        raise ConfigError(f"trimming {share:g} at both ends of {len(stack)} devices leaves none")
    ordered = np.sort(stack.astype(np.float64), axis=0)
    mean: NDArray[np.float64] = ordered[cut : len(stack) - cut].mean(axis=0)
    return mean


def coordinate_median(stack: NDArray[Any]) -> NDArray[np.float64]:
    """Median of each column of [devices, coordinates]."""
    median: NDArray[np.float64] = np.median(stack.astype(np.float64), axis=0)
    return median


def trust_score(dot: float, norm: float, reference_norm: float) -> float:
    """FLTrust's score: the positive part of the cosine with the reference."""
    if norm == 0 or reference_norm == 0:
        return 0.0
    return max(0.0, dot / (norm * reference_norm))
