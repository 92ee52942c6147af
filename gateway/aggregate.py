"""Staged updates -> one durable sum -> new global weights, in blocks: memory is O(block), disk O(model).

Rules.
1. `fold` reads a staged file twice: first everything is checked (`gateway.update_files`), then it is added. An update
   that fails is refused and nothing of it is in the sum.
2. The sum is a file ``sum.bin``: ring elements, then a trailer that names round and every update in it (device,
   digest, weight), then the trailer's length. A new sum is written beside the old one, synced and renamed, so a
   crash leaves the old or the new one, and `Checkpoint.taken` is the truth about who counts. Folding an update again
   does nothing: nothing counts twice.
3. Addition is in the ring: the same updates give the same bits in any order and any grouping.
4. Disk: old and new sum (at most 2 x 8 bytes a coordinate), base and new weights (2 x 4), the uploads that are open
   or being folded. Updates are deleted by the caller after `fold` says they are durable. The rules ``trimmed`` and
   ``median`` need single values: their uploads stay until the round closes (disk O(devices x model)).
5. Clear updates above the round's clip are scaled down to it (norm bound); NaN and infinity are refused.

No clock, no network. All functions take paths below a folder of the round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import files
from edgepriv.errors import DataError, RefusedError, WireError
from edgepriv.federated.fixed_point import decode_sum, ring_of
from edgepriv.federated.layout import Layout
from edgepriv.wire import cbor
from edgepriv.wire.rounds import MASKED
from edgepriv.wire.update import DTYPES, encode_header, read_header
from gateway.update_files import blocks, masked_length, open_source, tail_length

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgepriv.wire.rounds import RoundOpen

SUM_NAME = "sum.bin"
MAX_TRAILER_BYTES = 64 << 20
MAX_OPEN = 128  # staged files at a time: a process may have about a thousand
_LENGTH = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class Staged:
    """An upload on disk whose SHA-256 is ``digest``; ``factor`` scales it (robust rules)."""

    device: str
    digest: bytes
    path: Path
    weight: int = 1
    stale: int = 0
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """An update that is not in the sum, and why."""

    device: str
    digest: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A durable sum: how many coordinates and who is in it (device, staleness, digest, weight)."""

    path: Path
    length: int
    taken: tuple[tuple[str, int, bytes, int], ...] = field(default=())

    def has(self, staged: Staged) -> bool:
        """Say whether this very update is in the sum."""
        return any(row[:3] == (staged.device, staged.stale, staged.digest) for row in self.taken)


@dataclass(frozen=True, slots=True)
class Result:
    """New global weights on disk; ``within``: share of the devices within the clip (adaptive clipping)."""

    digest: bytes
    size: int
    norm: float
    devices: int
    within: float = 0.0


