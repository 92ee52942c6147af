"""A device's local training as a differentiable function of its images: what attack and bound both invert.

``update(images, labels)`` runs the same K steps as ``edgepriv.federated.torch_trainer`` (momentum, weight decay,
FedProx and BatchNorm included) with ``create_graph``, so the update's gradient with respect to the images exists.
Rules: the model handed in is copied once and never changed; state is passed in, not kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edgepriv.errors import DataError
from edgepriv.risk.gradient_leakage import statistics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgepriv.federated.local_recipe import LocalRecipe
    from edgepriv.risk.gradient_leakage.statistics import BatchStatistics

MAX_IMAGES = 64


@dataclass(frozen=True, slots=True)
class Simulated:
    """Parameter changes by name and each BatchNorm layer's weighted batch statistics, in the graph."""

    changes: dict[str, Tensor]
    statistics: dict[str, BatchStatistics]


class Simulation:
    """Local training of one recipe on one model, as a function of images and soft labels.

    Args:
        model: the global model W_t with its running statistics r_0; copied.
        recipe: what the device did, or what the attacker believes it did.
        clients: simulate this many devices on equal shares of the images and average them (an aggregate).
        momentum: the device's momentum buffers before the round, where the recipe carries them.

    Raises:
        DataError: no trainable parameter, or a carried momentum state that was not given.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: LocalRecipe,
        *,
        clients: int = 1,
        momentum: Mapping[str, Tensor] | None = None,
        device: str = "cpu",
    ) -> None:
        if recipe.carries_momentum and recipe.momentum and not momentum:
            raise DataError(
                "this recipe carries momentum from round to round and its state is missing",
                hint="give the momentum buffers of the last round, or let the device reset them each round",
            )
        training = recipe.batch_normalisation == "batch"
        self.twin, self.layers = statistics.instrument(model.to(device), training=training)
        self.momenta = statistics.momenta(model)
        self.recipe, self.clients, self.device = recipe, clients, device
        self.momentum = dict(momentum or {}) if recipe.carries_momentum else {}
        named = {name: p.detach().clone() for name, p in self.twin.named_parameters()}
        self.trained = {name: p.requires_grad_() for name, p in named.items() if recipe.trains(name)}
        self.fixed = {name: p for name, p in named.items() if name not in self.trained}
        self.fixed.update({name: b.detach().clone() for name, b in self.twin.named_buffers()})
        if not self.trained:
            raise DataError(f"no parameter of the model starts with {recipe.trainable}", hint="check trainable")

    def update(self, images: Tensor, targets: Tensor) -> Simulated:
        """Return the update that ``images`` [n, c, h, w] with soft labels ``targets`` [n, classes] would cause."""
        share = len(images) // self.clients
        parts = [
            self._one_client(images[i * share : (i + 1) * share], targets[i * share : (i + 1) * share])
            for i in range(self.clients)
        ]
        return parts[0] if self.clients == 1 else _mean(parts)

    def _one_client(self, images: Tensor, targets: Tensor) -> Simulated:
        for layer in self.layers.values():
            layer.records = []
        weights = dict(self.trained)
        velocity: dict[str, Tensor] = dict(self.momentum)
        for _ in range(self.recipe.epochs):
            for first in range(0, len(images), self.recipe.batch_size):
                rows = slice(first, first + self.recipe.batch_size)
                weights = self._step(weights, velocity, images[rows], targets[rows])
        changes = {name: weights[name] - start for name, start in self.trained.items()}
        recorded = {
            name: statistics.weighted(layer.records, self.momenta.get(name))
            for name, layer in self.layers.items()
            if layer.records and name in self.momenta
        }
        return Simulated(changes, recorded)

    def _step(
        self, weights: dict[str, Tensor], velocity: dict[str, Tensor], images: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        recipe = self.recipe
        logits = functional_call(self.twin, {**weights, **self.fixed}, (images,))
        loss = -(targets * torch.log_softmax(logits, dim=1)).sum(1).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        stepped = {}
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            change = gradient
            if recipe.weight_decay:
                change = change + recipe.weight_decay * weight
            if recipe.proximal_mu:
                change = change + recipe.proximal_mu * (weight - self.trained[name])
            if recipe.momentum:
                change = change + recipe.momentum * velocity[name] if name in velocity else change
                velocity[name] = change
            stepped[name] = weight - recipe.learning_rate * change
        return stepped


def _mean(parts: list[Simulated]) -> Simulated:
    changes = {name: torch.stack([p.changes[name] for p in parts]).mean(0) for name in parts[0].changes}
    recorded = {
        name: statistics.BatchStatistics(
            torch.stack([p.statistics[name].mean for p in parts]).mean(0),
            torch.stack([p.statistics[name].variance for p in parts]).mean(0),
        )
        for name in parts[0].statistics
    }
    return Simulated(changes, recorded)
