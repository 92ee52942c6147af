"""The device's end of federated rounds: a pure, steppable object. No clock, link, file or thread of its own.

Use: hand every `RoundMessage` to `receive`, fetched global weights to `model_ready`, and carry out the actions that
come back, in order, after `state` was made durable where ``dirty`` says so.

Rules.
1. The owner's policy decides (`RoundPolicy`), never the announcement: which privacy is accepted, which tensors may be
   trained, the smallest cohort, the threshold, the privacy budget.
2. A round is answered once: its number must be above every number answered before, also after a restart.
3. The upload's bytes are made once. The runtime stores them before the first chunk and resumes the same bytes; a
   device that lost them sits the round out.
4. What a masked round needs (mask seeds, shares) lives in this object only and is gone with the process: such a
   device lets the others finish, which a threshold allows.
5. The device charges its own privacy ledger when the upload is released, so an aborted round counts.
6. A declined round says why; nothing here raises on what the gateway sends except WireError, which is counted.
   Whatever goes wrong in training costs this device its part in the round and nothing else.
7. A head belongs to the model whose features it was trained over. A round is over the model that ran when the round
   was announced, and over none but those that its weights name (`edgepriv.federated.lineage`), where they name any.
   When another model runs, a round without an upload is left, uploads that a later round could take are withdrawn,
   and what error feedback remembers is forgotten.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv.errors import EdgeprivError, RefusedError, WireError
from edgepriv.federated import compression
from edgepriv.federated.fixed_point import ring_of
from edgepriv.federated.layout import Layout
from edgepriv.federated.ledger import Ledger
from edgepriv.federated.lineage import named_models
from edgepriv.federated.local_recipe import LocalRecipe
from edgepriv.federated.local_update import LocalUpdate, RoundSettings, Trainer
from edgepriv.federated.noise import MIN_STEPS, device_deviation
from edgepriv.federated.privacy import clip_update, joint_multiplier, update_norm
from edgepriv.wire import cbor, rounds
from edgepriv.wire.rounds import RoundOpen, RoundResult
from edgepriv.wire.update import decode_update, encode_update

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgepriv.keys import Identity
    from edgepriv.wire.messages import RoundMessage
    from edgepriv.wire.trust import TrustList

log = logging.getLogger(__name__)
MAX_EPOCHS = 10_000  # an announcement must not keep a device busy for ever
STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")
EXPIRES_AFTER_DEADLINE_S = 60.0
MAX_MODEL_BYTES = 512 << 20
ROUNDS_REMEMBERED = 8  # of which it is known what model ran when they were announced
MODELS_REMEMBERED = 8


@dataclass(frozen=True, slots=True)
class RoundPolicy:
    """What the owner lets this device do in rounds; comes with the trust list's policy or the device's config.

    ``trainable``: tensor names, or prefixes that end in ``*``. ``privacy``: ``any`` or ``masked``. ``active``: the
    gateway may lie (threshold floor(2n/3)+1), else it is honest but curious (floor(n/2)+1). ``max_epsilon``: budget
    at ``delta``; None = rounds without noise are accepted. ``colluders``: how many devices of a cohort must at least be
    assumed to leave out their share of the noise.
    """

    trainable: tuple[str, ...] = ("head.*",)
    privacy: str = "any"
    min_cohort: int = 32
    active: bool = False
    max_epsilon: float | None = None
    delta: float = 1e-5
    max_model_bytes: int = MAX_MODEL_BYTES
    colluders: int = 0

    def allows(self, name: str) -> bool:
        """Say whether a tensor may be trained."""
        return any(name == p or (p.endswith("*") and name.startswith(p[:-1])) for p in self.trainable)


@dataclass(frozen=True, slots=True)
class Send:
    """Seal and send this message."""

    message: RoundMessage


@dataclass(frozen=True, slots=True)
class FetchModel:
    """Pull the global weights by digest, then call `Participant.model_ready`."""

    round: int
    digest: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Upload:
    """Store these bytes durably, then offer them (``Offer.what == "update"``) until they are acknowledged."""

    round: int
    payload: bytes
    meta: dict[str, Any]
    expires: float


@dataclass(frozen=True, slots=True)
class EndRound:
    """The round is over for this device: stop its download and delete the uploads of the rounds in ``drop``.

    ``adopt``: SHA-256 of the new global weights, or empty; ``model``: SHA-256 of the model that the round was over,
    None where this device cannot know. An upload that may still be taken by a later round stays.
    """

    round: int
    reason: str
    adopt: bytes = b""
    adopt_bytes: int = 0
    drop: tuple[int, ...] = ()
    model: bytes | None = None


Action = Send | FetchModel | Upload | EndRound


@dataclass
class _Running:
    """The round that this device is in."""

    opened: RoundOpen
    layout: Layout
    weights: dict[str, NDArray[Any]] | None = None
    uploaded: bool = False
    member: Any = None


class Participant:
    """One device in federated rounds, one round at a time. ``model``: SHA-256 of the model that makes its features."""

    def __init__(
        self,
        identity: Identity,
        trust: TrustList,
        policy: RoundPolicy,
        trainer: Trainer,
        *,
        state: bytes = b"",
        seed: int = 0,
        model: bytes = b"",
    ) -> None:
        self.identity, self.trust, self.policy, self.trainer = identity, trust, policy, trainer
        self.seed, self.model = seed, model
        self.ledger = Ledger()
        self.clips = True  # only the simulator's dishonest devices turn this off
        self.feedback: dict[str, NDArray[np.float32]] = {}
        self._last_round = -1
        self._running: _Running | None = None
        self._answer: Send | None = None
        self._uploads: dict[int, int] = {}  # round of an upload -> last round that may take it
        self._announced: dict[int, bytes] = {}  # round -> the model that ran when it was announced
        self.ran: tuple[bytes, ...] = ()  # models that ran before this one, the latest first
        self._counted = -1
        self.dirty = False
        self.counters = {"joined": 0, "declined": 0, "uploaded": 0, "done": 0, "aborted": 0, "refused": 0}
        if state:
            self._restore(state)
            self.model = self.model or model

    # --- durable state ------------------------------------------------------------------------------------

    def state(self) -> bytes:
        """What must survive a restart; clears ``dirty``. No secret is in it."""
        self.dirty = False
        body = {
            "last": self._last_round,
            "ledger": self.ledger.rows(),
            "model": self.model,
            "ran": list(self.ran),
            "announced": [list(row) for row in self._announced.items()],
            "uploads": [list(row) for row in self._uploads.items()],
        }
        return cbor.encode(body)

    def _restore(self, raw: bytes) -> None:
        body = cbor.decode_map(raw, max_bytes=1 << 20)
        self._last_round = int(body["last"])
        self.ledger = Ledger.from_rows(body["ledger"])
        self.model = body.get("model", b"")
        self.ran = tuple(body.get("ran", ()))
        self._announced = dict(body.get("announced", ()))
        self._uploads = dict(body.get("uploads", ()))

    @property
    def round(self) -> int | None:
        """The round that this device is in."""
        return self._running.opened.round if self._running else None

    # --- what arrives -------------------------------------------------------------------------------------

    def receive(self, outer: RoundMessage, now: float) -> list[Action]:
        """Handle a step from the gateway.

        Args:
            outer: the message, as opened from the link.
            now: Unix seconds.

        Raises:
            WireError: malformed, or a step that does not belong to the running round.
        """
        body = rounds.read_step(outer, up=False)
        if isinstance(body, RoundOpen):
            return self._open(body, now)
        if isinstance(body, RoundResult):
            return self._result(outer.round, body)
        running = self._running
        if running is None or running.opened.round != outer.round or running.member is None:
            raise WireError("a step of a round that this device is not in")
        try:
            actions = [Send(m) for m in running.member.receive(body)]
        except WireError:
            raise
        except EdgeprivError as error:
            self.counters["refused"] += 1
            return [] if running.uploaded else self._sit_out(running, str(error))
        return [*actions, *self._advance()]

    def model_ready(self, round_number: int, raw: bytes) -> list[Action]:
        """Take the fetched global weights (their digest is checked by who fetched them)."""
        running = self._running
        if running is None or running.opened.round != round_number or running.uploaded:
            return []
        try:
            update = decode_update(raw, max_bytes=self.policy.max_model_bytes)
            running.layout.check_weights(update.tensors)
            models = named_models(update.meta)
        except WireError as error:
            return self._sit_out(running, f"the global weights are not usable: {error}")
        if models and self.model not in models:
            return self._sit_out(running, "the global weights are for another model than this device runs")
        running.weights = update.tensors
        return self._advance()

    def model_refused(self, round_number: int, reason: str) -> list[Action]:
        """The global weights cannot be had: this device sits the round out."""
        running = self._running
        return self._sit_out(running, reason) if running and running.opened.round == round_number else []

    def model_changed(self, model: bytes) -> list[Action]:
        """Another model makes the features from now on: nothing made over the old one enters a round over the new one.

        An upload that only its own round takes stays, for that round began with the old model.
        """
        if model == self.model:
            return []
        earlier = [one for one in (self.model, *self.ran) if one not in (model, b"")]
        self.ran = tuple(dict.fromkeys(earlier))[:MODELS_REMEMBERED]
        self.model, self.feedback, self.dirty = model, {}, True
        running = self._running
        left = [] if running is None or running.uploaded else self._sit_out(running, "another model runs now")
        withdrawn = tuple(n for n, last in self._uploads.items() if last > n)
        for n in withdrawn:
            del self._uploads[n]
        return [*left, *(EndRound(n, "another model runs now", drop=(n,)) for n in withdrawn)]

    def tick(self, now: float) -> list[Action]:
        """Give up a round whose deadline is well past: the gateway's result may never come."""
        running = self._running
        if running and now > running.opened.deadline + EXPIRES_AFTER_DEADLINE_S:
            return self._sit_out(running, "the deadline passed")
        return []

    # --- steps --------------------------------------------------------------------------------------------

    def _open(self, opened: RoundOpen, now: float) -> list[Action]:
        if self._answer and self._answer.message.round == opened.round:
            return [self._answer]  # the announcement is repeated until the gateway has an answer
        if opened.round == self._last_round:
            return [self._join(opened, accept=False, reason="restarted: this device sits the round out")]
        if opened.round < self._last_round:  # a gateway that was set back: a second view of a round is never given
            reason = f"this device's last round is {self._last_round}, round {opened.round} is long past"
            return [Send(rounds.step_message(opened.round, "join", rounds.Join(False, reason, b"")))]
        superseded = "a newer round was announced"
        actions = self._sit_out(self._running, superseded) if self._running else []
        actions += [EndRound(n, superseded, drop=(n,)) for n in self._expired(opened.round - 1)]
        self._announced.setdefault(opened.round, self.model)
        self._announced, self.dirty = dict([*self._announced.items()][-ROUNDS_REMEMBERED:]), True
        if reason := self._objection(opened, now):
            self.counters["declined"] += 1
            return [*actions, self._join(opened, accept=False, reason=reason)]
        self._last_round = opened.round
        self._running = _Running(opened, Layout(opened.tensors))
        self.counters["joined"] += 1
        advert = self._become_member(self._running)
        fetch = FetchModel(opened.round, opened.base, opened.base_bytes)
        return [*actions, self._join(opened, accept=True, advert=advert), fetch]

    def _become_member(self, running: _Running) -> bytes:
        if running.opened.privacy != rounds.MASKED:
            return b""
        from edgepriv.federated.secagg import Member

        running.member = Member(running.opened, running.layout, self.identity, self.trust, self.policy)
        advert: bytes = running.member.advert
        return advert

    def _objection(self, opened: RoundOpen, now: float) -> str:
        policy = self.policy
        if policy.privacy == "masked" and opened.privacy != rounds.MASKED:
            return "this device takes part in masked rounds only"
        if forbidden := [row[0] for row in opened.tensors if not policy.allows(row[0])]:
            return f"the policy does not let {forbidden[0]!r} be trained"
        if opened.base_bytes > policy.max_model_bytes:
            return "the global weights are over this device's limit"
        if now >= opened.deadline:
            return "the deadline is past"
        try:
            _recipe(opened)
            ring_of(opened)
            return _noise_objection(opened, policy.colluders) or self._budget_objection(opened)
        except EdgeprivError as error:
            return str(error)

    def _budget_objection(self, opened: RoundOpen) -> str:
        if self.policy.max_epsilon is None:
            return ""
        charge = _charge(opened)
        if charge is None:
            return "the round adds no noise and this device has a privacy budget"
        spent = self.ledger.epsilon_after(charge, self.policy.delta)
        if spent > self.policy.max_epsilon:
            return f"the privacy budget would be passed: epsilon {spent:.2f} of {self.policy.max_epsilon:g}"
        return ""

    def _join(self, opened: RoundOpen, *, accept: bool, reason: str = "", advert: bytes = b"") -> Send:
        self._answer = Send(rounds.step_message(opened.round, "join", rounds.Join(accept, reason[:200], advert)))
        return self._answer

    def _advance(self) -> list[Action]:
        running = self._running
        if running is None or running.uploaded or running.weights is None:
            return []
        if running.member is not None and not running.member.ready:
            return []
        try:
            return self._train(running)
        except EdgeprivError as error:
            return self._sit_out(running, str(error))
        except Exception as error:  # a trainer's mistake, of any kind; its text may hold data and stays here
            log.exception("training for round %d failed", running.opened.round)
            return self._sit_out(running, f"training failed: {type(error).__name__}")

    def _train(self, running: _Running) -> list[Action]:
        opened = running.opened
        weights = running.weights or {}
        masked = opened.privacy == rounds.MASKED
        settings = RoundSettings(_recipe(opened), opened.round, self.seed + opened.round, masked, opened.encoding)
        update = self.trainer(weights, settings)
        if update.examples < 1:
            raise RefusedError("no labelled examples")
        update = _covered(update, opened)
        clipped = clip_update(update.tensors, opened.clip) if self.clips else dict(update.tensors)
        within = not opened.adaptive_clip or update_norm(update.tensors) <= opened.clip
        if running.member is None:
            payload = self._clear_payload(clipped, running, update.examples, within=within)
            meta = rounds.offer_meta(min(update.examples, opened.max_weight))
        else:
            payload = running.member.masked_payload(clipped, update.examples, within=within)
            meta = rounds.offer_meta(0)
        if (charge := _charge(opened)) is not None:
            self.ledger.charge(opened.round, charge)
        running.uploaded, running.weights, self.dirty = True, None, True
        self._uploads[opened.round] = opened.round + opened.late_rounds
        self.counters["uploaded"] += 1
        return [Upload(opened.round, payload, meta, opened.deadline + EXPIRES_AFTER_DEADLINE_S)]

    def _clear_payload(
        self, tensors: dict[str, NDArray[np.float32]], running: _Running, examples: int, *, within: bool
    ) -> bytes:
        opened = running.opened
        arrays, scales = compression.compress(tensors, opened, feedback=self.feedback)
        meta: dict[str, Any] = {"round": opened.round, "examples": min(examples, opened.max_weight)}
        if opened.adaptive_clip:
            meta["within"] = within
        return encode_update(arrays, meta, scales=scales)

    def _sit_out(self, running: _Running | None, reason: str) -> list[Action]:
        self._running = None
        if running is None:
            return []
        leave = [] if running.uploaded else [self._join(running.opened, accept=False, reason=reason)]
        number = running.opened.round
        return [*leave, EndRound(number, reason, drop=self._over(number))]

    def _over(self, number: int) -> tuple[int, ...]:
        """Rounds whose uploads nobody takes after the end of this one; a round without an upload is among them."""
        over = self._expired(number)
        return over if number in self._uploads else tuple({*over, number})

    def _expired(self, number: int) -> tuple[int, ...]:
        """Rounds whose uploads no round after this one takes; they are forgotten here."""
        over = tuple(n for n, last in self._uploads.items() if last <= number)
        for n in over:
            del self._uploads[n]
            self.dirty = True
        return over

    def _result(self, number: int, result: RoundResult) -> list[Action]:
        if self._running and self._running.opened.round == number:
            self._running = None
        done = result.outcome == "done"
        if number != self._counted:  # a round over several gateways tells its shard's end, then its own
            self.counters["done" if done else "aborted"] += 1
            self._counted = number
        adopt = (result.model, result.model_bytes) if done and len(result.model) == 32 else (b"", 0)
        over = self._over(number)
        return [EndRound(number, result.reason or result.outcome, *adopt, drop=over, model=self._model_of(number))]

    def _model_of(self, number: int) -> bytes | None:
        """The model that a round was over; None where it ran unheard of here while the model changed."""
        known = sorted(self._announced.items())
        before = [model for n, model in known if n <= number][-1:]
        after = [model for n, model in known if n >= number][:1] or [self.model]
        return after[0] if not before or before == after else None


