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
