"""Heads from federated rounds on the disk, each under the digest of the model whose features it was trained over.

A head serves that model only: under another one of the same width its answers would be arbitrary. The running model's
head is kept, and of the models that ran before the head of the latest one that has any, so that a rollback finds its
own again. Who ran when is told by the participant's durable state, never by the times of files: the last head to be
written may be that of a model long gone, and clocks jump.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import files
from edgepriv.errors import WireError
from edgepriv.federated import head
from edgepriv.wire.update import decode_update

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray


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
        """The head of a model; a file that is none is deleted, where the disk lets it."""
        path = self._path(model)
        if not path.is_file():
            return None
        raw = path.read_bytes()
        try:
            tensors = head_of(decode_update(raw, max_bytes=self._max_bytes).tensors)
        except WireError:
            tensors = {}
        if not tensors:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return Head(tensors, hashlib.sha256(raw).digest(), path)

    def keep(self, model: bytes, raw: bytes) -> None:
        """Make global weights that hold a head the ones of this model, durably."""
        files.replace(self._path(model), raw)

    def drop_others(self, model: bytes, ran: Iterable[bytes]) -> int:
        """Delete what is neither this model's head nor the first to be found of those that ran before.

        Args:
            model: SHA-256 of the running model.
            ran: the models that ran before it, the latest first; where it is empty nobody knows, and only a head that
                names no model (of an earlier release) goes.

        Returns:
            How many heads went.
        """
        others = {path for path in self._folder.glob("head*.epu") if path != self._path(model)}
        earlier = [self._path(one) for one in ran]
        kept = {path for path in others if "-" in path.name} if not earlier else set()
        kept |= set([path for path in earlier if path in others][:1])
        for path in others - kept:
            path.unlink(missing_ok=True)
        return len(others - kept)

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
