"""A sealed image as one file: ``EPF1 | record length (4, big-endian) | epoch record | envelope``; see README.md."""

from __future__ import annotations

import struct

from edgepriv.errors import WireError
from edgepriv.wire import epoch
from edgepriv.wire.envelope import MAX_BYTES as MAX_ENVELOPE_BYTES

MAGIC = b"EPF1"
_HEAD = struct.Struct(">4sI")
MAX_BYTES = _HEAD.size + epoch.MAX_BYTES + MAX_ENVELOPE_BYTES


def pack(record: bytes, envelope: bytes) -> bytes:
    """One file from a signed epoch record and an envelope."""
    return _HEAD.pack(MAGIC, len(record)) + record + envelope


def unpack(raw: bytes) -> tuple[bytes, memoryview]:
    """Record and envelope of a file, or WireError."""
    if len(raw) < _HEAD.size or raw[:4] != MAGIC or len(raw) > MAX_BYTES:
        raise WireError("not a sealed image file")
    _, length = _HEAD.unpack_from(raw)
    if length > epoch.MAX_BYTES or _HEAD.size + length >= len(raw):
        raise WireError("a sealed image file is cut off")
    return raw[_HEAD.size : _HEAD.size + length], memoryview(raw)[_HEAD.size + length :]
