"""The trust list as a file that changes: reloads it, remembers the highest version, keeps the last good one.

Every party uses this, so that a rolled-back, expired or forged file is refused everywhere by the same rules. A bad
new file does not take a running party down: the list in force stays, the error is kept for the status, and the list
in force still expires.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from edgepriv.errors import EdgeprivError, KeyFileError, MissingFileError, TrustError
from edgepriv.keys import load_public
from edgepriv.wire.trust import MAX_BYTES, TrustList, read_trust

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class TrustFile:
    """Reads ``trust.cbor`` under a pinned owner key; ``state`` is the file that remembers the highest version."""

    def __init__(self, path: Path, owner: Path, state: Path, *, clock: Callable[[], float]) -> None:
        public = load_public(owner)
        if public.role != "owner":
            raise KeyFileError(f"{owner} is the key of {public.name}, not of an owner")
        self._path, self._state, self._clock, self._owner = path, state, clock, public.ed25519
        self._stamp: tuple[int, int, int] | None = None
        self._trust: TrustList | None = None
        self.error = ""

    def current(self) -> TrustList:
        """The list in force; looks at the file again when it has changed.

        Raises:
            MissingFileError: there has never been a file.
            TrustError: there is no valid list in force, or it has expired since.
        """
        stamp = self._stat()
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

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            info = self._path.stat()
        except OSError:
            return None
        return (info.st_mtime_ns, info.st_size, info.st_ino)

    def _read(self) -> TrustList:
        try:
            with self._path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise MissingFileError(
                f"no trust list at {self._path}", hint="the owner makes it: edgepriv owner sign"
            ) from error
        trust = read_trust(raw, self._owner, now=self._clock(), min_version=self._seen())
        self._remember(trust.version)
        return trust

    def _seen(self) -> int:
        try:
            return int(self._state.read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            raise TrustError(f"{self._state} is damaged", hint="it holds the highest trust version seen") from None

    def _remember(self, version: int) -> None:
        if version == (self._seen() if self._state.is_file() else -1):
            return
        temporary = self._state.with_name(self._state.name + ".part")
        with temporary.open("w") as file:
            file.write(str(version))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._state)
