"""The model that may run now: opens it, closes its session when the permission expires, opens what replaces it.

Expiry is checked hourly and at every switch, against the `TimeFloor`. A closed session is never used again; the device
goes on sending what it has and takes no further frame until a new permission or model can be opened (tried hourly, and
when a delivery was installed).
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

from edgepriv.device import protected
from edgepriv.device.time_floor import TimeFloor
from edgepriv.errors import EdgeprivError, TrustError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgepriv.device.config import DeviceConfig
    from edgepriv.device.infer import Inferer
    from edgepriv.device.model_updates import ModelUpdates
    from edgepriv.keys import Identity
    from edgepriv.wire.messages import Reply
    from edgepriv.wire.trust import TrustList

log = logging.getLogger(__name__)
CHECK_S = 3600.0


class ModelKeeper:
    """Holds ``inferer``. ``accept`` is asked before a model replaces the first one; ``updates`` brings new ones."""

    def __init__(
        self,
        config: DeviceConfig,
        identity: Identity,
        trust: Callable[[], TrustList],
        accept: Callable[[Inferer], None],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._identity, self._trust, self._accept = config, identity, trust, accept
        self._monotonic, self._checked = monotonic, monotonic()
        self.floor = TimeFloor(config.device.state / "time-floor", monotonic=monotonic)
        self.updates: ModelUpdates | None = None
        self.inferer = self._open()

    def _open(self) -> Inferer:
        listed = self._trust()
        self.floor.raise_to(listed.issued)
        inferer = protected.open_inferer(self._config, self._identity, listed, self.floor.now(), accept=self._check)
        self.floor.save()
        return inferer

    def _check(self, inferer: Inferer) -> None:
        self._accept(inferer)
        self.floor.raise_to(inferer.issued_s)
        if self._expired(inferer):
            inferer.close()
            raise TrustError("the permission has expired", hint="ask the owner: edgepriv grant")

    def _expired(self, inferer: Inferer) -> bool:
        return 0 < inferer.expires_s <= self.floor.now()

    def step(self, now: float) -> None:
        """Check what is due. ``now`` is the runtime's clock; expiry does not look at it."""
        if self.updates is not None and self.updates.step(now):
            self.reopen()
        if self._monotonic() - self._checked < CHECK_S:
            return
        self._checked = self._monotonic()
        with contextlib.suppress(EdgeprivError):  # as below
            self.floor.raise_to(self._trust().issued)
        self.floor.save()
        if self.inferer.closed or self._forbidden():
            self.reopen()

    def _forbidden(self) -> bool:
        """Whether the running model may run no longer: its permission has expired, or the owner has revoked it."""
        if self._expired(self.inferer):
            return True
        if not protected.is_store(self._config.model.path):
            return False
        try:
            listed = self._trust()
        except EdgeprivError:  # a list that has expired is the sealer's affair
            return False
        return protected.configured_store(self._config, self._identity, listed).revoked()

    def reopen(self) -> None:
        """Open what may run now in place of the running model; where nothing may, the session is closed."""
        forbidden = self.inferer.closed or self._forbidden()
        try:
            opened = self._open()
        except EdgeprivError as error:
            log.warning("%s: %s", "no model may run" if forbidden else "the running model stays", error)
            if forbidden:
                self.inferer.close()
        else:
            self.inferer.close()
            self.inferer = opened
        if self.updates is not None:
            self.updates.settle()

    def on_reply(self, reply: Reply) -> None:
        """An answer of the gateway to one of our questions."""
        if self.updates is not None:
            self.updates.on_reply(reply)

    @property
    def counters(self) -> dict[str, Any]:
        """For the status message."""
        found = {"model_closed": int(self.inferer.closed)}
        return found | (self.updates.counters if self.updates is not None else {})
