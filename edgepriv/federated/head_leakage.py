"""What a head-only update says about the features it was trained on: exact recovery and a bound, numpy only.

Two results, both cheap enough for a device that is about to send:

* :func:`recover_features`: for a softmax head, row c of the change is ``sum_i s_ic f_i`` and the bias change is
  ``sum_i s_ic``, so their quotient is a weighted mean of the features. One image in one step: the feature itself.
* :func:`feature_bound`: the Bayesian Cramer-Rao ceiling on features, ``V = (J^T J / sigma^2 + Lambda^-1)^-1`` with J
  the exact derivative of the K local steps (tangents carried through SGD, momentum, weight decay and FedProx).

The ceiling is about features. It bounds pixels only as far as the backbone can be inverted; the same statement in
pixels needs the backbone's derivative and is made at the risk service. It is an indicator, not a certificate.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError
from edgepriv.federated.head import BIAS, WEIGHT, apply_head, softmax

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgepriv.federated.local_recipe import LocalRecipe

    Floats = NDArray[np.float64]

MAX_JOINT_UNKNOWNS = 1536
MAX_JOINT_VALUES = 40_000_000
MAX_EXAMPLES = 512
AFFORDABLE = 15_000_000  # values of one example's derivatives times local steps: seconds on a small board


def affordable(weight_shape: tuple[int, ...], steps: int) -> bool:
    """Whether a board can carry one example's derivatives through all local steps of a head of this shape."""
    classes, features = weight_shape
    return features * classes * (features + 1) * steps <= AFFORDABLE


@dataclass(frozen=True, slots=True)
class FeatureBound:
    """How much of the features' variance an observer of the update could know at most, in this model.

    Attributes:
        explained_variance: 0 = nothing beyond the prior, 1 = everything; mean over the examples.
        per_example: the same for each example.
        joint: all examples unknown together; else (too many) each with the others taken as known, which is higher.
        sigma: the noise std it was computed for, the smallest where values differ.
        seconds: time taken.
    """

    explained_variance: float
    per_example: tuple[float, ...]
    joint: bool
    sigma: float
    seconds: float


@dataclass(frozen=True, slots=True)
class HeadJacobian:
    """Derivatives by example: each [features, values of the update]; and the prior variance of a feature."""

    blocks: tuple[Floats, ...]
    prior_variance: Floats
    joint: bool
    seconds: float


