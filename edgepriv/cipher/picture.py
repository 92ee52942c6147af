"""What is sealed: pixels of any common kind, or the compressed bytes as the camera made them.

Inside the AEAD each payload is preceded by 128 bytes: ``length (2, big-endian) | CBOR map | zeros``. The map has
``codec`` (text), ``dtype`` (text, empty for blobs), ``shape`` (list, empty for blobs), ``size`` (payload bytes before
padding) and ``taken`` (Unix seconds, 0 when unknown). Pixels are little-endian, in C order.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError, WireError
from edgepriv.wire import cbor
from edgepriv.wire.envelope import MAX_BYTES, META_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIXEL_CODECS = ("gray", "rgb", "rgba", "bgr", "bayer-rggb", "bayer-bggr", "bayer-grbg", "bayer-gbrg", "raw")
BLOB_CODECS = ("jpeg", "png", "blob")
DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2"), "float32": np.dtype("<f4")}
_CHANNELS = {"rgb": 3, "bgr": 3, "rgba": 4}
_LENGTH = struct.Struct(">H")


@dataclass(frozen=True, slots=True)
class Picture:
    """An image to seal, or one that was opened: ``pixels`` or ``blob``, never both.

    ``pixels`` is uint8, uint16 or float32, of shape [h, w] or [h, w, c]; ``blob`` holds compressed bytes. ``codec``
    says what they mean and travels sealed; ``taken`` is the time of capture in Unix seconds.
    """

    pixels: NDArray[Any] | None = None
    blob: bytes | None = None
    codec: str = "raw"
    taken: float = 0.0

    @classmethod
    def of(cls, value: Picture | NDArray[Any] | bytes, *, taken: float = 0.0) -> Picture:
        """Take an array or compressed bytes as they come, and name what they evidently are."""
        if isinstance(value, Picture):
            return value
        if isinstance(value, np.ndarray):
            return cls(pixels=value, codec=_pixel_codec(value), taken=taken)
        return cls(blob=bytes(value), codec=_blob_codec(value), taken=taken)


@dataclass(frozen=True, slots=True)
class Meta:
    """The sealed description of a payload."""

    codec: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    taken: float


def _pixel_codec(pixels: NDArray[Any]) -> str:
    channels = 1 if pixels.ndim == 2 else pixels.shape[-1]
    return {1: "gray", 3: "rgb", 4: "rgba"}.get(channels, "raw")


def _blob_codec(blob: bytes) -> str:
    if blob[:3] == b"\xff\xd8\xff":
        return "jpeg"
    return "png" if blob[:8] == b"\x89PNG\r\n\x1a\n" else "blob"


def payload_of(picture: Picture) -> tuple[Meta, NDArray[np.uint8]]:
    """The payload's bytes (a view where the array is contiguous) and their description.

    Raises:
        DataError: no payload or two, zero area, an unsupported dtype, shape or codec.
    """
    if (picture.pixels is None) == (picture.blob is None):
        raise DataError("a picture has pixels or compressed bytes, one of the two")
    if not math.isfinite(picture.taken):
        raise DataError("the time of capture is not a number")
    if picture.blob is not None:
        if picture.codec not in BLOB_CODECS or not picture.blob:
            raise DataError("compressed bytes are empty or of an unknown codec", hint=f"one of {BLOB_CODECS}")
        return Meta(picture.codec, "", (), len(picture.blob), float(picture.taken)), np.frombuffer(
            picture.blob, np.uint8
        )
    assert picture.pixels is not None  # noqa: S101 - checked above; tells the type checker
    return _pixel_payload(picture.pixels, picture.codec, float(picture.taken))


def _pixel_payload(pixels: NDArray[Any], codec: str, taken: float) -> tuple[Meta, NDArray[np.uint8]]:
    dtype = DTYPES.get(pixels.dtype.name)
    if dtype is None:
        raise DataError(f"pixels of type {pixels.dtype} are not supported", hint=f"convert to {', '.join(DTYPES)}")
    if problem := _shape_problem(codec, pixels.shape):
        raise DataError(problem)
    flat = np.ascontiguousarray(pixels, dtype=dtype).reshape(-1).view(np.uint8)
    return Meta(codec, pixels.dtype.name, tuple(pixels.shape), flat.size, taken), flat


def _shape_problem(codec: str, shape: tuple[int, ...]) -> str:
    """What is wrong with a shape under a codec, or an empty string."""
    if codec not in PIXEL_CODECS:
        return f"unknown pixel codec {codec[:20]!r}"
    if len(shape) not in {2, 3} or min(shape) < 1:
        return f"an image of shape {shape} has no area or too many axes"
    channels = shape[2] if len(shape) == 3 else 1
    if channels > 16 or channels != _CHANNELS.get(codec, channels):
        return f"an image of shape {shape} is not {codec}"
    if (codec == "gray" or codec.startswith("bayer")) and channels != 1:
        return f"an image of shape {shape} is not {codec}"
    return ""


def encode_meta(meta: Meta) -> bytes:
    """The 128 bytes before a payload."""
    body = cbor.encode(
        {"codec": meta.codec, "dtype": meta.dtype, "shape": list(meta.shape), "size": meta.size, "taken": meta.taken}
    )
    if len(body) > META_BYTES - _LENGTH.size:
        raise DataError("the description of this image does not fit its 128 bytes")
    return (_LENGTH.pack(len(body)) + body).ljust(META_BYTES, b"\x00")


def decode_meta(raw: bytes, payload_bytes: int) -> Meta:
    """Check and decode the 128 bytes, or raise WireError; ``payload_bytes`` is what follows, padding included."""
    (length,) = _LENGTH.unpack_from(raw)
    if len(raw) != META_BYTES or length > META_BYTES - _LENGTH.size or any(raw[_LENGTH.size + length :]):
        raise WireError("a sealed description is malformed")
    body = cbor.decode_map(raw[_LENGTH.size : _LENGTH.size + length], max_bytes=META_BYTES)
    match body:
        case {"codec": str(codec), "dtype": str(dtype), "shape": list(shape), "size": int(size), "taken": float(taken)}:
            meta = Meta(codec, dtype, tuple(shape), size, taken)
        case _:
            raise WireError("a sealed description lacks a field")
    if len(body) != 5 or not _consistent(meta) or not 0 < meta.size <= payload_bytes <= MAX_BYTES:
        raise WireError("a sealed description contradicts itself")
    return meta


def _consistent(meta: Meta) -> bool:
    if not math.isfinite(meta.taken) or any(type(n) is not int for n in (*meta.shape, meta.size)):
        return False
    if meta.codec in BLOB_CODECS:
        return not meta.dtype and not meta.shape
    if meta.dtype not in DTYPES or _shape_problem(meta.codec, meta.shape):
        return False
    return math.prod(meta.shape) * DTYPES[meta.dtype].itemsize == meta.size


def picture_of(meta: Meta, payload: NDArray[np.uint8]) -> Picture:
    """Rebuild the picture; ``payload`` is owned by the result when it holds pixels."""
    if meta.codec in BLOB_CODECS:
        return Picture(blob=payload[: meta.size].tobytes(), codec=meta.codec, taken=meta.taken)
    pixels = payload[: meta.size].view(DTYPES[meta.dtype]).reshape(meta.shape)
    return Picture(pixels=pixels, codec=meta.codec, taken=meta.taken)
