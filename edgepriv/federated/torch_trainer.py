"""Local training of the whole model on devices that have torch: FedAvg, and FedProx by ``proximal_mu``.

McMahan et al. 2017 (FedAvg) and Li et al. 2020 (FedProx). Rules: the caller's model is never changed; everything
random comes from ``seed``; the update is a dict of plain arrays under the model's ``state_dict`` names, so that
it can be encoded by ``edgepriv.wire``. BatchNorm's running statistics and counters are in it under their own
names and left out where the recipe keeps them at home. What such an update gives away is measured in
``edgepriv.risk.gradient_leakage``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgepriv.errors import DataError
from edgepriv.federated.local_update import LocalUpdate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from edgepriv.federated.local_recipe import LocalRecipe
    from edgepriv.federated.local_update import RoundSettings

STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")


@dataclass(frozen=True, slots=True)
class TrainedRound:
    """The result of one device's round.

    Attributes:
        tensors: after minus before, float32, by ``state_dict`` name; counters as int32. What is sent.
        n_examples: images trained on.
        steps: SGD steps K.
        mean_loss: over all steps. Stays on the device.
        order: the rows in the order of training, epoch after epoch. Stays on the device.
        momentum: the momentum buffers afterwards. Stays on the device.
        statistics: changes of BatchNorm's buffers, whether they are sent or not.
    """

    tensors: dict[str, NDArray[Any]]
    n_examples: int
    steps: int
    mean_loss: float
    order: NDArray[np.int64] = field(repr=False)
    momentum: dict[str, NDArray[Any]] = field(repr=False)
    statistics: dict[str, NDArray[Any]] = field(repr=False)


def is_statistic(name: str) -> bool:
    """Return whether a ``state_dict`` name is one of BatchNorm's buffers."""
    return name.endswith(STATISTICS)


