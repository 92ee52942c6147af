"""Opening a session with a gateway: a fresh link key, wrapped to the gateway and signed once by the party."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepriv import primitives
from edgepriv.errors import TrustError
from edgepriv.wire.epoch import AUTH_LINK_MAC, EPOCH_ID_BYTES, VERSION, EpochRecord, sign_epoch, wrap_info
from edgepriv.wire.link import LinkSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgepriv.keys import Identity
    from edgepriv.wire.epoch import SignedEpoch
    from edgepriv.wire.trust import TrustList

NO_FRAMES = "none"


def open_session(
    identity: Identity,
    trust: TrustList,
    gateway_name: str,
    *,
    seq: int,
    now: float,
    random: Callable[[int], bytes] = primitives.random_bytes,
) -> tuple[SignedEpoch, LinkSession]:
    """Open a link for a party that sends no frames (a recipient, the risk service).

    Returns:
        The signed record to publish on the ``epoch`` lane, and the party's end of the link.

    Raises:
        TrustError: the gateway or the party itself is not listed with these keys, or is revoked.
    """
    check_listed(identity, trust)
    epoch_id, k_link = random(EPOCH_ID_BYTES), random(primitives.KEY_BYTES)
    record = EpochRecord(
        version=VERSION,
        party=identity.name,
        gateway=gateway_name,
        epoch_id=epoch_id,
        seq=seq,
        created=int(now),
        max_frames=0,
        trust_version=trust.version,
        alg=primitives.AES_GCM,
        profile=NO_FRAMES,
        auth=AUTH_LINK_MAC,
        stanzas=(),
        link=wrap_link(trust, gateway_name, k_link, identity.name, epoch_id),
        commitment=b"",
    )
    return sign_epoch(record, identity), LinkSession(k_link, epoch_id, identity.name, side="party")


def check_listed(identity: Identity, trust: TrustList) -> None:
    """Refuse to speak for a name that the owner listed with other keys, or not at all."""
    listed = trust.party(identity.name)
    if (listed.ed25519, listed.x25519) != (identity.public.ed25519, identity.public.x25519):
        raise TrustError(
            f"the trust list has other keys for {identity.name}", hint="the owner adds this party's .pub file again"
        )


def wrap_link(trust: TrustList, gateway_name: str, k_link: bytes, party: str, epoch_id: bytes) -> bytes:
    """Wrap the link key to the gateway's key in the trust list."""
    gateway = trust.party(gateway_name, "gateway")
    return primitives.hpke_wrap(gateway.x25519, k_link, wrap_info("gwlink", party, epoch_id))
