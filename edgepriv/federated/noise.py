"""Gaussian noise from a key stream: the operating system's randomness, or a seed where a simulation must repeat.

Uniforms of 53 bits from AES-256-CTR, Box-Muller in float64. Noise on a device is rounded to whole steps of the ring:
rounding is post-processing of what the Gaussian mechanism gives, and leaves no low-order bits to read values from
(Mironov 2012).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgepriv import primitives

if TYPE_CHECKING:
    from numpy.typing import NDArray


class NoiseStream:
    """Standard normal samples, consecutive."""

    def __init__(self, seed: bytes = b"") -> None:
        key = primitives.hkdf(seed, 32, info=b"edgepriv/simulated-noise/v1") if seed else primitives.random_bytes(32)
        self._stream = primitives.backend().keystream(primitives.AES_GCM, key)

    def normal(self, count: int) -> NDArray[np.float64]:
        """``count`` samples of the standard normal distribution."""
        pairs = (count + 1) // 2
        raw = bytearray(16 * pairs)
        self._stream.xor_into(bytes(len(raw)), raw)
        bits = np.frombuffer(raw, np.uint64).reshape(2, pairs) >> np.uint64(11)
        uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53
        radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * math.pi * uniform[1]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def integers(self, count: int, deviation: float) -> NDArray[np.int64]:
        """Normal samples of this deviation, rounded to whole numbers."""
        return np.rint(self.normal(count) * deviation).astype(np.int64)


MIN_STEPS = 4.0  # rounded to whole steps, narrower noise is no Gaussian any more


def device_deviation(multiplier: float, clip_steps: float, survivors: int, colluders: int) -> float:
    """Each device's deviation in steps, so that the honest survivors' noise alone has ``multiplier * clip``.

    security: variance / (m - c) with m the fewest survivors and c the colluders who may leave theirs out.
    """
    honest = survivors - colluders
    if honest < 1:
        raise ValueError("the survivors must outnumber the colluders")
    return multiplier * clip_steps / math.sqrt(honest)
