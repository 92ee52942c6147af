"""A softmax head trained by numpy on features that a frozen backbone gives: what a device trains without torch.

Names and shapes are torch's: ``head.weight`` float32 [classes, features] and ``head.bias`` float32 [classes];
``logits = features @ weight.T + bias``. SGD with momentum and weight decay as in torch; FedProx's pull towards the
global head where the recipe asks for it. Everything random comes from the seed in the settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError
from edgepriv.federated.local_update import LocalUpdate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from edgepriv.federated.local_recipe import LocalRecipe
    from edgepriv.federated.local_update import RoundSettings

    Floats = NDArray[np.float32]

WEIGHT, BIAS = "head.weight", "head.bias"


def new_head(classes: int, features: int) -> dict[str, Floats]:
    """A head of zeros: every class equally likely."""
    return {WEIGHT: np.zeros((classes, features), np.float32), BIAS: np.zeros(classes, np.float32)}


def apply_head(features: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any]) -> NDArray[Any]:
    """Logits [n, classes] of features [n, d]."""
    logits: NDArray[Any] = features @ weight.T + bias
    return logits


def softmax(logits: NDArray[Any]) -> NDArray[Any]:
    """Probabilities [n, classes], without overflow."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: NDArray[Any] = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities


def accuracy(head: Mapping[str, NDArray[Any]], features: NDArray[Any], labels: NDArray[Any]) -> float:
    """Share of rows whose largest logit is their label."""
    return float((apply_head(features, head[WEIGHT], head[BIAS]).argmax(axis=1) == labels).mean())


def head_gradient(
    weight: NDArray[Any], bias: NDArray[Any], features: NDArray[Any], labels: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Gradient of the mean cross-entropy by weight and bias."""
    slope = softmax(apply_head(features, weight, bias))
    slope[np.arange(len(labels)), labels] -= 1
    slope /= len(labels)
    return slope.T @ features, slope.sum(axis=0)


def train_head(
    head: Mapping[str, NDArray[Any]],
    features: NDArray[Any],
    labels: NDArray[Any],
    recipe: LocalRecipe,
    *,
    seed: int,
) -> dict[str, Floats]:
    """Train a copy of ``head`` and return after minus before.

    Args:
        head: ``head.weight`` [classes, d] and ``head.bias`` [classes].
        features: float [n, d].
        labels: integers [n] in ``range(classes)``.
        recipe: learning rate, batches, epochs, momentum, weight decay, proximal pull.
        seed: of the batch order.

    Raises:
        DataError: shapes or labels do not fit, or training diverges.
    """
    start = {name: np.asarray(head[name], np.float32) for name in (WEIGHT, BIAS)}
    _check(start, features, labels)
    now = {name: value.copy() for name, value in start.items()}
    velocity = {name: np.zeros_like(value) for name, value in start.items()}
    x, y = np.asarray(features, np.float32), np.asarray(labels, np.int64)
    for rows in _batches(len(y), recipe, seed):
        gradients = dict(zip((WEIGHT, BIAS), head_gradient(now[WEIGHT], now[BIAS], x[rows], y[rows]), strict=True))
        for name, gradient in gradients.items():
            _step(now[name], gradient, velocity[name], start[name], recipe)
    if not all(np.isfinite(value).all() for value in now.values()):
        raise DataError("training diverged", hint="lower the learning rate")
    return {name: now[name] - start[name] for name in now}


def _step(weight: Floats, gradient: NDArray[Any], velocity: Floats, start: Floats, recipe: LocalRecipe) -> None:
    change = gradient + recipe.weight_decay * weight + recipe.proximal_mu * (weight - start)
    velocity *= recipe.momentum
    velocity += change
    weight -= recipe.learning_rate * velocity


def _batches(n: int, recipe: LocalRecipe, seed: int) -> Iterator[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    for _ in range(recipe.epochs):
        order = rng.permutation(n)
        for first in range(0, n, recipe.batch_size):
            yield order[first : first + recipe.batch_size]


def _check(head: Mapping[str, Floats], features: NDArray[Any], labels: NDArray[Any]) -> None:
    classes, width = head[WEIGHT].shape
    if features.ndim != 2 or features.shape[1] != width or len(features) != len(labels) or len(labels) == 0:
        raise DataError(f"features {features.shape} and {len(labels)} labels do not fit a head of {width} features")
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"a label lies outside the head's {classes} classes")


class HeadTrainer:
    """A trainer over fixed features and labels, for `edgepriv.federated.participant`."""

    def __init__(self, features: NDArray[Any], labels: NDArray[Any]) -> None:
        self.features, self.labels = np.asarray(features, np.float32), np.asarray(labels, np.int64)

    def __call__(self, weights: Mapping[str, NDArray[Any]], settings: RoundSettings) -> LocalUpdate:
        """Train the head of the global weights on what is here; no examples, no update."""
        if len(self.labels) == 0:
            return LocalUpdate({}, 0)
        delta = train_head(weights, self.features, self.labels, settings.recipe, seed=settings.seed)
        return LocalUpdate(delta, len(self.labels))
