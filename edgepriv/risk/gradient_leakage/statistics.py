"""BatchNorm's part of an update: which batch statistics the running statistics give away.

Hatamizadeh et al. 2023 recover them for one local step, ``s = (r_new - (1-m) r_0) / m``; this is the exact form
for K steps (see README.md for the derivation):

    s_bar = (r_K - (1-m)^K r_0) / (1 - (1-m)^K) = sum_k w_k s_k,   w_k proportional to (1-m)^(K-1-k)

Rules: variances are torch's *unbiased* ones throughout, because that is what ``running_var`` averages; nothing
here changes the caller's model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgepriv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_Norm = nn.modules.batchnorm._BatchNorm  # noqa: SLF001  (the public classes share no public base)


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Weighted mean over the local steps of one layer's batch mean and unbiased variance, float32 [features]."""

    mean: Tensor
    variance: Tensor


class RecordingBatchNorm(nn.Module):
    """BatchNorm from elementary operations that records each batch's statistics inside the autograd graph.

    torch updates running statistics outside the graph, so neither the attack nor the bound could differentiate
    through them. Parameters and buffers keep their names.
    """

    running_mean: Tensor
    running_var: Tensor
    records: list[tuple[Tensor, Tensor]]

    def __init__(self, original: _Norm) -> None:
        super().__init__()
        self.eps = original.eps
        self.weight, self.bias = original.weight, original.bias
        for name, value in original.named_buffers(recurse=False):
            self.register_buffer(name, value.clone())
        self.records = []

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the batch in training mode, by the running statistics otherwise."""
        shape = (1, -1, *([1] * (x.dim() - 2)))
        if self.training:
            dims = (0, *range(2, x.dim()))
            count = x.numel() // x.shape[1]
            if count < 2:
                raise DataError(
                    "BatchNorm cannot train on one value per channel", hint="use a larger batch or frozen BatchNorm"
                )
            mean = x.mean(dims)
            centred = x - mean.reshape(shape)
            variance = (centred * centred).mean(dims)
            self.records.append((mean, variance * (count / (count - 1))))
        else:
            centred = x - self.running_mean.reshape(shape)
            variance = self.running_var
        out = centred * torch.rsqrt(variance + self.eps).reshape(shape)
        if self.weight is not None:
            out = out * self.weight.reshape(shape) + self.bias.reshape(shape)
        return out


def instrument(model: nn.Module, *, training: bool) -> tuple[nn.Module, dict[str, RecordingBatchNorm]]:
    """Return a deep copy whose BatchNorm layers record, and those layers by name."""
    twin = copy.deepcopy(model)
    layers: dict[str, RecordingBatchNorm] = {}
    for name, module in list(twin.named_modules()):
        if isinstance(module, _Norm):
            recorder = RecordingBatchNorm(module)
            parent_name, _, attribute = name.rpartition(".")
            setattr(twin.get_submodule(parent_name), attribute, recorder)
            layers[name] = recorder
    twin.train(training)
    return twin, layers


def momenta(model: nn.Module) -> dict[str, float | None]:
    """Return the momentum of each BatchNorm layer that tracks running statistics; ``None`` = cumulative mean."""
    return {
        name: module.momentum
        for name, module in model.named_modules()
        if isinstance(module, _Norm) and module.track_running_stats
    }


def step_weights(momentum: float | None, steps: int) -> NDArray[np.float64]:
    """Return w_k, the weight of each of K recorded batches in ``s_bar``; they sum to 1."""
    if momentum is None:
        return np.full(steps, 1 / steps)
    weights = (1 - momentum) ** np.arange(steps - 1, -1, -1, dtype=np.float64)
    return np.asarray(weights / weights.sum(), np.float64)


def noise_gain(momentum: float | None, steps: int) -> float:
    """Return what a noise of std 1 on a running statistic becomes on ``s_bar``: 10 at K=1, m=0.1."""
    return 1.0 / steps if momentum is None else 1 / (1 - (1 - momentum) ** steps)


def weighted(records: list[tuple[Tensor, Tensor]], momentum: float | None) -> BatchStatistics:
    """Average recorded statistics as the running ones do, inside the graph."""
    weights = step_weights(momentum, len(records))
    mean = torch.stack([float(w) * m for w, (m, _) in zip(weights, records, strict=True)]).sum(0)
    variance = torch.stack([float(w) * v for w, (_, v) in zip(weights, records, strict=True)]).sum(0)
    return BatchStatistics(mean, variance)


def recover(
    before: Mapping[str, Tensor],
    update: Mapping[str, NDArray[Any]],
    layer_momenta: Mapping[str, float | None],
    steps: int,
    uses: Mapping[str, int] | None = None,
) -> dict[str, BatchStatistics]:
    """Recover ``s_bar`` of every BatchNorm layer whose running statistics are in the update.

    Args:
        before: state of the global model.
        update: changes by name.
        layer_momenta: see :func:`momenta`.
        steps: K according to the recipe.
        uses: how often a forward pass uses each layer, where it is not once; see :func:`uses_per_pass`.

    Returns:
        By layer name; a layer that is not in the update or did not move (frozen) is left out.

    Raises:
        DataError: a shared counter differs from what the recipe means, so the recipe cannot be the true one.
    """
    found = {}
    for layer, momentum in layer_momenta.items():
        mean_change = update.get(f"{layer}.running_mean")
        variance_change = update.get(f"{layer}.running_var")
        if mean_change is None or variance_change is None or not (mean_change.any() or variance_change.any()):
            continue
        k = steps * (uses or {}).get(layer, 1)
        _check_counter(layer, update, k)
        seen = int(before.get(f"{layer}.num_batches_tracked", torch.tensor(0)))
        parts = [
            _recover_one(before[f"{layer}.{kind}"], change, momentum, k, seen)
            for kind, change in (("running_mean", mean_change), ("running_var", variance_change))
        ]
        found[layer] = BatchStatistics(*parts)
    return found


def uses_per_pass(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, int]:
    """Return how often one forward pass uses each BatchNorm layer."""
    twin, layers = instrument(model, training=True)
    with torch.no_grad():
        twin(torch.rand(2, *image_shape, device=next(twin.parameters()).device))
    return {name: len(layer.records) for name, layer in layers.items()}


def _check_counter(layer: str, update: Mapping[str, NDArray[Any]], expected: int) -> None:
    counter = update.get(f"{layer}.num_batches_tracked")
    if counter is not None and round(float(np.asarray(counter))) != expected:
        raise DataError(
            f"{layer} counted {round(float(np.asarray(counter)))} batches, the recipe means {expected}",
            hint="give the batch size, epochs and number of images that the device really used",
        )


def _recover_one(before: Tensor, change: NDArray[Any], momentum: float | None, steps: int, seen: int) -> Tensor:
    r_0 = before.detach().cpu().double()
    r_k = r_0 + torch.from_numpy(np.asarray(change, np.float64))
    if momentum is None:
        return (((seen + steps) * r_k - seen * r_0) / steps).float()
    keep = (1 - momentum) ** steps
    return ((r_k - keep * r_0) / (1 - keep)).float()
