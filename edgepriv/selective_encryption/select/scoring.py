"""One entry for every strategy: numpy in, scores out, torch behind the wall."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from edgepriv.errors import ConfigError
from edgepriv.selective_encryption import carrier
from edgepriv.selective_encryption.select import compute
from edgepriv.selective_encryption.select.gates import decoy_gates, pss_gates
from edgepriv.selective_encryption.select.network import Network, UnsupportedModelError
from edgepriv.selective_encryption.select.scores import fisher, magnitude, random_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgepriv.selective_encryption.carrier import Layer
    from edgepriv.selective_encryption.select.scores import Scores

STRATEGIES = ("fisher", "decoy-gates", "pss", "magnitude", "random")
AGREEMENT, HALF_AGREEMENT = 1e-3, 2e-2  # relative to the largest output; the second where the runtime uses float16


def task_loss(task: str, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean loss of a batch: cross-entropy, or squared error on a scale where noise is of order one."""
    if task == "classify":
        return functional.cross_entropy(outputs.flatten(1), targets)
    return 100 * functional.mse_loss(outputs, targets)


def unit_scores(
    model: Any,
    layers: Sequence[Layer],
    strategy: str,
    *,
    task: str,
    x: NDArray[np.float32],
    y: NDArray[Any],
    reference: NDArray[Any] | None = None,
    seed: int = 0,
    threads: int = 1,
    steps: int | None = None,
) -> tuple[Scores, str]:
    """Score every unit.

    Args:
        model: a normalised ``onnx.ModelProto``.
        layers: what may be encrypted.
        strategy: one of ``STRATEGIES``.
        task: ``classify`` or ``denoise``.
        x: inputs; y: targets.
        y: labels, or clean pictures.
        reference: the runtime's outputs for the first inputs; a torch copy that disagrees is not used.
        seed: of every random draw.
        threads: for torch.
        steps: training steps of the gate strategies.

    Returns:
        The scores, and the strategy that was used: a model that torch cannot run gets ``magnitude``.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown selection {strategy!r}", hint=f"use one of {', '.join(STRATEGIES)}")
    if strategy == "random":
        return random_scores(layers, seed), strategy
    if strategy == "magnitude":
        return magnitude((layer.name, carrier.weight_rows(model, layer)) for layer in layers), strategy
    torch.set_num_threads(threads)
    try:
        network = Network(model)
        _check_agreement(network, x, reference)
    except UnsupportedModelError:
        return magnitude((layer.name, carrier.weight_rows(model, layer)) for layer in layers), "magnitude"
    return _trained(network, layers, strategy, task, x, y, seed, steps), strategy


def _trained(
    network: Network,
    layers: Sequence[Layer],
    strategy: str,
    task: str,
    x: NDArray[np.float32],
    y: NDArray[Any],
    seed: int,
    steps: int | None,
) -> Scores:
    tx, ty = compute.tensor(x), compute.tensor(y)

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return task_loss(task, outputs, targets)

    if strategy == "fisher":
        return fisher(network, layers, tx, ty, loss)
    if strategy == "pss":
        return pss_gates(network, layers, tx, ty, loss, seed=seed, steps=steps or 120)
    return decoy_gates(network, layers, tx, ty, loss, seed=seed, steps=steps or 200)


def _check_agreement(network: Network, x: NDArray[np.float32], reference: NDArray[Any] | None) -> None:
    if reference is None:
        return
    network.eval()
    with torch.no_grad():
        ours = network(compute.tensor(x[: len(reference)])).cpu().numpy()
    scale = float(np.abs(reference).max()) + 1e-6
    allowed = HALF_AGREEMENT if reference.dtype == np.float16 else AGREEMENT
    if ours.shape != reference.shape or float(np.abs(ours - reference).max()) > allowed * scale:
        raise UnsupportedModelError("the torch copy does not agree with the runtime")