def digest_of(path: Path) -> bytes:
    """SHA-256 of a file, read in blocks."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.digest()


def load_checkpoint(folder: Path, opened: RoundOpen) -> Checkpoint:
    """The sum of a round, empty where there is none.

    Raises:
        DataError: the file is not this round's.
    """
    path, length = folder / SUM_NAME, masked_length(opened)
    if not path.exists():
        return Checkpoint(path, length)
    with path.open("rb") as file:
        file.seek(-_LENGTH.size, os.SEEK_END)
        (size,) = _LENGTH.unpack(file.read())
        end = path.stat().st_size - _LENGTH.size - size
        if size > MAX_TRAILER_BYTES or end != length * ring_of(opened).dtype.itemsize:
            raise DataError(f"{path} is not the sum of round {opened.round}")
        file.seek(end)
        trailer = cbor.decode_map(file.read(size), max_bytes=MAX_TRAILER_BYTES)
    if trailer["round"] != opened.round or trailer["base"] != opened.base:
        raise DataError(f"{path} is not the sum of round {opened.round}")
    return Checkpoint(path, length, tuple(tuple(row) for row in trailer["taken"]))


def fold(folder: Path, opened: RoundOpen, staged: Sequence[Staged]) -> tuple[Checkpoint, list[Refusal]]:
    """Add verified updates to the round's sum, `MAX_OPEN` of them at a time.

    Args:
        folder: the round's folder.
        opened: the announcement.
        staged: uploads that are complete; several in one call share one pass over the sum.

    Returns:
        The durable sum (it names every update that is in it) and the refused updates.
    """
    refused: list[Refusal] = []
    for first in range(0, len(staged), MAX_OPEN):
        refused += _fold(load_checkpoint(folder, opened), opened, staged[first : first + MAX_OPEN])
    return load_checkpoint(folder, opened), refused


def _fold(before: Checkpoint, opened: RoundOpen, staged: Sequence[Staged]) -> list[Refusal]:
    sources: list[tuple[Staged, Any, float]] = []
    refused: list[Refusal] = []
    with contextlib.ExitStack() as files:
        for item in staged:
            if before.has(item) or any(item.device == s.device and item.stale == s.stale for s, _, _ in sources):
                continue
            try:
                if any(row[:2] == (item.device, item.stale) for row in before.taken):
                    raise WireError("another update of this device is in the sum")
                file = files.enter_context(item.path.open("rb"))
                source = open_source(file, item.path.stat().st_size, opened)
                sources.append((item, source, _factor(source.check(), item, opened)))
            except (WireError, OSError) as error:
                refused.append(Refusal(item.device, item.digest, str(error)))
        if sources:
            taken = (*before.taken, *((s.device, s.stale, s.digest, s.weight) for s, _, _ in sources))
            write_sum(before, opened, taken, sources)
    return refused


def declared(item: Staged, opened: RoundOpen) -> Staged:
    """The weight that a clear update states in its own header, where it states one.

    A device that was killed offers the same bytes again but has forgotten what it said of them in the first offer.
    """
    try:
        with item.path.open("rb") as file:
            header, _ = read_header(file.read(8), file.read, item.path.stat().st_size)
    except (WireError, OSError):
        return item  # `fold` says what is wrong with it
    examples = header["meta"].get("examples")
    if type(examples) is not int:
        return item
    weight = max(1, math.floor(max(1, min(examples, opened.max_weight)) / math.sqrt(1 + item.stale)))
    return dataclasses.replace(item, weight=weight)


def _factor(norm: float, item: Staged, opened: RoundOpen) -> float:
    """What scales an update: its own factor (robust rules), and never above the clip."""
    scaled = norm * item.factor
    return item.factor if scaled <= opened.clip else opened.clip / norm * (1 - 1e-9)


def write_sum(
    before: Checkpoint,
    opened: RoundOpen,
    taken: tuple[tuple[str, int, bytes, int], ...],
    sources: Iterable[tuple[Staged, Any, float]],
) -> Checkpoint:
    """A new durable sum: ``before`` and what the sources add; ``taken`` names everything in it."""
    ring, sources = ring_of(opened), list(sources)
    old = before.path.open("rb") if before.taken else None
    fresh = before.path.with_name(SUM_NAME + ".new")
    try:
        with fresh.open("wb") as file:
            for a, b in blocks(0, before.length):
                total = _read(old, b - a, ring.dtype)
                for item, source, factor in sources:
                    source.add(total, a, b, item.weight, ring, factor)
                file.write(total.data)
            trailer = {"round": opened.round, "base": opened.base, "taken": [list(row) for row in taken]}
            raw = cbor.encode(trailer)
            file.write(raw + _LENGTH.pack(len(raw)))
            files.sync_open(file)
    finally:
        if old:
            old.close()
    files.rename(fresh, before.path)
    return Checkpoint(before.path, before.length, taken)


class SumReader:
    """A sum read from its start, with masks taken off on the way."""

    def __init__(
        self, checkpoint: Checkpoint, opened: RoundOpen, unmask: Callable[[NDArray[Any]], None] | None
    ) -> None:
        self.ring, self.unmask = ring_of(opened), unmask
        self.file = checkpoint.path.open("rb") if checkpoint.taken else None

    def next(self, count: int) -> NDArray[Any]:
        """The next ring elements."""
        total = _read(self.file, count, self.ring.dtype)
        if self.unmask:
            self.unmask(total)
        return total

    def close(self) -> None:
        """Close the file."""
        if self.file:
            self.file.close()


def finish(
    folder: Path,
    opened: RoundOpen,
    base: Path,
    out: Path,
    *,
    unmask: Callable[[], Callable[[NDArray[Any]], None]] | None = None,
    noise: Callable[[int], NDArray[np.float64]] | None = None,
    count_noise: float = 0.0,
    rate: float = 1.0,
    cohorts: int = 1,
) -> Result:
    """Write ``base + rate * sum / weight`` as the new global weights.

    Args:
        folder: the round's folder with its sum.
        opened: the announcement.
        base: file of the global weights that the round started from.
        out: where the new ones go (written beside, synced, renamed).
        unmask: makes a function that takes masks off consecutive blocks of the sum in place (masked rounds).
        noise: gives that many samples to add to the sum, in units of the sum (central noise).
        count_noise: a sample to add to the count of devices within the clip (central noise, adaptive clipping).
        rate: the server's learning rate.
        cohorts: how many cohorts' noise is in the sum.

    Raises:
        RefusedError: nothing in the sum, or its mean is longer than any honest mean can be.
    """
    checkpoint = load_checkpoint(folder, opened)
    if not checkpoint.taken:
        raise RefusedError("no update is in the sum")
    devices = len(checkpoint.taken)
    mean, count, weights = _decode(folder, checkpoint, opened, unmask, noise)
    try:
        result = apply_mean(mean, weights, opened, base, out, rate, devices, cohorts=cohorts)
        if not opened.adaptive_clip:
            return result
        counted = opened.survivors if opened.noise != "none" else devices  # a fixed denominator under noise, as above
        return dataclasses.replace(result, within=0.5 + (count + count_noise) / counted)
    finally:
        mean.unlink(missing_ok=True)


def _decode(
    folder: Path,
    checkpoint: Checkpoint,
    opened: RoundOpen,
    unmask: Callable[[], Callable[[NDArray[Any]], None]] | None,
    noise: Callable[[int], NDArray[np.float64]] | None,
) -> tuple[Path, float, NDArray[np.int64]]:
    """The open sum as float32 in a file of its own, the count of adaptive clipping, and the weights, which are last."""
    path, ring = folder / "plain.bin", ring_of(opened)
    values = checkpoint.length - tail_length(opened)
    reader = SumReader(checkpoint, opened, unmask() if unmask else None)
    with path.open("wb") as file:
        for a, b in blocks(0, values):
            plain = decode_sum(reader.next(b - a), ring)
            file.write((plain + noise(b - a) if noise else plain).astype("<f4").data)
    count = float(decode_sum(reader.next(1), ring)[0]) if opened.adaptive_clip else 0.0
    weights = reader.next(len(opened.tensors)).astype(np.int64)
    reader.close()
    if opened.noise != "none":
        weights = np.full_like(weights, opened.survivors)  # a fixed public denominator: nobody's presence shows in it
    if (weights < 0).any() or weights.max() > opened.max_weight * opened.devices:
        raise RefusedError("the sum's weights are impossible: a device sent a wrong masked update")
    return path, count, weights


def apply_mean(
    mean: Path,
    weights: NDArray[np.int64],
    opened: RoundOpen,
    base: Path,
    out: Path,
    rate: float,
    devices: int,
    *,
    cohorts: int = 1,
    stretch: float = 1.0,
) -> Result:
    """Write ``base + rate * mean / weights``; ``mean``: a file of float32 values in the layout of the round.

    ``stretch``: how much longer than the clip the result of honest updates can be, by the rule that made it.
    """
    writer = _WeightsWriter(opened, base, mean, weights, rate)
    fresh = out.with_name(out.name + ".new")
    with fresh.open("wb") as file:
        writer.write(file)
        files.sync_open(file)
    norm = float(np.sqrt(writer.squares))
    groups = len({int(w) for w in weights if w > 0}) or 1
    limit = _longest_honest(opened, writer.values, devices, cohorts, stretch * math.sqrt(groups)) * rate
    if norm > limit:
        fresh.unlink()
        raise RefusedError(f"the mean update has norm {norm:.3g}, no honest one is above {limit:.3g}")
    files.rename(fresh, out)
    return Result(writer.digest.digest(), out.stat().st_size, norm, devices)


def _longest_honest(opened: RoundOpen, values: int, devices: int, cohorts: int, stretch: float) -> float:
    """A mean of clipped updates is at most the clip; noise adds its own length; rounding half a step a value.

    Where head and whole-model trainers share a round, each tensor's mean is over those who trained it: the tensors of
    one weight are a mean that is at most the clip, and g such groups together are at most sqrt(g) clips.
    """
    scale = devices / opened.survivors if opened.noise != "none" else stretch
    noise = 4 * opened.noise_multiplier * np.sqrt(cohorts * values) / opened.survivors
    return float(opened.clip * (1.001 * scale + noise) + np.sqrt(values) * 2.0**-opened.fraction_bits)


class _WeightsWriter:
    """Streams the base weights with the mean added."""

    def __init__(self, opened: RoundOpen, base: Path, mean: Path, weights: NDArray[np.int64], rate: float) -> None:
        self.opened, self.base, self.mean, self.weights, self.rate = opened, base, mean, weights, rate
        self.layout = Layout(opened.tensors)
        self.digest, self.squares, self.values = hashlib.sha256(), 0.0, self.layout.values

    def write(self, file: Any) -> None:
        with self.base.open("rb") as base, self.mean.open("rb") as mean:
            header, data_at = read_header(base.read(8), base.read, self.base.stat().st_size)
            meta = {**header["meta"], "round": self.opened.round}
            self._put(file, encode_header(meta, header["tensors"]))
            for name, dtype, shape, offset, _ in header["tensors"]:
                base.seek(data_at + offset)
                self._tensor(file, base, mean, name, dtype, int(np.prod(shape, dtype=np.int64)))

    def _tensor(self, file: Any, base: Any, mean: Any, name: str, dtype: str, size: int) -> None:
        slot = self.layout.by_name.get(name)
        if slot and dtype != "float32":
            raise DataError(f"{name} is {dtype}: only float32 weights are trained")
        step = self._steps(slot, mean) if slot else None
        for a, b in blocks(0, size):
            values = _read(base, b - a, DTYPES[dtype])
            if step:
                change = self.rate * step(b - a)
                self.squares += float(np.dot(change, change))
                values = (values + change).astype("<f4")
            self._put(file, values)

    def _steps(self, slot: Any, mean: Any) -> Callable[[int], NDArray[np.float64]]:
        index = self.layout.slots.index(slot)
        weight = max(int(self.weights[index]), 1)
        if self.opened.encoding == "randomk" and self.opened.privacy == MASKED:
            return _sparse_steps(self.opened, self.layout, index, mean, weight)
        mean.seek(slot.first * 4)
        return lambda count: _read(mean, count, np.dtype("<f4")).astype(np.float64) / weight

    def _put(self, file: Any, data: Any) -> None:
        view = data if isinstance(data, bytes) else data.data.cast("B")
        self.digest.update(view)
        file.write(view)


def _sparse_steps(
    opened: RoundOpen, layout: Layout, index: int, mean: Any, weight: int
) -> Callable[[int], NDArray[np.float64]]:
    """random-k under masks: the kept coordinates are put back in their places."""
    from edgepriv.federated.compression import random_coordinates

    sizes = [max(1, round(opened.keep * slot.size)) for slot in layout.slots]
    slot, first = layout.slots[index], sum(sizes[:index])
    mean.seek(first * 4)
    values = _read(mean, sizes[index], np.dtype("<f4")).astype(np.float64) / weight
    where = random_coordinates(opened, slot.name, slot.size)
    done = 0

    def step(count: int) -> NDArray[np.float64]:
        nonlocal done
        out = np.zeros(count)
        i, j = np.searchsorted(where, [done, done + count])
        out[where[i:j] - done] = values[i:j]
        done += count
        return out

    return step


def _read(file: Any, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The next elements as an array of our own; zeros where there is no file."""
    out = np.zeros(count, dtype)
    if file is not None:
        got = file.readinto(out.data.cast("B")) if count else 0
        if got != out.nbytes:
            raise DataError("a file of the round is cut short")
    return out
