"""Deterministic CBOR (RFC 8949 section 4.2) and nothing else.

Signatures, digests and associated data always cover the received bytes. So that one value has one encoding, bytes
that do not re-encode to themselves are refused, and so are tags, indefinite lengths, duplicate keys and nesting
deeper than 8.
"""

from __future__ import annotations

import io
from typing import Any

import cbor2

from edgepriv.errors import WireError

MAX_DEPTH = 8
_SCALARS = (int, str, bytes, float, bool, type(None))


def encode(value: Any) -> bytes:
    """Encode maps, lists, text, bytes, integers, floats, booleans and None in the one canonical form."""
    return cbor2.dumps(value, canonical=True)


def decode(raw: bytes, *, max_bytes: int) -> Any:
    """Decode one canonical value (arrays become lists).

    Raises:
        WireError: over ``max_bytes``, malformed, trailing bytes, not canonical, or a type outside the list above.
    """
    if len(raw) > max_bytes:
        raise WireError(f"message of {len(raw)} bytes is over the limit of {max_bytes}")
    try:
        value = _plain(cbor2.CBORDecoder(io.BytesIO(raw)).decode(), MAX_DEPTH)
        if encode(value) != raw:
            raise WireError("not deterministic CBOR")
    except WireError:
        raise
    except Exception as error:  # the decoder raises many types on hostile bytes; to us they are one
        raise WireError("not CBOR") from error
    return value


def decode_map(raw: bytes, *, max_bytes: int) -> dict[str, Any]:
    """Decode a map with text keys, or raise WireError."""
    value = decode(raw, max_bytes=max_bytes)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise WireError("not a map with text keys")
    return value


def _plain(value: Any, depth: int) -> Any:
    if depth < 0:
        raise WireError("nested too deeply")
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {_plain(key, 0): _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, _SCALARS):
        return value
    raise WireError(f"a {type(value).__name__} has no place on the wire")
