"""Service levels: a one-way key chain and sealed segments of true weights.

Keys: ``K_M`` is 32 random bytes, fresh for each (model id, version). ``K_{m-1} = HKDF(K_m)``, so the key of level m
opens levels 1..m and nothing above. Each segment has a key of its own, and its associated data binds model id,
version, level and the carrier's digest: a segment opens only where it was made for.

A segment's clear bytes are ``count`` parts ``region u32 | units u32 | indexes u32[units] | true bytes``, little
endian, regions and indexes strictly rising. Rules: bytes, never arithmetic, so that restoring is bit exact for every
element type; no file, clock or randomness of its own.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import primitives
from edgepriv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

MODEL_ID_BYTES = 16
DIGEST_BYTES = 32
MAX_LEVELS = 64
MAX_REGIONS = 65_536
PART_BYTES = 1 << 28
_PART = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Binding:
    """What every segment and permission of a protected model is bound to."""

    model_id: bytes
    version: int
    carrier: bytes

    def __post_init__(self) -> None:
        """Check the fixed widths that make the encoding unambiguous."""
        if len(self.model_id) != MODEL_ID_BYTES or len(self.carrier) != DIGEST_BYTES:
            raise DataError("a model id has 16 bytes and a carrier digest 32")
        if not 0 < self.version < 2**32:
            raise DataError("a model's version is a positive number below 2^32")

    def encode(self, level: int) -> bytes:
        """Associated data of one level."""
        label = b"edgepriv/pss/v1\x00"
        return label + self.model_id + struct.pack("<IH", self.version, level) + self.carrier


@dataclass(frozen=True, slots=True)
class Region:
    """Weights of one initializer: ``units`` runs of ``unit_bytes`` from ``offset`` in file number ``file``."""

    file: int
    offset: int
    unit_bytes: int
    units: int

    def rows(self, files: Sequence[NDArray[np.uint8]]) -> NDArray[Any]:
        """View the units as one void element each, so that a gather or scatter is one vectorised call."""
        part = files[self.file][self.offset : self.offset + self.units * self.unit_bytes]
        return part.view(np.dtype(f"V{self.unit_bytes}"))


def model_digest(files: Sequence[Any]) -> bytes:
    """SHA-256 of a model: of its one file, or of the joined digests of graph and external files in order."""
    digests = [hashlib.sha256(memoryview(item).cast("B")).digest() for item in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()


def key_below(key: bytes, model_id: bytes, level: int) -> bytes:
    """The key of ``level - 1`` from the key of ``level``; there is no way back."""
    return primitives.hkdf(key, 32, salt=model_id, info=b"edgepriv/pss/down/v1/%d" % (level - 1))


def key_at(key: bytes, model_id: bytes, held: int, wanted: int) -> bytes:
    """Walk the chain from a held level down to a wanted one.

    Raises:
        DataError: the wanted level lies above the held one.
    """
    if not 1 <= wanted <= held <= MAX_LEVELS:
        raise DataError(f"a key of level {held} does not open level {wanted}")
    for level in range(held, wanted, -1):
        key = key_below(key, model_id, level)
    return key


def seal(key: bytes, binding: Binding, level: int, plain: bytes) -> bytes:
    """Seal one segment under the level's key: ``nonce (12) | ciphertext | tag (16)``."""
    nonce = primitives.random_bytes(primitives.NONCE_BYTES)
    return nonce + primitives.aead_seal(_segment_key(key, binding, level), nonce, plain, binding.encode(level))


def unseal(key: bytes, binding: Binding, level: int, sealed: bytes | memoryview) -> bytes:
    """Open one segment, or raise AuthenticationError."""
    view = memoryview(sealed)
    nonce, body = bytes(view[: primitives.NONCE_BYTES]), view[primitives.NONCE_BYTES :]
    if len(nonce) != primitives.NONCE_BYTES:
        raise primitives.not_authentic()
    return primitives.aead_open(_segment_key(key, binding, level), nonce, body, binding.encode(level))


