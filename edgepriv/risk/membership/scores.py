"""The arrays an attack gets: scores of N models on n pool records, and who was a member of which model.

Shapes: ``scores`` float [K, n] of K shadow models, ``masks`` bool [K, n] (True = that record was in that model's
training set). Masks must be drawn independently for each record (Bernoulli): designs in which each record is in
exactly half of the models push LiRA below one half and look like privacy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgepriv.errors import ConfigError, DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scores = NDArray[np.float64]

__all__ = ["calibrated_records", "check_arrays", "check_shadow_count", "draw_masks", "log_probability", "margin"]

MARGIN_LIMIT = 30.0
MAX_SHADOWS = 2048


def draw_masks(models: int, records: int, rng: np.random.Generator, rate: float = 0.5) -> NDArray[np.bool_]:
    """Independent membership of each record in each model."""
    drawn: NDArray[np.bool_] = rng.random((models, records)) < rate
    return drawn


def margin(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Margin phi = z_y - logsumexp of the other classes' z, from logits [..., n, C], clipped to +-30."""
    values: Scores = np.asarray(logits, dtype=np.float64)
    own, others = _split(values, labels)
    clipped: Scores = np.clip(own - _logsumexp(others), -MARGIN_LIMIT, MARGIN_LIMIT)
    return clipped


def log_probability(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Log softmax of the true class, from logits [..., n, C]."""
    values: Scores = np.asarray(logits, dtype=np.float64)
    own, _ = _split(values, labels)
    result: Scores = own - _logsumexp(values)
    return result


def check_arrays(target: NDArray[np.floating], scores: NDArray[np.floating], masks: NDArray[np.bool_]) -> None:
    """Refuse arrays that do not belong together: target [n], scores [K, n], masks [K, n]."""
    if scores.ndim != 2 or scores.shape != masks.shape or target.shape != scores.shape[1:]:
        raise DataError(
            f"scores {scores.shape}, masks {masks.shape} and target {target.shape} do not fit",
            hint="scores and masks are [shadows, records], the target is [records]",
        )
    if masks.dtype != np.bool_:
        raise DataError(f"membership masks must be booleans, not {masks.dtype}")
    if target.dtype.kind not in "fiu" or scores.dtype.kind not in "fiu":
        raise DataError(f"scores must be numbers, not {target.dtype} and {scores.dtype}")
    if not (np.isfinite(target).all() and all(np.isfinite(row).all() for row in scores)):
        raise DataError("scores must be finite numbers")


def calibrated_records(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Records with at least two shadows that held them and two that did not; the others are dropped."""
    held = masks.sum(axis=0)
    enough: NDArray[np.bool_] = (held >= 2) & (len(masks) - held >= 2)
    return enough


def check_shadow_count(shadows: int, false_positive_rate: float, rate: float = 0.5) -> None:
    """Refuse too few shadows for a false-positive rate, where each holds a record with probability ``rate``.

    With K shadows and fair coins a share 2 (K + 1) / 2^K of the records has fewer than two shadows on one side, and an
    attack says nothing about them; other coins leave more. That share must not pass the rate at which it is read.
    """
    share = _uncalibrated(shadows, rate)
    if share > false_positive_rate:
        needed = next((k for k in range(4, MAX_SHADOWS) if _uncalibrated(k, rate) <= false_positive_rate), None)
        more = f"train at least {needed} shadows" if needed else "no number of shadows is enough"
        even = "" if abs(rate - 0.5) < 0.1 else ", give more nearly as many members as non-members"
        raise ConfigError(
            f"{shadows} shadow models are too few for a false-positive rate of {false_positive_rate:g}: "
            f"{share:.1%} of the records would have fewer than two with or without them",
            hint=f"{more}{even}, or ask for a larger rate",
        )


def _uncalibrated(shadows: int, rate: float) -> float:
    """Expected share of records with fewer than two shadows on one side."""
    return sum(p**shadows + shadows * (1 - p) * p ** (shadows - 1) for p in (rate, 1 - rate))


def _split(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    classes = logits.shape[-1]
    if logits.ndim < 2 or logits.shape[-2] != len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"logits {logits.shape} do not fit {len(labels)} labels")
    index = np.broadcast_to(labels[:, None], (*logits.shape[:-1], 1))
    own = np.take_along_axis(logits, index, axis=-1)[..., 0]
    others = logits.copy()
    np.put_along_axis(others, index, -np.inf, axis=-1)
    return own, others


def _logsumexp(values: NDArray[np.float64]) -> NDArray[np.float64]:
    top = values.max(axis=-1, keepdims=True)
    total: NDArray[np.float64] = top[..., 0] + np.log(np.exp(values - top).sum(axis=-1))
    return total
