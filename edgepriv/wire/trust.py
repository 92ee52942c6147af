"""``trust.cbor``: the one list that says who takes part, signed by the offline owner key.

Bytes: CBOR ``[body, signature]`` where ``body`` is a byte string (CBOR map) and the signature is Ed25519 by the owner
for the use ``trust``. A reader pins the owner's public key out of band, keeps the highest version it has seen, and
refuses lists that are older, expired, empty or unsigned. A gateway key among the recipients is an error: it would let
the gateway open frames.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgepriv import primitives
from edgepriv.errors import AuthenticationError, KeyFileError, TrustError, WireError
from edgepriv.keys import PublicIdentity, check_full_name
from edgepriv.wire import cbor

if TYPE_CHECKING:
    from edgepriv.keys import Identity

USE = "trust"
MAX_BYTES = 4 << 20
LISTED_ROLES = ("device", "recipient", "gateway", "risk", "issuer")


@dataclass(frozen=True, slots=True)
class TrustList:
    """Who may do what. Times are Unix seconds; ``policy`` is per device (``*`` = all others)."""

    version: int
    issued: int
    expires: int
    parties: tuple[PublicIdentity, ...]
    revoked: tuple[str, ...] = ()
    policy: dict[str, dict[str, Any]] = field(default_factory=dict)
    digest: bytes = b""

    def party(self, name: str, *roles: str) -> PublicIdentity:
        """Return a party that is listed, not revoked and has one of the roles.

        Raises:
            TrustError: otherwise.
        """
        if name in self.revoked:
            raise TrustError(
                f"{name} is revoked",
                hint="if it should take part again, the owner lists it under a new name with fresh keys",
            )
        for candidate in self.parties:
            if candidate.name == name and (not roles or candidate.role in roles):
                return candidate
        raise TrustError(
            f"{name} is not in the trust list as {' or '.join(roles) or 'a party'}",
            hint="the owner adds its .pub file: edgepriv owner sign",
        )

    def with_role(self, role: str) -> tuple[PublicIdentity, ...]:
        """All parties of a role that are not revoked."""
        return tuple(p for p in self.parties if p.role == role and p.name not in self.revoked)

    def policy_for(self, device: str) -> dict[str, Any]:
        """The owner's policy for a device."""
        return {**self.policy.get("*", {}), **self.policy.get(device, {})}


def sign_trust(trust: TrustList, owner: Identity) -> bytes:
    """Encode and sign a list with the owner's key."""
    _check(trust)
    body = cbor.encode(
        {
            "version": trust.version,
            "issued": trust.issued,
            "expires": trust.expires,
            "parties": [[p.role, p.name, p.ed25519, p.x25519] for p in trust.parties],
            "revoked": list(trust.revoked),
            "policy": trust.policy,
        }
    )
    return cbor.encode([body, owner.sign(USE, body)])


def read_trust(
    raw: bytes, owner_ed25519: bytes, *, now: float, min_version: int = 0, seen_digest: bytes = b""
) -> TrustList:
    """Verify a list against the pinned owner key.

    Args:
        raw: the file.
        owner_ed25519: the pinned public key, 32 bytes.
        now: Unix seconds.
        min_version: the highest version this party has seen.
        seen_digest: SHA-256 of the list of that version; another list of the same version is a rollback too.

    Raises:
        TrustError: unsigned, forged, expired, rolled back, empty or contradictory.
    """
    try:
        body, signature = _two_byte_strings(raw)
        primitives.verify(owner_ed25519, USE, body, signature)
        trust = _parse(body, hashlib.sha256(raw).digest())
    except (WireError, AuthenticationError) as error:
        raise TrustError(
            "the trust list is not signed by the owner that is pinned here, or is no trust list",
            hint="compare the owner.key.pub that is pinned with the owner's; fetch trust.cbor again",
        ) from error
    if trust.version < min_version:
        raise TrustError(f"trust list version {trust.version} is older than {min_version}, which was seen before")
    if seen_digest and trust.version == min_version and trust.digest != seen_digest:
        raise TrustError(
            f"another trust list of version {trust.version} was seen before",
            hint="the owner signs again from the newest copy of the list, so that its version rises",
        )
    if trust.expires <= now:
        raise TrustError("the trust list has expired", hint="the owner signs a new one: edgepriv owner sign")
    _check(trust)
    return trust


def _two_byte_strings(raw: bytes) -> tuple[bytes, bytes]:
    value = cbor.decode(raw, max_bytes=MAX_BYTES)
    match value:
        case [bytes() as body, bytes() as signature]:
            return body, signature
    raise WireError("not a signed object")


def _parse(body: bytes, digest: bytes) -> TrustList:
    value = cbor.decode_map(body, max_bytes=MAX_BYTES)
    try:
        parties = tuple(PublicIdentity(*row) for row in value["parties"])
        trust = TrustList(
            version=value["version"],
            issued=value["issued"],
            expires=value["expires"],
            parties=parties,
            revoked=tuple(value["revoked"]),
            policy=value["policy"],
            digest=digest,
        )
    except (KeyError, TypeError) as error:
        raise WireError("the trust list lacks a field") from error
    numbers = (trust.version, trust.issued, trust.expires)
    keys_ok = all(
        isinstance(p.ed25519, bytes) and isinstance(p.x25519, bytes) and len(p.ed25519) == len(p.x25519) == 32
        for p in parties
    )
    if not keys_ok or not all(type(n) is int for n in numbers) or not isinstance(trust.policy, dict):
        raise WireError("the trust list has a field of the wrong type")
    return trust


def _check(trust: TrustList) -> None:
    if not trust.parties:
        raise TrustError("the trust list is empty")
    names = [p.name for p in trust.parties]
    if len(set(names)) != len(names):
        raise TrustError("the trust list names a party twice")
    for party in trust.parties:
        try:
            check_full_name(party.role, party.name)
        except KeyFileError as error:
            raise TrustError(f"the trust list: {error}") from None
        if party.role not in LISTED_ROLES:
            raise TrustError(f"{party.name} does not fit the role {party.role}")
    revoked_keys = {key for p in trust.parties if p.name in trust.revoked for key in (p.ed25519, p.x25519)}
    gateway_keys = {key for p in trust.parties if p.role == "gateway" for key in (p.ed25519, p.x25519)}
    for party in trust.parties:
        if party.name not in trust.revoked and revoked_keys & {party.ed25519, party.x25519}:
            raise TrustError(f"{party.name} has the keys of a party that is revoked", hint="it needs fresh keys")
        if party.role == "recipient" and gateway_keys & {party.ed25519, party.x25519}:
            raise TrustError(f"{party.name} has a gateway's key: the gateway would open frames")
