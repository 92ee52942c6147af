"""Robust rules over staged updates, block by block: memory is devices x block, never devices x model.

``trimmed`` and ``median`` need all values of a coordinate at once, so a checked update is kept (as a hard link in the
round's folder, named by device, staleness and digest) until the round closes: disk is O(devices x model) for them, and
each file is open only while a block of it is read, so any number of devices needs one open file.
``fltrust`` streams: an update's score with the reference update becomes its weight before it is folded.
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import RefusedError, WireError
from edgepriv.federated.layout import Layout
from edgepriv.federated.robust import coordinate_median, trimmed_mean, trust_score
from gateway.aggregate import Refusal, Result, Staged, apply_mean
from gateway.update_files import Source, blocks, open_source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgepriv.wire.rounds import RoundOpen

KEPT = "kept"
ROBUST_BLOCK = 1 << 14
RULES = {"trimmed": trimmed_mean, "median": coordinate_median}
# trimmed of k < n/2 values at each end, a coordinate's square is at most n/(n-k) < 2 times the mean square of the n
# values (the median is the largest such k): over all coordinates at most sqrt(2) clips
STRETCH = math.sqrt(2)


def keep(folder: Path, opened: RoundOpen, staged: Sequence[Staged]) -> list[Refusal]:
    """Check updates and keep them for `robust_finish`; the refused ones are returned."""
    kept, refused = folder / KEPT, []
    kept.mkdir(exist_ok=True)
    for item in staged:
        target = kept / f"{item.device}~{item.stale}~{item.digest.hex()}"
        try:
            with item.path.open("rb") as file:
                open_source(file, item.path.stat().st_size, opened).check()
            with contextlib.suppress(FileExistsError):
                os.link(item.path, target)
        except (WireError, OSError) as error:
            refused.append(Refusal(item.device, item.digest, str(error)))
    return refused


def kept_updates(folder: Path) -> list[tuple[str, bytes]]:
    """Device and digest of every kept update."""
    rows = [path.name.split("~") for path in sorted((folder / KEPT).glob("*"))]
    return [(device, bytes.fromhex(digest)) for device, _, digest in rows]


def robust_finish(folder: Path, opened: RoundOpen, base: Path, out: Path, *, rule: str, rate: float = 1.0) -> Result:
    """Write ``base + rate * rule(updates)`` as the new global weights.

    Raises:
        RefusedError: no update was kept.
    """
    paths = sorted((folder / KEPT).glob("*"))
    if not paths:
        raise RefusedError("no update was kept")
    layout, mean = Layout(opened.tensors), folder / "plain.bin"
    with mean.open("wb") as plain:
        sources = [_open(ClosedFile(p), p, opened) for p in paths]
        factors = [_clip_factor(source, opened) for source in sources]
        for a, b in blocks(0, layout.values, ROBUST_BLOCK):
            stack = np.stack([s.values(a, b) * np.float32(f) for s, f in zip(sources, factors, strict=True)])
            plain.write(RULES[rule](stack).astype("<f4").data)
    try:
        ones = np.ones(len(layout.slots), np.int64)
        return apply_mean(mean, ones, opened, base, out, rate, len(paths), stretch=STRETCH)
    finally:
        mean.unlink(missing_ok=True)


class ClosedFile:
    """A file to read from that is open only while it is read."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def seek(self, at: int) -> int:
        """Where the next `read` begins."""
        self._at = at
        return at

    def read(self, count: int) -> bytes:
        """The next bytes, fewer at the end."""
        with self._path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), count, self._at)
        self._at += len(data)
        return data


def _open(file: Any, path: Path, opened: RoundOpen) -> Source:
    source = open_source(file, path.stat().st_size, opened)
    if not isinstance(source, Source):
        raise WireError("robust rules need clear updates")
    return source


def _clip_factor(source: Source, opened: RoundOpen) -> float:
    norm = source.check()
    return 1.0 if norm <= opened.clip else opened.clip / norm


def score(path: Path, reference: Path, opened: RoundOpen) -> tuple[float, float]:
    """FLTrust: the update's trust score and the factor that gives it the reference's norm.

    Raises:
        WireError: the update (or the reference) is not one of this round.
    """
    with path.open("rb") as file, reference.open("rb") as trusted:
        update, anchor = _open(file, path, opened), _open(trusted, reference, opened)
        norm, anchor_norm = update.check(), anchor.check()
        dot = sum(_dot(update.values(a, b), anchor.values(a, b)) for a, b in blocks(0, update.layout.values))
    value = trust_score(dot, norm, anchor_norm)
    return value, min(anchor_norm, opened.clip) / norm if norm > 0 else 0.0


def _dot(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float(np.dot(one.astype(np.float64), other.astype(np.float64)))


def trusted(item: Staged, reference: Path, opened: RoundOpen) -> Staged | Refusal:
    """An update with FLTrust's weight and factor, or a refusal where it points away from the reference."""
    import dataclasses

    try:
        value, factor = score(item.path, reference, opened)
    except (WireError, OSError) as error:
        return Refusal(item.device, item.digest, str(error))
    weight = math.floor(value * opened.max_weight)
    if weight < 1:
        return Refusal(item.device, item.digest, "points away from the trusted reference update")
    return dataclasses.replace(item, weight=weight, factor=factor)
