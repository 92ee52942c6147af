"""Reading a staged update block by block, in the coordinates of the round's vector, with bounded memory.

An update in a file is untrusted. `open_source` checks the header against the round; `Source.check` reads everything
once (NaN, infinity, positions) and gives the L2 norm; `Source.add` then adds the part of one block to the sum. Blocks
are asked for in ascending order. Memory is one block, and 8 bytes a kept coordinate for sparse updates, which are
taken in rounds that ask for them and with as many coordinates as those keep.
"""

from __future__ import annotations

import math
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from edgepriv.errors import WireError
from edgepriv.federated.compression import INDEX, VALUE, check_indices, random_coordinates, split_name
from edgepriv.federated.fixed_point import Ring, add_into, count_steps, quantise, ring_of
from edgepriv.federated.layout import Layout, Slot
from edgepriv.wire.rounds import MASKED
from edgepriv.wire.update import DTYPES, read_header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from edgepriv.wire.rounds import RoundOpen

BLOCK = 1 << 18
MASKED_NAME = "masked"


def blocks(first: int, last: int, most: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Ranges [a, b) of at most ``most`` coordinates that cover [first, last)."""
    for start in range(first, last, most):
        yield start, min(start + most, last)


class _Part:
    """One array of the file: reads [a, b) of it as float32 (or as it is)."""

    def __init__(self, file: BinaryIO, row: list[Any], data_at: int) -> None:
        _, self.dtype_name, shape, offset, self.scale = row
        self.file, self.dtype, self.size = file, DTYPES[row[1]], prod(shape)
        self.at = data_at + offset

    def raw(self, a: int, b: int) -> NDArray[Any]:
        self.file.seek(self.at + a * self.dtype.itemsize)
        data = self.file.read((b - a) * self.dtype.itemsize)
        if len(data) != (b - a) * self.dtype.itemsize:
            raise WireError("an update is cut short")
        return np.frombuffer(data, self.dtype)

    def floats(self, a: int, b: int) -> NDArray[np.float32]:
        values = self.raw(a, b).astype(np.float32)
        return values * np.float32(self.scale) if self.dtype_name == "int8" else values


class Source:
    """One clear update. Dense arrays, or pairs of positions and values."""

    def __init__(self, file: BinaryIO, header: dict[str, Any], data_at: int, opened: RoundOpen) -> None:
        self.layout = Layout(opened.tensors)
        self.adaptive, self.within = opened.adaptive_clip, header["meta"].get("within")
        if self.adaptive and type(self.within) is not bool:
            raise WireError("an update does not say whether it was within the clip")
        self.dense: dict[str, _Part] = {}
        self.sparse: dict[str, tuple[NDArray[Any], NDArray[np.float32]]] = {}
        pending: dict[str, NDArray[np.uint32]] = {}
        for row in header["tensors"]:
            self._take(row, _Part(file, row, data_at), opened, pending)
        if pending or not (self.dense or self.sparse):
            raise WireError("an update lacks its values")

    def _take(self, row: list[Any], part: _Part, opened: RoundOpen, pending: dict[str, NDArray[np.uint32]]) -> None:
        name, kind = split_name(row[0]) if row[0] not in self.layout.by_name else (row[0], "")
        slot = self.layout.by_name.get(name)
        if slot is None:
            raise WireError(f"the round does not touch {row[0]!r}"[:120])
        if name in self.dense or name in self.sparse:
            raise WireError(f"an update has {name!r} twice"[:120])
        if kind:
            _check_sparse(row, part, slot, opened)
        if kind == INDEX:
            pending[name] = part.raw(0, part.size)
            check_indices(pending[name], slot.size)
        elif kind == VALUE:
            where: NDArray[Any] | None = pending.pop(name, None)
            if where is None and opened.encoding == "randomk":
                where = random_coordinates(opened, name, slot.size)
            if where is None or part.size != where.size:
                raise WireError("an update's values do not fit their positions")
            self.sparse[name] = (where, part.floats(0, part.size))
        elif tuple(row[2]) != slot.shape or row[1] not in {"float32", "float16", "int8"}:
            raise WireError(f"{name} has another shape or dtype than the round says")
        else:
            self.dense[name] = part

    def present(self) -> NDArray[np.int64]:
        """1 for each tensor that is there."""
        return np.array([int(s.name in self.dense or s.name in self.sparse) for s in self.layout.slots])

    def check(self) -> float:
        """Read all of it once; the L2 norm, or WireError on NaN or infinity."""
        total = 0.0
        for name, part in self.dense.items():
            for a, b in blocks(0, self.layout.by_name[name].size):
                total += _squares(part.floats(a, b))
        for _, values in self.sparse.values():
            total += _squares(values)
        if not math.isfinite(total):
            raise WireError("an update has NaN or infinity")
        return math.sqrt(total)

    def values(self, a: int, b: int) -> NDArray[np.float32]:
        """Coordinates [a, b) of the vector, zeros where the update has none."""
        out = np.zeros(b - a, np.float32)
        for slot, low, high in _overlaps(self.layout, a, b):
            piece = out[slot.first + low - a : slot.first + high - a]
            if slot.name in self.dense:
                piece[:] = self.dense[slot.name].floats(low, high)
            elif slot.name in self.sparse:
                where, values = self.sparse[slot.name]
                i, j = np.searchsorted(where, np.array([low, high], where.dtype))  # else all positions are converted
                piece[where[i:j] - low] = values[i:j]
        return out

    def add(self, total: NDArray[Any], a: int, b: int, weight: int, ring: Ring, factor: float) -> None:
        """Add coordinates [a, b), weighted and quantised; the weights' own coordinates come last."""
        split = min(max(a, self.layout.values), b)
        if split > a:
            add_into(total[: split - a], quantise(self.values(a, split), weight, ring, factor=factor))
        if b > split:
            first = split - self.layout.values
            add_into(total[split - a :], self._tail(weight, ring)[first : first + b - split])

    def _tail(self, weight: int, ring: Ring) -> NDArray[Any]:
        """What stands after the values: the half for the count of devices within the clip, then the weights."""
        count = [count_steps(ring, within=bool(self.within))] if self.adaptive else []
        return np.array([*count, *(self.present() * weight)], np.int64).astype(ring.dtype)


def _check_sparse(row: list[Any], part: _Part, slot: Slot, opened: RoundOpen) -> None:
    """Refuse positions and values that the round does not ask for, before they are read (WireError)."""
    positions = row[0] == slot.name + INDEX
    if opened.encoding not in ({"topk"} if positions else {"topk", "randomk"}):
        raise WireError(f"a round of {opened.encoding} updates takes no chosen coordinates")
    if row[1] != ("uint32" if positions else "float32") or len(row[2]) != 1:
        raise WireError("an update's chosen coordinates are malformed")
    most = max(1, round(opened.keep * slot.size))
    if part.size > most:
        raise WireError(f"an update has {part.size} coordinates of {slot.name!r}, the round keeps {most}"[:200])


class MaskedSource:
    """One masked update: ring elements that nobody can check; only the length and the type are."""

    def __init__(self, file: BinaryIO, header: dict[str, Any], data_at: int, opened: RoundOpen) -> None:
        rows, ring = header["tensors"], ring_of(opened)
        length = masked_length(opened)
        if len(rows) != 1 or rows[0][:3] != [MASKED_NAME, f"uint{ring.bits}", [length]]:
            raise WireError("a masked update has one vector of the round's ring and length")
        self.part = _Part(file, rows[0], data_at)

    def check(self) -> float:
        """Nothing can be said of masked values."""
        return 0.0

    def add(self, total: NDArray[Any], a: int, b: int, _weight: int, _ring: Ring, _factor: float) -> None:
        """Add coordinates [a, b) as they are."""
        add_into(total, self.part.raw(a, b))


def masked_length(opened: RoundOpen) -> int:
    """Coordinates of the summed vector: all values (or random-k's share of each tensor), the count, the weights."""
    layout, tail = Layout(opened.tensors), tail_length(opened)
    if opened.privacy == MASKED and opened.encoding == "randomk":
        return sum(max(1, round(opened.keep * slot.size)) for slot in layout.slots) + tail
    return layout.values + tail


def tail_length(opened: RoundOpen) -> int:
    """Coordinates after the values: the count of adaptive clipping where there is one, and a weight a tensor."""
    return int(opened.adaptive_clip) + len(opened.tensors)


def open_source(file: BinaryIO, size: int, opened: RoundOpen) -> Source | MaskedSource:
    """Parse and check the header of a staged update, or raise WireError."""
    file.seek(0)
    header, data_at = read_header(file.read(8), file.read, size)
    kind = MaskedSource if opened.privacy == MASKED else Source
    return kind(file, header, data_at, opened)


def _squares(values: NDArray[np.float32]) -> float:
    wide = values.astype(np.float64)
    return float(np.dot(wide, wide))


def _overlaps(layout: Layout, a: int, b: int) -> Iterator[tuple[Slot, int, int]]:
    """Slots that meet [a, b), with the range inside each."""
    for slot in layout.slots:
        low, high = max(a, slot.first) - slot.first, min(b, slot.first + slot.size) - slot.first
        if low < high:
            yield slot, low, high
