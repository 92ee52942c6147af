"""Smaller updates for clear rounds: float16, int8, and the largest coordinates with error feedback; random-k.

topk sends, for each tensor, ``NAME#i`` (uint32 positions, ascending) and ``NAME#v`` (float32); what was not sent is
kept on the device and added next time (error feedback, Stich et al. 2018). Where values must be summed under masks
the coordinates have to be the same for all: random-k draws them from the round's public seed (Konecny et al. 2016).
Values are not scaled: a server rate of 1/keep makes the mean unbiased.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgepriv.wire.rounds import RoundOpen

    Floats = NDArray[np.float32]

INDEX, VALUE = "#i", "#v"


def compress(
    tensors: Mapping[str, Floats], opened: RoundOpen, *, feedback: dict[str, Floats]
) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    """Arrays and int8 scales for `wire.update.encode_update`; ``feedback`` is read and rewritten for topk."""
    if opened.encoding == "float16":
        return {n: _half(t) for n, t in tensors.items()}, {}
    if opened.encoding == "int8":
        return _to_int8(tensors)
    if opened.encoding == "topk":
        return _top_k(tensors, opened.keep, opened.clip, feedback), {}
    if opened.encoding == "randomk":
        return {n + VALUE: t.ravel()[random_coordinates(opened, n, t.size)] for n, t in tensors.items()}, {}
    return {n: np.ascontiguousarray(t, np.float32) for n, t in tensors.items()}, {}


def _half(tensor: Floats) -> NDArray[np.float16]:
    return np.clip(tensor, -65504, 65504).astype(np.float16)


def _to_int8(tensors: Mapping[str, Floats]) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    arrays: dict[str, NDArray[Any]] = {}
    scales: dict[str, float] = {}
    for name, tensor in tensors.items():
        step = float(np.abs(tensor).max()) / 127 or 1.0
        scales[name] = float(np.float32(step))
        arrays[name] = np.clip(np.rint(tensor / np.float32(step)), -127, 127).astype(np.int8)
    return arrays, scales


def _top_k(
    tensors: Mapping[str, Floats], keep: float, clip: float, feedback: dict[str, Floats]
) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for name, tensor in tensors.items():
        owed = feedback.get(name)
        wanted = tensor.ravel() + (owed if owed is not None and owed.size == tensor.size else np.float32(0))
        count = max(1, round(keep * wanted.size))
        chosen = np.sort(np.argpartition(np.abs(wanted), -count)[-count:])
        sent = np.clip(wanted[chosen], -clip, clip).astype(np.float32)
        rest = wanted.copy()
        rest[chosen] -= sent
        feedback[name] = rest
        arrays[name + INDEX], arrays[name + VALUE] = chosen.astype(np.uint32), sent
    return _within(arrays, clip, feedback)


def _within(arrays: dict[str, NDArray[Any]], clip: float, feedback: dict[str, Floats]) -> dict[str, NDArray[Any]]:
    """Error feedback adds to the update after clipping, so the bound is enforced again; the rest stays owed."""
    values = [name for name in arrays if name.endswith(VALUE)]
    norm = float(np.sqrt(sum(float(np.vdot(arrays[n].astype(np.float64), arrays[n])) for n in values)))
    if norm <= clip:
        return arrays
    factor = np.float32(clip / norm * (1 - 1e-7))
    for name in values:
        kept = arrays[name] * factor
        feedback[name[: -len(VALUE)]][arrays[name[: -len(VALUE)] + INDEX]] += arrays[name] - kept
        arrays[name] = kept
    return arrays


def random_coordinates(opened: RoundOpen, name: str, size: int) -> NDArray[np.int64]:
    """The coordinates of random-k for one tensor, ascending: the same for every device of the round."""
    import hashlib

    digest = hashlib.sha256(b"edgepriv/random-k/v1\x00" + opened.seed + name.encode()).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
    count = max(1, round(opened.keep * size))
    return np.sort(rng.choice(size, count, replace=False)).astype(np.int64)


def split_name(name: str) -> tuple[str, str]:
    """Tensor name and part (empty, INDEX or VALUE) of an array's name."""
    if name.endswith((INDEX, VALUE)):
        return name[:-2], name[-2:]
    return name, ""


def check_indices(indices: NDArray[Any], size: int) -> None:
    """Refuse positions that are not ascending and within the tensor (WireError)."""
    if indices.size and (int(indices[-1]) >= size or bool((indices[1:] <= indices[:-1]).any())):
        raise WireError("an update's positions are not ascending within their tensor")