def _recipe(opened: RoundOpen) -> LocalRecipe:
    """Training settings of an announcement; unknown ones are refused, not ignored."""
    known = {f.name for f in dataclasses.fields(LocalRecipe)} - {"trainable", "shares_statistics"}
    if unknown := opened.training.keys() - known:
        raise WireError(f"unknown training setting {min(unknown)!r}"[:120])
    try:
        recipe = LocalRecipe(
            **opened.training,
            trainable=tuple(row[0] for row in opened.tensors),
            shares_statistics=opened.statistics == "shared",
        )
    except TypeError as error:
        raise WireError("a training setting is of the wrong type") from error
    if recipe.epochs > MAX_EPOCHS:
        raise WireError(f"{recipe.epochs} epochs are over this device's limit of {MAX_EPOCHS}")
    return recipe


def _covered(update: LocalUpdate, opened: RoundOpen) -> LocalUpdate:
    """Only what the round names leaves the device, whatever the trainer returned."""
    names = {row[0] for row in opened.tensors}
    if opened.statistics == "home":
        names = {name for name in names if not name.endswith(STATISTICS)}
    return LocalUpdate({n: t for n, t in update.tensors.items() if n in names}, update.examples)


def _noise_objection(opened: RoundOpen, colluders: int) -> str:
    """Why this device's share of the noise would be less than what its ledger is charged for; empty where it is not.

    The number of members is checked later, by `secagg.Member`, where it is known.
    """
    if opened.noise == "none":
        return ""
    if opened.max_weight != 1:
        return "a round with noise has weight 1 for every device"
    if opened.noise != "distributed":
        return ""
    if opened.privacy != rounds.MASKED:
        return "noise of single devices only hides under masks"
    if opened.colluders < colluders:
        return f"the noise assumes {opened.colluders} colluders, this device's policy {colluders}"
    if opened.survivors <= opened.colluders:
        return f"the noise counts on {opened.survivors} devices of which {opened.colluders} may leave theirs out"
    widths = [opened.noise_multiplier * opened.clip, *([opened.clip_noise] if opened.adaptive_clip else [])]
    steps = device_deviation(min(widths), 2.0**opened.fraction_bits, opened.survivors, opened.colluders)
    return "" if steps >= MIN_STEPS else f"noise of {steps:.2g} steps is rounded away: too few fraction bits"


def _charge(opened: RoundOpen) -> float | None:
    """Noise multiplier that this device may count on: the noise over what one device can change, count included.

    None: no noise. 0: a noisy sum beside a count without noise, which no budget covers.
    """
    if opened.noise == "none" or opened.noise_multiplier <= 0:
        return None
    return joint_multiplier(opened.noise_multiplier, opened.clip_noise, adaptive=opened.adaptive_clip)
