"""Who the gateway believes: the owner's trust list, read again when its file changes.

Rules: the highest version seen is kept in the store, so a rolled-back file is refused; a file that is refused leaves
the list that was valid before in force until it expires. Every message asks `Roster.party`, so a revocation works at
ingest from the moment the new list is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepriv.errors import KeyFileError, MissingFileError, TrustError
from edgepriv.wire.trust import MAX_BYTES, TrustList, read_trust

if TYPE_CHECKING:
    from pathlib import Path

    from edgepriv.keys import Identity, PublicIdentity
    from gateway.store import Store

SEEN, SEEN_DIGEST = "trust_version", "trust_digest"


class Roster:
    """The trust list in force, with fast look-up by name."""

    def __init__(self, path: Path, owner: PublicIdentity, store: Store, *, now: float) -> None:
        self.path, self._owner, self._store = path, owner, store
        self._stamp: tuple[int, int] = (0, 0)
        self.last_error = ""
        self.raw = b""
        self.trust = self._read(now)
        self._parties = {p.name: p for p in self.trust.parties}

    def _read(self, now: float) -> TrustList:
        self._stamp = self._current_stamp()
        try:
            with self.path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise MissingFileError(
                f"cannot read the trust list {self.path}: {error.strerror}",
                hint="the owner makes it: edgepriv owner sign",
            ) from None
        version, digest = int(self._store.meta(SEEN) or 0), self._store.meta(SEEN_DIGEST) or b""
        trust = read_trust(raw, self._owner.ed25519, now=now, min_version=version, seen_digest=digest)
        self._store.set_meta(SEEN, trust.version)
        self._store.set_meta(SEEN_DIGEST, trust.digest)
        self.raw = raw
        return trust

    def _current_stamp(self) -> tuple[int, int]:
        try:
            stat = self.path.stat()
        except OSError:
            return (0, 0)
        return (stat.st_mtime_ns, stat.st_size)

    def reload(self, now: float, *, force: bool = False) -> bool:
        """Read the file where it changed; True when another list is in force. A refused file is noted, not raised."""
        if not force and self._current_stamp() == self._stamp:
            return False
        try:
            trust = self._read(now)
        except (MissingFileError, TrustError) as error:
            self.last_error = str(error)
            return False
        changed = trust.digest != self.trust.digest
        self.trust, self.last_error = trust, ""
        self._parties = {p.name: p for p in trust.parties}
        return changed

    def party(self, name: str, now: float) -> PublicIdentity:
        """A party that may speak now, or TrustError: unknown, revoked, or the list has expired."""
        if self.trust.expires <= now:
            raise TrustError("the trust list has expired", hint="the owner signs a new one: edgepriv owner sign")
        found = self._parties.get(name)
        if found is None or name in self.trust.revoked:
            return self.trust.party(name)  # raises with the exact reason
        return found

    def model_issuers(self) -> list[bytes]:
        """Ed25519 keys that may sign protected models: the owner's, and those of issuers that are not revoked."""
        return [self._owner.ed25519, *(party.ed25519 for party in self.trust.with_role("issuer"))]

    def check_self(self, identity: Identity) -> None:
        """Refuse to run under a key that the owner has not listed for this gateway (TrustError), or no gateway's."""
        if identity.public.role != "gateway":
            hint = "[gateway] identity names the file that edgepriv keys new --role gateway made"
            raise KeyFileError(f"this is the key of {identity.name}, not of a gateway", hint=hint)
        listed = self.trust.party(identity.name, "gateway")
        if (listed.ed25519, listed.x25519) != (identity.public.ed25519, identity.public.x25519):
            raise TrustError(
                f"the trust list has other keys for {identity.name}",
                hint="the owner adds this gateway's .pub file again",
            )
