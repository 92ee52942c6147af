"""The sealed link between a party and its gateway: TLS ends at the broker, so this does not.

Bytes: ``"EPL1" | epoch_id (16) | salt (16) | seq (8, big-endian) | AES-256-GCM ciphertext and tag``.
Key: HKDF-SHA256(k_link, salt=epoch_id | salt, info="edgepriv/link/<up|down>/v1"), one for each direction and process
(``salt`` is fresh in each process, so a restarted gateway never repeats a nonce). Nonce: ``0000 | seq``. Associated
data: the 44 header bytes, the topic and the party's name, so that no message is accepted on another topic.

Replay: the party's side keeps a window for each salt and refuses what it has seen. The gateway's side accepts the
same bytes again, because a party repeats an item until it is acknowledged; there every effect is keyed by the
SHA-256 of the bytes and durable, so a replay is a counted duplicate.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections import OrderedDict
from typing import Literal, NoReturn

from edgepriv import primitives
from edgepriv.errors import ReplayError, WireError
from edgepriv.wire.epoch import EPOCH_ID_BYTES

MAGIC = b"EPL1"
HEADER = struct.Struct(">4s16s16sQ")
OVERHEAD_BYTES = HEADER.size + primitives.TAG_BYTES
WINDOW = 4096
MAX_SALTS = 64

Direction = Literal["up", "down"]


class ReplayWindow:
    """Accepts each sequence number once, in any order within a sliding window."""

    __slots__ = ("_bits", "_top")

    def __init__(self) -> None:
        self._top, self._bits = -1, 0

    def accept(self, seq: int) -> None:
        """Mark a number as seen, or raise ReplayError."""
        if seq > self._top:
            self._bits = ((self._bits << (seq - self._top)) | 1) & ((1 << WINDOW) - 1) if self._top >= 0 else 1
            self._top = seq
            return
        offset = self._top - seq
        if offset >= WINDOW or self._bits >> offset & 1:
            raise ReplayError("a message of the link was received before")
        self._bits |= 1 << offset


def epoch_of(raw: bytes) -> bytes:
    """Read which epoch's key opens a sealed message, or raise WireError."""
    if len(raw) < OVERHEAD_BYTES or raw[:4] != MAGIC:
        raise WireError("not a sealed link message")
    return raw[4 : 4 + EPOCH_ID_BYTES]


class LinkSession:
    """One end of a link. ``k_link`` stays in this process: another process that holds a copy refuses to use it."""

    def __init__(self, k_link: bytes, epoch_id: bytes, party: str, *, side: Literal["party", "gateway"]) -> None:
        self.epoch_id, self.party = epoch_id, party
        self._k_link, self._pid = k_link, os.getpid()
        self._send: Direction = "up" if side == "party" else "down"
        self._receive: Direction = "down" if side == "party" else "up"
        self._salt, self._seq = primitives.random_bytes(16), 0
        self._send_key = self._key(self._send, self._salt)
        self._mac_prk = primitives.hkdf_extract(k_link, epoch_id)
        self._receive_keys: OrderedDict[bytes, bytes] = OrderedDict()
        self._windows: dict[bytes, ReplayWindow] | None = {} if side == "party" else None

    def _key(self, direction: Direction, salt: bytes) -> bytes:
        info = f"edgepriv/link/{direction}/v1".encode()
        return primitives.hkdf(self._k_link, 32, salt=self.epoch_id + salt, info=info)

    def seal(self, topic: str, body: primitives.Buffer) -> bytes:
        """Seal a message for ``topic``; sequence numbers never repeat under one key."""
        self._guard()
        header = HEADER.pack(MAGIC, self.epoch_id, self._salt, self._seq)
        nonce = struct.pack(">IQ", 0, self._seq)
        self._seq += 1
        return header + primitives.aead_seal(self._send_key, nonce, body, self._aad(header, topic))

    def open(self, topic: str, raw: bytes) -> bytes:
        """Open a message that arrived on ``topic``.

        Raises:
            WireError: not a link message, or of another epoch.
            AuthenticationError: forged, altered or moved to another topic.
            ReplayError: seen before (party's side only).
        """
        self._guard()
        if epoch_of(raw) != self.epoch_id:
            raise WireError("a link message of another epoch")
        header = raw[: HEADER.size]
        _, _, salt, seq = HEADER.unpack(header)
        key = self._receive_keys.get(salt) or self._key(self._receive, salt)
        body = primitives.aead_open(key, struct.pack(">IQ", 0, seq), raw[HEADER.size :], self._aad(header, topic))
        self._remember(salt, key)
        if self._windows is not None:
            self._windows.setdefault(salt, ReplayWindow()).accept(seq)
        return body

    def mac_key(self, *context: bytes) -> bytes:
        """The single-use key of a frame's MAC to the gateway: HKDF(k_link, epoch_id, label | SHA-256(context))."""
        self._guard()
        digest = hashlib.sha256(b"".join(context)).digest()
        return primitives.hkdf_expand(self._mac_prk, b"edgepriv/gwmac/v1" + digest)

    def _remember(self, salt: bytes, key: bytes) -> None:
        """Cache a peer's key only after a message under it was authentic; bounded on both sides."""
        if salt in self._receive_keys:
            return
        if len(self._receive_keys) >= MAX_SALTS:
            if self._windows is not None:
                raise ReplayError("the gateway restarted too often within one epoch; a new epoch is needed")
            self._receive_keys.popitem(last=False)
        self._receive_keys[salt] = key

    def _aad(self, header: bytes, topic: str) -> bytes:
        return header + topic.encode() + b"\x00" + self.party.encode()

    def _guard(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("a link key crossed a fork; open a new epoch in the child")

    def __repr__(self) -> str:
        return f"LinkSession({self.party!r}, epoch {self.epoch_id.hex()[:8]}, keys hidden)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a link key is not pickled")
