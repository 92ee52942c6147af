"""A federated update or a set of weights as bytes: named arrays, little-endian, no pickle.

Bytes: ``"EPU1" | header length (4, big-endian) | header | data``. The header is canonical CBOR
``{"meta": map, "tensors": [[name, dtype, shape, offset, scale], ...]}``; offsets count from the start of the data and
arrays follow each other without gaps, so a size cannot lie. dtypes: float32, float16, int8 (value = int x scale),
int32, uint32, uint64 (sums and masked uploads).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import WireError
from edgepriv.wire import cbor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAGIC = b"EPU1"
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 10_000
DTYPES = {
    name: np.dtype(name).newbyteorder("<") for name in ("float32", "float16", "int8", "int32", "uint32", "uint64")
}


@dataclass(frozen=True, slots=True)
class Update:
    """Decoded arrays by name (int8 is scaled back to float32) with the sender's meta map."""

    tensors: dict[str, np.ndarray[Any, Any]]
    meta: dict[str, Any] = field(default_factory=dict)


def encode_update(
    tensors: Mapping[str, np.ndarray[Any, Any]],
    meta: Mapping[str, Any] | None = None,
    *,
    scales: Mapping[str, float] | None = None,
) -> bytes:
    """Encode arrays in the order given; ``scales`` names the step of int8 arrays."""
    rows, parts, offset = [], [], 0
    for name, array in tensors.items():
        dtype = array.dtype.name
        if dtype not in DTYPES:
            raise WireError(f"{name}: dtype {dtype} has no place in an update")
        raw = np.ascontiguousarray(array, DTYPES[dtype]).tobytes()
        rows.append([name, dtype, list(array.shape), offset, float((scales or {}).get(name, 1.0))])
        parts.append(raw)
        offset += len(raw)
    return b"".join([encode_header(meta or {}, rows), *parts])


def decode_update(raw: bytes | memoryview, *, max_bytes: int, finite: bool = True) -> Update:
    """Decode an update.

    Args:
        raw: the bytes.
        max_bytes: refused above this, before anything is allocated.
        finite: refuse NaN and infinity.

    Raises:
        WireError: malformed in any way.
    """
    header, data = split_update(raw, max_bytes=max_bytes)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, dtype, shape, offset, scale in header["tensors"]:
        array = np.frombuffer(data, DTYPES[dtype], prod(shape), offset).reshape(shape)
        if dtype == "int8":
            array = array.astype(np.float32) * np.float32(scale)
        if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise WireError(f"{name}: NaN or infinity in an update")
        tensors[name] = array
    return Update(tensors, header["meta"])


def split_update(raw: bytes | memoryview, *, max_bytes: int) -> tuple[dict[str, Any], memoryview]:
    """Header (checked) and data of an update, without touching the arrays; raises WireError."""
    view = memoryview(raw)
    if len(view) > max_bytes:
        raise WireError(f"update of {len(view)} bytes is over the limit of {max_bytes}")
    header, first = read_header(bytes(view[:8]), lambda length: bytes(view[8 : 8 + length]), len(view))
    return header, view[first:]


def read_header(lead: bytes, read: Callable[[int], bytes], total_bytes: int) -> tuple[dict[str, Any], int]:
    """Checked header of an update that lies in a file, and where its data starts.

    Args:
        lead: the first 8 bytes.
        read: gives the header bytes that follow, at most `MAX_HEADER_BYTES` are asked for.
        total_bytes: size of the whole update.

    Raises:
        WireError: malformed.
    """
    if len(lead) < 8 or lead[:4] != MAGIC:
        raise WireError("not an update")
    (length,) = struct.unpack(">I", lead[4:8])
    if length > MAX_HEADER_BYTES or 8 + length > total_bytes:
        raise WireError("an update's header is cut short")
    header = cbor.decode_map(read(length), max_bytes=MAX_HEADER_BYTES)
    if set(header) != {"meta", "tensors"} or not isinstance(header["meta"], dict):
        raise WireError("an update's header lacks a field")
    _check_rows(header["tensors"], total_bytes - 8 - length)
    return header, 8 + length


def encode_header(meta: Mapping[str, Any], rows: list[Any]) -> bytes:
    """Everything before the data, for writers that stream arrays to a file."""
    header = cbor.encode({"meta": dict(meta), "tensors": rows})
    return MAGIC + struct.pack(">I", len(header)) + header


def _check_rows(rows: Any, data_bytes: int) -> None:
    if not isinstance(rows, list) or len(rows) > MAX_TENSORS:
        raise WireError("an update's list of tensors is not within its limit")
    expected, names = 0, set()
    for row in rows:
        match row:
            case [str() as name, str() as dtype, list() as shape, int() as offset, float() as scale]:
                pass
            case _:
                raise WireError("an update's tensor row is malformed")
        if dtype not in DTYPES or name in names or not np.isfinite(scale):
            raise WireError("an update's tensor row is not valid")
        if len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 31 for n in shape) or offset != expected:
            raise WireError("an update's tensor row does not fit its data")
        names.add(name)
        expected += prod(shape) * DTYPES[dtype].itemsize
        if expected > data_bytes:
            raise WireError("an update is cut short")
    if expected != data_bytes:
        raise WireError("an update has bytes that belong to no tensor")
