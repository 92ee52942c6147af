"""What the model store remembers: one small file, replaced atomically and changed under a lock.

Two processes share a store: the runtime, and the one-shot process that installs. Both locks are the kernel's, on an
open folder, and end with their process however it ends:

* ``changing`` (the store's folder), for a moment: who changes the state sees it as the other process left it;
* ``alone`` (``versions``), for the whole of an installation: nobody else unpacks or removes anything there meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING

from edgepriv import files
from edgepriv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_REASONS = 32
NEWER = ("permission", "good_permission")


@dataclass(frozen=True, slots=True)
class State:
    """The whole durable state.

    ``permission`` and ``good_permission`` choose the permissions of ``current`` and ``last_good`` by the beginning of
    their SHA-256; empty is the single one of a store that an older edgepriv wrote. ``trial`` is ``current`` or empty.
    """

    current: str = ""
    last_good: str = ""
    trial: str = ""
    attempts: int = 0
    min_version: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    floor_s: int = 0
    permission: str = ""
    good_permission: str = ""

    def refusing(self, attempt: str, reason: str) -> State:
        """With one reason more; the oldest are forgotten."""
        return replace(self, refused=dict(list({**self.refused, attempt: reason}.items())[-MAX_REASONS:]))

    def accepting(self, attempt: str) -> State:
        """Without this attempt's reason: it runs after all."""
        return replace(self, refused={name: reason for name, reason in self.refused.items() if name != attempt})


@dataclass(frozen=True, slots=True)
class Candidate:
    """A delivery as one permission opens it: by name (SHA-256 of the file, hex); ``permission`` None: there is none."""

    name: str
    permission: bytes | None

    @property
    def chosen(self) -> str:
        """How the state names the permission."""
        return "" if self.permission is None else hashlib.sha256(self.permission).hexdigest()[:16]

    @property
    def attempt(self) -> str:
        """What a refusal is filed under: another permission for the same delivery is another attempt."""
        return self.name if self.permission is None else f"{self.name}:{self.chosen}"


class StateFile:
    """``state.json`` of the store in ``folder``, which exists."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "state.json"
        self._alone = False

    def read(self) -> State:
        """What is there; an empty state where there is nothing (DataError: damaged)."""
        if not self._path.is_file():
            return State()
        try:
            stored = json.loads(self._path.read_text())
            return State(**{one.name: stored[one.name] for one in fields(State) if one.name in stored})
        except (ValueError, TypeError) as error:
            raise DataError(f"{self._path} is damaged", hint="remove the folder and fetch the model again") from error

    def write(self, state: State) -> None:
        """Replace it, within `changing`; after this returns, a cut of power cannot lose it."""
        stored = {name: value for name, value in asdict(state).items() if value or name not in NEWER}
        files.replace(self._path, json.dumps(stored).encode())

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Nobody else changes the state meanwhile; waits its turn. Not to be nested."""
        number = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX)
            yield
        finally:
            os.close(number)

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether nobody else installs; then nobody else begins to while the block lasts. May be nested."""
        if self._alone:
            yield True
            return
        number = os.open(self._folder / "versions", os.O_RDONLY)
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._alone = True
            yield self._alone
        finally:
            self._alone = False
            os.close(number)
