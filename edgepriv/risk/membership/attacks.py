"""Attacks on a model's scores: threshold, LiRA, RMIA, label-only; ``quantile`` is beside. Higher means "was a member".

Attacker: holds the records in question with their labels and the target's score on each; the calibrated attacks also
hold shadow models trained as the target was. Each function returns one float per record. Records are worked in blocks,
so memory is O(shadows) per block however many records there are.

Sources: LiRA arXiv 2112.03570 (online, fixed variance); RMIA arXiv 2312.03262 (the ratio whose ROC the full score
shares for one target); label-only arXiv 2007.14321.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgepriv.risk.membership.scores import calibrated_records, check_arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Scores = NDArray[np.float64]
    Masks = NDArray[np.bool_]

__all__ = ["BLOCK", "COPY_SEED", "agreement", "calibrated_difference", "lira", "rmia_all", "rmia_out", "threshold"]

BLOCK = 8192
COPY_SEED = 0  # of the target's and of every shadow's copies: they must be the same pictures


def threshold(target: Scores) -> Scores:
    """One global threshold on the target's own score; near one half it proves nothing."""
    return np.asarray(target, dtype=np.float64)


def lira(target: Scores, scores: Scores, masks: Masks) -> Scores:
    """Log-likelihood ratio of two Gaussians: per-record medians of IN and OUT shadows, one pooled sd for each side.

    Records without two shadows on both sides get NaN, which the evaluation drops.
    """
    check_arrays(target, scores, masks)
    inside, outside = np.empty(len(target)), np.empty(len(target))
    squares, counts = np.zeros(2), np.zeros(2)
    good = calibrated_records(masks)
    for part in _blocks(len(target)):
        for side, (centre, held) in enumerate(((inside, masks[:, part]), (outside, ~masks[:, part]))):
            centre[part] = _masked_median(scores[:, part], held)
            use = held & good[part]
            squares[side] += np.where(use, (scores[:, part] - centre[part]) ** 2, 0.0).sum()
            counts[side] += use.sum()
    spread = np.maximum(squares / np.maximum(counts, 1), 1e-12)
    ratio = (target - outside) ** 2 / (2 * spread[1]) - (target - inside) ** 2 / (2 * spread[0])
    return np.where(good, ratio, np.nan)


def rmia_all(target: Scores, scores: Scores, masks: Masks) -> Scores:
    """Log of the target's probability over the mean probability of all references; scores are log-probabilities."""
    check_arrays(target, scores, masks)
    return _in_blocks(target, scores, masks, _log_ratio_all)


def rmia_out(target: Scores, scores: Scores, masks: Masks) -> Scores:
    """As ``rmia_all``, with the references that did not hold the record; NaN where there are none."""
    check_arrays(target, scores, masks)
    return _in_blocks(target, scores, masks, _log_ratio_out)


def calibrated_difference(target: Scores, scores: Scores, masks: Masks) -> Scores:
    """Target minus the mean over shadows that did not hold the record: calibrates bounded scores such as agreement."""
    check_arrays(target, scores, masks)
    return _in_blocks(target, scores, masks, _difference)


def agreement(
    predict: Callable[[NDArray[np.uint8]], NDArray[np.int64]],
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    copies: int = 6,
    noise: float = 0.15,
) -> Scores:
    """Share of noisy copies of each picture that keep its label: all that a label-only attacker can see.

    The copies are the same in every call on the same pictures, so that two models are asked the same questions.

    ``predict`` maps uint8 [n, h, w, c] to labels [n]; ``noise`` is the largest standard deviation over the range of the
    pixels; three in four copies are also shifted by one pixel.
    """
    rng = np.random.default_rng(COPY_SEED)
    votes = np.zeros(len(images))
    for copy in range(copies):
        moved = np.roll(images, ((0, 0), (1, 0), (-1, 0), (0, 1))[copy % 4], axis=(1, 2))
        grain = rng.normal(0.0, 255 * noise * (copy + 1) / copies, images.shape)
        votes += predict(np.clip(moved + grain, 0, 255).astype(np.uint8)) == labels
    return votes / copies


def _blocks(count: int) -> Iterator[slice]:
    yield from (slice(start, start + BLOCK) for start in range(0, count, BLOCK))


def _masked_median(scores: Scores, held: Masks) -> Scores:
    """Median over axis 0 of the entries that are held; NaN where none is."""
    ordered = np.sort(np.where(held, scores, np.inf), axis=0)
    count = held.sum(axis=0)
    low, high = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, len(scores) - 1)
    pick = np.take_along_axis(ordered, np.stack([low, high]), axis=0)
    return np.asarray(np.where(count > 0, np.where(count > 0, pick, 0.0).mean(axis=0), np.nan))


def _in_blocks(target: Scores, scores: Scores, masks: Masks, attack: Callable[..., Scores]) -> Scores:
    result = np.empty(len(target))
    for part in _blocks(len(target)):
        result[part] = attack(target[part], scores[:, part], masks[:, part])
    return result


def _log_ratio_all(target: Scores, scores: Scores, masks: Masks) -> Scores:
    return _log_ratio(target, scores, np.ones_like(masks))


def _log_ratio_out(target: Scores, scores: Scores, masks: Masks) -> Scores:
    return _log_ratio(target, scores, ~masks)


def _log_ratio(target: Scores, scores: Scores, used: Masks) -> Scores:
    values, count = np.where(used, scores, -np.inf), used.sum(axis=0)
    top = np.where(count > 0, values.max(axis=0), 0.0)
    total = np.log(np.maximum(np.exp(values - top).sum(axis=0), 1e-300))
    mean = top + total - np.log(np.maximum(count, 1))
    return np.where(count > 0, target - mean, np.nan)


def _difference(target: Scores, scores: Scores, masks: Masks) -> Scores:
    outside = (~masks).sum(axis=0)
    mean = np.where(masks, 0.0, scores).sum(axis=0) / np.maximum(outside, 1)
    return np.where(outside > 0, target - mean, np.nan)
