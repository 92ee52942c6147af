"""A lower bound on epsilon from one run of the mechanism (Steinke, Nasr, Jagielski, arXiv 2305.08846).

Each of m canaries is included by a fair coin; the auditor guesses the g most extreme scores, half IN and half OUT, and
c guesses are right. The bound can never pass a value set by g (3.49 for 100 guesses), so it finds a wrong noise scale
at small epsilon and cannot refute a large one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["count_correct", "epsilon_lower_bound"]


def epsilon_lower_bound(
    canaries: int, guesses: int, correct: int, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """Largest epsilon that the guesses refute at this confidence; 0 where they refute nothing.

    Raises:
        ConfigError: more correct guesses than guesses, or more guesses than canaries.
    """
    if not 0 <= correct <= guesses <= canaries or guesses == 0:
        raise ConfigError(f"{correct} correct of {guesses} guesses about {canaries} canaries cannot be")
    level = 1.0 - confidence
    if _p_value(0.0, canaries, guesses, correct, delta) > level:
        return 0.0
    low, high = 0.0, 30.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if _p_value(middle, canaries, guesses, correct, delta) <= level else (low, middle)
    return low


def count_correct(scores: NDArray[np.float64], members: NDArray[np.bool_], guesses: int) -> int:
    """Guess the ``guesses``/2 highest scores as members and as many lowest as non-members; return the hits."""
    keep = np.isfinite(scores)
    scores, members = scores[keep], members[keep]
    half = guesses // 2
    if 2 * half != guesses or guesses > len(scores):
        raise ConfigError(f"guesses must be even and at most {len(scores)}, not {guesses}")
    order = np.argsort(scores, kind="stable")
    return int((~members[order[:half]]).sum() + members[order[len(order) - half :]].sum())


def _p_value(epsilon: float, canaries: int, guesses: int, correct: int, delta: float) -> float:
    right = 1.0 / (1.0 + math.exp(-epsilon))
    tail = _binomial_tail(guesses, right)
    beta = tail[correct]
    if delta == 0.0 or correct == 0:
        return float(beta)
    steps = np.arange(1, correct + 1)
    alpha = float(((tail[correct - steps] - beta) / steps).max())
    return float(beta + 2 * canaries * delta * alpha)


def _binomial_tail(trials: int, probability: float) -> NDArray[np.float64]:
    """P[Binom >= c] for c = 0..trials."""
    k = np.arange(trials + 1)
    choose = np.array([math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1) for i in k])
    failure = math.log1p(-probability) if probability < 1 else -math.inf
    mass = np.exp(choose + k * math.log(probability) + (trials - k) * failure)
    return np.cumsum(mass[::-1])[::-1]
