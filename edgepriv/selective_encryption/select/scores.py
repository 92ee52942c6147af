"""Scores that need no training: Fisher times decoy variance, magnitude, chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from edgepriv.selective_encryption.carrier import Layer
    from edgepriv.selective_encryption.select.network import Network

    Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

Scores = dict[str, "NDArray[np.float64]"]
GRADIENT_BATCH = 16


def fisher(network: Network, layers: Sequence[Layer], x: torch.Tensor, y: torch.Tensor, loss: Loss) -> Scores:
    """g^2 * ((w - mu)^2 + var): the expected second-order loss when a decoy N(mu, var) replaces the weight.

    Args:
        network: the model, frozen.
        layers: what may be encrypted.
        x: inputs [n, ...]; y: targets for ``loss``.
        y: targets.
        loss: mean loss of a batch.

    Returns:
        One number a unit.
    """
    network.eval()
    squares = {layer.name: torch.zeros_like(network.weight(layer.name)) for layer in layers}
    for bx, by in zip(torch.split(x, GRADIENT_BATCH), torch.split(y, GRADIENT_BATCH), strict=True):
        network.zero_grad(set_to_none=True)
        (loss(network(bx), by) * len(bx)).backward()  # type: ignore[no-untyped-call]
        for layer in layers:
            gradient = network.weight(layer.name).grad
            if gradient is not None:
                squares[layer.name] += gradient**2
    network.zero_grad(set_to_none=True)
    scores = {}
    for layer in layers:
        rows = network.rows(layer.name, layer.units)
        spread = (rows - rows.mean(0)) ** 2 + rows.var(0, unbiased=False)
        square = squares[layer.name].contiguous(memory_format=torch.contiguous_format).reshape(rows.shape)
        scores[layer.name] = (square * spread).sum(1).double().cpu().numpy()
    return scores


def magnitude(rows: Iterable[tuple[str, NDArray[Any]]]) -> Scores:
    """Norm of each unit: needs neither data nor a graph that torch can run. ``rows``: layer name and weights."""
    return {name: np.linalg.norm(w.astype(np.float64), axis=1) for name, w in rows}


def random_scores(layers: Sequence[Layer], seed: int) -> Scores:
    """Chance, the baseline of every table."""
    rng = np.random.default_rng(seed)
    return {layer.name: rng.random(layer.units) for layer in layers}
