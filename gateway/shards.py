"""Sums of parts: cohorts of one gateway, shards of several gateways, added exactly and in any order to the same bits.

Every part has the round's number, base weights and settings and a cohort name of its own; masks never cross parts, so
a part is an anonymity set of its own. `add_sum` adds a part's sum, masks taken off on the way, to the durable sum of
the whole round (`whole_of` is its announcement). A gateway that is a shard exports that sum as a *partial sum*: an
update file with one array ``sum`` (uint64, two's complement, the round's scale; weights last) and, in its meta map, the
announcement and the devices in it. The root adds partial sums as they come and writes the new global weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import files
from edgepriv.errors import DataError, WireError
from edgepriv.federated.fixed_point import choose_ring, ring_of, signed, slack_of, value_bound
from edgepriv.federated.noise import NoiseStream
from edgepriv.wire import message
from edgepriv.wire.rounds import RoundOpen, read_step, step_message
from edgepriv.wire.update import encode_header, read_header
from gateway import aggregate
from gateway.aggregate import Checkpoint, Result, Staged, SumReader
from gateway.round_plan import announcement
from gateway.update_files import blocks, masked_length

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from gateway.round_plan import RoundPlan

SUM = "sum"
MOST_DEVICES = 1 << 16  # what the arithmetic of a round over shards allows for
_WIDE = np.dtype("<u8")
# what must be equal in all parts for their sums to be one sum
SAME = (
    "round", "model", "base", "tensors", "clip", "fraction_bits", "encoding", "keep", "noise", "noise_multiplier",
    "max_weight", "adaptive_clip", "clip_noise", "privacy",
)  # fmt: skip


def whole_of(plan: RoundPlan, devices: int, now: float) -> RoundOpen:
    """The announcement that stands for all parts together; raises ConfigError where its ring could overflow."""
    return announcement(dataclasses.replace(plan, part=""), devices, now)


class _CohortSum:
    """A cohort's own sum as a source, with its masks taken off; read from its start."""

    def __init__(self, reader: SumReader) -> None:
        self.reader = reader

    def add(self, total: NDArray[Any], a: int, b: int, *_: Any) -> None:
        """Add coordinates [a, b); called for consecutive blocks."""
        total += signed(self.reader.next(b - a), self.reader.ring).astype(total.dtype)


def add_cohort(
    whole: Path, whole_opened: RoundOpen, folder: Path, opened: RoundOpen, unmask: Callable[[], Any] | None
) -> Checkpoint:
    """Add a cohort's sum (in ``folder``) to the round's sum (in ``whole``); once, however often it is called.

    Raises:
        DataError: nothing is in the cohort's sum, or one of its devices is in the round's sum by another way.
    """
    cohort = aggregate.load_checkpoint(folder, opened)
    if not cohort.taken:
        raise DataError("no update is in the sum")
    reader = SumReader(cohort, opened, unmask() if unmask else None)
    with contextlib.closing(reader):
        return add_sum(whole, whole_opened, cohort.taken, _CohortSum(reader))


def add_sum(whole: Path, opened: RoundOpen, taken: tuple[tuple[str, int, bytes, int], ...], source: Any) -> Checkpoint:
    """Add a part's sum durably; nothing happens where it is in already.

    Raises:
        DataError: some, but not all, of its devices are in the sum.
    """
    whole.mkdir(parents=True, exist_ok=True)
    before = aggregate.load_checkpoint(whole, opened)
    names, new = {row[:2] for row in before.taken}, {row[:2] for row in taken}
    if new <= names:
        return before
    if doubled := sorted(new & names):
        raise DataError(f"{doubled[0][0]} is in two partial sums")
    return aggregate.write_sum(before, opened, (*before.taken, *taken), [(Staged("", b"", whole), source, 1.0)])


def export_partial(
    folder: Path, opened: RoundOpen, out: Path, *, unmask: Callable[[], Callable[[NDArray[Any]], None]] | None
) -> Result:
    """Write a shard's sum, masks taken off, as a partial sum.

    Raises:
        DataError: nothing is in the sum.
    """
    checkpoint = aggregate.load_checkpoint(folder, opened)
    if not checkpoint.taken:
        raise DataError("no update is in the sum")
    taken = [[device, stale] for device, stale, _, _ in checkpoint.taken]
    meta = {"kind": "partial-sum", "opened": message.encode(opened), "taken": taken}
    header = encode_header(meta, [[SUM, "uint64", [checkpoint.length], 0, 1.0]])
    reader, ring, digest = (
        SumReader(checkpoint, opened, unmask() if unmask else None),
        ring_of(opened),
        hashlib.sha256(header),
    )
    fresh = out.with_name(out.name + ".new")
    with fresh.open("wb") as file, contextlib.closing(reader):
        file.write(header)
        for a, b in blocks(0, checkpoint.length):
            raw = signed(reader.next(b - a), ring).astype("<i8").tobytes()
            digest.update(raw)
            file.write(raw)
        files.sync_open(file)
    files.rename(fresh, out)
    return Result(digest.digest(), out.stat().st_size, 0.0, len(taken))


