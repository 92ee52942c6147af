"""What the *final* model shows without any update: class inversion (Fredrikson et al. 2015, priors of Yin et al. 2020).

For each class the image that the model is surest of, with total variation and the distance to BatchNorm's running
statistics as priors. A class picture is an average, not a person: the score says whether it is nearer to the class
than public knowledge is, judged by a classifier trained on public images only.
"""

from __future__ import annotations

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
        confidence: the audited model's own, mean.
        seconds: time taken.
    """

    images: NDArray[np.float32] = field(repr=False)
    mean_ssim: float
    prior_ssim: float
    nearest_ssim: float
    recognised: float
    confidence: float
    seconds: float

    def record(self) -> dict[str, Any]:
        """Return plain values for JSON, without the pictures."""
        values = asdict(self)
        del values["images"]
        return values


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
    everybody = np.broadcast_to(references.mean(axis=0), means.shape)
    nearest = [_nearest(picture, references[labels == c][:200]) for picture, c in zip(pictures, present, strict=True)]
    return ClassInversion(
        images=found,
        mean_ssim=float(ssim(pictures, means, data_range=1.0).mean()),
        prior_ssim=float(ssim(everybody, means, data_range=1.0).mean()),
        nearest_ssim=float(np.mean(nearest)),
        recognised=float(((unit_p @ unit_m.T).argmax(1) == np.arange(len(present))).mean()),
        confidence=sure,
        seconds=seconds,
    )


def _nearest(picture: NDArray[np.float32], candidates: NDArray[np.float32]) -> float:
    return float(ssim(np.broadcast_to(picture, candidates.shape), candidates, data_range=1.0).max())
