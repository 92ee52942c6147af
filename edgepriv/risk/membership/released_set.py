"""The attack on a released synthetic set: how near is the nearest released picture of the same class, or of any?

Attacker: holds the released pictures with their labels and the record in question; no model at all. Calibrated with
shadow releases (``attacks.lira`` on these scores) it is the strongest attack known here on a release without noise.
Where labels were released by randomised response a record's own picture mostly stands in another class, so that only
``nearness_any``, which asks no class, sees it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgepriv.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["nearness", "nearness_any"]

BLOCK = 1024


def nearness(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    released: NDArray[np.uint8],
    released_labels: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Minus the L2 distance (pixels in 0..1) from each record to the nearest released picture of its class.

    Args:
        images: the records, uint8 [n, h, w, c].
        labels: their labels [n].
        released: uint8 [m, h, w, c].
        released_labels: [m].

    Returns:
        float64 [n]; a class that was not released counts as the largest possible distance.
    """
    _check(images, released)
    result = np.full(len(images), -float(np.sqrt(np.prod(images.shape[1:]))))
    for label in np.unique(labels):
        mine, theirs = np.nonzero(labels == label)[0], released[released_labels == label]
        if len(theirs):
            result[mine] = -_nearest(_flat(images[mine]), _flat(theirs))
    return result


def nearness_any(images: NDArray[np.uint8], released: NDArray[np.uint8]) -> NDArray[np.float64]:
    """As ``nearness``, over the released pictures of all classes."""
    _check(images, released)
    return -_nearest(_flat(images), _flat(released))


def _check(images: NDArray[np.uint8], released: NDArray[np.uint8]) -> None:
    if images.shape[1:] != released.shape[1:]:
        raise DataError(f"records are {images.shape[1:]}, released pictures {released.shape[1:]}")


def _flat(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255.0)


def _nearest(records: NDArray[np.float32], released: NDArray[np.float32]) -> NDArray[np.float64]:
    norms = np.einsum("ij,ij->i", released, released)
    best = np.empty(len(records))
    for start in range(0, len(records), BLOCK):
        part = records[start : start + BLOCK]
        square = np.einsum("ij,ij->i", part, part)[:, None] + norms - 2 * part @ released.T
        best[start : start + BLOCK] = np.sqrt(np.maximum(square.min(axis=1), 0.0))
    return best
