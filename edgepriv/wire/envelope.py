"""The envelope of a sealed frame: its bytes, the gateway's check and the replay rule. Nothing here can open a frame.

====== ===== ==========================================================================================
offset bytes field (integers big-endian)
====== ===== ==========================================================================================
0      4     magic ``EPE1``
4      1     version (1)
5      1     profile: 0 ``aead``, 1 ``flep3``, 2 ``flep3-strong``
6      1     alg: 1 ``aes-256-gcm``, 2 ``chacha20-poly1305``
7      1     auth: 1 ``link-mac``, 2 ``ed25519``
8      8     counter of the frame in its epoch, from 0
16     32    mid, the random message id
48     32    SHA-256 of the signed epoch record
80     32    commitment to the content key
112    n     AEAD ciphertext, its last 16 bytes the AEAD tag (n >= 80)
112+n  16/64 MAC to the gateway (``link-mac``) or Ed25519 signature (``ed25519``) over all bytes before it
====== ===== ==========================================================================================

Rules: any bytes give an `Envelope` or one WireError; lengths are checked before anything is allocated and nothing is
copied but the short fields. The counter starts at 0 in each epoch: for one (party, epoch) the same counter with the
same digest is a duplicate, with another digest a conflict; order does not matter.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgepriv import primitives
from edgepriv.errors import WireError
from edgepriv.wire.epoch import AUTH_LINK_MAC, AUTH_SIGNATURE

if TYPE_CHECKING:
    from edgepriv.keys import PublicIdentity
    from edgepriv.wire.epoch import SignedEpoch
    from edgepriv.wire.link import LinkSession

MAGIC = b"EPE1"
VERSION = 1
PROFILES = {"aead": 0, "flep3": 1, "flep3-strong": 2}
ALGS: dict[primitives.Alg, int] = {primitives.AES_GCM: 1, primitives.CHACHA: 2}
AUTHS = {AUTH_LINK_MAC: 1, AUTH_SIGNATURE: 2}
AUTH_BYTES = {AUTH_LINK_MAC: 16, AUTH_SIGNATURE: 64}
HEADER = struct.Struct(">4sBBBBQ32s32s")
HEADER_BYTES = HEADER.size
COMMITMENT_BYTES = 32
BODY_OFFSET = HEADER_BYTES + COMMITMENT_BYTES
META_BYTES = 64
MIN_BODY_BYTES = META_BYTES + primitives.TAG_BYTES
MAX_BYTES = 256 << 20
MAX_FRAMES = 1 << 16
SIGNATURE_USE = "frame"

_PROFILE_NAMES = {code: name for name, code in PROFILES.items()}
_ALG_NAMES = {code: name for name, code in ALGS.items()}
_AUTH_NAMES = {code: name for name, code in AUTHS.items()}

Outcome = Literal["new", "duplicate", "conflict"]


@dataclass(frozen=True, slots=True)
class Envelope:
    """A parsed envelope; ``raw`` and ``ciphertext`` are views into the bytes that were given."""

    version: int
    profile: str
    alg: primitives.Alg
    auth: str
    counter: int
    mid: bytes
    epoch_digest: bytes
    header: bytes
    commitment: bytes
    ciphertext: memoryview  # with the AEAD tag at its end
    aead_tag: bytes
    tag: bytes
    raw: memoryview

    @property
    def authenticated(self) -> memoryview:
        """The bytes that ``tag`` covers: all before it."""
        return self.raw[: len(self.raw) - len(self.tag)]

    def digest(self) -> bytes:
        """What an acknowledgement names: SHA-256 of header, commitment, AEAD tag and the tag to the gateway.

        The last tag authenticates every byte before it, so hashing the ciphertext once more would bind nothing new;
        call this on verified envelopes only.
        """
        return hashlib.sha256(self.header + self.commitment + self.aead_tag + self.tag).digest()

    def content_digest(self) -> bytes:
        """What a recipient remembers of a frame it opened: all but the tag to the gateway, which it cannot check."""
        return hashlib.sha256(self.header + self.commitment + self.aead_tag).digest()


def pack_header(*, profile: str, alg: str, auth: str, counter: int, mid: bytes, epoch_digest: bytes) -> bytes:
    """The first 80 bytes of an envelope.

    Raises:
        WireError: an unknown name, or a counter outside the format.
    """
    try:
        codes = (PROFILES[profile], ALGS[alg], AUTHS[auth])  # type: ignore[index]
    except KeyError as error:
        raise WireError(f"no such profile, algorithm or authentication: {error.args[0]!r}") from None
    if not 0 <= counter < MAX_FRAMES:
        raise WireError("the frame counter is out of range")
    return HEADER.pack(MAGIC, VERSION, *codes, counter, mid, epoch_digest)


def parse(raw: bytes | bytearray | memoryview, *, max_bytes: int = MAX_BYTES) -> Envelope:
    """Parse an envelope without copying its ciphertext, or raise WireError."""
    view = memoryview(raw).cast("B")
    if len(view) > max_bytes:
        raise WireError(f"an envelope of {len(view)} bytes is over the limit of {max_bytes}")
    if len(view) < BODY_OFFSET + MIN_BODY_BYTES or bytes(view[:4]) != MAGIC:
        raise WireError("not an envelope, or cut off")
    _, version, profile, alg, auth, counter, mid, epoch_digest = HEADER.unpack_from(view)
    if version != VERSION:
        raise WireError(f"envelope version {version} is not supported")
    if profile not in _PROFILE_NAMES or alg not in _ALG_NAMES or auth not in _AUTH_NAMES:
        raise WireError("an envelope with an unknown profile, algorithm or authentication")
    if counter >= MAX_FRAMES:
        raise WireError("the frame counter is out of range")
    end = len(view) - AUTH_BYTES[_AUTH_NAMES[auth]]
    if end - BODY_OFFSET < MIN_BODY_BYTES:
        raise WireError("not an envelope, or cut off")
    return Envelope(
        version=version,
        profile=_PROFILE_NAMES[profile],
        alg=_ALG_NAMES[alg],
        auth=_AUTH_NAMES[auth],
        counter=counter,
        mid=mid,
        epoch_digest=epoch_digest,
        header=bytes(view[:HEADER_BYTES]),
        commitment=bytes(view[HEADER_BYTES:BODY_OFFSET]),
        ciphertext=view[BODY_OFFSET:end],
        aead_tag=bytes(view[end - primitives.TAG_BYTES : end]),
        tag=bytes(view[end:]),
        raw=view,
    )


def check_record(envelope: Envelope, epoch: SignedEpoch) -> None:
    """Refuse a frame that differs from the record it binds.

    Raises:
        AuthenticationError: another record, or another version, profile, algorithm or authentication.
        WireError: a counter beyond the epoch's frames.
    """
    record = epoch.record
    bound = (envelope.epoch_digest, envelope.version, envelope.profile, envelope.alg, envelope.auth)
    if bound != (epoch.digest, record.version, record.profile, record.alg, record.auth):
        raise primitives.not_authentic()
    if envelope.counter >= record.max_frames:
        raise WireError("the frame counter is beyond its epoch's last frame")


def link_mac(
    envelope_alg: primitives.Alg,
    session: LinkSession,
    header: bytes,
    com: bytes,
    aead_tag: bytes,
    data: primitives.Buffer,
) -> bytes:
    """The 16-byte MAC to the gateway, under a key that serves this one envelope."""
    key = session.mac_key(header, com, aead_tag)
    return primitives.backend().mac(envelope_alg, key, data)


def verify_for_gateway(envelope: Envelope, session: LinkSession, epoch: SignedEpoch, device: PublicIdentity) -> None:
    """Check that ``device`` sent this envelope in this epoch, without being able to open it.

    Args:
        envelope: what `parse` returned.
        session: the gateway's end of the epoch's link.
        epoch: the record, verified by `edgepriv.wire.epoch.read_epoch`.
        device: the device as the trust list has it.

    Raises:
        AuthenticationError: the MAC or signature is wrong, or the frame does not match its record or device.
        WireError: a counter beyond the epoch's frames.
    """
    if device.name != epoch.record.party or session.party != device.name:
        raise primitives.not_authentic()
    check_record(envelope, epoch)
    if envelope.auth == AUTH_SIGNATURE:
        device.verify(SIGNATURE_USE, envelope.authenticated, envelope.tag)
        return
    expected = link_mac(
        envelope.alg, session, envelope.header, envelope.commitment, envelope.aead_tag, envelope.authenticated
    )
    if not primitives.equal(expected, envelope.tag):
        raise primitives.not_authentic()


def judge(known: bytes | None, digest: bytes) -> Outcome:
    """The replay rule over a lookup: ``known`` is the digest stored for this (party, epoch, counter), or None."""
    if known is None:
        return "new"
    return "duplicate" if primitives.equal(known, digest) else "conflict"
