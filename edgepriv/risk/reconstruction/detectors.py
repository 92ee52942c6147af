"""What can be seen of a model that was made to leak: features of its outputs and, where the graph is read, its weights.

Rules: every feature is higher for a vicious model than for an honest twin, on the models it was designed on; alone none
is proof (an honest linear model leaks more than a weakly vicious network). They are compared with honest references of
the same architecture (:mod:`verdict`). Needs: outputs and pictures; labels for the within-class features (the model's
own classes stand in); the torch graph for the white-box ones, else they are None.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from edgepriv.image_quality import ssim
from edgepriv.risk.reconstruction.auditors import RidgeDecoder
from edgepriv.risk.reconstruction.decoders import DecoderSettings, TrainedDecoder
from edgepriv.risk.reconstruction.measure import explained_variance

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from edgepriv.risk.reconstruction.leakage import Bench

    Array = NDArray[np.float64]

FEATURES = (
    "ridge",
    "ridge_log_softmax",
    "trained",
    "ssim",
    "effective_rank",
    "log_spread",
    "fine_tuning_drop",
    "last_layer_rank",
)
WHITE_BOX = frozenset({"fine_tuning_drop", "last_layer_rank"})


@dataclass(frozen=True, slots=True)
class Evidence:
    """Features of one model, and for those that are explained variances what they rest on, picture by picture.

    Attributes:
        values: every feature, None where it was not measured.
        lost: squared error of each scoring picture, [n], by feature.
        available: squared distance of each scoring picture from its class's mean, [n].
        outputs: the model's outputs on all of the bench, [m, k].
    """

    values: dict[str, float | None]
    lost: dict[str, Array]
    available: Array
    outputs: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DetectorSettings:
    """What the detectors may spend: the trained decoder and the fine-tuning."""

    trained: DecoderSettings | None = None
    fine_tuning_epochs: int = 1
    fine_tuning_rate: float = 3e-4


def log_softmax(logits: NDArray[Any]) -> Array:
    """Return the logarithm of the softmax, float64."""
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)), np.float64)


def effective_rank(logits: NDArray[Any], groups: NDArray[np.int64]) -> float:
    """(sum of eigenvalues)^2 / sum of squares, of the pooled within-class covariance of the logits."""
    z = np.asarray(logits, np.float64).copy()
    for group in np.unique(groups):
        z[groups == group] -= z[groups == group].mean(0)
    covariance = np.cov(z.T)
    # trace and Frobenius norm are the two sums: no decomposition of a matrix as large as the supplier likes
    return float(np.trace(covariance) ** 2 / max(float((covariance**2).sum()), 1e-300))


def matrix_rank(weights: torch.Tensor) -> float:
    """Effective rank of a weight matrix, from its squared singular values."""
    energy = torch.linalg.svdvals(weights.double()) ** 2
    return float(energy.sum() ** 2 / (energy**2).sum())


def _fitted(bench: Bench, z: Array, truth: NDArray[Any], baseline: Array) -> tuple[float, Array]:
    copies = RidgeDecoder(z[: bench.cut], bench.pixels[: bench.cut]).rebuild(z[bench.cut :])
    return explained_variance(truth, copies, baseline), copies


def features(
    bench: Bench, logits: NDArray[np.float32], network: nn.Module | None, settings: DetectorSettings
) -> dict[str, float | None]:
    """Measure every feature of one model on a bench: the values of :func:`evidence`."""
    return evidence(bench, logits, network, settings).values


def evidence(
    bench: Bench, logits: NDArray[np.float32], network: nn.Module | None, settings: DetectorSettings
) -> Evidence:
    """Measure every feature of one model on a bench, with the errors of each picture.

    Args:
        bench: pictures shared by the model and its references.
        logits: raw outputs on ``bench.images``, [n, k].
        network: the model as a torch graph, or None for a black box.
        settings: which expensive features to compute.
    """
    groups = bench.groups(logits)
    truth, baseline = bench.pixels[bench.cut :], bench.baseline(groups)
    z = np.asarray(logits, np.float64)
    raw, copies = _fitted(bench, z, truth, baseline)
    rebuilt = {"ridge": copies}
    pictures = (len(truth), *bench.shape)
    found: dict[str, float | None] = dict.fromkeys(FEATURES)
    found["ridge"] = raw
    found["ridge_log_softmax"], rebuilt["ridge_log_softmax"] = _fitted(bench, log_softmax(z), truth, baseline)
    found["ssim"] = float(ssim(truth.reshape(pictures), np.clip(copies, 0, 1).reshape(pictures), data_range=1.0).mean())
    found["effective_rank"] = effective_rank(z, groups)
    found["log_spread"] = float(np.log(z.std(0).mean() + 1e-12))
    if settings.trained is not None:
        trained = TrainedDecoder(z[: bench.cut], bench.pixels[: bench.cut], bench.shape, settings.trained)
        rebuilt["trained"] = trained.rebuild(z[bench.cut :])
        found["trained"] = explained_variance(truth, rebuilt["trained"], baseline)
    if network is not None:
        found |= white_box_features(bench, network, raw, settings)
    lost = {name: ((truth - part) ** 2).sum(1) for name, part in rebuilt.items()}
    return Evidence(found, lost, ((truth - baseline) ** 2).sum(1), logits)


def white_box_features(
    bench: Bench, network: nn.Module, before: float, settings: DetectorSettings
) -> dict[str, float | None]:
    """Features that need the weights: fine-tuning by cross entropy alone, and the rank of the last layer."""
    matrices = [p for p in network.parameters() if p.ndim == 2]
    found: dict[str, float | None] = {"last_layer_rank": matrix_rank(matrices[-1].detach()) if matrices else None}
    if settings.fine_tuning_epochs and bench.labels is not None and bench.attributes is None:
        found["fine_tuning_drop"] = before - _leakage_after_fine_tuning(bench, network, settings)
    return found


def pictures_of(images: NDArray[np.uint8]) -> torch.Tensor:
    """Return uint8 [n, h, w, c] as float32 [n, c, h, w] in [0, 1]."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)


def outputs_of(network: nn.Module, x: torch.Tensor, batch: int = 500) -> NDArray[np.float32]:
    """Return a network's outputs in evaluation mode, float32 [n, k]."""
    network.eval()
    with torch.no_grad():
        return np.concatenate(
            [network(part).cpu().numpy() for at in range(0, len(x), batch) for part in [x[at : at + batch]]]
        ).astype(np.float32)


def _leakage_after_fine_tuning(bench: Bench, network: nn.Module, settings: DetectorSettings) -> float:
    tuned = copy.deepcopy(network).eval()  # evaluation mode keeps the norms' statistics frozen
    optimiser = torch.optim.Adam(tuned.parameters(), settings.fine_tuning_rate)
    x, y = pictures_of(bench.images), torch.from_numpy(np.asarray(bench.labels))
    generator = torch.Generator().manual_seed(0)
    for _ in range(settings.fine_tuning_epochs):
        for rows in torch.randperm(bench.cut, generator=generator).split(125):  # type: ignore[no-untyped-call]
            loss = functional.cross_entropy(tuned(x[rows]), y[rows])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    z = np.asarray(outputs_of(tuned, x), np.float64)
    return _fitted(bench, z, bench.pixels[bench.cut :], bench.baseline(bench.groups(z)))[0]
