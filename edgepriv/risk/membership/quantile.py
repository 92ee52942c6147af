"""Quantile regression (arXiv 2307.03694): where a score stands among those that non-members like the record get.

Attacker: holds the records in question, the target's score on each, and records known not to be members with their
scores; no shadow model. One boosted regressor for each quantile, fitted on the known non-members alone, predicts from
what is known of a record (its picture and class) how a model that never saw it would score. The paper uses gradient
boosting for tables and a network for pictures; here pictures come as projections, so that boosting serves both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError, MissingDependencyError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scores = NDArray[np.float64]

__all__ = ["LEVELS", "MIN_REFERENCES", "quantile", "quantile_curves"]

LEVELS = (0.25, 0.5, 0.75)
MIN_REFERENCES = 100


def quantile(target: Scores, features: Scores, reference: Scores, reference_features: Scores) -> Scores:
    """Position of each score among the quantiles predicted for its record; higher means "was a member".

    Args:
        target: scores [n] of the records in question.
        features: [n, f] what is known of each record (for pictures: a few projections and the class).
        reference: scores [m] of records known not to be members.
        reference_features: [m, f].

    Raises:
        DataError: fewer known non-members than ``MIN_REFERENCES``.
    """
    curves = quantile_curves(features, reference, reference_features)
    return _position(np.asarray(target, dtype=np.float64), curves)


def quantile_curves(features: Scores, reference: Scores, reference_features: Scores) -> Scores:
    """Predicted quantiles [levels, n] of a non-member's score, in rising order for each record."""
    if len(reference) < MIN_REFERENCES:
        raise DataError(
            f"{len(reference)} known non-members are too few for quantile regression",
            hint=f"give at least {MIN_REFERENCES}",
        )
    regressor, limits = _boosting()
    with limits(limits=1):  # the data are small: more threads wait for each other
        curves = [
            regressor(
                loss="quantile",
                quantile=level,
                max_iter=60,
                learning_rate=0.2,
                max_leaf_nodes=6,
                min_samples_leaf=20,
                early_stopping=False,
                random_state=0,
            )
            .fit(reference_features, reference)
            .predict(features)
            for level in LEVELS
        ]
    return np.sort(np.stack(curves), axis=0)


def _boosting() -> tuple[Any, Any]:
    try:
        from sklearn.ensemble import HistGradientBoostingRegressor
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingDependencyError(
            "the quantile attack needs scikit-learn", hint="pip install 'edgepriv[server]'"
        ) from error
    return HistGradientBoostingRegressor, threadpool_limits


def _position(target: Scores, curves: Scores) -> Scores:
    """Piecewise linear position of the target among the quantile curves [levels, n]; beyond them, in outer gaps."""
    gaps = np.maximum(np.diff(curves, axis=0), 1e-6 * (np.abs(curves).max() + 1e-9))
    inside = np.clip((target - curves[:-1]) / gaps, 0.0, 1.0).sum(axis=0)
    above = np.maximum(target - curves[-1], 0.0) / gaps.sum(axis=0)
    below = np.maximum(curves[0] - target, 0.0) / gaps.sum(axis=0)
    return np.asarray(inside + above - below)
