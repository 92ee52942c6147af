"""Every message that travels inside the sealed link, and how its plaintext begins.

Plaintext: one lead byte, then the body. ``0x00``: a CBOR message of this file. ``0x01``: a chunk of a transfer,
``reference (16) | index (4, big-endian) | data``: raw, because most bytes on the wire are chunks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from edgepriv.errors import WireError
from edgepriv.wire import message
from edgepriv.wire.message import sized

_CHUNK = struct.Struct(">B16sI")
LEAD_MESSAGE = b"\x00"
LEAD_CHUNK = 1


@message.message("status")
class Status:
    """A device's state every half minute: plain counters by name, and what it runs."""

    at: float
    firmware: str
    model: str
    model_digest: bytes
    level: int
    trust_version: int
    counters: dict[str, Any]


@message.message("offer")
class Offer:
    """A device asks to send ``size`` bytes: an envelope too large for one packet, or a federated update."""

    ref: bytes
    what: str
    size: int
    chunk_bytes: int
    digest: bytes
    round: int
    expires: float
    meta: dict[str, Any]


@message.message("grant")
class Grant:
    """The gateway permits chunks: pairs (first, count) flattened; they are both credit and list of missing ranges."""

    ref: bytes
    ranges: tuple[int, ...]


@message.message("frame")
class FrameMessage:
    """A sealed frame that fits one packet."""

    envelope: bytes = sized(1 << 20)


@message.message("ack")
class Ack:
    """The gateway has made an item durable (or refused it for good): names SHA-256 of the item's bytes."""

    digest: bytes
    outcome: str  # stored | duplicate | rejected | conflict
    reason: str


@message.message("fetch")
class Fetch:
    """Ask for chunks of an object: ``ref`` is the first 16 bytes of its SHA-256."""

    ref: bytes
    first: int
    count: int
    chunk_bytes: int


@message.message("query")
class Query:
    """A recipient or the risk service asks the gateway."""

    id: bytes
    what: str
    args: dict[str, Any]


@message.message("reply")
class Reply:
    """The gateway answers a query. ``body`` is what the query's documentation says."""

    id: bytes
    ok: bool
    body: Any


@message.message("round")
class RoundMessage:
    """One step of a federated round in either direction; ``body`` is the step's own message."""

    round: int
    step: str
    body: bytes = sized(1 << 20)


@message.message("notice")
class Notice:
    """The gateway tells a party something it must act on: ``code`` is stable, ``text`` is for people."""

    code: str
    text: str
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a transfer."""

    ref: bytes
    index: int
    data: bytes


def encode(value: Any) -> bytes:
    """Plaintext of a message or a chunk."""
    if isinstance(value, Chunk):
        return _CHUNK.pack(LEAD_CHUNK, value.ref, value.index) + value.data
    return LEAD_MESSAGE + message.encode(value)


def decode(plain: bytes) -> Any:
    """Message or chunk of a plaintext, or WireError."""
    if plain[:1] == LEAD_MESSAGE:
        return message.decode(plain[1:])
    if len(plain) >= _CHUNK.size and plain[0] == LEAD_CHUNK:
        _, ref, index = _CHUNK.unpack_from(plain)
        return Chunk(ref, index, plain[_CHUNK.size :])
    raise WireError("neither a message nor a chunk")
