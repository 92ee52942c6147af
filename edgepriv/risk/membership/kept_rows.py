"""Finished shadow models' scores on disk, so that an audit that was cut goes on where it stopped.

One ``.npz`` a model, readable by its owner only, because the scores tell members; named by the digest of all that
decides them, so that rows of another pipeline, other records or other weights are never taken up.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import datasets
from edgepriv.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Row = tuple[NDArray[np.float64], ...]

__all__ = ["KeptRows", "digest_of"]


def digest_of(*what: object) -> str:
    """A name for arrays (by their bytes, shapes and types) and for other values (by their repr)."""
    found = hashlib.sha256()
    for part in what:
        if isinstance(part, np.ndarray):
            found.update(f"{part.shape}{part.dtype}".encode() + np.ascontiguousarray(part).tobytes())
        else:
            found.update(repr(part).encode())
        found.update(b"\0")
    return found.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Rows of one pipeline in ``folder``; ``name`` is the digest of what decides them."""

    folder: Path
    name: str

    def read(self, model: int) -> Row | None:
        """The row of a model; None where it was not finished, or cannot be read."""
        try:
            held = datasets.read_arrays(self._path(model), None, "a kept row")
        except DataError:
            return None
        return tuple(held[name] for name in sorted(held))

    def write(self, model: int, row: Row) -> None:
        """Keep the row of a model."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = self._path(model).with_suffix(".part")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            named: dict[str, Any] = {f"{index:02d}": values for index, values in enumerate(row)}
            np.savez(stream, **named)
        partial.replace(self._path(model))

    def _path(self, model: int) -> Path:
        return self.folder / f"{self.name}-{model:03d}.npz"
