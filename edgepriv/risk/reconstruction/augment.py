"""The seven augmentations of the paper's public code in plain torch: one of them per picture, chosen uniformly.

Horizontal flip; random erasing (2 to 20 per cent); perspective (distortion 0.5); sharpness 5; autocontrast; centre crop
of two thirds, resized; Gaussian blur with a 5x9 kernel. Pictures stay in [0, 1]. All randomness comes from the
generator that is passed.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from edgepriv.risk.ssim_torch import gaussian


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def flip(x: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    """Mirror left and right."""
    return x.flip(-1)


def erase(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blacken one rectangle of 2 to 20 per cent of the area."""
    height, width = x.shape[-2:]
    side = _uniform(generator, 0.02, 0.2) ** 0.5
    rows, columns = max(1, int(side * height)), max(1, int(side * width))
    top = int(_uniform(generator, 0, height - rows + 1))
    left = int(_uniform(generator, 0, width - columns + 1))
    out = x.clone()
    out[..., top : top + rows, left : left + columns] = 0
    return out


def perspective(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Warp by a homography that moves each corner inwards by up to half of the half side."""
    moves = torch.rand(4, 2, generator=generator).to(x) * 0.5
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]).to(x)
    moved = corners * (1 - moves)
    rows = [
        row
        for (u, v), (a, b) in zip(moved, corners, strict=True)
        for row in (
            torch.stack([u, v, u.new_ones(()), *u.new_zeros(3), -u * a, -v * a]),
            torch.stack([*u.new_zeros(3), u, v, u.new_ones(()), -u * b, -v * b]),
        )
    ]
    solved = torch.linalg.solve(torch.stack(rows), corners.reshape(-1))
    matrix = torch.cat([solved, solved.new_ones(1)]).reshape(3, 3)
    height, width = x.shape[-2:]
    grid_y, grid_x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    points = torch.stack([grid_x, grid_y, torch.ones_like(grid_x)], -1).to(x) @ matrix.T
    grid = points[..., :2] / points[..., 2:]
    return functional.grid_sample(x[None], grid[None], align_corners=True)[0]


def sharpen(x: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    """Sharpness factor 5: away from a 3x3 smoothed copy."""
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]).to(x) / 13
    channels = x.shape[0]
    smooth = x.clone()
    smooth[:, 1:-1, 1:-1] = functional.conv2d(x[None], kernel.expand(channels, 1, 3, 3), groups=channels)[0]
    return smooth + 5 * (x - smooth)


def autocontrast(x: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    """Stretch each channel to [0, 1]."""
    low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_min(1e-6), x)


def crop(x: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    """Cut out the centre two thirds and resize it."""
    height, width = x.shape[-2:]
    rows, columns = max(1, height * 2 // 3), max(1, width * 2 // 3)
    top, left = (height - rows) // 2, (width - columns) // 2
    centre = x[None, :, top : top + rows, left : left + columns]
    return functional.interpolate(centre, size=(height, width), mode="bilinear", align_corners=False)[0]


def blur(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gaussian blur, kernel 5 wide and 9 high, sigma uniform in [0.1, 2]."""
    sigma = _uniform(generator, 0.1, 2.0)
    channels = x.shape[0]
    down = gaussian(9, sigma, x).reshape(1, 1, 9, 1).expand(channels, 1, 9, 1)
    across = gaussian(5, sigma, x).reshape(1, 1, 1, 5).expand(channels, 1, 1, 5)
    padded = functional.pad(x[None], (2, 2, 4, 4), mode="reflect")
    return functional.conv2d(functional.conv2d(padded, down, groups=channels), across, groups=channels)[0]


TRANSFORMS = (flip, erase, perspective, sharpen, autocontrast, crop, blur)


def augmented(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a copy of pictures [n, c, h, w] with one transform each, clamped to [0, 1]."""
    choices = torch.randint(len(TRANSFORMS), (len(x),), generator=generator).tolist()
    rows = [TRANSFORMS[choice](picture, generator) for choice, picture in zip(choices, x, strict=True)]
    return torch.stack(rows).clamp(0, 1)
