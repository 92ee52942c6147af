"""What the *final* model shows without any update: class inversion (Fredrikson et al. 2015, priors of Yin et al. 2020).

For each class the image that the model is surest of, with total variation and the distance to BatchNorm's running
statistics as priors. A class picture is an average, not a person: the score says whether it is nearer to the class
than public knowledge is, judged by a classifier trained on public images only.

Whether the pictures are recognised more often than by chance is a test over the classes of which the auditor has images
(:func:`judge_classes`). With two classes both are right by chance in one of four models, so there fresh networks of the
same architecture are inverted too and the difference between own and other class is compared with theirs.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from edgepriv.image_quality import ssim
from edgepriv.risk.gradient_leakage import statistics
from edgepriv.risk.gradient_leakage.inversion import cosine_schedule, total_variation

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ClassInversion:
    """Pictures of the classes and their scores.

    Attributes:
        images: float32 [classes, h, w, c].
        mean_ssim: with the mean picture of the class in the reference images, mean over classes.
        prior_ssim: SSIM of the mean of *all* reference images with the same: public knowledge.
        nearest_ssim: of each class picture with the single reference image it resembles most, mean over classes.
        recognised: share of class pictures that an independent classifier (nearest class mean) names right.
        right: how many these are.
        present: classes of which there are reference images; only these are judged.
        margin: correlation with the own class mean minus the best with another's, mean over classes.
        confidence: the audited model's own, mean.
        seconds: time taken.
    """

    images: NDArray[np.float32] = field(repr=False)
    mean_ssim: float
    prior_ssim: float
    nearest_ssim: float
    recognised: float
    right: int
    present: int
    margin: float
    confidence: float
    seconds: float

    def record(self) -> dict[str, Any]:
        """Return plain values for JSON, without the pictures."""
        values = asdict(self)
        del values["images"]
        return values


MAX_CHANCE = 0.05
FRESH_MODELS = 19  # above all of them: one in twenty by chance
LEAK, HIDDEN, UNDECIDABLE = "leak", "do not show", "undecidable"


@dataclass(frozen=True, slots=True)
class ClassVerdict:
    """``leak``, ``do not show`` or ``undecidable``, how often as much comes about by chance, and by which test."""

    word: str
    reason: str
    chance: float


def judge_classes(found: ClassInversion, fresh: Callable[[int], ClassInversion] | None = None) -> ClassVerdict:
    """Say whether the class pictures tell more than chance.

    Args:
        found: of the audited model.
        fresh: inverts a network of the same architecture that has seen nothing, by number; called where so few classes
            are present that even all of them are recognised by chance too often.
    """
    n, right = found.present, found.right
    if n < 2:
        return ClassVerdict(UNDECIDABLE, f"pictures of {n} classes: nothing to tell apart", 1.0)
    if n**-n <= MAX_CHANCE:
        chance = sum(math.comb(n, k) * (n - 1) ** (n - k) for k in range(right, n + 1)) / n**n
        reason = f"{right} of {n} classes are recognised; by chance as many in {chance:.2g} of models"
        return ClassVerdict(LEAK if chance <= MAX_CHANCE else HIDDEN, reason, chance)
    if fresh is None:
        return ClassVerdict(UNDECIDABLE, f"all of {n} classes are right by chance in {n**-n:.0%} of models", n**-n)
    margins = [fresh(index).margin for index in range(FRESH_MODELS)]
    chance = (1 + sum(margin >= found.margin for margin in margins)) / (1 + FRESH_MODELS)
    reason = (
        f"{right} of {n} classes are recognised by a margin of {found.margin:.2f}; "
        f"of {FRESH_MODELS} networks that have seen nothing the best has {max(margins):.2f}"
    )
    return ClassVerdict(LEAK if chance <= MAX_CHANCE and right == n else HIDDEN, reason, chance)


def invert_classes(
    model: nn.Module,
    classes: int,
    references: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    iterations: int = 150,
    tv_weight: float = 0.05,
    bn_weight: float = 0.1,
    seed: int = 0,
) -> ClassInversion:
    """Invert every class of ``model`` and score the pictures.

    Args:
        model: the final global model.
        classes: how many outputs it has.
        references: images that the auditor holds [n, c, h, w] in 0..1.
        labels: their classes [n].
        iterations: of Adam.
        tv_weight: of the total variation.
        bn_weight: of the distance to the running statistics; 0 where the model has none.
        seed: of the starting pictures.
    """
    began = time.perf_counter()
    frozen, _ = statistics.instrument(model, training=False)
    twin, layers = statistics.instrument(model, training=True)
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(classes, *references.shape[1:], generator=generator).requires_grad_()
    wanted = torch.arange(classes)
    optimiser = torch.optim.Adam([images], lr=0.1)
    schedule = cosine_schedule(optimiser, iterations)
    for _ in range(iterations):
        loss = functional.cross_entropy(frozen(images), wanted) + tv_weight * total_variation(images)
        if layers and bn_weight:
            loss = loss + bn_weight * _distance_to_running(twin, layers, images)
        (images.grad,) = torch.autograd.grad(loss, [images])
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(0, 1)
    with torch.no_grad():
        sure = torch.softmax(frozen(images), 1)[wanted, wanted].mean()
    found = images.detach().permute(0, 2, 3, 1).numpy()
    return _scored(found, references.transpose(0, 2, 3, 1), labels, float(sure), time.perf_counter() - began)


def _distance_to_running(twin: nn.Module, layers: dict[str, statistics.RecordingBatchNorm], images: Tensor) -> Tensor:
    for layer in layers.values():
        layer.records = []
    twin(images)
    terms = []
    for layer in layers.values():
        mean, variance = layer.records[0]
        for got, wanted in ((mean, layer.running_mean), (variance, layer.running_var)):
            terms.append((got - wanted).norm() / (wanted.norm() + 1e-8))
    return torch.stack(terms).sum()


def _scored(
    found: NDArray[np.float32],
    references: NDArray[np.float32],
    labels: NDArray[np.int64],
    sure: float,
    seconds: float,
) -> ClassInversion:
    present = [c for c in range(len(found)) if (labels == c).any()]
    means = np.stack([references[labels == c].mean(axis=0) for c in present])
    pictures = found[present]
    flat_p, flat_m = pictures.reshape(len(present), -1), means.reshape(len(present), -1)
    flat_p, flat_m = flat_p - flat_p.mean(1, keepdims=True), flat_m - flat_m.mean(1, keepdims=True)
    unit_p = flat_p / np.maximum(np.linalg.norm(flat_p, axis=1, keepdims=True), 1e-9)
    unit_m = flat_m / np.maximum(np.linalg.norm(flat_m, axis=1, keepdims=True), 1e-9)
    similar = unit_p @ unit_m.T
    own = np.diag(similar)
    other = np.where(np.eye(len(present), dtype=bool), -np.inf, similar).max(1) if len(present) > 1 else own
    everybody = np.broadcast_to(references.mean(axis=0), means.shape)
    nearest = [_nearest(picture, references[labels == c][:200]) for picture, c in zip(pictures, present, strict=True)]
    return ClassInversion(
        images=found,
        mean_ssim=float(ssim(pictures, means, data_range=1.0).mean()),
        prior_ssim=float(ssim(everybody, means, data_range=1.0).mean()),
        nearest_ssim=float(np.mean(nearest)),
        recognised=float((similar.argmax(1) == np.arange(len(present))).mean()),
        right=int((similar.argmax(1) == np.arange(len(present))).sum()),
        present=len(present),
        margin=float((own - other).mean()),
        confidence=sure,
        seconds=seconds,
    )


def _nearest(picture: NDArray[np.float32], candidates: NDArray[np.float32]) -> float:
    return float(ssim(np.broadcast_to(picture, candidates.shape), candidates, data_range=1.0).max())
