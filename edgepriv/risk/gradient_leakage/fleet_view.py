"""What the updates of this fleet would have shown, with no protection and as configured: for the demo's report.

Two devices are played with canaries: one that trains the head on a frozen backbone, and one that trains a whole
BatchNorm model. A few seconds of CPU in all; nothing of a real device is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgepriv.federated.local_recipe import LocalRecipe, head_recipe
from edgepriv.risk import models
from edgepriv.risk.gradient_leakage.audit import canary_update, judge_update, make_canaries
from edgepriv.risk.gradient_leakage.inversion import Attack
from edgepriv.risk.gradient_leakage.page import as_bytes, nearest_public
from edgepriv.risk.gradient_leakage.protections import NoProtection
from edgepriv.risk.pictures import grid_png

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgepriv.risk.gradient_leakage.audit import Canaries, UpdateAudit
    from edgepriv.risk.gradient_leakage.protections import Protection

__all__ = ["UpdateView", "fleet_view", "view_update", "with_head"]
COLUMNS = "canary | no protection | as configured | nearest public image"


@dataclass(frozen=True, slots=True)
class UpdateView:
    """One kind of device: figures without and with protection, and one grid.

    Attributes:
        title: which device.
        unprotected: ``psnr_db``, ``ssim``, ``iip``, ``verdict``.
        configured: the same, for what is sent as configured.
        protection: what the configuration does, in words.
        caption: names of the grid's columns.
        png: canary | no protection | as configured | nearest public image.
    """

    title: str
    unprotected: dict[str, Any]
    configured: dict[str, Any]
    protection: str
    caption: str
    png: bytes = field(repr=False)


def fleet_view(
    head_model: nn.Module,
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    public: NDArray[np.float32],
    public_labels: NDArray[np.int64],
    *,
    head_protections: Sequence[Protection],
    full_protections: Sequence[Protection],
    full_model: nn.Module | None = None,
    learning_rate: float = 0.1,
    full_batch: int = 4,
    iterations: int = 100,
    seed: int = 0,
) -> list[UpdateView]:
    """Return the two views of the demo's report.

    Args:
        head_model: backbone ``features`` and ``head`` as the devices have them (see :func:`with_head`).
        images: canaries [n, c, h, w] in 0..1, at least ``full_batch``; the head-only device uses the first.
        labels: [n].
        public: other images of the same kind [m, c, h, w], a few hundred.
        public_labels: [m].
        head_protections: applied in this order to the head-only update, as configured.
        full_protections: the same for the whole model's.
        full_model: a BatchNorm network; a fresh small one by default.
        learning_rate: of both devices.
        full_batch: images of the device that trains the whole model.
        iterations: of each attack.
        seed: of everything.
    """
    if full_model is None:
        torch.manual_seed(seed)
        classes = int(max(labels.max(), public_labels.max())) + 1
        full_model = models.build("cnn-bn", classes, images.shape[1], images.shape[2])
    held = make_canaries(images[:full_batch], labels[:full_batch], public, public_labels, seed=seed, epochs=3)
    attack = Attack(iterations=iterations, seed=seed)
    head = view_update(
        "A device that trains only the head, one image", head_model,
        head_recipe(learning_rate=learning_rate, batch_size=1),
        held.take(slice(0, 1)), head_protections, attack=attack, seed=seed,
    )  # fmt: skip
    full = view_update(
        f"A device that trains the whole BatchNorm model, {full_batch} images", full_model,
        LocalRecipe(learning_rate, batch_size=full_batch), held, full_protections, attack=attack, seed=seed,
    )  # fmt: skip
    return [head, full]


def view_update(
    title: str,
    model: nn.Module,
    recipe: LocalRecipe,
    canaries: Canaries,
    protections: Sequence[Protection],
    *,
    attack: Attack | None = None,
    seed: int = 0,
) -> UpdateView:
    """Attack one canary device's update as it is and as protected."""
    update = canary_update(model, recipe, canaries, seed=seed)
    rng = np.random.default_rng(seed)
    sent = dict(update)
    for protection in protections:
        sent = protection.apply(sent, rng)
    open_audit, shut_audit = (
        judge_update(model, tensors, recipe, canaries, attack=attack, sigmas=None) for tensors in (update, sent)
    )
    words = ", then ".join(p.name for p in protections) or NoProtection().name
    return UpdateView(
        title, _figures(open_audit), _figures(shut_audit), words, COLUMNS, _grid(open_audit, shut_audit, canaries)
    )


def with_head(backbone: nn.Module, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> models.Classifier:
    """Put a backbone and a numpy head together into what the audits take."""
    model = models.Classifier(backbone, weight.shape[1], weight.shape[0])
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(np.array(weight)))
        model.head.bias.copy_(torch.from_numpy(np.array(bias)))
    return model


def _figures(audit: UpdateAudit) -> dict[str, Any]:
    found = audit.leakage
    return {
        "psnr_db": found.psnr_db,
        "ssim": found.ssim,
        "prior_ssim": found.prior_ssim,
        "iip": found.iip,
        "pool_size": found.pool_size,
        "verdict": _word(audit),
    }


def _word(audit: UpdateAudit) -> str:
    """The verdict on what the attack saw: no bound was computed here, so none is ever ``contained``."""
    return "this attack fails" if audit.reason.startswith("this attack fails") else audit.verdict


def _grid(unprotected: UpdateAudit, configured: UpdateAudit, canaries: Canaries) -> bytes:
    truth = canaries.images.transpose(0, 2, 3, 1)
    a, b = (audit.reconstruction.images[list(audit.leakage.matched)] for audit in (unprotected, configured))
    columns = [truth, a, b, nearest_public(b, canaries.public.transpose(0, 2, 3, 1))]
    return grid_png([as_bytes(column) for column in columns])
