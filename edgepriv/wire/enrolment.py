"""Enrolment by a one-time token: the token's text, the request and the answer.

A token is a secret of one device for at most 24 hours: a file, or a QR code of its one line. It carries what the device
must pin before it speaks (the digest of the gateway's CA certificate, the owner's public keys), and the secret that it
sends only to a server which that CA vouches for. Enrolment gives transport identity; the owner's list gives the rest.

Text: ``edgepriv-token-1:`` and base64url (no padding) of a CBOR map with the fields of `Token`.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
from dataclasses import dataclass

from edgepriv.errors import WireError
from edgepriv.keys import NAME, PublicIdentity
from edgepriv.wire import cbor, message
from edgepriv.wire.message import sized

PREFIX = "edgepriv-token-1:"
ID_BYTES, SECRET_BYTES = 8, 16
MAX_LIFETIME_S = 24 * 3600
MAX_TOKEN_CHARS = 2048
MAX_REQUEST_BYTES = 16 << 10
MAX_ANSWER_BYTES = 5 << 20
USE, USE_RENEW = "enrol", "renew"


@dataclass(frozen=True, slots=True)
class Token:
    """What the device is given. ``url`` is the gateway's enrolment address; ``expires`` is in Unix seconds."""

    id: bytes
    secret: bytes
    device: str
    url: str
    ca_digest: bytes
    owner_ed25519: bytes
    owner_x25519: bytes
    expires: int

    def __repr__(self) -> str:
        return f"Token({self.id.hex()}, {self.device!r}, secret hidden)"

    @property
    def owner(self) -> PublicIdentity:
        """The owner to pin."""
        return PublicIdentity("owner", "owner", self.owner_ed25519, self.owner_x25519)

    def to_text(self) -> str:
        """The one line that is handed over."""
        raw = cbor.encode({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        return PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("=")


def read_token(text: str) -> Token:
    """Parse a token's text, or raise WireError."""
    text = text.strip()
    if len(text) > MAX_TOKEN_CHARS or not text.startswith(PREFIX):
        raise WireError("not an enrolment token", hint="it begins with edgepriv-token-1:")
    body = text[len(PREFIX) :]
    try:
        raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        raise WireError("the enrolment token is damaged") from None
    token = message.from_map(Token, cbor.decode_map(raw, max_bytes=MAX_TOKEN_CHARS))
    lengths = [
        len(token.id),
        len(token.secret),
        len(token.ca_digest),
        len(token.owner_ed25519),
        len(token.owner_x25519),
    ]
    if lengths != [ID_BYTES, SECRET_BYTES, 32, 32, 32] or not token.device.startswith("dev-"):
        raise WireError("the enrolment token is damaged")
    if not NAME.fullmatch(token.device[4:]) or not token.url.startswith("https://"):
        raise WireError("the enrolment token is damaged")
    return token


@message.message("enrol-request")
class EnrolRequest:
    """A device asks for its certificate. ``proof`` is Ed25519 by its new identity over `proof_bytes`."""

    token_id: bytes
    secret: bytes
    request: bytes
    ed25519: bytes
    x25519: bytes
    proof: bytes


@message.message("renew-request")
class RenewRequest:
    """An enrolled device asks for a new certificate of its TLS key. ``proof``: Ed25519 over `renewal_bytes`."""

    name: str
    request: bytes
    proof: bytes


@message.message("enrol-answer")
class EnrolAnswer:
    """Certificate, CA and the CA of the broker (PEM), and the gateway's trust list (the device verifies it).

    The last two may be empty: the broker has no TLS, or the gateway no list yet.
    """

    name: str
    certificate: bytes = sized(16 << 10)
    ca: bytes = sized(16 << 10)
    broker_ca: bytes = sized(64 << 10)
    trust: bytes = sized(4 << 20)


def proof_bytes(token_id: bytes, request: bytes, ed25519: bytes, x25519: bytes) -> bytes:
    """What a device signs: it holds the identity key and means this TLS key and this token."""
    return token_id + hashlib.sha256(request).digest() + ed25519 + x25519


def renewal_bytes(name: str, request: bytes) -> bytes:
    """What an enrolled device signs to renew: its name and the request, which its TLS key signed."""
    return name.encode() + b"\x00" + hashlib.sha256(request).digest()
