"""What is sealed: pixels of any common kind, or the compressed bytes as the camera made them.

Inside the AEAD each payload is preceded by 64 bytes (integers big-endian):

====== ===== ==========================================================================================
offset bytes field
====== ===== ==========================================================================================
0      1     version of this table (1)
1      1     codec: 0 raw, 1 gray, 2 rgb, 3 rgba, 4 bgr, 5 to 8 bayer rggb, bggr, grbg, gbrg;
             64 jpeg, 65 png, 66 blob
2      1     type: 0 none (blobs), 1 uint8, 2 uint16, 3 float32
3      1     number of axes: 0 (blobs), 2 or 3
4      12    height, width, channels, 4 bytes each; 0 where there is no such axis
16     8     size: payload bytes before padding
24     8     time of capture, Unix seconds, IEEE 754 double; 0 when unknown
32     32    zeros
====== ===== ==========================================================================================

Pixels are little-endian, in C order.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError, WireError
from edgepriv.wire.envelope import MAX_BYTES, META_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIXEL_CODECS = ("raw", "gray", "rgb", "rgba", "bgr", "bayer-rggb", "bayer-bggr", "bayer-grbg", "bayer-gbrg")
BLOB_CODECS = ("jpeg", "png", "blob")
_FIRST_BLOB_CODE = 64
MAX_CHANNELS = 16
_CODEC_CODES = {name: code for code, name in enumerate(PIXEL_CODECS)} | {
    name: code for code, name in enumerate(BLOB_CODECS, _FIRST_BLOB_CODE)
}
_CODEC_NAMES = {code: name for name, code in _CODEC_CODES.items()}
_TABLE_VERSION = 1
DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2"), "float32": np.dtype("<f4")}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHANNELS = {"rgb": 3, "bgr": 3, "rgba": 4}
_DTYPE_CODES = {"": 0} | {name: code for code, name in enumerate(DTYPES, 1)}
_DTYPE_NAMES = {code: name for name, code in _DTYPE_CODES.items()}
_TABLE = struct.Struct(">BBBBIIIQd32s")


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
    def of(cls, value: Picture | NDArray[Any] | bytes | bytearray | memoryview, *, taken: float = 0.0) -> Picture:
        """Take an array or compressed bytes as they come, and name what they evidently are.

        Raises:
            DataError: neither; a list of numbers or a view of an array is never taken for compressed bytes.
        """
        if isinstance(value, Picture):
            return value
        if isinstance(value, np.ndarray):
            return cls(pixels=value, codec=_pixel_codec(value), taken=taken)
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise DataError(
                f"a {type(value).__name__} is no picture", hint="give a numpy array, or the bytes of a file"
            )
        if isinstance(value, memoryview) and (value.ndim != 1 or value.format != "B"):
            raise DataError(
                f"a memoryview of format {value.format!r} and {value.ndim} axes is no file's bytes",
                hint="for pixels give the numpy array itself",
            )
        blob = bytes(value)
        return cls(blob=blob, codec=_blob_codec(blob), taken=taken)


@dataclass(frozen=True, slots=True)
class Meta:
    """The sealed description of a payload."""

    codec: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    taken: float


def _pixel_codec(pixels: NDArray[Any]) -> str:
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
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
    if not isinstance(picture.taken, (int, float, np.number)) or not math.isfinite(picture.taken):
        raise DataError("the time of capture is not a number")
    if picture.blob is not None:
        if not isinstance(picture.blob, bytes):
            raise DataError(f"compressed bytes are a {type(picture.blob).__name__}, not bytes")
        if picture.codec not in BLOB_CODECS or not picture.blob:
            raise DataError("compressed bytes are empty or of an unknown codec", hint=f"one of {BLOB_CODECS}")
        return Meta(picture.codec, "", (), len(picture.blob), float(picture.taken)), np.frombuffer(
            picture.blob, np.uint8
        )
    assert picture.pixels is not None  # noqa: S101 - checked above; tells the type checker
    return _pixel_payload(picture.pixels, picture.codec, float(picture.taken))


def _pixel_payload(pixels: NDArray[Any], codec: str, taken: float) -> tuple[Meta, NDArray[np.uint8]]:
    if not isinstance(pixels, np.ndarray):
        raise DataError(f"pixels are a {type(pixels).__name__}, not a numpy array")
    name = _NAMES.get(pixels.dtype) or pixels.dtype.name  # numpy composes that name anew each time, in Python
    dtype = DTYPES.get(name)
    if dtype is None:
        raise DataError(f"pixels of type {pixels.dtype} are not supported", hint=f"convert to {', '.join(DTYPES)}")
    if problem := _shape_problem(codec, pixels.shape):
        raise DataError(problem)
    flat = np.ascontiguousarray(pixels, dtype=dtype).reshape(-1).view(np.uint8)
    return Meta(codec, name, tuple(pixels.shape), flat.size, taken), flat


def _shape_problem(codec: str, shape: tuple[int, ...]) -> str:
    """What is wrong with a shape under a codec, or an empty string."""
    if codec not in PIXEL_CODECS:
        return f"unknown pixel codec {codec[:20]!r}"
    if len(shape) not in {2, 3}:
        return (
            f"an image has two or three axes, [height, width] or [height, width, channels], not {len(shape)}: {shape}"
        )
    if min(shape) < 1:
        return f"an image of shape {shape} has no area"
    if max(shape) >= 1 << 32:
        return f"an image of shape {shape} is too large"
    channels = shape[2] if len(shape) == 3 else 1
    if channels > MAX_CHANNELS:
        return f"an image of {channels} channels: at most {MAX_CHANNELS} can be sealed"
    if channels != _CHANNELS.get(codec, channels):
        return f"an image of shape {shape} is not {codec}"
    if (codec == "gray" or codec.startswith("bayer")) and channels != 1:
        return f"an image of shape {shape} is not {codec}"
    return ""


def encode_meta(meta: Meta) -> bytes:
    """The 64 bytes before a payload."""
    axes = (*meta.shape, 0, 0, 0)[:3]
    codes = (_CODEC_CODES[meta.codec], _DTYPE_CODES[meta.dtype], len(meta.shape))
    return _TABLE.pack(_TABLE_VERSION, *codes, *axes, meta.size, meta.taken, b"")


def decode_meta(raw: bytes, payload_bytes: int) -> Meta:
    """Check and decode the 64 bytes, or raise WireError; ``payload_bytes`` is what follows, padding included."""
    if len(raw) != META_BYTES:
        raise WireError("a sealed description is cut off")
    version, codec, dtype, ndim, height, width, channels, size, taken, zeros = _TABLE.unpack(raw)
    if version != _TABLE_VERSION or codec not in _CODEC_NAMES or dtype not in _DTYPE_NAMES or ndim > 3 or any(zeros):
        raise WireError("a sealed description is malformed")
    axes = (height, width, channels)
    meta = Meta(_CODEC_NAMES[codec], _DTYPE_NAMES[dtype], axes[:ndim], size, taken)
    if any(axes[ndim:]) or not _consistent(meta) or not 0 < size <= payload_bytes <= MAX_BYTES:
        raise WireError("a sealed description contradicts itself")
    return meta


def _consistent(meta: Meta) -> bool:
    if not math.isfinite(meta.taken):
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
