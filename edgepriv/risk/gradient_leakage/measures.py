"""How much of the truth a reconstruction shows: SSIM, PSNR, feature distance, RDLV and IIP.

RDLV is the measure of Hatamizadeh et al.'s published code (NVFlare); IIP comes from GradInversion (Yin et al.
2021). Both need the truth, so they exist for canaries and on the device itself, never for a real device's update
at the server. Rules: reconstructions are matched to truths by the Hungarian algorithm on pixel distance; PSNR is
the mean of the per-image values, and ``mean_mse_psnr_db`` (PSNR of the mean error) stands beside it because the
bound averages that way.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from edgepriv.errors import DataError
from edgepriv.image_quality import ssim
from edgepriv.risk import models

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Features = Callable[[NDArray[np.float32]], NDArray[np.float64]]

PSNR_CEILING_DB = 100.0
SSIM_FLOOR = 0.05
CHANCE_DRAWS = 399


@dataclass(frozen=True, slots=True)
class Leakage:
    """Scores of one reconstruction against the truth.

    Attributes:
        psnr_db: mean over images, each capped at 100 dB.
        mean_mse_psnr_db: PSNR of the mean squared error.
        ssim: mean over images.
        prior_ssim: SSIM of each truth with the prior image, mean: what anybody knows.
        rdlv: largest over images of (max over reconstructions SSIM - prior SSIM) / prior SSIM; ``None`` where the
            prior's SSIM is below 0.05 for every image, because the ratio breaks there.
        iip: share of reconstructions whose nearest pool image by features is the truth.
        iip_interval: Wilson's 95 % interval of it.
        iip_pixel: the same by pixel distance.
        iip_same_label: the same by features among pool images of the truth's label.
        feature_distance: mean of 1 - cosine between features of reconstruction and truth.
        pool_size: chance level of IIP is one over this.
        n: images.
        identified: how many reconstructions those of ``iip`` are.
        iip_chance: how often as many are identified by chance: images drawn from the pool stand for the truths and
            are matched in the same way; 1 where the pool holds fewer than there are truths.
        ssim_chance: how often the best image's SSIM comes about in the same way.
        matched: row of the reconstruction that belongs to each truth.
        per_image_psnr_db: in the order of the truths.
        per_image_ssim: the same.
        per_image_prior_ssim: of the prior image with each truth.
        per_image_prior_psnr_db: of the prior image with each truth.
    """

    psnr_db: float
    mean_mse_psnr_db: float
    ssim: float
    prior_ssim: float
    rdlv: float | None
    iip: float
    iip_interval: tuple[float, float]
    iip_pixel: float
    iip_same_label: float
    feature_distance: float
    pool_size: int
    n: int
    identified: int
    iip_chance: float
    ssim_chance: float
    matched: tuple[int, ...] = field(repr=False)
    per_image_psnr_db: tuple[float, ...] = field(repr=False)
    per_image_ssim: tuple[float, ...] = field(repr=False)
    per_image_prior_ssim: tuple[float, ...] = field(repr=False)
    per_image_prior_psnr_db: tuple[float, ...] = field(repr=False)

    def record(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def score(
    reconstructed: NDArray[np.float32],
    truth: NDArray[np.float32],
    pool: NDArray[np.float32],
    *,
    truth_labels: NDArray[np.int64],
    pool_labels: NDArray[np.int64],
    features: Features,
    prior: NDArray[np.float32] | None = None,
) -> Leakage:
    """Compare reconstructions with the truth.

    Args:
        reconstructed: [n, h, w, c] in 0..1, in any order.
        truth: [n, h, w, c] in 0..1.
        pool: [m, h, w, c] images of the same kind that the truth hides among; the truth is appended to it.
        truth_labels: [n].
        pool_labels: [m].
        features: phi, trained on public data, never the audited model.
        prior: one image [h, w, c] that anybody has; the pool's mean by default.
    """
    if reconstructed.shape != truth.shape:
        raise DataError(f"{reconstructed.shape} reconstructions cannot be compared with {truth.shape} truths")
    matched = match(reconstructed, truth)
    ordered = reconstructed[matched]
    errors, per_image = _errors(ordered, truth)
    scores = _pair_ssim(ordered, truth)
    known = np.broadcast_to(pool.mean(axis=0) if prior is None else prior, truth.shape)
    prior_scores = _pair_ssim(known, truth)
    everything = np.concatenate([pool, truth])
    labels = np.concatenate([pool_labels, truth_labels])
    nearest, same, distance = _identified(features, ordered, everything, labels, len(pool))
    hits = nearest == len(pool) + np.arange(len(truth))
    apart = _pixel_distances(ordered, everything)
    chances = _chances(ordered, pool, nearest, apart, int(hits.sum()), float(scores.max()))
    return Leakage(
        psnr_db=float(per_image.mean()),
        mean_mse_psnr_db=float(min(PSNR_CEILING_DB, -10 * np.log10(max(float(errors.mean()), 1e-30)))),
        ssim=float(scores.mean()),
        prior_ssim=float(prior_scores.mean()),
        rdlv=_rdlv(reconstructed, truth, prior_scores),
        iip=float(hits.mean()),
        iip_interval=wilson(int(hits.sum()), len(hits)),
        iip_pixel=float((apart.argmin(1) == len(pool) + np.arange(len(truth))).mean()),
        iip_same_label=float(same.mean()),
        feature_distance=distance,
        pool_size=len(everything),
        n=len(truth),
        identified=int(hits.sum()),
        iip_chance=chances[0],
        ssim_chance=chances[1],
        matched=tuple(int(i) for i in matched),
        per_image_psnr_db=tuple(per_image.tolist()),
        per_image_ssim=tuple(scores.tolist()),
        per_image_prior_ssim=tuple(prior_scores.tolist()),
        per_image_prior_psnr_db=tuple(_errors(known, truth)[1].tolist()),
    )


def _errors(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the squared error of each image and its PSNR, capped."""
    errors = ((a - b) ** 2).reshape(len(b), -1).mean(1)
    return errors, np.minimum(PSNR_CEILING_DB, -10 * np.log10(np.maximum(errors, 1e-30)))


