"""Which labels an update gives away, without seeing an image.

One image: the only negative entry of the head's gradient is the label (iDLG, Zhao et al. 2020). Several: the head
bias moved by ``-lr * sum_k (mean p - mean y)``, so the class counts are ``n (p + db / (lr K))`` with p the model's
mean prediction, taken from public images (the idea of Geng et al. 2021 and Wainakh et al. 2022 in our own form).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgepriv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgepriv.federated.local_recipe import LocalRecipe


def head_names(model: nn.Module) -> tuple[str, str | None]:
    """Return the names of the last linear layer's weight and bias (``None`` without one)."""
    last = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not last:
        raise DataError("the model has no linear head to read labels from", hint="give the labels")
    name, module = last[-1]
    return f"{name}.weight", f"{name}.bias" if module.bias is not None else None


def effective_steps(recipe: LocalRecipe, n_images: int) -> float:
    """Return K, or with momentum the sum over steps of how much each gradient counts in the end."""
    k, mu = recipe.steps(n_images), recipe.momentum
    return float(k) if mu == 0 else sum((1 - mu ** (k - j)) / (1 - mu) for j in range(k))


def infer_labels(
    model: nn.Module,
    update: Mapping[str, NDArray[Any]],
    recipe: LocalRecipe,
    n_images: int,
    public: NDArray[np.float32],
) -> NDArray[np.int64]:
    """Estimate the labels of an update, sorted; their order over the batches stays unknown.

    Args:
        model: the global model.
        update: changes by name.
        recipe: what the device did.
        n_images: how many images the update comes from.
        public: [m, c, h, w] images of the same kind.

    Raises:
        DataError: the head is not in the update.
    """
    weight, bias = head_names(model)
    if weight not in update:
        raise DataError(f"{weight} is not in the update", hint="labels cannot be read from it: give them")
    scale = recipe.learning_rate * effective_steps(recipe, n_images)
    if bias is None or bias not in update:
        # features after a ReLU are not negative, so the row sums keep the sign of the missing bias gradient
        rows = update[weight].sum(axis=1)
        return np.sort(np.argsort(-rows)[:n_images]).astype(np.int64)
    change = np.asarray(update[bias], np.float64)
    if n_images == 1:
        return np.array([int(np.argmax(change))], np.int64)
    counts = n_images * (_mean_prediction(model, public, recipe) + change / scale)
    return _round_to_total(counts, n_images)


def _mean_prediction(model: nn.Module, public: NDArray[np.float32], recipe: LocalRecipe) -> NDArray[np.float64]:
    from edgepriv.risk.gradient_leakage.statistics import instrument

    twin, _ = instrument(model, training=recipe.batch_normalisation == "batch")
    with torch.no_grad():
        logits = twin(torch.from_numpy(np.ascontiguousarray(public)))
    mean: NDArray[np.float64] = torch.softmax(logits, 1).mean(0).double().numpy()
    return mean


def _round_to_total(counts: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    counts = np.clip(counts, 0, None)
    counts *= total / max(counts.sum(), 1e-12)
    whole = np.floor(counts).astype(np.int64)
    for index in np.argsort(whole - counts)[: total - int(whole.sum())]:
        whole[index] += 1
    return np.repeat(np.arange(len(counts)), whole).astype(np.int64)
