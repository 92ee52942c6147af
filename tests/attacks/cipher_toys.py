"""The positive control: a three-map image cipher of the kind the literature keeps publishing, re-derived here.

Arnold's cat map moves pixels, the Hénon map gives one mask and the logistic map another. Keys are map parameters, so
permutation and mask are the same for every picture. It passes entropy, chi-square and correlation, and falls to three
chosen pictures.
"""

from functools import lru_cache

import numpy as np

TRANSIENT = 12


class ThreeMapToy:
    """Square 8-bit pictures; the message id is ignored, as in the originals."""

    def __init__(self, fixed_key=None):
        self.fixed_key = fixed_key

    def encrypt(self, image, key, mid):
        """Permute, then add two chaotic masks."""
        source, mask = _key_material(image.shape, self.fixed_key or key)
        flat = np.ascontiguousarray(image).reshape(-1)
        return (flat[source] ^ mask).reshape(image.shape)


@lru_cache(maxsize=2)
def _key_material(shape, key):
    """Permutation and mask: the same for every picture under a key, which is the weakness."""
    parameters = np.frombuffer(key[:24], np.uint64) / 2.0**64
    size = int(np.prod(shape))
    mask = _henon(size, parameters[1]) ^ _logistic(size, parameters[2])
    return _arnold(shape, 3 + int(parameters[0] * 5)), mask


def _arnold(shape, rounds):
    """Source index of every pixel after some rounds of the cat map on the largest square, channels kept together."""
    height, width, channels = shape
    side = min(height, width)
    index = np.arange(height * width * channels).reshape(shape)
    y, x = np.mgrid[:side, :side]
    square = index[:side, :side].copy()
    for _ in range(rounds):
        square = square[(x + y) % side, (x + 2 * y) % side]
    index[:side, :side] = square
    return index.reshape(-1)


def _henon(n, start):
    lanes = 16384
    x, y = np.linspace(0.0, 0.1, lanes) + 0.05 * start, np.zeros(lanes)
    return _bytes_of(n, lanes, x, y, lambda x, y: (1 - 1.4 * x * x + y, 0.3 * x))


def _logistic(n, start):
    lanes = 16384
    x = 0.1 + 0.8 * np.mod(start + np.arange(lanes) * 0.6180339887, 1.0)
    return _bytes_of(n, lanes, x, x, lambda x, _: (3.99999 * x * (1 - x), x))


def _bytes_of(n, lanes, x, y, step):
    rows = -(-n // lanes)
    out = np.empty((rows, lanes), np.uint8)
    for i in range(TRANSIENT + rows):
        x, y = step(x, y)
        if i >= TRANSIENT:
            out[i - TRANSIENT] = np.mod(np.abs(x) * 1e10, 256).astype(np.uint8)
    return out.reshape(-1)[:n]