def recover_features(update: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Recover features from a head's change by dW/db.

    Returns:
        One row for each class whose bias moved up (its images pull it up): [rows, features], and the classes.
        Exact for one image and one step; for several images of one class it is their weighted mean, mixed with
        what the other classes' images push down.
    """
    weight, bias = (np.asarray(update[name], np.float64) for name in (WEIGHT, BIAS))
    classes = np.flatnonzero(bias > 0)
    return weight[classes] / bias[classes, None], classes.astype(np.int64)


def head_jacobian(
    head: Mapping[str, NDArray[Any]],
    features: NDArray[Any],
    labels: NDArray[Any],
    recipe: LocalRecipe,
    *,
    prior_variance: NDArray[Any] | None = None,
    examples: int | None = None,
) -> HeadJacobian:
    """Differentiate the head's change with respect to the features, in the order in which they are trained on.

    Args:
        head: ``head.weight`` and ``head.bias`` before the round.
        features: [n, d], in the order of training; each epoch is taken in this order.
        labels: [n].
        recipe: what the device does.
        prior_variance: [d] of public features; by default the mean square of these features, for each.
        examples: only so many of them, evenly spaced, each with all others taken as known.

    Raises:
        DataError: shapes that do not fit, or more than 512 examples.
    """
    began = time.perf_counter()
    x, y = np.asarray(features, np.float64), np.asarray(labels, np.int64)
    weight, bias = (np.asarray(head[name], np.float64) for name in (WEIGHT, BIAS))
    if x.ndim != 2 or x.shape[1] != weight.shape[1] or len(x) != len(y) or not len(x):
        raise DataError(f"features {x.shape} and {len(y)} labels do not fit a head {weight.shape}")
    chosen = np.arange(len(x)) if examples is None else np.unique(np.linspace(0, len(x) - 1, examples).astype(int))
    if len(chosen) > MAX_EXAMPLES:
        raise DataError(f"{len(x)} examples are more than {MAX_EXAMPLES}", hint="check a sample of them")
    # own features are too few for a variance each: their mean square errs on the side of more noise
    own = np.full(x.shape[1], float((x * x).mean()))
    prior = own if prior_variance is None else np.asarray(prior_variance, np.float64)
    unknowns, values = x.size, weight.size + bias.size
    joint = len(chosen) == len(x) and unknowns <= MAX_JOINT_UNKNOWNS and unknowns * values <= MAX_JOINT_VALUES
    blocks = tuple(_example_tangents(weight, bias, x, y, recipe, int(i)) for i in chosen)
    return HeadJacobian(blocks, prior + 1e-4, joint, time.perf_counter() - began)


def feature_bound(jacobian: HeadJacobian, sigma: float | Floats) -> FeatureBound:
    """Return the ceiling for Gaussian noise of std ``sigma`` (above 0) on every value of the update, or on each."""
    began = time.perf_counter()
    if np.min(sigma) <= 0:
        raise DataError("the bound needs noise above zero", hint="use the rounding step of the encoding")
    n = len(jacobian.blocks)
    prior = jacobian.prior_variance
    if jacobian.joint:
        variances = _posterior(np.concatenate(jacobian.blocks), np.tile(prior, n), sigma).reshape(n, -1)
    else:
        variances = np.stack([_posterior(block, prior, sigma) for block in jacobian.blocks])
    known = 1 - variances.sum(axis=1) / prior.sum()
    seconds = jacobian.seconds + time.perf_counter() - began
    least = float(np.min(sigma))
    return FeatureBound(float(known.mean()), tuple(float(v) for v in known), jacobian.joint, least, seconds)


def noise_for(
    jacobian: HeadJacobian, limit: float, *, there: float | Floats = 0.0, least: float = 1e-8, most: float = 1e4
) -> float:
    """Return the smallest noise std (to 5 %) with which no example's explained variance is above ``limit``.

    ``there`` is noise that the update has anyway, what its encoding rounds away for one.

    Raises:
        DataError: not even ``most`` is enough.
    """

    def above(sigma: float) -> bool:
        return max(feature_bound(jacobian, np.hypot(there, sigma)).per_example) > limit

    if above(most):
        raise DataError(f"no noise up to {most:g} brings the bound to {limit}")
    low, high = np.log(least), np.log(most)
    while high - low > 0.05:
        middle = (low + high) / 2
        if above(float(np.exp(middle))):
            low = middle
        else:
            high = middle
    return float(np.exp(high))


def _posterior(block: Floats, prior: Floats, sigma: float | Floats) -> Floats:
    """Return diag V for unknowns with rows ``block`` [unknowns, values]; I + R F R is never worse than I."""
    scaled = block * np.sqrt(prior)[:, None] / sigma
    try:
        left = np.diag(np.linalg.inv(np.eye(len(prior)) + scaled @ scaled.T))
    except np.linalg.LinAlgError:  # noise so far below the derivatives that the sum loses I; this never says less
        turned, values, _ = np.linalg.svd(scaled, full_matrices=False)
        left = 1 - (turned**2 * (values**2 / (1 + values**2))).sum(axis=1)
    return np.asarray(prior * np.clip(left, 0, 1), np.float64)


def _example_tangents(
    weight: Floats, bias: Floats, x: Floats, y: NDArray[np.int64], recipe: LocalRecipe, example: int
) -> Floats:
    """Carry the derivatives by one example's features through all local steps: [features, values of the update]."""
    state = _Tangents(weight, bias, x.shape[1], recipe)
    for _ in range(recipe.epochs):
        for first in range(0, len(y), recipe.batch_size):
            rows = np.arange(first, min(first + recipe.batch_size, len(y)))
            inside = np.flatnonzero(rows == example)
            state.step(x[rows], y[rows], int(inside[0]) if len(inside) else None)
    return np.concatenate([state.weight_tangent.reshape(x.shape[1], -1), state.bias_tangent], axis=1)


class _Tangents:
    """Head, velocity and their derivatives by the d features of one example; tangents lead with that axis."""

    def __init__(self, weight: Floats, bias: Floats, unknowns: int, recipe: LocalRecipe) -> None:
        self.recipe, self.start = recipe, (weight, bias)
        self.weight, self.bias = weight.copy(), bias.copy()
        self.velocity = [np.zeros_like(weight), np.zeros_like(bias)]
        self.weight_tangent = np.zeros((unknowns, *weight.shape))
        self.bias_tangent = np.zeros((unknowns, *bias.shape))
        self.velocity_tangent = [np.zeros_like(self.weight_tangent), np.zeros_like(self.bias_tangent)]

    def step(self, x: Floats, y: NDArray[np.int64], example: int | None) -> None:
        n = len(y)
        p = softmax(apply_head(x, self.weight, self.bias))
        slope = p.copy()
        slope[np.arange(n), y] -= 1
        slope /= n
        logits_t = np.tensordot(self.weight_tangent, x, axes=(2, 1)).transpose(0, 2, 1) + self.bias_tangent[:, None]
        if example is not None:
            logits_t[:, example] += self.weight.T
        slope_t = p * (logits_t - (p * logits_t).sum(axis=2, keepdims=True)) / n
        weight_t = np.tensordot(slope_t, x, axes=(1, 0))
        if example is not None:
            unknown = np.arange(len(weight_t))
            weight_t[unknown, :, unknown] += slope[example]
        changes = (
            (0, self.weight, self.weight_tangent, slope.T @ x, weight_t),
            (1, self.bias, self.bias_tangent, slope.sum(axis=0), slope_t.sum(axis=1)),
        )
        for index, value, tangent, gradient, gradient_t in changes:
            self._move(index, value, tangent, gradient, gradient_t)

    def _move(self, index: int, value: Floats, tangent: Floats, gradient: Floats, gradient_t: Floats) -> None:
        recipe = self.recipe
        pull = recipe.weight_decay + recipe.proximal_mu
        change = gradient + pull * value - recipe.proximal_mu * self.start[index]
        self.velocity[index] = recipe.momentum * self.velocity[index] + change
        self.velocity_tangent[index] = recipe.momentum * self.velocity_tangent[index] + gradient_t + pull * tangent
        value -= recipe.learning_rate * self.velocity[index]
        tangent -= recipe.learning_rate * self.velocity_tangent[index]
