"""Inversion of a head-only update: features by dW/db, then images through the frozen backbone.

For one image in one step the feature is exact (Geiping et al. 2020 state the identity for any biased linear layer);
what remains is feature inversion. For several images the head's gradient is matched directly through the backbone,
and every class with a single image keeps its quotient as an anchor. Same rules as :mod:`inversion`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgepriv.errors import DataError
from edgepriv.federated.head import BIAS, WEIGHT
from edgepriv.federated.head_leakage import recover_features
from edgepriv.risk.gradient_leakage import statistics
from edgepriv.risk.gradient_leakage.inversion import (
    Attack,
    Reconstruction,
    check_update,
    cosine_schedule,
    invert,
    total_variation,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from edgepriv.federated.local_recipe import LocalRecipe


def invert_head(
    model: nn.Module,
    update: Mapping[str, NDArray[Any]],
    recipe: LocalRecipe,
    shape: tuple[int, int, int, int],
    attack: Attack | None = None,
    *,
    labels: NDArray[np.int64] | None = None,
    prior: NDArray[np.float32] | None = None,
    device: str = "cpu",
) -> Reconstruction:
    """Reconstruct the images behind a head-only update.

    Args:
        model: a backbone ``features`` and a linear ``head``.
        update: changes of ``head.weight`` and ``head.bias``.
        recipe: what the device did.
        shape: (n, channels, height, width).
        attack: restarts, iterations, total variation, seed; the matching options matter for several images.
        labels: in the order of training, for several images.
        prior: public images, see :func:`inversion.invert`.
        device: a torch device.

    Raises:
        DataError: the update is not a head's, or does not fit the model.
    """
    attack = attack or Attack()
    check_update(model.state_dict(), update)
    if set(update) != {WEIGHT, BIAS}:
        raise DataError("this is no head-only update", hint=f"it must hold {WEIGHT} and {BIAS} and nothing else")
    if shape[0] > 1:
        return invert(
            model, update, recipe, shape, replace(attack, bn_weight=0.0), labels=labels, prior=prior, device=device
        )
    rows, classes = recover_features(update)
    if len(rows) == 0:
        raise DataError("no bias moved up: the head learned nothing that can be read")
    strongest = int(np.argmax(np.asarray(update[BIAS])[classes]))
    return invert_features(model, rows[strongest : strongest + 1], classes[[strongest]], shape, attack, device=device)


def invert_features(
    model: nn.Module,
    wanted: NDArray[np.float64],
    labels: NDArray[np.int64],
    shape: tuple[int, int, int, int],
    attack: Attack,
    *,
    device: str = "cpu",
) -> Reconstruction:
    """Find images whose backbone features are ``wanted`` [n, d]: relative squared distance plus total variation."""
    began = time.perf_counter()
    twin, _ = statistics.instrument(model, training=False)
    backbone = twin.get_submodule("features").to(device).requires_grad_(requires_grad=False)
    goal = torch.from_numpy(wanted.astype(np.float32)).to(device)
    best_loss, best, trace = float("inf"), torch.zeros(shape), []
    for restart in range(attack.restarts):
        generator = torch.Generator().manual_seed(attack.seed * 1000 + restart)
        images = torch.rand(shape, generator=generator).to(device).requires_grad_()
        optimiser = torch.optim.Adam([images], lr=attack.learning_rate)
        schedule = cosine_schedule(optimiser, attack.iterations)
        for _ in range(attack.iterations):
            loss = _distance(backbone(images), goal) + attack.tv_weight * total_variation(images)
            (images.grad,) = torch.autograd.grad(loss, [images])
            trace.append(float(loss.detach()))
            if trace[-1] < best_loss:
                best_loss, best = trace[-1], images.detach().clone()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                images.clamp_(0, 1)
    found = best.permute(0, 2, 3, 1).cpu().numpy()
    return Reconstruction(found, labels, best_loss, 0.0, time.perf_counter() - began, 0, tuple(trace))


def _distance(features: Tensor, goal: Tensor) -> Tensor:
    return ((features - goal) ** 2).sum() / (goal**2).sum().clamp_min(1e-12)
