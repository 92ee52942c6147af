"""The runtime: one ``step`` moves data through the stages in the order of this folder's file list.

capture > infer > release > seal > spool > publish. A step takes at most one frame, drains what the gateway sent, and
sends what may be sent; it never blocks and has no thread, clock, store or link of its own, so the simulator runs this
very function a thousand times over. What goes wrong with one frame is counted and the next frame follows; what must
stop the device (no trust, no key, no model) is raised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv.device.release import release
from edgepriv.device.seal import ModelLabel, SealedItem
from edgepriv.doctor import certificate_expiry
from edgepriv.errors import (
    AuthenticationError,
    DataError,
    MissingFileError,
    ReplayError,
    StorageFullError,
    WireError,
)
from edgepriv.wire import messages, topics
from edgepriv.wire.messages import Ack, Chunk, Grant, Notice, Reply, RoundMessage, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edgepriv.device.capture import Frame, FrameSource
    from edgepriv.device.config import DeviceConfig
    from edgepriv.device.fetch import Fetcher
    from edgepriv.device.indicator import OutputIndicator
    from edgepriv.device.infer import Inference, Inferer
    from edgepriv.device.learn import Learner
    from edgepriv.device.ledger import SceneLedger
    from edgepriv.device.model_keeper import ModelKeeper
    from edgepriv.device.publish import Publisher
    from edgepriv.device.release import Released, ReleasePolicy
    from edgepriv.device.seal import Sealer
    from edgepriv.device.spool import Spool
    from edgepriv.device.trust_updates import TrustUpdates
    from edgepriv.mqtt import Inbound, Link
    from edgepriv.wire.link import LinkSession

log = logging.getLogger(__name__)
FEDERATED_POLICY = "argmax"


@dataclass(slots=True)
class Stages:
    """The parts of one device, in the order in which data meets them."""

    source: FrameSource
    inferer: Inferer
    policy: ReleasePolicy
    ledger: SceneLedger | None
    sealer: Sealer
    spool: Spool
    publisher: Publisher
    fetcher: Fetcher
    learner: Learner | None
    link: Link
    indicator: OutputIndicator | None = None
    trust: TrustUpdates | None = None
    keeper: ModelKeeper | None = None


class DeviceRuntime:
    """One device. Call `step` in a loop; it returns whether it found anything to do."""

    def __init__(self, name: str, config: DeviceConfig, stages: Stages, *, clock: Callable[[], float]) -> None:
        self.name, self.config, self.stages, self._clock = name, config, stages, clock
        self.counters: Counter[str] = Counter()
        self._sessions: dict[bytes, LinkSession] = {}
        self._uncommitted, self._last_commit = 0, clock()
        self._last_frame = self._last_status = -1e18
        self._generation = -1
        self.capturing = True
        self._down = topics.down(name)
        stages.link.subscribe(self._down)
        self._renew(force=False)
        stages.spool.commit()

    # --- the step -----------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do what can be done now, without waiting; True when something was done."""
        now = self._clock()
        worked = self._receive(now)
        self._keep_model(now)
        if self.capturing and not self.stages.inferer.closed and now - self._last_frame >= self.config.run.interval_s:
            worked |= self._take_frame(now)
        self._commit(now)
        self._learn(now)
        self._status(now)
        return self.stages.publisher.step(self.stages.sealer.epoch_digest, now) or worked

    def finish(self) -> None:
        """Make everything durable and let go of camera, spool and link."""
        self.stages.spool.close()
        self.stages.source.close()
        self.stages.link.close()

    def _learn(self, now: float) -> None:
        """Downloads and rounds; a full disk costs this device its part in a round and nothing else."""
        if (learner := self.stages.learner) is not None:
            with self._spared():
                learner.step(now)
        if (trust := self.stages.trust) is not None:
            with self._spared():
                trust.step()
        with self._spared():
            self.stages.fetcher.step(now)

    def _keep_model(self, now: float) -> None:
        """Which model may run now: an expired permission closes the session, a delivery replaces it."""
        keeper = self.stages.keeper
        if keeper is None:
            return
        with self._spared():
            keeper.step(now)
        if self.stages.learner is not None and keeper.inferer.digest != self.stages.inferer.digest:
            with self._spared():
                self.stages.learner.model_changed(keeper.inferer.spec.trainable, keeper.inferer.digest)
        self.stages.inferer = keeper.inferer

    @contextlib.contextmanager
    def _spared(self) -> Iterator[None]:
        """A full disk is counted here and ends nothing: what it did not take comes again. Other errors are raised."""
        try:
            yield
        except StorageFullError as error:
            self._reject("rejected_storage", error)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                raise
            self._reject("rejected_storage", error)

    # --- a frame's way ------------------------------------------------------------------------------------

    def _take_frame(self, now: float) -> bool:
        frame = self._capture()
        if frame is None:
            return False
        self._last_frame = now
        try:
            released = self._judge(frame)
            if released is not None:
                self._keep(released)
        except DataError as error:
            self._reject("rejected_data", error)
        except StorageFullError as error:
            self._reject("rejected_storage", error)
        return True

    def _capture(self) -> Frame | None:
        source, limit = self.stages.source, self.config.run.frames
        if (limit and self.counters["captured"] + self.counters["rejected_capture"] >= limit) or source.exhausted:
            self.capturing = False
            return None
        try:
            frame = source.read()
        except (DataError, MissingFileError) as error:
            self._reject("rejected_capture", error)
            return None
        if frame is not None:
            self.counters["captured"] += 1
        return frame

    def _judge(self, frame: Frame) -> Released | None:
        """Infer and release; None where the limit of an inference or the scene's budget is passed (nothing leaves)."""
        inference = self.stages.inferer(frame)
        if self._looks_vicious(inference) and self.config.release.refuse_suspicious:
            return None
        policy, inference = self._with_head(inference)
        released = release(policy, inference)
        if 0 < self.config.release.max_bits_per_inference < released.bits - 1e-9:
            self.counters["refused_bits"] += 1
            return None
        if self.stages.ledger is not None and not self.stages.ledger.allow(frame, released.bits):
            self.counters["refused_budget"] += 1
            return None
        return released

    def _looks_vicious(self, inference: Inference) -> bool:
        """Whether the outputs of late differ from an honest model's: counted, and a warning, never a proof."""
        indicator = self.stages.indicator
        if indicator is None or not len(inference.logits):
            return False
        indicator.observe(inference.logits)
        self.counters["suspicious_outputs"] += indicator.suspicious
        return indicator.suspicious

    def _with_head(self, inference: Inference) -> tuple[ReleasePolicy, Inference]:
        """Serve the federated head where there is one, under argmax only: it has not been audited."""
        learner, policy = self.stages.learner, self.stages.policy
        if learner is None:
            return policy, inference
        learner.observe(inference, f"{inference.frame.index}")
        logits = learner.logits(inference)
        if logits is None or policy.name != FEDERATED_POLICY:
            return policy, inference
        return policy, dataclasses.replace(inference, logits=logits)

    def _keep(self, released: Released) -> None:
        self._renew()
        model = ModelLabel(self.stages.inferer.spec.id, self.stages.inferer.digest)
        scene = self.stages.ledger.scene_id if self.stages.ledger is not None else b""
        self.stages.spool.add(self.stages.sealer.seal(released, model, scene))
        self._uncommitted += 1
        self.counters["accepted"] += 1

    def _renew(self, *, force: bool = False) -> None:
        records = self.stages.sealer.renew(force=force)
        if records:
            try:
                self.stages.spool.add(records)
                self._make_durable()  # the record is durable before anything that needs it
            except StorageFullError:
                self.stages.sealer.undo_renewal()  # the old epoch goes on carrying messages; no frame is sealed now
                raise
            session = self.stages.sealer.session
            self._sessions = dict([*self._sessions.items(), (session.epoch_id, session)][-2:])
            self.stages.spool.drop_finished_epochs(self.stages.sealer.epoch_digest)
            self.counters["epochs"] += 1

    def _commit(self, now: float) -> None:
        spool = self.config.spool
        due = self._uncommitted >= spool.commit_frames or now - self._last_commit >= spool.commit_s
        if due or not self.capturing:
            try:
                self._make_durable()
            except StorageFullError as error:
                log.warning("frames were not kept: %s", error)
            self._last_commit = now

    def _make_durable(self) -> None:
        """Commit the spool; where that fails, the frames since the last commit were not accepted."""
        uncommitted, self._uncommitted = self._uncommitted, 0
        try:
            self.stages.spool.commit()
        except StorageFullError:
            self.counters["accepted"] -= uncommitted
            self.counters["rejected_storage"] += uncommitted
            raise

    def _reject(self, counter: str, error: Exception) -> None:
        self.counters[counter] += 1
        log.warning("%s: %s", counter, error)

    # --- what the gateway says ----------------------------------------------------------------------------

    def _receive(self, now: float) -> bool:
        inbound = self.stages.link.receive()
        for packet in inbound:
            try:
                with self._spared():  # a chunk or a round's state that the disk did not take comes again
                    self._dispatch(self._open(packet), now)
            except ReplayError:
                self.counters["down_replayed"] += 1
            except AuthenticationError:
                self.counters["down_forged"] += 1
            except WireError as error:
                self.counters["down_malformed"] += 1
                log.warning("from the gateway: %s", error)
        return bool(inbound)

    def _open(self, packet: Inbound) -> Any:
        if not topics.is_down(packet.topic, self.name):
            raise WireError("not this device's topic")
        from edgepriv.wire.link import epoch_of

        session = self._sessions.get(epoch_of(packet.payload))
        if session is None:
            raise WireError("a message of an epoch that this process does not hold")
        return messages.decode(session.open(packet.topic, packet.payload))

    def _dispatch(self, message: Any, now: float) -> None:
        match message:
            case Ack():
                self._acknowledged(message)
            case Grant():
                self.stages.publisher.on_grant(message, now)
            case Chunk():
                self.stages.fetcher.on_chunk(message)
            case RoundMessage() if self.stages.learner is not None:
                self.stages.learner.receive(message, now)
            case Reply() if self.stages.keeper is not None:
                self.stages.keeper.on_reply(message)
            case Notice(code="unknown-epoch"):
                self.stages.publisher.forget_epochs()
                self.counters["notices"] += 1
            case Notice(code="trust-list", detail=detail) if self.stages.trust is not None:
                self.stages.trust.named(detail)
            case Notice(code=code, text=text):
                self.counters["notices"] += 1
                log.warning("the gateway says %s: %s", code, text)
            case _:
                raise WireError("a message that no gateway sends to a device")

    def _acknowledged(self, ack: Ack) -> None:
        outcome = self.stages.publisher.on_ack(ack)
        self.counters[f"acked_{outcome}" if outcome else "ack_of_nothing"] += 1

    # --- status and updates -------------------------------------------------------------------------------

    def _status(self, now: float) -> None:
        link = self.stages.link
        known = self.stages.publisher.epoch_known(self.stages.sealer.epoch_digest)
        due = now - self._last_status >= self.config.run.status_s or link.generation != self._generation
        if due and known and self.stages.publisher.send_message(self.status(now)):
            self._last_status, self._generation = now, link.generation

    def status(self, now: float) -> Status:
        """Counters and what runs here."""
        spool = self.stages.spool
        counters: dict[str, Any] = {**self.counters, **spool.counters()}
        counters |= {"queue_items": spool.items, "queue_bytes": spool.stored_bytes}
        expires = certificate_expiry(self.config.broker.certificate)
        if expires:
            counters["certificate_days"] = round((expires - now) / 86_400, 1)
        trust, learner = self.stages.trust, self.stages.learner
        if trust is not None:
            counters |= trust.counters
        if self.stages.keeper is not None:
            counters |= self.stages.keeper.counters
        if learner is not None:
            counters |= learner.counters
        return Status(
            at=now,
            firmware=_version(),
            model=self.stages.inferer.spec.id,
            model_digest=self.stages.inferer.digest,
            level=self.stages.inferer.level,
            trust_version=trust.version if trust is not None else 0,
            counters=counters,
        )

    def spool_upload(self, number: int, payload: bytes) -> None:
        """Store a round's upload before its first chunk leaves; without room the device sits the round out."""
        import hashlib

        digest = hashlib.sha256(payload).digest()
        try:
            self.stages.spool.add([SealedItem("update", digest, self.stages.sealer.epoch_digest, payload, number)])
            self._make_durable()
        except StorageFullError as error:
            self._reject("rejected_storage", error)

    def drop_upload(self, number: int) -> None:
        """Forget a round's upload that will not be needed (StorageFullError: it is still there)."""
        self.stages.spool.remove_round(number)
        self._make_durable()


def _version() -> str:
    from importlib.metadata import version

    return version("edgepriv")
