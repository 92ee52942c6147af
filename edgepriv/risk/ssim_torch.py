"""SSIM as a differentiable torch function, for losses.

Equal to :func:`edgepriv.image_quality.ssim`, which a test asserts.

Gaussian window, k1 = 0.01, k2 = 0.03, population covariance, valid positions only, mean over positions and channels.
The window is separable and pictures are small, so each direction is a product with a banded matrix: on a CPU many times
faster than a convolution.
"""

from __future__ import annotations

import torch


def gaussian(side: int, sigma: float, like: torch.Tensor) -> torch.Tensor:
    """Return a normalised one-dimensional Gaussian window of ``side`` pixels."""
    offsets = torch.arange(side, dtype=like.dtype, device=like.device) - side // 2
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    return weights / weights.sum()


def bands(size: int, kernel: torch.Tensor) -> torch.Tensor:
    """Return the matrix [size - len(kernel) + 1, size] that slides a kernel over the valid positions of a line."""
    places = size - len(kernel) + 1
    offsets = torch.arange(size, device=kernel.device)[None] - torch.arange(places, device=kernel.device)[:, None]
    inside = (offsets >= 0) & (offsets < len(kernel))
    return torch.where(inside, kernel[offsets.clamp(0, len(kernel) - 1)], kernel.new_zeros(()))


def ssim(
    a: torch.Tensor, b: torch.Tensor, *, data_range: float = 1.0, window: int = 11, sigma: float = 1.5
) -> torch.Tensor:
    """Structural similarity of picture pairs.

    Args:
        a: pictures [n, channels, height, width].
        b: the same shape.
        data_range: largest minus smallest possible value.
        window: side of the Gaussian window, shrunk to the largest odd size that fits.
        sigma: its standard deviation in pixels.

    Returns:
        One score a pair, [n].
    """
    side = min(window, a.shape[2], a.shape[3])
    kernel = gaussian(side - 1 + side % 2, sigma, a)
    n, channels = a.shape[:2]
    down, across = bands(a.shape[2], kernel), bands(a.shape[3], kernel)
    stacked = torch.stack([a, b, a * a, b * b, a * b])
    ma, mb, maa, mbb, mab = (down @ (stacked @ across.T)).reshape(5, n, channels, len(down), len(across))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    numerator = (2 * ma * mb + c1) * (2 * (mab - ma * mb) + c2)
    denominator = (ma * ma + mb * mb + c1) * (maa - ma * ma + mbb - mb * mb + c2)
    score: torch.Tensor = (numerator / denominator).mean(dim=(1, 2, 3))
    return score
