"""Resizing a sensor image to a model's input: box averages by whole factors, then bilinear; numpy only.

Precomputed for one pair of sizes. The whole-factor average reads each source pixel once and avoids aliasing; the
bilinear step then touches the small image only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Resizer:
    """Resize [height, width, channels] of one source size to float32 of one target size."""

    def __init__(self, source: tuple[int, int], target: tuple[int, int], *, square: bool = False) -> None:
        self.source, self.target = source, target
        side = min(source)
        top, left = ((source[0] - side) // 2, (source[1] - side) // 2) if square else (0, 0)
        height, width = (side, side) if square else source
        self._fy, self._fx = max(1, height // target[0]), max(1, width // target[1])
        height, width = height // self._fy * self._fy, width // self._fx * self._fx
        self._window = (slice(top, top + height), slice(left, left + width))
        self._rows = _taps(height // self._fy, target[0])
        self._columns = _taps(width // self._fx, target[1])

    def __call__(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """Resize one image."""
        small = self._average(pixels[self._window])
        if small.shape[:2] == self.target:
            return small
        (r0, r1, rw), (c0, c1, cw) = self._rows, self._columns
        rows = small[r0] + (small[r1] - small[r0]) * rw[:, None, None]
        return np.asarray(rows[:, c0] + (rows[:, c1] - rows[:, c0]) * cw[None, :, None], np.float32)

    def _average(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        fy, fx = self._fy, self._fx
        if fy == fx == 1:
            return np.asarray(pixels, np.float32)
        wide = np.uint32 if pixels.dtype == np.uint8 and fy * fx > 257 else np.uint16
        total: NDArray[Any] = np.zeros((pixels.shape[0] // fy, pixels.shape[1] // fx, pixels.shape[2]), np.float32)
        if pixels.dtype == np.uint8:
            total = total.astype(wide)
        for dy in range(fy):
            row = pixels[dy::fy]
            for dx in range(fx):
                total += row[:, dx::fx]
        return np.asarray(total, np.float32) * np.float32(1 / (fy * fx))


def _taps(n: int, m: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """For each of ``m`` outputs: two source positions of ``n`` and the weight of the second (half-pixel centres)."""
    at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    low = np.floor(at).astype(np.int64)
    return low, np.minimum(low + 1, n - 1), (at - low).astype(np.float32)
