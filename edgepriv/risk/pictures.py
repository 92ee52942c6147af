"""Grids of pictures as PNG bytes, without an imaging library: what a report shows to a person."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MARGIN = 2
LEAST_SIDE = 48


def png(image: NDArray[np.uint8]) -> bytes:
    """Encode a picture uint8 [h, w, c] with one or three channels as PNG."""
    height, width, channels = image.shape
    colour = {1: 0, 3: 2}[channels]
    rows = b"".join(b"\x00" + image[row].tobytes() for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = [_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows, 6)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def grid(columns: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Lay pictures out: one column for each array [n, h, w, c], one row for each picture, enlarged if tiny."""
    factor = max(1, -(-LEAST_SIDE // columns[0].shape[1]))
    n, height, width, channels = columns[0].shape
    shown = 3 if channels == 3 else 1
    tall, wide = height * factor + MARGIN, width * factor + MARGIN
    sheet = np.full((n * tall + MARGIN, len(columns) * wide + MARGIN, shown), 255, np.uint8)
    for column, pictures in enumerate(columns):
        for row, picture in enumerate(pictures[..., :shown]):
            big = picture.repeat(factor, 0).repeat(factor, 1)
            top, left = MARGIN + row * tall, MARGIN + column * wide
            sheet[top : top + height * factor, left : left + width * factor] = big
    return sheet


def grid_png(columns: Sequence[NDArray[np.uint8]]) -> bytes:
    """Return :func:`grid` as PNG bytes."""
    return png(grid(columns))
