"""Win a masked model back: what someone with the carrier and some data can do (torch).

Who the attacker is: has the carrier (graph, every weight in clear, decoys in the hidden places), knows the method,
and holds some data of the task. Variants give more: the positions; the model before BatchNorm was folded. Each
attack is also run on two references with the same data: training from scratch, and the model with *every* convolution
encrypted. What counts is the gain over the larger of the two.

Training recipe, the same for everybody: SGD, Nesterov momentum 0.9, weight decay 5e-4, one-cycle learning rate with
peak 0.02, gradient norm clipped at 5, random shifts and flips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgepriv.selective_encryption.select import compute
from edgepriv.selective_encryption.select.network import Network
from edgepriv.selective_encryption.select.scoring import task_loss

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgepriv.selective_encryption.calibrate import Samples

PEAK_RATE = 0.02
BATCH = 64
EVALUATION_BATCH = 250


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how the attacker trains."""

    steps: int
    rate: float = PEAK_RATE
    shift_share: float = 0.125
    flip: bool = True


def steps_for(count: int) -> int:
    """Training steps for a number of labels: about 60 for 20, 120 for 100, 200 for 1,000, at most 1,000."""
    return int(np.clip(round(60 * (count / 20) ** 0.31), 60, 1000))


@dataclass(frozen=True, slots=True)
class Target:
    """A masked model under attack.

    ``model`` is the ONNX graph with decoys, ``hidden`` the encrypted units by layer (only the attacker who knows the
    positions uses them).
    """

    model: Any
    hidden: Mapping[str, NDArray[np.bool_]]


def recalibrate(target: Target, data: Samples, test: Samples) -> float:
    """Label-free: recompute BatchNorm statistics on unlabelled inputs, 30 passes, no gradient.

    A folded model gets fresh BatchNorm layers first.
    """
    network = Network(target.model)
    if not network.norms:
        network = Network(target.model, extra_norm=True)
    _recalibrated(network, compute.tensor(data.x))
    return judge(network, test)


def _recalibrated(network: Network, x: torch.Tensor) -> None:
    for norm in network.norms.values():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the passes
    network.train()
    with torch.no_grad():
        for part in torch.split(x[: 30 * EVALUATION_BATCH], EVALUATION_BATCH):
            network(part)
    for norm in network.norms.values():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.1


def fine_tune(
    target: Target, data: Samples, test: Samples, recipe: Recipe, *, seed: int, extra_norm: bool = False
) -> float:
    """Train everything on labelled data, statistics recalibrated first; ``extra_norm`` re-inserts BatchNorm."""
    torch.manual_seed(seed)
    network = Network(target.model, extra_norm=extra_norm)
    _recalibrated(network, compute.tensor(data.x))
    _train(network, list(network.parameters()), data, recipe)
    return judge(network, test)


def known_positions(
    target: Target, data: Samples, test: Samples, recipe: Recipe, *, seed: int, norm_training: bool
) -> float:
    """Train only the hidden weights; everything else is known to be true.

    ``norm_training`` False: BatchNorm keeps the true statistics (or is folded); True: statistics follow the batches.
    """
    torch.manual_seed(seed)
    network = Network(target.model)
    if norm_training and not network.norms:
        network = Network(target.model, extra_norm=True)
    network.frozen_norms = not norm_training
    network.requires_grad_(requires_grad=False)
    open_weights = []
    for name, units in target.hidden.items():
        if units.any():
            weight = network.weight(name)
            weight.requires_grad_(True)
            mask = torch.from_numpy(units).reshape(-1, 1).expand(len(units), weight.numel() // len(units))
            weight.register_hook(_Keep(mask.reshape(weight.shape).to(weight.device).float()))  # type: ignore[no-untyped-call]
            open_weights.append(weight)
    _train(network, open_weights, data, recipe, decay=0.0)
    return judge(network, test)


@dataclass(frozen=True)
class _Keep:
    """Gradient hook: only the hidden units move."""

    mask: torch.Tensor

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * self.mask


def scratch(target: Target, data: Samples, test: Samples, recipe: Recipe, *, seed: int) -> float:
    """Train the bare architecture from random weights on the same data: what the data alone is worth."""
    torch.manual_seed(seed)
    network = Network(target.model)
    if not network.norms:
        network = Network(target.model, extra_norm=True)
    for parameter in network.weights.values():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            nn.init.zeros_(parameter)
    for norm in network.norms.values():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_parameters()
    _train(network, list(network.parameters()), data, recipe)
    return judge(network, test)


def judge(network: Network, test: Samples) -> float:
    """Quality on the test data."""
    network.eval()
    with torch.no_grad():
        parts = [network(part) for part in torch.split(compute.tensor(test.x), EVALUATION_BATCH)]
    return test.quality(torch.cat(parts).cpu().numpy())


def _train(
    network: Network, parameters: Sequence[torch.Tensor], data: Samples, recipe: Recipe, *, decay: float = 5e-4
) -> None:
    x, y = compute.tensor(data.x), compute.tensor(data.y)
    optimizer = torch.optim.SGD(parameters, lr=recipe.rate, momentum=0.9, nesterov=True, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=recipe.steps, pct_start=0.2)
    network.train()
    batch, order = min(BATCH, len(x)), torch.randperm(len(x))
    at = 0
    for _ in range(recipe.steps):
        if at + batch > len(x):
            order, at = torch.randperm(len(x)), 0
        pick = order[at : at + batch]
        at += batch
        inputs, targets = _varied(x[pick], y[pick], data.task, recipe)
        optimizer.zero_grad()
        task_loss(data.task, network(inputs), targets).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()


def _varied(x: torch.Tensor, y: torch.Tensor, task: str, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Random shift and mirror; targets of ``denoise`` are pictures and stay as they are."""
    if task != "classify":
        return x, y
    if recipe.flip:
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x, x.flip(3))
    reach = int(recipe.shift_share * x.shape[2])
    if reach:
        down, right = (int(v) for v in torch.randint(0, 2 * reach + 1, (2,)))
        padded = functional.pad(x, (reach,) * 4)
        x = padded[:, :, down : down + x.shape[2], right : right + x.shape[3]]
    return x.contiguous(memory_format=torch.channels_last), y