def _segment_key(key: bytes, binding: Binding, level: int) -> bytes:
    return primitives.hkdf(key, 32, salt=binding.model_id, info=b"edgepriv/pss/seg/v1/%d" % level)


def file_key(first_key: bytes, binding: Binding) -> bytes:
    """The key of whole-file sealing, from level 1's key: every permission opens the carrier."""
    return primitives.hkdf(first_key, 32, salt=binding.model_id, info=b"edgepriv/pss/file/v1")


def seal_file(first_key: bytes, binding: Binding, index: int, content: bytes | memoryview) -> bytearray:
    """Seal one whole file of the model (``full`` mode), part by part: libraries do not take 2 GB in one piece.

    Each part is ``nonce (12) | ciphertext | tag (16)``; its associated data says which part of how many it is.
    """
    key, view = file_key(first_key, binding), memoryview(content).cast("B")
    count = max(1, -(-len(view) // PART_BYTES))
    out = bytearray()
    for number in range(count):
        nonce = primitives.random_bytes(primitives.NONCE_BYTES)
        part = view[number * PART_BYTES : (number + 1) * PART_BYTES]
        out += nonce
        out += primitives.aead_seal(key, nonce, part, _file_aad(binding, index, number, count))
    return out


def unseal_file(first_key: bytes, binding: Binding, index: int, sealed: bytes | memoryview) -> bytearray:
    """Open one whole file, or raise AuthenticationError."""
    key, view = file_key(first_key, binding), memoryview(sealed).cast("B")
    overhead = primitives.NONCE_BYTES + primitives.TAG_BYTES
    step = PART_BYTES + overhead
    count = max(1, -(-len(view) // step))
    out = bytearray()
    for number in range(count):
        part = view[number * step : (number + 1) * step]
        if len(part) < overhead:
            raise primitives.not_authentic()
        nonce, body = bytes(part[: primitives.NONCE_BYTES]), part[primitives.NONCE_BYTES :]
        out += primitives.aead_open(key, nonce, body, _file_aad(binding, index, number, count))
    return out


def _file_aad(binding: Binding, index: int, number: int, count: int) -> bytes:
    return binding.encode(0) + struct.pack("<HII", index, number, count)


def encode_segment(
    files: Sequence[NDArray[np.uint8]], regions: Sequence[Region], chosen: Mapping[int, NDArray[np.int64]]
) -> bytes:
    """Write positions and true bytes of the chosen units of each region (region number -> unit indexes)."""
    parts: list[bytes] = []
    for number in sorted(chosen):
        indexes = np.unique(chosen[number]).astype("<u4")
        if len(indexes):
            rows = regions[number].rows(files)[indexes]
            parts += [_PART.pack(number, len(indexes)), indexes.tobytes(), rows.tobytes()]
    return b"".join(parts)


def apply_segment(files: Sequence[NDArray[np.uint8]], regions: Sequence[Region], plain: bytes) -> int:
    """Write a segment's true bytes into the files in place; returns how many units were written.

    Raises:
        DataError: a position lies outside its region, or the segment is cut short.
    """
    at, written, last = 0, 0, -1
    while at < len(plain):
        if len(plain) - at < _PART.size:
            raise _broken()
        number, count = _PART.unpack_from(plain, at)
        at += _PART.size
        if not last < number < len(regions) or not 0 < count <= regions[number].units:
            raise _broken()
        region, last = regions[number], number
        end = at + 4 * count
        if end + count * region.unit_bytes > len(plain):
            raise _broken()
        indexes = np.frombuffer(plain, "<u4", count, at)
        if indexes[-1] >= region.units or bool(np.any(indexes[1:] <= indexes[:-1])):
            raise _broken()
        region.rows(files)[indexes] = np.frombuffer(plain, np.dtype(f"V{region.unit_bytes}"), count, end)
        at, written = end + count * region.unit_bytes, written + count
    return written


def _broken() -> DataError:
    return DataError("a sealed segment does not fit its manifest", hint="fetch the model again")
