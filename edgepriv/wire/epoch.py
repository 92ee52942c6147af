"""The epoch record: opens a session of a party with the gateway and, for a device, an epoch of frame keys.

Bytes: CBOR ``[body, signature]``; ``body`` is a byte string (CBOR map, fields of `EpochRecord`), the signature is the
party's Ed25519 for the use ``epoch``. It carries the link key wrapped by HPKE to the gateway, and for devices the
content key wrapped to each recipient with a commitment to it. A frame binds the SHA-256 of the whole record, so a
frame and its record cannot be mixed. Parties without frames (recipients, the risk service) send no stanzas.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepriv import primitives
from edgepriv.errors import AuthenticationError, TrustError, WireError
from edgepriv.wire import cbor
from edgepriv.wire.message import from_map

if TYPE_CHECKING:
    from edgepriv.keys import Identity, PublicIdentity
    from edgepriv.wire.trust import TrustList

USE = "epoch"
VERSION = 1
MAX_BYTES = 64 << 10
EPOCH_ID_BYTES = 16
STANZA_BYTES = 8 + primitives.HPKE_OVERHEAD_BYTES + primitives.KEY_BYTES
AUTH_LINK_MAC = "link-mac"
AUTH_SIGNATURE = "ed25519"


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """What a record says. ``stanzas`` are ``key id (8) | HPKE(ck)``; ``link`` is HPKE(k_link) for the gateway."""

    version: int
    party: str
    gateway: str
    epoch_id: bytes
    seq: int
    created: int
    max_frames: int
    trust_version: int
    alg: str
    profile: str
    auth: str
    stanzas: tuple[bytes, ...]
    link: bytes
    commitment: bytes


@dataclass(frozen=True, slots=True)
class SignedEpoch:
    """A record with the exact bytes that were signed, and their digest, which frames bind."""

    record: EpochRecord
    raw: bytes
    digest: bytes


def wrap_info(label: str, party: str, epoch_id: bytes) -> bytes:
    """HPKE info of a wrapped key: bound to its use, its sender and its epoch."""
    return f"edgepriv/{label}/v1".encode() + b"\x00" + party.encode() + b"\x00" + epoch_id


def commitment(ck: bytes, party: str, epoch_id: bytes) -> bytes:
    """HMAC that commits a record to one content key, so that no record opens to two."""
    return primitives.hmac_sha256(ck, b"edgepriv/epoch-commit/v1\x00" + party.encode() + b"\x00" + epoch_id)


def sign_epoch(record: EpochRecord, identity: Identity) -> SignedEpoch:
    """Encode and sign a record with the party's key."""
    body = cbor.encode(
        {
            f.name: (list(v) if isinstance(v := getattr(record, f.name), tuple) else v)
            for f in dataclasses.fields(record)
        }
    )
    raw = cbor.encode([body, identity.sign(USE, body)])
    return SignedEpoch(record, raw, hashlib.sha256(raw).digest())


def read_epoch(raw: bytes, trust: TrustList) -> SignedEpoch:
    """Parse a record and check that a listed party signed it.

    Raises:
        WireError: malformed.
        AuthenticationError: wrong signature.
        TrustError: the party is unknown or revoked.
    """
    match cbor.decode(raw, max_bytes=MAX_BYTES):
        case [bytes() as body, bytes() as signature]:
            record = _parse(body)
        case _:
            raise WireError("not an epoch record")
    party = trust.party(record.party, "device", "recipient", "risk", "gateway")
    party.verify(USE, body, signature)
    return SignedEpoch(record, raw, hashlib.sha256(raw).digest())


def _parse(body: bytes) -> EpochRecord:
    record = from_map(EpochRecord, cbor.decode_map(body, max_bytes=MAX_BYTES))
    if record.version != VERSION:
        raise WireError(f"epoch record version {record.version} is not supported")
    if len(record.epoch_id) != EPOCH_ID_BYTES or any(len(s) != STANZA_BYTES for s in record.stanzas):
        raise WireError("epoch record has a field of the wrong length")
    if len(record.commitment) != (32 if record.stanzas else 0) or record.max_frames < 0 or record.seq < 0:
        raise WireError("epoch record contradicts itself")
    return record


def unwrap_link(record: EpochRecord, gateway: Identity) -> bytes:
    """The gateway's way to the link key; raises AuthenticationError when the record is for another gateway."""
    if record.gateway != gateway.name:
        raise AuthenticationError(f"the record is addressed to {record.gateway}, not to {gateway.name}")
    return gateway.unwrap(record.link, wrap_info("gwlink", record.party, record.epoch_id))


def unwrap_content(record: EpochRecord, recipient: Identity) -> bytes:
    """A recipient's way to the content key.

    Raises:
        TrustError: the record has no stanza for this recipient.
        AuthenticationError: the stanza does not open, or does not match the commitment.
    """
    for stanza in record.stanzas:
        if stanza[:8] == recipient.public.key_id:
            ck = recipient.unwrap(stanza[8:], wrap_info("wrap", record.party, record.epoch_id))
            if not primitives.equal(commitment(ck, record.party, record.epoch_id), record.commitment):
                raise primitives.not_authentic()
            return ck
    raise TrustError(f"this frame is not addressed to {recipient.name}", hint="the owner lists its recipients")


def wrap_stanza(recipient: PublicIdentity, ck: bytes, party: str, epoch_id: bytes) -> bytes:
    """Wrap a content key to one recipient."""
    return recipient.key_id + primitives.hpke_wrap(recipient.x25519, ck, wrap_info("wrap", party, epoch_id))
