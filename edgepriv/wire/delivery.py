"""A model delivery's bytes: named files in one CBOR map, found by position, so that gigabytes never lie in memory.

``{"schema": S, "files": {name: bytes, ...}}``, definite lengths, keys in this order. Two schemas: a *delivery* is one
protected model with golden inputs, the issuer's signed list and verdicts; a *shipment* is what a gateway hands to
devices: a delivery repository (``metadata/NAME``, ``targets/NAME``) and permissions (``permissions/DEVICE``).

Rules: names are bare or ``FOLDER/NAME``; nothing is allocated from a length before it was checked against the stream.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgepriv import primitives
from edgepriv.errors import AuthenticationError, WireError
from edgepriv.wire import cbor

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

DELIVERY, SHIPMENT = "edgepriv.delivery/1", "edgepriv.shipment/1"
MANIFEST, VERDICT = "manifest.cbor", "verdict.cbor"
TARGETS, METADATA, PERMISSIONS = "targets", "metadata", "permissions"
MANIFEST_USE = "model-manifest"
MAX_FILES, MAX_NAME_BYTES, MAX_SIGNED_BYTES, MAX_VERDICT_BYTES = 4096, 200, 16_000_000, 65_536
_BYTES, _TEXT, _MAP = 2, 3, 5


@dataclass(frozen=True, slots=True)
class Span:
    """Where a file's bytes lie in the stream."""

    start: int
    size: int

    def read(self, stream: BinaryIO, limit: int) -> bytes:
        """The bytes (WireError: more than ``limit``)."""
        if self.size > limit:
            raise WireError(f"a file of {self.size} bytes is over the limit of {limit}")
        stream.seek(self.start)
        return stream.read(self.size)

    def copy(self, stream: BinaryIO, target: BinaryIO) -> None:
        """Copy the bytes in blocks."""
        stream.seek(self.start)
        left = self.size
        while left:
            block = stream.read(min(left, 1 << 20))
            if not block:
                raise WireError("the delivery is cut short")
            target.write(block)
            left -= len(block)


def spans(stream: BinaryIO, schema: str, within: Span | None = None) -> dict[str, Span]:
    """Find the files of a delivery or shipment.

    Args:
        stream: a seekable file.
        schema: ``DELIVERY`` or ``SHIPMENT``.
        within: the part of the stream to look at; all of it by default.

    Raises:
        WireError: it is not one.
    """
    whole = within or Span(0, stream.seek(0, 2))
    end = whole.start + whole.size
    stream.seek(whole.start)
    if _head(stream, _MAP) != 2 or _text(stream) != "schema" or _text(stream) != schema or _text(stream) != "files":
        raise WireError(f"not a {schema} file")
    count = _head(stream, _MAP)
    if count > MAX_FILES:
        raise WireError(f"a delivery has at most {MAX_FILES} files")
    found: dict[str, Span] = {}
    for _ in range(count):
        name, size = _text(stream), _head(stream, _BYTES)
        start = stream.tell()
        if start + size > end or name in found or not _good_name(name):
            raise WireError("the delivery is cut short, or a file name in it is not valid")
        found[name] = Span(start, size)
        stream.seek(start + size)
    if stream.tell() != end:
        raise WireError("bytes follow the delivery")
    return found


def is_one(stream: BinaryIO, schema: str) -> bool:
    """Whether a stream begins as a delivery or shipment does."""
    stream.seek(0)
    try:
        return _head(stream, _MAP) == 2 and _text(stream) == "schema" and _text(stream) == schema
    except WireError:
        return False


def write(stream: BinaryIO, schema: str, files: Mapping[str, Any]) -> None:
    """Write a delivery or shipment; contents are bytes, arrays of them, or paths of files to copy."""
    stream.write(_encoded_head(_MAP, 2) + _encoded_text("schema") + _encoded_text(schema) + _encoded_text("files"))
    stream.write(_encoded_head(_MAP, len(files)))
    for name, content in files.items():
        if not _good_name(name):
            raise WireError(f"a file of a delivery cannot be named {name!r}")
        stream.write(_encoded_text(name))
        if isinstance(content, Path):
            stream.write(_encoded_head(_BYTES, content.stat().st_size))
            with content.open("rb") as file:
                shutil.copyfileobj(file, stream, 1 << 20)
        else:
            view = memoryview(content)
            stream.write(_encoded_head(_BYTES, view.nbytes))
            stream.write(view)


# --- what a carrier of deliveries may know: which bytes would run, and what was said of them -------------------


