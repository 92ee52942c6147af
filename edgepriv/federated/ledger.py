"""The device's own account of what rounds have told about its data. Exact for Gaussian noise, numpy not needed.

Each round that adds noise is one Gaussian mechanism of sensitivity 1 and standard deviation z (the noise multiplier)
without amplification: whoever runs the round knows who took part. Gaussians compose to one Gaussian with
``mu^2 = sum 1 / z_i^2`` and its ``delta(epsilon)`` is known in closed form (Balle & Wang 2018, theorem 8; Dong, Roth &
Su 2022, corollary 2.13), so nothing is lost to a bound. Aborted rounds count: the charge is made when bytes leave.
"""

from __future__ import annotations

import math
from typing import Any


def _phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _log_phi(x: float) -> float:
    if x > -30:
        return math.log(max(_phi(x), 5e-324))
    return -x * x / 2 - math.log(-x) - 0.5 * math.log(2 * math.pi)  # Mills ratio far in the tail


def delta_of(epsilon: float, mu: float) -> float:
    """Delta at ``epsilon`` of a Gaussian mechanism with sensitivity over deviation ``mu``."""
    if mu <= 0:
        return 0.0
    second = math.exp(min(epsilon + _log_phi(-epsilon / mu - mu / 2), 0.0))
    return max(_phi(-epsilon / mu + mu / 2) - second, 0.0)


def epsilon_of(mu: float, delta: float) -> float:
    """Smallest epsilon at which ``delta_of`` is at most ``delta``."""
    if mu <= 0 or delta_of(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_of(high, mu) > delta:
        low, high = high, high * 2
        if high > 1e9:
            return math.inf
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle, mu) > delta else (low, middle)
    return high


class Ledger:
    """Noise multipliers by round."""

    def __init__(self) -> None:
        self._charges: dict[int, float] = {}

    @classmethod
    def from_rows(cls, rows: Any) -> Ledger:
        """Restore what `rows` gave."""
        ledger = cls()
        ledger._charges = {int(number): float(multiplier) for number, multiplier in rows}
        return ledger

    def rows(self) -> list[list[float]]:
        """Plain values for storage."""
        return [[number, multiplier] for number, multiplier in sorted(self._charges.items())]

    def charge(self, round_number: int, noise_multiplier: float) -> None:
        """Book a round; once."""
        self._charges.setdefault(round_number, noise_multiplier)

    def epsilon(self, delta: float) -> float:
        """What was spent so far."""
        return self.epsilon_after(None, delta)

    def epsilon_after(self, noise_multiplier: float | None, delta: float) -> float:
        """What would be spent after one more round."""
        multipliers = [*self._charges.values(), *([noise_multiplier] if noise_multiplier is not None else [])]
        if any(z <= 0 for z in multipliers):
            return math.inf
        return epsilon_of(math.sqrt(sum(1 / (z * z) for z in multipliers)), delta)
