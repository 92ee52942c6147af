"""Newer trust lists by way of the gateway, which can deliver them and can neither make nor change one.

The gateway tells by a notice which list it holds (version, SHA-256, size). A device with an older one fetches it and
asks its `TrustFile` to adopt it: the owner's signature, the expiry and a higher version decide there. What was refused
once is not fetched again, so that a gateway that offers rubbish costs one download for each different rubbish.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from edgepriv.errors import TrustError, WireError
from edgepriv.wire.trust import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgepriv.device.fetch import Fetcher
    from edgepriv.trust_file import TrustFile
    from edgepriv.wire.trust import TrustList

log = logging.getLogger(__name__)
MAX_REFUSED = 64


class TrustUpdates:
    """Fetches the list that the gateway names, and has it judged; ``adopted`` hears of a list that is now in force."""

    def __init__(self, trust: TrustFile, fetcher: Fetcher, adopted: Callable[[TrustList], None]) -> None:
        self._trust, self._fetcher, self._adopted = trust, fetcher, adopted
        self._wanted: tuple[bytes, int] | None = None
        self._refused: OrderedDict[bytes, None] = OrderedDict()
        self.counters = {"trust_adopted": 0, "trust_refused": 0}

    @property
    def version(self) -> int:
        """Version of the list in force."""
        return self._trust.current().version

    def named(self, detail: dict[str, Any]) -> None:
        """The gateway says which list it holds (WireError: it says so in a wrong form)."""
        match detail:
            case {"version": int() as version, "digest": bytes() as digest, "size": int() as size}:
                if len(digest) != 32 or not 0 < size <= MAX_BYTES:
                    raise WireError("a trust list of a wrong size")
            case _:
                raise WireError("a trust list without version, digest or size")
        if version <= self.version or digest in self._refused or (digest, size) == self._wanted:
            return
        if self._wanted is not None:
            self._fetcher.drop(self._wanted[0])
        self._wanted = (digest, size)

    def step(self) -> None:
        """Adopt the list when its download is complete; a full disk leaves it for the next step (OSError)."""
        if self._wanted is None:
            return
        path = self._fetcher.want(*self._wanted)
        if path is None:
            return
        try:
            trust = self._trust.adopt(path.read_bytes())
        except TrustError as error:
            self._refuse(self._wanted[0], error)
        else:
            self.counters["trust_adopted"] += 1
            log.warning("trust list version %d is in force", trust.version)
            self._adopted(trust)
        self._wanted = None
        path.unlink(missing_ok=True)

    def _refuse(self, digest: bytes, error: TrustError) -> None:
        self.counters["trust_refused"] += 1
        log.error("a trust list from the gateway was refused: %s", error)
        self._refused[digest] = None
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)