@dataclass(frozen=True, slots=True)
class Label:
    """A delivery seen from outside: the signed manifest's name, version and the digest that each level would run."""

    name: str
    version: int
    issuer: bytes
    digests: tuple[bytes, ...]
    verdicts: tuple[bytes, ...]


def read_label(stream: BinaryIO, issuers: Collection[bytes]) -> Label | None:
    """Read the label of a delivery or of the one in a shipment; None where the stream is neither.

    Raises:
        WireError: damaged.
        AuthenticationError: the manifest is signed by nobody among ``issuers``.
    """
    if is_one(stream, SHIPMENT):
        targets = [span for name, span in spans(stream, SHIPMENT).items() if name.startswith(TARGETS + "/")]
        if len(targets) != 1:
            raise WireError("a shipment carries one delivery")
        files = spans(stream, DELIVERY, targets[0])
    elif is_one(stream, DELIVERY):
        files = spans(stream, DELIVERY)
    else:
        return None
    if MANIFEST not in files:
        raise WireError("the delivery lacks its manifest")
    body, issuer = _manifest(files[MANIFEST].read(stream, MAX_SIGNED_BYTES), issuers)
    verdicts = [s.read(stream, MAX_VERDICT_BYTES) for name, s in files.items() if is_verdict(name)]
    match body:
        case {"name": str() as name, "version": int() as version, "levels": [*levels]}:
            digests = tuple(_level_digest(level) for level in levels)
        case _:
            raise WireError("the delivery's manifest is malformed")
    return Label(name, version, issuer, digests, tuple(verdicts))


def _level_digest(level: Any) -> bytes:
    match level:
        case {"digest": bytes() as digest} if len(digest) == 32:
            return digest
        case _:
            raise WireError("the delivery's manifest is malformed")


def verdict_name(level: int) -> str:
    """Name of the verdict on one level."""
    return f"verdict-{level}.cbor"


def is_verdict(name: str) -> bool:
    """Whether a delivery's file is a verdict: ``verdict.cbor`` or ``verdict-N.cbor``."""
    middle = name.removeprefix("verdict-").removesuffix(".cbor")
    return name == VERDICT or (name == f"verdict-{middle}.cbor" and middle.isdecimal())


def _manifest(signed: bytes, issuers: Collection[bytes]) -> tuple[dict[str, Any], bytes]:
    match cbor.decode(signed, max_bytes=MAX_SIGNED_BYTES):
        case [bytes() as raw, bytes() as issuer, bytes() as signature]:
            if issuer not in issuers:
                raise AuthenticationError("the model is signed by somebody who is not a trusted model issuer")
            primitives.verify(issuer, MANIFEST_USE, raw, signature)
            return cbor.decode_map(raw, max_bytes=MAX_SIGNED_BYTES), issuer
        case _:
            raise WireError("the delivery's manifest is malformed")


# --- CBOR heads ------------------------------------------------------------------------------------------------


def _head(stream: BinaryIO, kind: int) -> int:
    first = stream.read(1)
    if not first or first[0] >> 5 != kind:
        raise WireError("not a delivery")
    short = first[0] & 31
    if short < 24:
        return short
    if short > 27:
        raise WireError("not a delivery: indefinite lengths have no place in one")
    width = 1 << (short - 24)
    raw = stream.read(width)
    if len(raw) != width:
        raise WireError("the delivery is cut short")
    return int.from_bytes(raw, "big")


def _text(stream: BinaryIO) -> str:
    size = _head(stream, _TEXT)
    if size > MAX_NAME_BYTES:
        raise WireError("a name in the delivery is too long")
    try:
        return stream.read(size).decode()
    except UnicodeDecodeError as error:
        raise WireError("a name in the delivery is not text") from error


def _encoded_head(kind: int, value: int) -> bytes:
    for short, width in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if value < 24:
            return bytes([kind << 5 | value])
        if value < 1 << 8 * width:
            return bytes([kind << 5 | short]) + value.to_bytes(width, "big")
    raise WireError("a length over 2^64")


def _encoded_text(text: str) -> bytes:
    raw = text.encode()
    return _encoded_head(_TEXT, len(raw)) + raw


def _good_name(name: str) -> bool:
    parts = name.split("/")
    bare = all(part and not part.startswith(".") and "\\" not in part and "\x00" not in part for part in parts)
    return bare and len(parts) <= 2 and len(name.encode()) <= MAX_NAME_BYTES
