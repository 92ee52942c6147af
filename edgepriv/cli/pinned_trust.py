"""Reading ``trust.cbor`` once, for a command: under the pinned owner key, rollback guard beside it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from edgepriv.errors import TrustError
from edgepriv.trust_file import TrustFile

if TYPE_CHECKING:
    from pathlib import Path

    from edgepriv.client import GatewayClient
    from edgepriv.wire.trust import TrustList

LOG = logging.getLogger(__name__)


def adopt_newer(client: GatewayClient, trust: TrustFile) -> bool:
    """Take the owner's newer list from the gateway, where it has one; what he did not sign is refused.

    Returns:
        Whether another list is in force now.
    """
    raw = client.trust_above(trust.current().version)
    if raw is None:
        return False
    try:
        version = trust.adopt(raw).version
    except TrustError as error:
        LOG.warning("a trust list from the gateway was refused: %s", error)
        return False
    LOG.warning("trust list version %d is in force", version)
    return True


def read(path: Path, owner_pub: Path, *, seen: Path | None = None) -> TrustList:
    """Verify a trust list against the pinned owner key and remember its version.

    Args:
        path: ``trust.cbor``.
        owner_pub: the owner's public key file, brought here out of band.
        seen: where the highest version seen is kept; by default ``<owner_pub>.seen``.

    Raises:
        MissingFileError, KeyFileError, TrustError: what is wrong and what to do.
    """
    state = seen or owner_pub.with_name(owner_pub.name + ".seen")
    try:
        return TrustFile(path, owner_pub, state, clock=time.time).current()
    except OSError as error:
        raise TrustError(
            f"cannot write {state}: {error.strerror}", hint="the highest list version seen must be kept there"
        ) from None
