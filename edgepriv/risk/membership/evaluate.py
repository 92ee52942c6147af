"""From attack scores to figures: AUC with midranks, TPR at a false-positive rate, bootstrap, permuted null.

Rules: ties are counted against the attacker where a rate is read (a tied block passes only if all of it fits the
budget); the bootstrap resamples records, once for all targets, because targets share them; AUC is a lower bound on
what leaks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgepriv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Scores = NDArray[np.float64]
    Masks = NDArray[np.bool_]

__all__ = ["auc", "bootstrap_interval", "null_interval", "permuted_null", "true_positive_rate"]


BOOTSTRAP_CELLS = 2_000_000  # weights held at once


def auc(scores: Scores, members: Masks) -> float:
    """Area under the ROC curve; NaN scores are dropped, ties count one half."""
    scores, members = _usable(scores, members)
    return float(_weighted_auc(scores, members, np.ones((1, len(scores))))[0])


def true_positive_rate(scores: Scores, members: Masks, false_positive_rate: float) -> float | None:
    """Largest TPR whose FPR does not pass the rate; None where the budget is below one non-member."""
    scores, members = _usable(scores, members)
    budget = math.floor(false_positive_rate * int((~members).sum()) + 1e-9)
    if budget < 1:
        return None
    cuts, start = np.unique(-scores, return_inverse=True)
    false = np.cumsum(np.bincount(start, weights=~members, minlength=len(cuts)))
    true = np.cumsum(np.bincount(start, weights=members, minlength=len(cuts)))
    fits = np.nonzero(false <= budget)[0]
    return float(true[fits[-1]] / members.sum()) if len(fits) else 0.0


def bootstrap_interval(
    scores: Sequence[Scores], members: Sequence[Masks], rng: np.random.Generator, *, draws: int = 200
) -> tuple[float, float]:
    """95 % interval of the mean AUC over targets, by resampling the pool's records."""
    count = len(scores[0])
    share, step = np.full(count, 1.0 / count), max(1, BOOTSTRAP_CELLS // count)
    means = []
    for start in range(0, draws, step):
        weights = rng.multinomial(count, share, size=min(step, draws - start)).astype(np.float64)
        total = np.zeros(len(weights))
        for values, held in zip(scores, members, strict=True):
            keep = np.isfinite(values)
            total += _weighted_auc(values[keep], held[keep], weights[:, keep])
        means.append(total / len(scores))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def permuted_null(scores: Sequence[Scores], members: Sequence[Masks], rng: np.random.Generator) -> float:
    """Mean AUC against shuffled membership: anything but one half is a mistake in the evaluation."""
    values = []
    for score, held in zip(scores, members, strict=True):
        usable, truth = _usable(score, held)
        values.append(auc(usable, rng.permutation(truth)))
    return float(np.mean(values))


def null_interval(members: Sequence[Masks], z: float = 3.29) -> tuple[float, float]:
    """Where the permuted null's mean must lie (99.9 %), from the variance of the rank statistic."""
    variance = 0.0
    for held in members:
        inside = max(int(held.sum()), 1)
        outside = max(len(held) - inside, 1)
        variance += (inside + outside + 1) / (12.0 * inside * outside)
    half = z * math.sqrt(variance) / len(members)
    return 0.5 - half, 0.5 + half


def _usable(scores: Scores, members: Masks) -> tuple[Scores, Masks]:
    keep = np.isfinite(scores)
    scores, members = np.asarray(scores)[keep], np.asarray(members)[keep]
    if not members.any() or members.all():
        raise DataError("an attack is judged on members and non-members; one of them is missing")
    return scores, members


def _weighted_auc(scores: Scores, members: Masks, weights: Scores) -> Scores:
    """AUC for each row of record weights [B, n]."""
    cuts, group = np.unique(scores, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(cuts)))
    sorted_weights, held = weights[:, order], members[order]
    inside = np.add.reduceat(sorted_weights * held, starts, axis=1)
    outside = np.add.reduceat(sorted_weights * ~held, starts, axis=1)
    below = np.cumsum(outside, axis=1) - outside / 2
    pairs = inside.sum(axis=1) * outside.sum(axis=1)
    result: Scores = (inside * below).sum(axis=1) / np.maximum(pairs, 1e-12)
    return result
