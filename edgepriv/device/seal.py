"""Stage 4, seal: the frame to its recipients, the output to the gateway; both sealed before they touch a disk.

Keys live in this process only. A new epoch begins at start, after a number of frames, after a time, and at once when
the trust list changes; its record is spooled before the first item that needs it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from edgepriv.cipher.epochs import DeviceEpoch
from edgepriv.cipher.picture import Picture
from edgepriv.wire import envelope, messages, topics
from edgepriv.wire.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgepriv.device.config import SealConfig
    from edgepriv.device.release import Released
    from edgepriv.keys import Identity
    from edgepriv.primitives import Alg
    from edgepriv.wire.link import LinkSession
    from edgepriv.wire.trust import TrustList


@dataclass(frozen=True, slots=True)
class SealedItem:
    """A thing for the spool. ``digest`` is what the gateway's acknowledgement must name; ``epoch`` its record's.

    A frame's ``payload`` is a view into the sealer's buffer: it is valid until the next frame is sealed.
    """

    kind: str  # epoch | output | frame | update
    digest: bytes
    epoch: bytes
    payload: bytes | memoryview
    round: int = 0


@dataclass(frozen=True, slots=True)
class ModelLabel:
    """What an output says about the model that made it."""

    id: str
    digest: bytes


class Sealer:
    """Seals what one device releases. ``next_epoch`` gives a number that never repeats, also across restarts."""

    def __init__(
        self,
        identity: Identity,
        trust: Callable[[], TrustList],
        gateway: str,
        config: SealConfig,
        *,
        shard: int,
        clock: Callable[[], float],
        next_epoch: Callable[[], int],
    ) -> None:
        self._identity, self._trust, self._gateway, self._config = identity, trust, gateway, config
        self._clock, self._next_epoch = clock, next_epoch
        self._topic = topics.up(identity.name, shard, "msg")
        self._epoch: DeviceEpoch | None = None
        self._previous: DeviceEpoch | None = None
        self._outputs = 0

    @property
    def session(self) -> LinkSession:
        """The link of the epoch in force (after the first `renew`)."""
        if self._epoch is None:
            raise RuntimeError("renew() opens the first epoch")
        return self._epoch.session

    @property
    def epoch_digest(self) -> bytes:
        """Digest of the record in force."""
        if self._epoch is None:
            raise RuntimeError("renew() opens the first epoch")
        return self._epoch.signed.digest

    def renew(self, *, force: bool = False) -> list[SealedItem]:
        """Open a new epoch when one is due; returns its record for the spool."""
        trust, now = self._trust(), self._clock()
        if self._epoch is not None and not force and not self._due(self._epoch, now, trust):
            return []
        self._previous = self._epoch
        self._epoch = DeviceEpoch.open(
            self._identity,
            trust,
            self._gateway,
            seq=self._next_epoch(),
            now=now,
            profile=self._config.profile,
            alg=None if self._config.alg == "auto" else cast("Alg", self._config.alg),
            max_frames=self._config.frames_per_epoch,
        )
        signed = self._epoch.signed
        return [SealedItem("epoch", signed.digest, signed.digest, signed.raw)]

    def undo_renewal(self) -> None:
        """Go back to the epoch before: the new record could not be stored, so nothing may be sealed under it."""
        self._epoch, self._previous = self._previous, None

    def _due(self, epoch: DeviceEpoch, now: float, trust: TrustList) -> bool:
        old = now - epoch.signed.record.created >= self._config.epoch_s
        return old or epoch.needs_rotation(now, trust)

    def seal(self, released: Released, model: ModelLabel, scene: bytes) -> list[SealedItem]:
        """Seal one frame and its output."""
        items = [self.seal_output(released, model, scene)]
        if self._config.images and self._epoch is not None:
            raw = self._epoch.seal_view(_picture(released))
            items.append(SealedItem("frame", envelope.parse(raw).digest(), self.epoch_digest, raw))
        return items

    def seal_output(self, released: Released, model: ModelLabel, scene: bytes) -> SealedItem:
        """Seal the output alone, as the link message that will be sent as it is."""
        counter, self._outputs = self._outputs, self._outputs + 1
        output = Output(
            counter=counter,
            at=released.inference.frame.at,
            model=model.id,
            model_digest=model.digest,
            task=released.task,
            policy=released.policy,
            bits=released.bits,
            decimals=released.decimals,
            scene=scene,
            values=released.values,
        )
        raw = self.session.seal(self._topic, messages.encode(output))
        return SealedItem("output", hashlib.sha256(raw).digest(), self.epoch_digest, raw)


def _picture(released: Released) -> Picture:
    """What is sealed of a frame, with its time of capture."""
    frame = released.inference.frame
    if frame.encoded is not None:
        return Picture.of(frame.encoded, taken=frame.at)
    if frame.codec:
        return Picture(pixels=frame.pixels, codec=frame.codec, taken=frame.at)
    return Picture.of(frame.pixels, taken=frame.at)
