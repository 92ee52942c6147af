"""How much of an input a reconstruction holds: R, explained variance, SSIM and PSNR, each with its record.

Rules: R (arXiv 2212.04223: Mahalanobis distance to the mean image over distance to the reconstruction) is computed in
float64 with an explicit ridge, because the published float32 pseudo-inverse decides by rounding which directions
count; ``r_as_published_code`` keeps that version for comparison only. R of one data set is never compared with
another's: scores carry a :class:`ScoreRecord`, and :func:`compare` refuses when two records differ.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgepriv.errors import DataError, RefusedError
from edgepriv.image_quality import psnr, ssim

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.float64]

DEFAULT_RIDGE = 1e-2  # pixel error variance that still counts as a good copy: an error of sd 0.1
SSIM_WINDOW = 11
BOOTSTRAP_ROUNDS = 400


@dataclass(frozen=True, slots=True)
class ScoreRecord:
    """Everything that must be equal before two R may be compared."""

    dtype: str
    ridge: float
    rank: int
    condition: float
    image_shape: tuple[int, int, int]
    pixel_range: tuple[float, float]
    data: str
    images_in_covariance: int
    torch_version: str
    device: str
    ssim_window: int = SSIM_WINDOW

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Score:
    """One reconstruction's scores over a set of images; intervals are 95 % bootstrap intervals over images."""

    explained_variance: float
    explained_variance_interval: tuple[float, float]
    ssim: float
    psnr_db: float
    risk_r: float | None
    record: ScoreRecord


class PixelScale:
    """Mean and covariance of a data set's pixels, as the metric that R measures in.

    Args:
        pixels: images flattened to [n, d], values in [0, 1].
        image_shape: height, width, channels with product d.
        data: the data set's name, kept in the record.
        ridge: added to the covariance's diagonal (squared pixel units).
        device: where the d x d algebra runs; always float64.
    """

    def __init__(
        self,
        pixels: NDArray[Any],
        image_shape: tuple[int, int, int],
        data: str,
        *,
        ridge: float = DEFAULT_RIDGE,
        device: str = "cpu",
    ) -> None:
        if len(pixels) < 2:
            raise DataError("a covariance needs at least two images")
        self._device = torch.device(device)
        x = torch.as_tensor(np.array(pixels, np.float64), device=self._device)
        self.mean = x.mean(0)
        centred = x - self.mean
        self._covariance = centred.T @ centred / (len(x) - 1)
        eigenvalues = torch.linalg.eigvalsh(self._covariance) + ridge
        cutoff = eigenvalues[-1] * len(eigenvalues) * torch.finfo(torch.float64).eps
        rank = int(((eigenvalues - ridge) > cutoff).sum())
        condition = float(eigenvalues[-1] / eigenvalues[0].clamp_min(torch.finfo(torch.float64).tiny))
        identity = torch.eye(x.shape[1], dtype=torch.float64, device=self._device)
        self._factor = torch.linalg.cholesky(self._covariance + ridge * identity)
        self.record = ScoreRecord(
            "float64", ridge, rank, condition, image_shape, (0.0, 1.0), data, len(x), torch.__version__, device
        )

    @property
    def well_estimated(self) -> bool:
        """True where the covariance was estimated from more images than it has dimensions."""
        return self.record.images_in_covariance > len(self.mean)

    def distance(self, a: NDArray[Any], b: NDArray[Any] | torch.Tensor) -> torch.Tensor:
        """Return d(a, b) = sqrt((a-b)^T (C + ridge I)^-1 (a-b)) for rows of a and b, float64 [n]."""
        left = torch.as_tensor(np.array(a, np.float64), device=self._device)
        right = b if isinstance(b, torch.Tensor) else torch.as_tensor(np.array(b, np.float64), device=self._device)
        solved = torch.linalg.solve_triangular(self._factor, (left - right).T, upper=False)
        length: torch.Tensor = torch.linalg.vector_norm(solved, dim=0)
        return length

    def risk_r(self, x: NDArray[Any], reconstruction: NDArray[Any]) -> float:
        """R = mean over images of d(x, mean image) / d(x, reconstruction); about 1 for the class mean."""
        ratio = self.distance(x, self.mean) / self.distance(x, reconstruction).clamp_min(1e-9)
        return float(ratio.mean())

    def r_as_published_code(self, x: NDArray[Any], reconstruction: NDArray[Any], *, dtype: str = "float32") -> float:
        """Return R as the public code computes it (pseudo-inverse, default rtol): fragile, never the default."""
        kind = {"float32": torch.float32, "float64": torch.float64}[dtype]
        inverse = torch.linalg.pinv(self._covariance.to(kind), hermitian=False)

        def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            difference = (a - b).to(kind)
            length: torch.Tensor = ((difference @ inverse) * difference).sum(1).clamp_min(0).sqrt()
            return length

        rows = torch.as_tensor(np.array(x, np.float64), device=self._device)
        copies = torch.as_tensor(np.array(reconstruction, np.float64), device=self._device)
        return float((distance(rows, self.mean) / distance(rows, copies)).mean())


