"""Heads from federated rounds on the disk, each under the digest of the model whose features it was trained over.

A head serves that model only: under another one of the same width its answers would be arbitrary. The running model's
head and the one of the model before it are kept, so that a rollback finds its own again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import files
from edgepriv.errors import WireError
from edgepriv.federated import head
from edgepriv.wire.update import decode_update

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

KEPT = 2


@dataclass(frozen=True, slots=True)
class Head:
    """Weight and bias of a head; ``digest``: SHA-256 of the global weights that it came with, which lie at ``path``."""

    tensors: Mapping[str, NDArray[np.float32]]
    digest: bytes
    path: Path


class Heads:
    """The files ``head-MODEL.epu`` in ``folder``; each holds global weights as they were received."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def of(self, model: bytes) -> Head | None:
        """The head of a model; a file that is none is deleted."""
        path = self._path(model)
        if not path.is_file():
            return None
        raw = path.read_bytes()
        try:
            tensors = head_of(decode_update(raw, max_bytes=self._max_bytes).tensors)
        except WireError:
            tensors = {}
        if not tensors:
            path.unlink()
            return None
        return Head(tensors, hashlib.sha256(raw).digest(), path)

    def keep(self, model: bytes, raw: bytes) -> None:
        """Make global weights that hold a head the ones of this model, durably."""
        files.replace(self._path(model), raw)

    def drop_others(self, model: bytes) -> int:
        """Delete what is neither this model's nor the newest beside it; returns how many heads went."""
        others = [path for path in self._folder.glob("head*.epu") if path != self._path(model)]
        unbound = [path for path in others if "-" not in path.name]  # of an earlier release: nobody knows whose it is
        bound = sorted((p for p in others if p not in unbound), key=lambda path: path.stat().st_mtime_ns)
        old = [*unbound, *bound[: len(bound) - (KEPT - 1)]]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)

    def _path(self, model: bytes) -> Path:
        return self._folder / f"head-{model.hex()}.epu"


def head_of(tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """Weight and bias of a softmax head, or nothing where the weights have none.

    Raises:
        WireError: they are not those of a head; no inference could use them.
    """
    if head.WEIGHT not in tensors or head.BIAS not in tensors:
        return {}
    weight, bias = tensors[head.WEIGHT], tensors[head.BIAS]
    if weight.ndim != 2 or 0 in weight.shape or bias.shape != weight.shape[:1]:
        raise WireError(f"a head of shapes {list(weight.shape)} and {list(bias.shape)}")
    if weight.dtype != np.float32 or bias.dtype != np.float32:
        raise WireError("a head that is not float32")
    return {head.WEIGHT: weight.copy(), head.BIAS: bias.copy()}
