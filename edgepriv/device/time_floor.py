"""The device's lower bound of the time: what a bad clock and a lying gateway cannot move.

The latest time that a trusted signature stated (owner's trust list, issuer's manifest or permission, risk verdict),
kept on the disk and advanced by the monotonic clock while the process runs. Never by the system clock, because one bad
NTP step would expire everything for ever. Root on the device can set the file back: expiry is advisory against root.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from edgepriv import files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class TimeFloor:
    """Seconds since 1970 that have certainly passed."""

    def __init__(self, path: Path, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._path, self._monotonic = path, monotonic
        self._base, self._since = float(self._stored()), monotonic()

    def _stored(self) -> int:
        try:
            return max(0, int(self._path.read_text()))
        except (OSError, ValueError):
            return 0

    def now(self) -> int:
        """The floor at this moment."""
        return int(self._base + max(0.0, self._monotonic() - self._since))

    def raise_to(self, seconds: int) -> None:
        """A trusted signature stated this time; the floor never goes back."""
        if seconds > self.now():
            self._base, self._since = float(seconds), self._monotonic()

    def save(self) -> None:
        """Keep it on the disk, if it is later than what is there."""
        if self.now() > self._stored():
            files.replace(self._path, str(self.now()).encode())