def match(reconstructed: NDArray[np.float32], truth: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return for each truth the row of its reconstruction: the assignment with the least total pixel distance."""
    flat_r, flat_t = reconstructed.reshape(len(reconstructed), -1), truth.reshape(len(truth), -1)
    cost = ((flat_t[:, None] - flat_r[None]) ** 2).sum(-1)
    return np.asarray(linear_sum_assignment(cost)[1], np.int64)


def _chances(
    ordered: NDArray[np.float32],
    pool: NDArray[np.float32],
    nearest: NDArray[np.int64],
    distances: NDArray[np.float64],
    hits: int,
    best: float,
) -> tuple[float, float]:
    """How often random images of the pool in place of the truths give as many hits, and as high an SSIM.

    Reconstructions that know nothing do not hit with probability ``1 / pool``: matching picks the nearest truth for
    each, some images are near to everything, and small pictures are easily alike.
    """
    if len(pool) < len(ordered):
        return 1.0, 1.0
    rng, as_many, as_clear = np.random.default_rng(0), 1, 1
    for _ in range(CHANCE_DRAWS):
        drawn = rng.choice(len(pool), len(ordered), replace=False)
        truths, mine = linear_sum_assignment(distances[:, drawn].T)
        as_many += int((nearest[mine] == drawn[truths]).sum() >= hits)
        as_clear += int(_pair_ssim(ordered[mine], pool[drawn[truths]]).max() >= best)
    return as_many / (CHANCE_DRAWS + 1), as_clear / (CHANCE_DRAWS + 1)


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's interval of a proportion."""
    p, spread = hits / n, z * z / n
    middle = p + spread / 2
    half = z * float(np.sqrt(p * (1 - p) / n + spread / (4 * n)))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def train_features(
    images: NDArray[np.float32], labels: NDArray[np.int64], *, seed: int = 0, epochs: int = 6
) -> Features:
    """Train phi on public images and return it as a function of [n, h, w, c] images.

    A small CNN without BatchNorm, its penultimate layer, mean-centred on the public images.
    """
    torch.manual_seed(seed)
    classes = max(int(labels.max()) + 1, 2)
    model = models.build("cnn", classes, images.shape[3], images.shape[1])
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = as_tensor(images), torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x), generator=generator), 64):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    body = model.get_submodule("features").eval()
    with torch.no_grad():
        centre = body(x[:2000]).mean(0)

    def phi(batch: NDArray[np.float32]) -> NDArray[np.float64]:
        with torch.no_grad():
            out: NDArray[np.float64] = (body(as_tensor(batch)) - centre).double().numpy()
        return out

    return phi


def as_tensor(images: NDArray[np.float32]) -> torch.Tensor:
    """Turn [n, h, w, c] into a float32 tensor [n, c, h, w]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32))


def _pair_ssim(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    return ssim(a, b, data_range=1.0, window=7 if a.shape[1] < 16 else 11)


def _rdlv(reconstructed: NDArray[np.float32], truth: NDArray[np.float32], prior: NDArray[np.float64]) -> float | None:
    values = []
    for image, floor in zip(truth, prior, strict=True):
        if floor >= SSIM_FLOOR:
            best = float(_pair_ssim(reconstructed, np.broadcast_to(image, reconstructed.shape)).max())
            values.append((best - float(floor)) / float(floor))
    return max(values) if values else None


def _identified(
    features: Features,
    ordered: NDArray[np.float32],
    everything: NDArray[np.float32],
    labels: NDArray[np.int64],
    first: int,
) -> tuple[NDArray[np.int64], NDArray[np.bool_], float]:
    """Return the nearest image of the whole pool, hits among the same label, and the mean feature distance."""
    of_pool, of_mine = _unit(features(everything)), _unit(features(ordered))
    similarity = of_mine @ of_pool.T
    rows = np.arange(len(ordered))
    mine = similarity[rows, first + rows].copy()
    other_label = labels[None, :] != labels[first:][:, None]
    same = np.where(other_label, -np.inf, similarity).argmax(1) == first + rows
    return np.asarray(similarity.argmax(1), np.int64), same, float(1 - mine.mean())


def _pixel_distances(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return squared distances [len(a), len(b)]."""
    flat_a, flat_b = a.reshape(len(a), -1).astype(np.float64), b.reshape(len(b), -1)
    return np.asarray(
        (flat_a * flat_a).sum(1)[:, None] - 2 * flat_a @ flat_b.T + (flat_b.astype(np.float64) ** 2).sum(1)[None]
    )


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), np.float64)
