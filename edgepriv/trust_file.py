"""The trust list as a file that changes: reloads it, remembers the newest version, keeps the last good one.

Every party uses this, so that a rolled-back, expired or forged file is refused everywhere by the same rules. A bad
new file does not take a running party down: the list in force stays, the error is kept for the status, and the list
in force still expires. A list that came over the network (`TrustFile.adopt`) passes the same checks and lies beside
the state file, because a service may not write where the operator's file is; of the two the higher version counts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from edgepriv import files
from edgepriv.errors import EdgeprivError, KeyFileError, MissingFileError, TrustError
from edgepriv.keys import load_public
from edgepriv.wire.trust import MAX_BYTES, TrustList, read_trust

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Stamp = tuple[int, int, int] | None


class TrustFile:
    """Reads ``trust.cbor`` under a pinned owner key; ``state`` is the file that remembers the highest version."""

    def __init__(self, path: Path, owner: Path, state: Path, *, clock: Callable[[], float]) -> None:
        public = load_public(owner)
        if public.role != "owner":
            raise KeyFileError(f"{owner} is the key of {public.name}, not of an owner")
        self._path, self._state, self._clock, self._owner = path, state, clock, public.ed25519
        self._watched = os.fspath(path)  # asked for at every frame, and pathlib takes its time
        self._received = state.with_name(state.name + ".cbor")
        self._digest = state.with_name(state.name + ".digest")
        self._stamp: Stamp = None
        self._trust: TrustList | None = None
        self.error = ""

    def current(self) -> TrustList:
        """The list in force; looks at the operator's file again when it has changed.

        Raises:
            MissingFileError: there has never been a file.
            TrustError: there is no valid list in force, or it has expired since.
        """
        stamp = _stamp(self._watched)
        if stamp != self._stamp or self._trust is None:
            self._stamp = stamp
            try:
                self._trust, self.error = self._read(), ""
            except EdgeprivError as error:
                if self._trust is None:
                    raise
                self.error = str(error)
        if self._trust.expires <= self._clock():
            raise TrustError("the trust list has expired", hint="the owner signs a new one: edgepriv owner sign")
        return self._trust

    def adopt(self, raw: bytes) -> TrustList:
        """Take a list that somebody else brought, whoever that was: only the owner's signature counts.

        Raises:
            TrustError: not the owner's, damaged, expired, or not newer than the list in force; nothing has changed.
        """
        before = self.current()
        if len(raw) > MAX_BYTES:
            raise TrustError("the trust list is too large")
        trust = self._checked(raw)
        if trust.version <= before.version:
            raise TrustError(
                f"trust list version {trust.version} is not newer than {before.version}, which is in force"
            )
        files.replace(self._received, raw)
        self._stamp = None  # look again
        return self.current()

    def _read(self) -> TrustList:
        """The newer of the operator's and the received list; what is wrong with one does not hide the other."""
        found: list[tuple[TrustList, bytes]] = []
        failed: EdgeprivError | None = None
        for path in (self._path, self._received):
            try:
                raw = _content(path)
                found.append((read_trust(raw, self._owner, now=self._clock()), raw))
            except EdgeprivError as error:
                failed = failed or error
        if not found:
            raise failed or TrustError("there is no trust list")
        _, raw = max(found, key=lambda pair: pair[0].version)
        trust = self._checked(raw)
        if (trust.version, trust.digest) != self._seen():
            # Two files, so that the version before this one, which knows the number alone, can be gone back to.
            files.replace(self._digest, f"{trust.version} {trust.digest.hex()}".encode())
            files.replace(self._state, str(trust.version).encode())
        return trust

    def _checked(self, raw: bytes) -> TrustList:
        version, digest = self._seen()
        return read_trust(raw, self._owner, now=self._clock(), min_version=version, seen_digest=digest)

    def _seen(self) -> tuple[int, bytes]:
        """Version and digest of the newest list that was ever in force here."""
        try:
            version = int(self._state.read_text())
            of, _, digest = self._digest.read_text().partition(" ") if self._digest.is_file() else ("0", "", "")
            return version, bytes.fromhex(digest) if int(of) == version else b""
        except FileNotFoundError:
            return 0, b""
        except ValueError:
            raise TrustError(
                f"{self._state} is damaged, which says what lists were seen here",
                hint="restore it; or make sure that trust.cbor is the owner's newest, and delete it",
            ) from None


def _stamp(path: str) -> Stamp:
    try:
        info = os.stat(path)  # noqa: PTH116 - see `TrustFile`
    except OSError:
        return None
    return (info.st_mtime_ns, info.st_size, info.st_ino)


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise MissingFileError(f"no trust list at {path}", hint="the owner makes it: edgepriv owner sign") from error