class Partial:
    """A partial sum in a file, as a source of `add_sum`. The file is untrusted: WireError where it is not one."""

    def __init__(self, file: Any, path: Path) -> None:
        header, self.first = read_header(file.read(8), file.read, path.stat().st_size)
        self.file, meta = file, header["meta"]
        opened = message.decode(meta["opened"]) if isinstance(meta.get("opened"), bytes) else None
        if meta.get("kind") != "partial-sum" or not isinstance(opened, RoundOpen):
            raise WireError(f"{path.name} is not a partial sum")
        read_step(step_message(opened.round, "open", opened), up=False)  # its tensors and numbers are what they must be
        self.opened, self.taken = opened, _names(meta.get("taken"))
        if not 1 <= opened.survivors <= len(self.taken) <= opened.devices:
            raise WireError(f"{path.name} names {len(self.taken)} devices, its announcement counts on other numbers")
        if [row[:3] for row in header["tensors"]] != [[SUM, "uint64", [masked_length(opened)]]]:
            raise WireError(f"{path.name} does not fit its announcement")

    @property
    def rows(self) -> tuple[tuple[str, int, bytes, int], ...]:
        """The devices in it, as a checkpoint names them."""
        return tuple((name, stale, b"", 1) for name, stale in self.taken)

    def differs(self, opened: RoundOpen) -> str:
        """The first setting in which its announcement is not that of the round; empty where it fits."""
        names = (*SAME, "seed") if opened.encoding == "randomk" else SAME
        return next((name for name in names if getattr(self.opened, name) != getattr(opened, name)), "")

    def add(self, total: NDArray[Any], a: int, b: int, *_: Any) -> None:
        """Add coordinates [a, b)."""
        self.file.seek(self.first + a * _WIDE.itemsize)
        raw = self.file.read((b - a) * _WIDE.itemsize)
        total += np.frombuffer(raw, _WIDE).astype(total.dtype)


def _names(rows: Any) -> list[tuple[str, int]]:
    """Devices and staleness of a partial sum, each once; raises WireError."""
    match rows:
        case [_, *_] if all(
            isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and type(row[1]) is int and row[1] >= 0
            for row in rows
        ):
            names = [(row[0], row[1]) for row in rows]
        case _:
            raise WireError("a partial sum names no devices")
    if len(set(names)) < len(names):
        raise WireError("a partial sum names a device twice")
    return names


def merge_partials(base: Path, partials: Sequence[Path], out: Path, *, rate: float = 1.0) -> Result:
    """Add partial sums that an operator brings, and write the new global weights.

    Args:
        base: the global weights that all shards started from.
        partials: one file for each shard that finished.
        out: where the new weights go.
        rate: the server's learning rate.

    Raises:
        DataError: shards of different rounds or settings, a cohort or a device twice.
        WireError: a file is not a partial sum.
    """
    with contextlib.ExitStack() as stack:
        sources = [Partial(stack.enter_context(path.open("rb")), path) for path in partials]
        opened = _together(sources, base)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=out.parent, prefix="merge-")))
        for source in sources:
            add_sum(folder, opened, source.rows, source)
        noise, count_noise = central_noise(opened)
        return aggregate.finish(
            folder, opened, base, out, rate=rate, noise=noise, count_noise=count_noise, cohorts=len(sources)
        )


def central_noise(opened: RoundOpen, seed: bytes = b"") -> tuple[Callable[[int], NDArray[np.float64]] | None, float]:
    """Central noise on the sum and on adaptive clipping's count: Gaussian, deviation multiplier x clip; or none."""
    if opened.noise != "central":
        return None, 0.0
    stream, deviation = NoiseStream(seed), opened.noise_multiplier * opened.clip
    count = float(stream.normal(1)[0]) * opened.clip_noise if opened.adaptive_clip else 0.0
    return lambda samples: stream.normal(samples) * deviation, count


def _together(sources: list[Partial], base: Path) -> RoundOpen:
    """The announcement of the whole round, in the ring of 64 bits."""
    if not sources:
        raise DataError("no partial sum was given")
    first = sources[0].opened
    for source in sources[1:]:
        if different := source.differs(first):
            raise DataError(f"partial sums of different rounds: {different} differs")
    cohorts, devices_in = [s.opened.cohort for s in sources], [row for s in sources for row in s.taken]
    if len(set(cohorts)) < len(cohorts) or len(set(devices_in)) < len(devices_in):
        raise DataError("a cohort or a device is in two partial sums")
    if aggregate.digest_of(base) != first.base:
        raise DataError("the base weights are not those that the shards started from")
    return widened(first, sum(s.opened.survivors for s in sources), sum(s.opened.devices for s in sources))


def widened(opened: RoundOpen, survivors: int, devices: int) -> RoundOpen:
    """An announcement over several parts, in the ring of 64 bits; raises ConfigError where that could overflow."""
    choose_ring(
        fraction_bits=opened.fraction_bits,
        bound=value_bound(opened.clip, adaptive=opened.adaptive_clip),
        max_weight=opened.max_weight,
        devices=devices,
        slack=slack_of(opened.noise, opened.noise_multiplier * opened.clip, opened.clip_noise, opened.fraction_bits),
    )
    return dataclasses.replace(opened, ring_bits=64, survivors=survivors, devices=devices)
