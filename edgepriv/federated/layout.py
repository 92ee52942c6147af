"""How the trainable tensors of a round lie in one vector: one order, one place for each, weights last.

The vector has ``values`` coordinates (the tensors of the announcement, row-major, in its order) and then one weight
for each tensor: a device that does not train a tensor (the head trainer beside full-model trainers) adds zeros and
weight 0 there, so the mean of a tensor is over those who trained it, and one sum serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError, WireError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies."""

    name: str
    shape: tuple[int, ...]
    first: int
    size: int


class Layout:
    """Slots of a round's tensors, from rows ``[name, [dimensions]]``."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self.slots: list[Slot] = []
        self.values = 0
        for name, shape in rows:
            self.slots.append(Slot(name, tuple(shape), self.values, prod(shape)))
            self.values += self.slots[-1].size
        self.by_name = {slot.name: slot for slot in self.slots}

    @property
    def length(self) -> int:
        """Coordinates of the vector, weights included."""
        return self.values + len(self.slots)

    def flatten(self, tensors: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Values [values] float32 and, for each tensor, 1 where it is there and 0 where not.

        Raises:
            DataError: a tensor that the round does not touch, or of another shape.
        """
        vector, present = np.zeros(self.values, np.float32), np.zeros(len(self.slots), np.int64)
        if unknown := tensors.keys() - self.by_name.keys():
            raise DataError(f"the round does not touch {min(unknown)!r}")
        for index, slot in enumerate(self.slots):
            if slot.name not in tensors:
                continue
            if tuple(tensors[slot.name].shape) != slot.shape:
                raise DataError(f"{slot.name} has shape {tensors[slot.name].shape}, the round says {slot.shape}")
            vector[slot.first : slot.first + slot.size] = tensors[slot.name].ravel()
            present[index] = 1
        return vector, present

    def unflatten(self, vector: NDArray[Any], *, only: Iterable[int] | None = None) -> dict[str, NDArray[Any]]:
        """Views of the vector by tensor name; ``only`` names slots by position."""
        chosen = self.slots if only is None else [self.slots[i] for i in only]
        return {s.name: vector[s.first : s.first + s.size].reshape(s.shape) for s in chosen}

    def check_weights(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Refuse global weights that lack one of the round's tensors (WireError)."""
        for slot in self.slots:
            if slot.name not in tensors or tuple(tensors[slot.name].shape) != slot.shape:
                raise WireError(f"the global weights lack {slot.name} of shape {slot.shape}")
