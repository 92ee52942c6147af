"""A trusted reference update for FLTrust, signed by who made it: the risk service, or a canary device.

File or field: canonical CBOR ``[body, signature]`` with a `Reference` as body; the update itself is bytes of
`edgepriv.wire.update` and is named by its SHA-256. A statement is good for one set of global weights (``base``), so an
old reference cannot be played against newer weights, and until ``expires``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepriv.errors import TrustError, WireError
from edgepriv.wire import cbor, message

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edgepriv.keys import Identity
    from edgepriv.wire.trust import TrustList

USE = "round-reference"
MAX_BYTES = 4096


@message.message("round-reference")
class Reference:
    """``base``: SHA-256 of the weights that ``update`` (SHA-256) starts from. Times are Unix seconds."""

    sender: str
    base: bytes
    update: bytes
    issued: float
    expires: float


def sign_reference(reference: Reference, identity: Identity) -> bytes:
    """Encode and sign a statement."""
    body = message.encode(reference)
    return cbor.encode([body, identity.sign(USE, body)])


def read_reference(raw: bytes, trust: TrustList, *, senders: Iterable[str], now: float) -> Reference:
    """Check a statement.

    Args:
        raw: the bytes.
        trust: the list in force.
        senders: full names that may make references; empty: every risk service in the list.
        now: Unix seconds.

    Raises:
        WireError: malformed, or expired.
        TrustError: its sender is not listed, is revoked, or may not make references here.
        AuthenticationError: its sender did not sign this.
    """
    match cbor.decode(raw, max_bytes=MAX_BYTES):
        case [bytes() as body, bytes() as signature]:
            reference = message.decode(body)
        case _:
            raise WireError("not a reference statement")
    if not isinstance(reference, Reference) or not len(reference.base) == len(reference.update) == 32:
        raise WireError("not a reference statement")
    allowed = set(senders)
    party = trust.party(reference.sender, *(("risk", "device") if allowed else ("risk",)))
    if allowed and party.name not in allowed:
        raise TrustError(f"{party.name} may not make references here", hint="name it in [rounds] references")
    party.verify(USE, body, signature)
    if not reference.issued <= now + 300 or now >= reference.expires:
        raise WireError("a reference statement that is not yet, or no longer, good")
    return reference
