"""SSIM and PSNR of pictures, numpy only: the one implementation that every score in edgepriv uses.

SSIM after Wang et al. 2004 (Gaussian window, k1 = 0.01, k2 = 0.03, population covariance, valid positions only,
mean over positions and channels); equal to scikit-image's ``structural_similarity(gaussian_weights=True,
use_sample_covariance=False)`` on the interior, which a test asserts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def psnr(a: NDArray[Any], b: NDArray[Any], *, data_range: float) -> float:
    """Peak signal-to-noise ratio in dB over all elements of two arrays of one shape; infinite when equal."""
    error = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(data_range**2 / error))


def ssim(
    a: NDArray[Any], b: NDArray[Any], *, data_range: float, window: int = 11, sigma: float = 1.5
) -> NDArray[np.float64]:
    """Structural similarity of picture pairs.

    Args:
        a: pictures [n, height, width, channels].
        b: the same shape.
        data_range: largest minus smallest possible value.
        window: side of the Gaussian window in pixels; shrunk to the largest odd size that fits.
        sigma: its standard deviation in pixels.

    Returns:
        One score a pair, float64 [n].
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or x.ndim != 4:
        raise DataError(f"SSIM needs two arrays [n, height, width, channels]; got {x.shape} and {y.shape}")
    side = min(window, x.shape[1], x.shape[2])
    kernel = _gaussian(side - 1 + side % 2, sigma)
    mx, my = _blur(x, kernel), _blur(y, kernel)
    vx, vy = _blur(x * x, kernel) - mx * mx, _blur(y * y, kernel) - my * my
    cov = _blur(x * y, kernel) - mx * my
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    score = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return np.asarray(score.mean(axis=(1, 2, 3)), np.float64)


def _gaussian(side: int, sigma: float) -> NDArray[np.float64]:
    offsets = np.arange(side) - side // 2
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    return np.asarray(weights / weights.sum(), np.float64)


def _blur(x: NDArray[np.float64], kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    side = len(kernel)
    rows = np.zeros((x.shape[0], x.shape[1] - side + 1, *x.shape[2:]))
    for i, weight in enumerate(kernel):
        rows += weight * x[:, i : i + rows.shape[1]]
    out = np.zeros((*rows.shape[:2], x.shape[2] - side + 1, x.shape[3]))
    for i, weight in enumerate(kernel):
        out += weight * rows[:, :, i : i + out.shape[2]]
    return out
