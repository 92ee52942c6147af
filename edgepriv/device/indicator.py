"""Does one output look like an honest model's? A check before release, at inference time, numpy only.

Our own design, not the paper's. What is looked at is the *shape* of an output: its logits, shifted and scaled to mean 0
and deviation 1, because how far logits spread depends on how long an honest supplier trained. The reference file holds,
for each class, the mean and a whitening matrix of the shapes that *honest reference models* give pictures of it; the
indicator is the whitened distance of an output from the centre of its class. The risk service and ``edgepriv harden``
fit the file; the device only evaluates it.

Rules: a warning, never a proof: an attacker who trains against it stays inside (the measured rates stand in
``edgepriv/risk/reconstruction/README.md``). The release policy is the control. Any bytes give an
indicator or DataError.
File: JSON, schema ``edgepriv.output-indicator/2``, keys ``centres`` [k][k], ``whitening`` [k][k][k], ``threshold``
(of the mean over ``window`` outputs), ``window``.
"""

from __future__ import annotations

import json
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError, MissingFileError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

SCHEMA = "edgepriv.output-indicator/2"
MAX_FILE_BYTES = 64 << 20
MAX_CLASSES = 200


def log_softmax(logits: NDArray[Any]) -> Array:
    """Return log-softmax of rows [n, k], float64."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(axis=1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(axis=1, keepdims=True)), np.float64)


def shape(logits: NDArray[Any]) -> Array:
    """Return rows [n, k] shifted to mean 0 and scaled to deviation 1, float64."""
    z = np.asarray(logits, np.float64)
    z = z - z.mean(axis=1, keepdims=True)
    return np.asarray(z / (z.std(axis=1, keepdims=True) + 1e-9), np.float64)


class OutputIndicator:
    """Distances of outputs from what honest models give.

    Args:
        centres: mean shape of each class, [k, k].
        whitening: for each class a matrix W with W^T W = inverse covariance, [k, k, k].
        threshold: mean distance over a window above which ``suspicious`` is true.
        window: how many outputs the running mean covers.
    """

    def __init__(self, centres: Array, whitening: Array, threshold: float, window: int) -> None:
        self._centres, self._whitening = centres, whitening
        self.threshold, self.window = threshold, window
        self._recent: deque[float] = deque(maxlen=window)

    @classmethod
    def from_bytes(cls, raw: bytes) -> OutputIndicator:
        """Read a reference file's bytes.

        Raises:
            DataError: they are no reference file of this schema.
        """
        if len(raw) > MAX_FILE_BYTES:
            raise DataError("the indicator's file is larger than 64 MiB")
        try:
            content = json.loads(raw)
            if content["schema"] != SCHEMA:
                raise DataError(f"the indicator's file is of another schema than {SCHEMA}")
            centres = np.asarray(content["centres"], np.float64)
            whitening = np.asarray(content["whitening"], np.float64)
            threshold, window = float(content["threshold"]), int(content["window"])
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise DataError("the indicator's file is not valid") from error
        k = len(centres) if centres.ndim == 2 else 0
        shapes = centres.shape == (k, k) and whitening.shape == (k, k, k) and 2 <= k <= MAX_CLASSES
        if (
            not shapes
            or not 1 <= window <= 100_000
            or not np.isfinite([centres.sum(), whitening.sum(), threshold]).all()
        ):
            raise DataError("the indicator's file is not valid")
        return cls(centres, whitening, threshold, window)

    @classmethod
    def load(cls, path: Path) -> OutputIndicator:
        """Read a reference file (MissingFileError, DataError)."""
        if not path.is_file():
            raise MissingFileError(f"no indicator file: {path}", hint="the risk service writes it beside a verdict")
        return cls.from_bytes(path.read_bytes())

    def distances(self, logits: NDArray[Any]) -> Array:
        """Return the distance of each row of logits [n, k] from the centre of its own class, [n].

        Raises:
            DataError: another number of classes, or NaN.
        """
        if logits.ndim != 2 or logits.shape[1] != len(self._centres) or not np.isfinite(logits).all():
            raise DataError("the outputs are not finite rows of the indicator's number of classes")
        z, classes = shape(logits), logits.argmax(axis=1)
        return np.asarray(
            np.linalg.norm(np.einsum("nij,nj->ni", self._whitening[classes], z - self._centres[classes]), axis=1)
        )

    def observe(self, logits: NDArray[Any]) -> float:
        """Take one output [k] into the running mean and return its distance."""
        distance = float(self.distances(np.asarray(logits).reshape(1, -1))[0])
        self._recent.append(distance)
        return distance

    @property
    def suspicious(self) -> bool:
        """True where the mean over a full window is above the threshold."""
        return len(self._recent) == self.window and float(np.mean(self._recent)) > self.threshold
