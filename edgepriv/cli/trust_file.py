"""Reading ``trust.cbor`` for a command: pinned owner key, rollback guard beside the file."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from edgepriv.errors import MissingFileError, TrustError

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
    from edgepriv.keys import load_public
    from edgepriv.wire import trust as wire

    owner = load_public(owner_pub)
    if owner.role != "owner":
        raise TrustError(f"{owner_pub} is the key of a {owner.role}, not of an owner")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise MissingFileError(f"cannot read the trust list {path}: {error.strerror}") from None
    seen = seen or owner_pub.with_name(owner_pub.name + ".seen")
    highest = _version(seen)
    trust = wire.read_trust(raw, owner.ed25519, now=time.time(), min_version=highest)
    if trust.version > highest:
        _remember(seen, trust.version)
    return trust


def _version(seen: Path) -> int:
    try:
        return int(seen.read_text())
    except FileNotFoundError:
        return 0
    except (OSError, ValueError):
        raise TrustError(f"{seen} is damaged", hint="it holds the highest list version seen; restore it") from None


def _remember(seen: Path, version: int) -> None:
    """Persist the version atomically; where that is not possible the guard would be void, so it is an error."""
    partial = seen.with_name(seen.name + ".part")
    try:
        with partial.open("w") as file:
            file.write(f"{version}\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(seen)
    except OSError as error:
        raise TrustError(
            f"cannot write {seen}: {error.strerror}", hint="the highest list version seen must be kept there"
        ) from None
