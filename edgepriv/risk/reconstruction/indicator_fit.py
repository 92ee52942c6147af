"""Fit the file that a device's output indicator reads: where honest models' outputs lie.

Our own design, not the paper's. The threshold is a quantile of window means over honest models that were left out of
the fit, so that it counts how much honest models differ from each other, not only how one model's outputs scatter.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

SCHEMA = "edgepriv.output-indicator/2"
WINDOW = 50
QUANTILE = 0.95
RIDGE = 0.05


def shape(logits: NDArray[Any]) -> Array:
    """Return rows [n, k] shifted to mean 0 and scaled to deviation 1: no matter of how long was trained."""
    z = np.asarray(logits, np.float64)
    z = z - z.mean(1, keepdims=True)
    return np.asarray(z / (z.std(1, keepdims=True) + 1e-9), np.float64)


def _class_gaussians(outputs: Sequence[NDArray[Any]]) -> tuple[Array, Array]:
    """Centres [k, k] and whitening matrices [k, k, k] of the shapes, by predicted class."""
    z = np.concatenate([shape(part) for part in outputs])
    classes = z.argmax(1)
    k = z.shape[1]
    pooled = np.cov(z.T) + RIDGE * np.eye(k)
    centres, whitening = np.empty((k, k)), np.empty((k, k, k))
    for label in range(k):
        rows = z[classes == label]
        enough = len(rows) > 3 * k
        covariance = np.cov(rows.T) + RIDGE * np.eye(k) if enough else pooled
        centres[label] = rows.mean(0) if len(rows) else z.mean(0)
        whitening[label] = np.linalg.inv(np.linalg.cholesky(covariance))
    return centres, whitening


def distances(logits: NDArray[Any], centres: Array, whitening: Array) -> Array:
    """Whitened distance of each output from its class, [n]: equal to the device's evaluator."""
    z, classes = shape(logits), logits.argmax(1)
    return np.asarray(np.linalg.norm(np.einsum("nij,nj->ni", whitening[classes], z - centres[classes]), axis=1))


def fit_indicator(outputs: Sequence[NDArray[Any]], *, window: int = WINDOW, seed: int = 0) -> bytes:
    """Fit an indicator to the raw outputs of honest reference models.

    Args:
        outputs: for each model its logits on the same kind of pictures, [n, k].
        window: how many outputs the device averages.
        seed: of the windows that are drawn to set the threshold.

    Returns:
        The file's bytes.

    Raises:
        DataError: fewer than two references: nothing would say how honest models differ.
    """
    if len(outputs) < 2:
        raise DataError("an indicator needs the outputs of at least two honest models")
    generator = np.random.default_rng(seed)
    means: list[float] = []
    for left_out, part in enumerate(outputs):
        rest = [other for at, other in enumerate(outputs) if at != left_out]
        found = distances(part, *_class_gaussians(rest))
        rows = generator.integers(0, len(found), (200, window))
        means.extend(found[rows].mean(1).tolist())
    centres, whitening = _class_gaussians(outputs)
    content = {
        "schema": SCHEMA,
        "centres": np.round(centres, 6).tolist(),
        "whitening": np.round(whitening, 6).tolist(),
        "threshold": float(np.quantile(means, QUANTILE)),
        "window": window,
    }
    return json.dumps(content).encode()


def windows_flagged(raw: bytes, logits: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which of a sequence of outputs [n, k] a device would hold back: its evaluator, output by output."""
    content = json.loads(raw)
    window = int(content["window"])
    found = distances(logits, np.asarray(content["centres"]), np.asarray(content["whitening"]))
    sums = np.cumsum(np.concatenate([[0.0], found]))
    flagged = np.zeros(len(found), bool)
    if len(found) >= window:
        flagged[window - 1 :] = (sums[window:] - sums[:-window]) / window > content["threshold"]
    return flagged