def explained_variance(x: NDArray[Any], reconstruction: NDArray[Any], baseline: NDArray[Any]) -> float:
    """Within-class explained variance: 1 - sum|x - reconstruction|^2 / sum|x - class mean|^2.

    0 says that nothing beyond the label was rebuilt, 1 is a perfect copy; it may be negative.
    """
    lost, available = _squared_errors(x, reconstruction, baseline)
    return float(1 - lost.sum() / available.sum())


def _squared_errors(x: NDArray[Any], reconstruction: NDArray[Any], baseline: NDArray[Any]) -> tuple[Pixels, Pixels]:
    lost = ((np.asarray(x, np.float64) - reconstruction) ** 2).sum(1)
    available = ((np.asarray(x, np.float64) - baseline) ** 2).sum(1)
    if available.sum() <= 0:
        raise DataError("the images of each class are all equal: there is nothing that could leak beyond the label")
    return lost, available


def bootstrap_interval(lost: Pixels, available: Pixels, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of 1 - sum(lost)/sum(available) over resampled images."""
    rows = np.random.default_rng(seed).integers(0, len(lost), (BOOTSTRAP_ROUNDS, len(lost)))
    values = 1 - lost[rows].sum(1) / np.maximum(available[rows].sum(1), 1e-12)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def score(x: NDArray[Any], reconstruction: NDArray[Any], baseline: NDArray[Any], scale: PixelScale) -> Score:
    """Score reconstructions of images.

    Args:
        x: true images, [n, d] in [0, 1].
        reconstruction: the decoder's output, [n, d], not clamped; SSIM, PSNR and R clamp it.
        baseline: the mean image of each image's class, [n, d].
        scale: the metric of the data set.
    """
    lost, available = _squared_errors(x, reconstruction, baseline)
    clamped = np.clip(reconstruction, 0, 1)
    shape = (len(x), *scale.record.image_shape)
    return Score(
        float(1 - lost.sum() / available.sum()),
        bootstrap_interval(lost, available),
        float(ssim(np.reshape(x, shape), clamped.reshape(shape), data_range=1.0, window=SSIM_WINDOW).mean()),
        psnr(x, clamped, data_range=1.0),
        scale.risk_r(x, clamped) if scale.well_estimated else None,
        scale.record,
    )


def compare(a: Score, b: Score) -> float:
    """Return how much larger a's R is than b's.

    Raises:
        RefusedError: the two were not measured in the same way, or one of them has no R.
    """
    if a.record != b.record:
        differing = [key for key, value in a.record.as_dict().items() if value != b.record.as_dict()[key]]
        raise RefusedError(f"these two R cannot be compared: {', '.join(differing)} differ")
    if a.risk_r is None or b.risk_r is None:
        raise RefusedError("one of the scores has no R: too few images for its covariance")
    return a.risk_r - b.risk_r
