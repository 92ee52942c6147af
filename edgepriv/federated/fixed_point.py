"""Exact sums: numbers as integers of one public scale in the ring of 32 or 64 bits.

Addition in the ring is associative and commutative, so a sum has the same bits in any order of arrival, and masks
that cancel leave exactly the plain sum. A round states ring, scale, bounds and the largest number of devices; the
ring is refused where their product could overflow, so a sum that wraps cannot happen.

``q(x, w) = rint(x * w * 2**fraction_bits) mod 2**bits``: x is float32 (24 bits), w an integer up to 2^20, so the
product is exact in float64 and q is the same on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import ConfigError, WireError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgepriv.wire.rounds import RoundOpen

MAX_WEIGHT = 1 << 20
MAX_DEVICES = 1 << 20


@dataclass(frozen=True, slots=True)
class Ring:
    """The arithmetic of one round.

    Attributes:
        bits: 32 or 64.
        fraction_bits: the scale is two to this power.
        bound: largest magnitude of one coordinate of one device (the L2 clip bounds it too).
        max_weight: largest weight of a device.
        devices: most devices that a sum may have.
        slack: integer steps that noise may add for each device (0 without noise).
    """

    bits: int
    fraction_bits: int
    bound: float
    max_weight: int
    devices: int
    slack: int = 0

    def __post_init__(self) -> None:
        if self.bits not in {32, 64} or not 0 <= self.fraction_bits <= 40:
            raise ConfigError("a ring has 32 or 64 bits and 0 to 40 bits of fraction")
        if not 0 < self.bound <= 1e9 or not 1 <= self.max_weight <= MAX_WEIGHT or not 1 <= self.devices <= MAX_DEVICES:
            raise ConfigError("a ring's bound, weight or number of devices is out of range")
        if self.headroom < 1:
            raise ConfigError(
                f"{self.devices} devices of weight {self.max_weight} and bound {self.bound} overflow {self.bits} bits",
                hint="fewer fraction bits, a smaller clip or weight, or the ring of 64 bits",
            )

    @property
    def headroom(self) -> float:
        """Half the ring over the largest possible sum; below 1 it could overflow."""
        one = max(self.bound * 2.0**self.fraction_bits, 1.0) * self.max_weight + 1 + self.slack
        return float(2.0 ** (self.bits - 1) / (one * self.devices + 1))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Little-endian unsigned integers of the ring."""
        return np.dtype(f"<u{self.bits // 8}")

    @property
    def scale(self) -> float:
        """Steps per unit."""
        return 2.0**self.fraction_bits


def choose_ring(*, fraction_bits: int, bound: float, max_weight: int, devices: int, slack: int = 0) -> Ring:
    """The narrowest ring that cannot overflow, or ConfigError where even 64 bits could."""
    try:
        return Ring(32, fraction_bits, bound, max_weight, devices, slack)
    except ConfigError:
        return Ring(64, fraction_bits, bound, max_weight, devices, slack)


HALF = 0.5  # what a device adds to, or takes from, the count of devices within the clip


def value_bound(clip: float, *, adaptive: bool) -> float:
    """Largest magnitude of a coordinate: the clip, or the half of adaptive clipping's count."""
    return max(clip, HALF) if adaptive else clip


def slack_of(noise: str, deviation: float, count_deviation: float, fraction_bits: int) -> int:
    """Steps that one device's noise may add: twelve deviations of the whole sum's noise, or of the count's."""
    if noise == "none":
        return 0
    steps = 12 * max(deviation, count_deviation) * 2.0 ** min(fraction_bits, 64)
    if not math.isfinite(steps):
        raise ConfigError("the noise has no finite deviation")
    return math.ceil(steps)


def ring_of(opened: RoundOpen) -> Ring:
    """The arithmetic that an announcement states; raises ConfigError where it could overflow."""
    slack = slack_of(opened.noise, opened.noise_multiplier * opened.clip, opened.clip_noise, opened.fraction_bits)
    bound = value_bound(opened.clip, adaptive=opened.adaptive_clip)
    return Ring(opened.ring_bits, opened.fraction_bits, bound, opened.max_weight, opened.devices, slack)


def count_steps(ring: Ring, *, within: bool) -> int:
    """A device's part in the count of devices within the clip: plus or minus a half, in steps of the ring."""
    return int(HALF * ring.scale) * (1 if within else -1)


def quantise(values: NDArray[Any], weight: int, ring: Ring, *, factor: float = 1.0) -> NDArray[Any]:
    """Weighted values as ring elements (same shape); ``factor`` scales them first (norm clipping at the gateway).

    Raises:
        WireError: NaN or infinity, a value above the bound, or a weight outside 0..max_weight.
    """
    if not 0 <= weight <= ring.max_weight:
        raise WireError(f"a weight lies outside 0..{ring.max_weight}")
    scaled = values.astype(np.float64)
    if factor != 1.0:
        scaled *= factor
    # one comparison refuses NaN, infinity and large values alike; honest devices clip, and rounding stays below 1e-6
    if not bool((np.abs(scaled) <= ring.bound * (1 + 1e-6)).all()):
        raise WireError("an update has NaN, infinity or a value above the round's bound")
    np.clip(scaled, -ring.bound, ring.bound, out=scaled)
    scaled *= weight * ring.scale
    np.rint(scaled, out=scaled)
    return scaled.astype(np.int64).astype(ring.dtype, copy=False)


def clip_steps(vector: NDArray[Any], limit: float, ring: Ring) -> NDArray[np.int64]:
    """Signed steps of a ring vector with an *integer* L2 norm of at most ``limit``.

    Rounding may push a clipped update above its bound, and privacy accounts for what is really sent; truncation
    towards zero can only shorten it.
    """
    steps = signed(vector, ring)
    norm = math.sqrt(float(np.dot(steps.astype(np.float64), steps.astype(np.float64))))
    return steps if norm <= limit else np.trunc(steps * (limit / norm)).astype(np.int64)


def signed(total: NDArray[Any], ring: Ring) -> NDArray[np.int64]:
    """Ring elements as signed integers: the upper half of the ring is negative."""
    return np.ascontiguousarray(total).view(f"<i{ring.bits // 8}").astype(np.int64)


def add_into(total: NDArray[Any], part: NDArray[Any]) -> None:
    """``total += part`` in the ring (unsigned integers wrap by definition)."""
    np.add(total, part, out=total)


def decode_sum(total: NDArray[Any], ring: Ring) -> NDArray[np.float64]:
    """A sum as numbers."""
    return signed(total, ring).astype(np.float64) / ring.scale
