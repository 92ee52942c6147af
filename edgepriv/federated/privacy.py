"""Clipping: what bounds one device's part in a sum.

The L2 norm is taken over all tensors together, BatchNorm statistics included where the round shares them, so nothing
leaves the device outside the bound.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


def update_norm(tensors: Mapping[str, NDArray[Any]]) -> float:
    """L2 norm over all tensors, in float64."""
    return math.sqrt(sum(float(np.vdot(t.astype(np.float64), t.astype(np.float64))) for t in tensors.values()))


def joint_multiplier(noise_multiplier: float, clip_noise: float = 0.0, *, adaptive: bool = False) -> float:
    """Noise multiplier of the one Gaussian that a round's noisy sum and noisy count together are.

    The count's sensitivity is a half (each device adds plus or minus a half), so scaled to sensitivity 1 its deviation
    is ``2 * clip_noise``; two Gaussians on one update are one with ``z^-2 = z_sum^-2 + z_count^-2`` (Andrew et al.
    2021, theorem 1). 0 where one of them has no noise: nothing is promised.
    """
    if not adaptive:
        return noise_multiplier
    if noise_multiplier <= 0 or clip_noise <= 0:
        return 0.0
    return 1 / math.hypot(1 / noise_multiplier, 1 / (2 * clip_noise))


def next_clip(clip: float, within: float, *, quantile: float, rate: float) -> float:
    """The next round's clip: ``C exp(-rate (within - quantile))`` (Andrew et al. 2021, section 2.1).

    Args:
        clip: this round's.
        within: noisy share of the devices whose update was within it; taken as 0..1.
        quantile: the share that is aimed at.
        rate: how far one round may move it, in the exponent.
    """
    return clip * math.exp(-rate * (min(max(within, 0.0), 1.0) - quantile))


def clip_update(tensors: Mapping[str, NDArray[Any]], clip: float) -> dict[str, NDArray[np.float32]]:
    """Scale the update down to L2 norm ``clip`` where it is above.

    Raises:
        DataError: NaN or infinity.
    """
    norm = update_norm(tensors)
    if not math.isfinite(norm):
        raise DataError("the update has NaN or infinity", hint="lower the learning rate")
    factor = 1.0 if norm <= clip else clip / norm * (1 - 1e-7)  # float32 rounding must not pass the bound
    return {name: (value * np.float32(factor)).astype(np.float32) for name, value in tensors.items()}
