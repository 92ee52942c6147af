"""More than one gateway: each shard sums its own cohort, a root adds the partial sums.

Rounds are sharded by topic: gateway k serves the devices of shard k, runs its own round under the same number, base and
settings with ``publish = "partial"``, and so ends with a *partial sum* instead of new weights: an update file with one
array ``sum`` (uint64, two's complement, the round's scale; weights last) and, in its meta map, the announcement and
the devices in it. The root adds partial sums of distinct cohorts, in any order to the same bits, and writes the new
global weights, which become every shard's next base. Masks never cross shards: a shard is an anonymity set of its
own. A shard that died redoes its round from its own durable files, or sits out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError, WireError
from edgepriv.federated.fixed_point import add_into, ring_of, signed
from edgepriv.wire import message
from edgepriv.wire.rounds import RoundOpen
from edgepriv.wire.update import encode_header, read_header
from gateway import aggregate
from gateway.aggregate import Checkpoint, Result, Staged, SumReader
from gateway.update_files import blocks, masked_length

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

SUM = "sum"
_WIDE = np.dtype("<u8")
# what must be equal in all shards for their sums to be one sum
SAME = (
    "round", "model", "base", "tensors", "clip", "fraction_bits", "encoding", "keep", "noise", "noise_multiplier",
    "max_weight",
)  # fmt: skip


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
        aggregate.sync(file)
    aggregate.rename(fresh, out)
    return Result(digest.digest(), out.stat().st_size, 0.0, len(taken))


class _Partial:
    """A partial sum in a file, as a source of `aggregate.write_sum`."""

    def __init__(self, file: Any, path: Path) -> None:
        header, self.first = read_header(file.read(8), file.read, path.stat().st_size)
        self.file, meta = file, header["meta"]
        opened = message.decode(meta["opened"]) if isinstance(meta.get("opened"), bytes) else None
        if meta.get("kind") != "partial-sum" or not isinstance(opened, RoundOpen):
            raise WireError(f"{path.name} is not a partial sum")
        self.opened, self.taken = opened, [(str(name), int(stale)) for name, stale in meta["taken"]]
        if [row[:3] for row in header["tensors"]] != [[SUM, "uint64", [masked_length(opened)]]]:
            raise WireError(f"{path.name} does not fit its announcement")

    def add(self, total: NDArray[Any], a: int, b: int, *_: Any) -> None:
        """Add coordinates [a, b)."""
        self.file.seek(self.first + a * _WIDE.itemsize)
        raw = self.file.read((b - a) * _WIDE.itemsize)
        add_into(total, np.frombuffer(raw, _WIDE))


def merge_partials(base: Path, partials: Sequence[Path], out: Path, *, rate: float = 1.0) -> Result:
    """Add partial sums and write the new global weights.

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
        sources = [_Partial(stack.enter_context(path.open("rb")), path) for path in partials]
        opened = _together(sources, base)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=out.parent, prefix="merge-")))
        taken = tuple((name, stale, b"", 1) for source in sources for name, stale in source.taken)
        start = Checkpoint(folder / aggregate.SUM_NAME, masked_length(opened))
        nobody = Staged("", b"", folder)
        aggregate.write_sum(start, opened, taken, [(nobody, source, 1.0) for source in sources])
        return aggregate.finish(folder, opened, base, out, rate=rate)


def _together(sources: list[_Partial], base: Path) -> RoundOpen:
    """The announcement of the whole round, in the ring of 64 bits."""
    if not sources:
        raise DataError("no partial sum was given")
    first = sources[0].opened
    for source in sources[1:]:
        names = (*SAME, "seed") if first.encoding == "randomk" else SAME
        if different := [name for name in names if getattr(source.opened, name) != getattr(first, name)]:
            raise DataError(f"partial sums of different rounds: {different[0]} differs")
    cohorts, devices_in = [s.opened.cohort for s in sources], [row for s in sources for row in s.taken]
    if len(set(cohorts)) < len(cohorts) or len(set(devices_in)) < len(devices_in):
        raise DataError("a cohort or a device is in two partial sums")
    if aggregate.digest_of(base) != first.base:
        raise DataError("the base weights are not those that the shards started from")
    survivors, devices = sum(s.opened.survivors for s in sources), sum(s.opened.devices for s in sources)
    return dataclasses.replace(first, ring_bits=64, survivors=survivors, devices=devices, privacy="clear")
