"""Resizing against a reference that loops over pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.device.resize import Resizer


def reference(pixels, target, square):
    height, width, channels = pixels.shape
    if square:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[top : top + side, left : left + side]
        height = width = side
    fy, fx = max(1, height // target[0]), max(1, width // target[1])
    rows, columns = height // fy, width // fx
    small = np.zeros((rows, columns, channels))
    for i in range(rows):
        for j in range(columns):
            small[i, j] = pixels[i * fy : i * fy + fy, j * fx : j * fx + fx].reshape(-1, channels).astype(float).mean(0)
    out = np.zeros((*target, channels))
    for i in range(target[0]):
        for j in range(target[1]):
            y = min(max((i + 0.5) * rows / target[0] - 0.5, 0), rows - 1)
            x = min(max((j + 0.5) * columns / target[1] - 0.5, 0), columns - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
            wy, wx = y - y0, x - x0
            top = small[y0, x0] * (1 - wx) + small[y0, x1] * wx
            bottom = small[y1, x0] * (1 - wx) + small[y1, x1] * wx
            out[i, j] = top * (1 - wy) + bottom * wy
    return out


sides = st.integers(1, 24)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 99))
def test_it_equals_the_reference(height, width, to_height, to_width, channels, square, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)
    got = Resizer((height, width), (to_height, to_width), square=square)(pixels)
    assert got.dtype == np.float32
    assert got.shape == (to_height, to_width, channels)
    assert np.allclose(got, reference(pixels, (to_height, to_width), square), atol=1e-3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_white_stays_white_for_large_factors(dtype):
    top = 1.0 if dtype is np.float32 else np.iinfo(dtype).max
    pixels = np.full((480, 640, 3), top, dtype)
    assert np.allclose(Resizer((480, 640), (8, 8))(pixels), top, rtol=1e-4)


def test_a_picture_of_the_right_size_is_only_converted():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(Resizer((4, 4), (4, 4))(pixels), pixels.astype(np.float32))
