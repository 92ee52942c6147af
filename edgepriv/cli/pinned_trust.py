"""Reading ``trust.cbor`` once, for a command: under the pinned owner key, rollback guard beside it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from edgepriv.errors import TrustError
from edgepriv.trust_file import TrustFile

if TYPE_CHECKING:
    from pathlib import Path

    from edgepriv.wire.trust import TrustList


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