def train_locally(
    model: nn.Module,
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    recipe: LocalRecipe,
    *,
    seed: int,
    device: str = "cpu",
    momentum: Mapping[str, NDArray[Any]] | None = None,
    shuffle: bool = True,
) -> TrainedRound:
    """Train a copy of ``model`` and return what changed.

    Args:
        model: the global model of the round.
        images: float32 [n, channels, height, width] in 0..1.
        labels: int64 [n].
        recipe: see :class:`LocalRecipe`.
        seed: of the batch order.
        device: a torch device.
        momentum: buffers of the last round, where the recipe carries them.
        shuffle: new order each epoch; else the given one.

    Raises:
        DataError: no images, labels that do not fit, or training that diverges.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise DataError(f"{len(images)} images and {len(labels)} labels cannot be trained on")
    local = copy.deepcopy(model).to(device)
    local.train(recipe.batch_normalisation == "batch")
    start = {name: value.detach().clone() for name, value in local.state_dict().items()}
    optimiser = _Sgd(local, start, recipe, momentum or {})
    x, y = torch.from_numpy(np.ascontiguousarray(images)).to(device), torch.from_numpy(labels).to(device)
    losses, order = [], []
    for rows in _batches(len(images), recipe, np.random.default_rng(seed), shuffle=shuffle):
        loss = functional.cross_entropy(local(x[rows]), y[rows])
        if not torch.isfinite(loss):
            raise DataError("training diverged: the loss is not finite", hint="lower the learning rate")
        optimiser.step(loss)
        losses.append(loss.item())
        order.append(rows)
    changes = _difference(start, local.state_dict(), recipe)
    moved = {name: value for name, value in changes.items() if is_statistic(name)}
    sent = changes if recipe.shares_statistics else {n: v for n, v in changes.items() if n not in moved}
    return TrainedRound(
        tensors=sent,
        statistics=moved,
        n_examples=len(images),
        steps=len(losses),
        mean_loss=float(np.mean(losses)),
        order=np.concatenate(order),
        momentum=optimiser.state(),
    )


class _Sgd:
    """SGD as torch's own, with FedProx's term; written out because the audit differentiates the same lines."""

    def __init__(
        self,
        model: nn.Module,
        start: Mapping[str, Tensor],
        recipe: LocalRecipe,
        momentum: Mapping[str, NDArray[Any]],
    ) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if recipe.trains(name)}
        if not self.parameters:
            raise DataError(f"no parameter of the model starts with {recipe.trainable}", hint="check trainable")
        self.start, self.recipe = start, recipe
        carried = momentum if recipe.carries_momentum else {}
        self.velocity = {name: torch.as_tensor(np.array(value)) for name, value in carried.items()}

    def step(self, loss: Tensor) -> None:
        recipe = self.recipe
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        with torch.no_grad():
            for (name, weight), gradient in zip(self.parameters.items(), gradients, strict=True):
                pull = recipe.proximal_mu * (weight - self.start[name])
                change = gradient + recipe.weight_decay * weight + pull
                if recipe.momentum:
                    old = self.velocity.get(name)
                    change = change if old is None else recipe.momentum * old.to(weight.device) + change
                    self.velocity[name] = change
                weight.sub_(recipe.learning_rate * change)

    def state(self) -> dict[str, NDArray[Any]]:
        return {name: value.cpu().numpy() for name, value in self.velocity.items()}


def _batches(
    n_images: int, recipe: LocalRecipe, rng: np.random.Generator, *, shuffle: bool
) -> Iterator[NDArray[np.int64]]:
    for _ in range(recipe.epochs):
        order = rng.permutation(n_images) if shuffle else np.arange(n_images)
        for first in range(0, n_images, recipe.batch_size):
            yield order[first : first + recipe.batch_size].astype(np.int64)


def _difference(start: Mapping[str, Tensor], end: Mapping[str, Tensor], recipe: LocalRecipe) -> dict[str, NDArray[Any]]:
    tensors = {}
    for name, before in start.items():
        if is_statistic(name):
            if recipe.batch_normalisation != "batch":
                continue
        elif not recipe.trains(name):
            continue
        change = (end[name] - before).cpu().numpy()
        tensors[name] = change if np.issubdtype(change.dtype, np.floating) else change.astype(np.int32)
    return tensors


class TorchTrainer:
    """A trainer of the whole model for `edgepriv.federated.participant`, over fixed images and labels.

    Global weights may name any part of the model. BatchNorm statistics that the round keeps at home persist on
    this device from round to round (FedBN); counters never leave through a sum.

    Args:
        model: the architecture; its weights are replaced by each round's.
        images: float32 [n, channels, height, width] in 0..1.
        labels: int64 [n].
        device: a torch device.
    """

    def __init__(
        self, model: nn.Module, images: NDArray[np.float32], labels: NDArray[np.int64], *, device: str = "cpu"
    ) -> None:
        self.model, self.images, self.labels, self.device = model, images, labels, device
        self.momentum: dict[str, NDArray[Any]] = {}

    def __call__(self, weights: Mapping[str, NDArray[Any]], settings: RoundSettings) -> LocalUpdate:
        """Train on what is here from the round's weights; no examples, no update."""
        if len(self.labels) == 0:
            return LocalUpdate({}, 0)
        state = self.model.state_dict()
        if unknown := sorted(set(weights) - set(state)):
            raise DataError(f"the round trains {unknown[0]!r}, which this model has not")
        self.model.load_state_dict({**state, **{name: torch.tensor(np.array(w)) for name, w in weights.items()}})
        trained = train_locally(
            self.model,
            self.images,
            self.labels,
            settings.recipe,
            seed=settings.seed,
            device=self.device,
            momentum=self.momentum,
        )
        self.momentum = trained.momentum
        sent = {name: value for name, value in trained.tensors.items() if name in weights}
        self._keep_statistics(trained)
        return LocalUpdate({n: v for n, v in sent.items() if v.dtype == np.float32}, trained.n_examples)

    def _keep_statistics(self, trained: TrainedRound) -> None:
        state = self.model.state_dict()
        for name, value in trained.statistics.items():
            state[name] += torch.tensor(value, dtype=state[name].dtype)
