"""Learning on the device: labelled features in memory, and this device's part in federated rounds.

Only features of the frozen backbone are kept, in memory and bounded; no frame and no feature is written to disk.
Labels come from the scene (simulation), from a labelled folder, or from a file that ``edgepriv device label`` appends
to; frames without a label are never trained on. The device trains the softmax head with numpy, or hands the round to
another trainer. Every update of a clear round passes `edgepriv.federated.self_check` under the owner's policy before
it is encoded; the outcome is a counter, its figures stay on the device.

A head that rounds bring serves the model whose features it was trained over and no other (`edgepriv.device.heads`).
When another model runs, that holds at once, in memory; the disk follows. What a full disk does not take (the state of
rounds, uploads that are withdrawn) is kept and tried again by `Learner.step`, and no message leaves that rests on it.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import files
from edgepriv.device.config import SelfCheckConfig
from edgepriv.device.heads import Heads, head_of
from edgepriv.errors import DataError, RefusedError, StorageFullError, WireError
from edgepriv.federated import head
from edgepriv.federated.head_leakage import affordable
from edgepriv.federated.lineage import named_models
from edgepriv.federated.local_update import LocalUpdate
from edgepriv.federated.participant import EndRound, FetchModel, Participant, RoundPolicy, Send, Upload
from edgepriv.federated.self_check import STATISTICS, CheckPolicy, self_check
from edgepriv.wire.update import decode_update

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from edgepriv.device.config import RoundsConfig
    from edgepriv.device.fetch import Fetcher
    from edgepriv.device.infer import Inference
    from edgepriv.federated.local_update import RoundSettings, Trainer
    from edgepriv.federated.participant import Action
    from edgepriv.keys import Identity
    from edgepriv.wire.messages import RoundMessage
    from edgepriv.wire.trust import TrustList

log = logging.getLogger(__name__)
UNLABELLED_KEPT = 500
RETRY_S = 10.0


class Samples:
    """Features with labels, newest kept; features without one wait a while for it."""

    def __init__(self, max_samples: int, labels_file: Path | None) -> None:
        self._labelled: OrderedDict[str, tuple[NDArray[np.float32], int]] = OrderedDict()
        self._waiting: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._max, self._file, self._read_to = max_samples, labels_file, 0
        self._shape: tuple[int, ...] = ()
        self.bad_labels = 0

    def clear(self) -> None:
        """Forget all: another model makes other features."""
        self._labelled.clear()
        self._waiting.clear()

    def add(self, name: str, features: NDArray[np.float32], label: int | None) -> None:
        """Keep one frame's features; features of another width are another model's, and what was kept goes."""
        if features.shape != self._shape:
            self.clear()
            self._shape = features.shape
        if label is None:
            self._waiting[name] = features
            if len(self._waiting) > UNLABELLED_KEPT:
                self._waiting.popitem(last=False)
            return
        self._labelled[name] = (features, label)
        if len(self._labelled) > self._max:
            self._labelled.popitem(last=False)

    def read_labels(self) -> None:
        """Take new lines of the labels file: ``{"frame": name, "label": index}``; bad lines are counted."""
        if self._file is None or not self._file.is_file() or self._file.stat().st_size <= self._read_to:
            return
        with self._file.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # being written
                self._read_to += len(line)
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            name, label = str(entry["frame"]), int(entry["label"])
        except (ValueError, KeyError, TypeError):
            self.bad_labels += 1
            return
        features = self._waiting.pop(name, None)
        if features is not None:
            self.add(name, features, label)

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features [n, d] and labels [n]."""
        if not self._labelled:
            return np.zeros((0, 0), np.float32), np.zeros(0, np.int64)
        rows = list(self._labelled.values())
        return np.stack([f for f, _ in rows]), np.array([label for _, label in rows], np.int64)

    def __len__(self) -> int:
        return len(self._labelled)


class Learner:
    """Joins rounds, trains and adopts new heads. The runtime carries out what it asks for.

    ``model``: SHA-256 of the model that runs; `model_changed` names another. ``metas``: what the offer of a round's
    upload says; None for an upload that must not be offered any more.
    """

    def __init__(
        self,
        identity: Identity,
        trust: TrustList,
        config: RoundsConfig,
        *,
        state: Path,
        fetcher: Fetcher,
        send: Callable[[Any], bool],
        spool_upload: Callable[[int, bytes], None],
        drop_upload: Callable[[int], None],
        model: bytes,
        trainable: tuple[str, ...],
        metas: dict[int, dict[str, Any] | None],
        trainer: Trainer | None = None,
        check: SelfCheckConfig | None = None,
    ) -> None:
        self.samples = Samples(config.max_samples, config.labels)
        self._config, self._state, self._fetcher, self._send = config, state, fetcher, send
        self._spool_upload, self._drop_upload = spool_upload, drop_upload
        policy = RoundPolicy(
            trainable=trainable or ("head.*",),
            privacy="masked" if config.require_masks else "any",
            min_cohort=config.min_cohort,
            active=config.active_gateway,
            colluders=config.colluders,
            max_epsilon=config.epsilon_budget or None,
            max_model_bytes=fetcher.max_bytes,
        )
        check = check or SelfCheckConfig()
        self._examples = check.examples
        self._check_policy = CheckPolicy(check.policy, check.max_explained_variance, check.min_images)
        self.counters: Counter[str] = Counter()
        saved = self._state_file.read_bytes() if self._state_file.is_file() else b""
        train = self._checked(trainer or self._train)
        self.participant = Participant(identity, trust, policy, train, state=saved, model=model)
        self.head: Mapping[str, NDArray[Any]] | None = None
        self.head_digest = b""
        self.metas = metas
        self._heads, self._head_file = Heads(state, max_bytes=fetcher.max_bytes), state
        self._fetch: FetchModel | None = None
        self._adopt: EndRound | None = None
        self._newest = b""  # of the objects in the fetcher's folder, the only one that stays
        self._to_drop: set[int] = set()  # rounds whose uploads are still to go from the spool
        self._untidy = True  # heads that nobody needs may lie on the disk
        self._tried = float("-inf")
        fetcher.forget(set())  # what an earlier process left there
        self._use_head()
        try:
            self._switch(model)  # where another model was installed since the last process
        except (OSError, StorageFullError) as error:  # `step` tries again, and raises what does not pass
            log.warning("what rounds left is not tidied up yet: %s", error)

    @property
    def _state_file(self) -> Path:
        return self._state / "rounds.cbor"

    # --- inference ----------------------------------------------------------------------------------------

    def observe(self, inference: Inference, name: str) -> None:
        """Keep a frame's features for training, where the model gives any."""
        if len(inference.features) and self._config.take_part:
            self.samples.add(name, inference.features, inference.frame.label)

    def logits(self, inference: Inference) -> NDArray[np.float32] | None:
        """Logits by the federated head, or None while there is none for this model."""
        if self.head is None or not len(inference.features):
            return None
        weight, bias = self.head[head.WEIGHT], self.head[head.BIAS]
        if weight.shape[1] != len(inference.features):
            return None
        return np.asarray(head.apply_head(inference.features[None], weight, bias)[0], np.float32)

    def _checked(self, trainer: Trainer) -> Trainer:
        """The trainer, and behind it the look at what it made."""

        def train(weights: Mapping[str, NDArray[Any]], settings: RoundSettings) -> LocalUpdate:
            update = trainer(weights, settings)
            return self._check(update, weights, settings) if update.examples else update

        return train

    def _check(self, update: LocalUpdate, weights: Mapping[str, NDArray[Any]], settings: RoundSettings) -> LocalUpdate:
        """What may leave of an update, by the owner's policy (RefusedError: nothing). Masks hide single updates."""
        shared = settings.recipe.shares_statistics
        sent = {n: t for n, t in update.tensors.items() if shared or not n.endswith(STATISTICS)}
        policy = replace(self._check_policy, masked=settings.masked, encoding=settings.encoding)
        try:
            found = self_check(
                sent, settings.recipe, policy, n_images=update.examples, round_number=settings.round,
                **self._known(sent, weights, settings),
            )  # fmt: skip
        except RefusedError:
            self.counters["self_check_refused"] += 1
            raise
        self.counters[f"self_check_{found.action}"] += 1
        self.counters["self_check_above_limit"] += found.within_limits is False
        log.info("self-check of round %d: %s", settings.round, json.dumps(found.record()))
        return LocalUpdate(found.update, update.examples)

    def _known(
        self, sent: Mapping[str, NDArray[Any]], weights: Mapping[str, NDArray[Any]], settings: RoundSettings
    ) -> dict[str, Any]:
        """What the bound needs, where a head alone was trained here on features and the board can afford it."""
        if set(sent) != {head.WEIGHT, head.BIAS} or not self._examples:
            return {}
        features, labels = self.samples.arrays()
        if not affordable(weights[head.WEIGHT].shape, settings.recipe.steps(len(labels))):
            self.counters["self_check_without_bound"] += 1
            return {}
        order = np.random.default_rng(settings.seed).permutation(len(labels))
        return {"head": weights, "features": features[order], "labels": labels[order], "examples": self._examples}

    def _train(self, weights: Mapping[str, NDArray[Any]], settings: RoundSettings) -> LocalUpdate:
        features, labels = self.samples.arrays()
        if len(labels) < self._config.min_samples:
            return LocalUpdate({}, 0)
        classes = len(weights[head.BIAS])
        keep = labels < classes
        if not keep.all():
            raise DataError("a label is outside the round's classes", hint="check the labels file")
        delta = head.train_head(weights, features, labels, settings.recipe, seed=settings.seed)
        return LocalUpdate({n: np.asarray(t, np.float32) for n, t in delta.items()}, len(labels))

    # --- rounds -------------------------------------------------------------------------------------------

    def receive(self, message: RoundMessage, now: float) -> None:
        """Handle a step of a round (WireError when it is not one)."""
        if self._config.take_part:
            self._carry_out(self.participant.receive(message, now))

    def step(self, now: float) -> None:
        """Once a step of the runtime: labels, downloads and deadlines."""
        self.samples.read_labels()
        if (self._to_drop or self._untidy or self.participant.dirty) and abs(now - self._tried) >= RETRY_S:
            self._tried = now
            self._settle()
        if actions := self.participant.tick(now):
            self._carry_out(actions)
        if self._fetch is not None:
            self._pull_base(self._fetch)
        if self._adopt is not None:
            self._pull_result(self._adopt)

    def model_changed(self, trainable: tuple[str, ...], model: bytes) -> None:
        """Another model runs from now on: its features have nothing to do with those that were kept.

        Raises:
            OSError: the disk did not take the new state. What serves has changed all the same; `step` tries again.
            StorageFullError: the same of the spool.
        """
        self.samples.clear()
        policy = replace(self.participant.policy, trainable=trainable or ("head.*",))
        self.participant.policy = policy
        self._switch(model)

    def _switch(self, model: bytes) -> None:
        """Serve the head of this model, and then, on the disk too, leave what rounds made over another one."""
        actions: list[Action] = []
        if model != self.participant.model:
            had = self.head is not None
            actions = self.participant.model_changed(model)
            self._withdraw(actions)  # also where the new head cannot be read
            self._use_head()
            if self.head is not None:
                log.info("another model runs now, with the head that rounds brought for it before")
            elif had:
                self._set_aside("another model runs now")
        self._untidy = True
        self._carry_out(actions)

    def _set_aside(self, reason: str) -> None:
        self.counters["heads_set_aside"] += 1
        hope = "" if self.head is not None else "; the next round over this model brings its own"
        log.warning("a head from federated rounds is not used: %s%s", reason, hope)

    def _use_head(self) -> None:
        """Serve the running model's head, if it has one; whatever goes wrong, no other model's."""
        self.head, self.head_digest, self._head_file = None, b"", self._state
        found = self._heads.of(self.participant.model)
        if found is not None:
            self.head, self.head_digest, self._head_file = found.tensors, found.digest, found.path

    def _pull_base(self, fetch: FetchModel) -> None:
        try:
            path = self._weights(fetch.digest, fetch.size)
        except WireError as error:
            self._fetch = None
            self._carry_out(self.participant.model_refused(fetch.round, str(error)))
            return
        if path is not None:
            self._fetch = None
            raw = path.read_bytes()
            self._keep_newest(fetch.digest)
            self._carry_out(self.participant.model_ready(fetch.round, raw))

    def _pull_result(self, ended: EndRound) -> None:
        try:
            path = self._weights(ended.adopt, ended.adopt_bytes)
            if path is None:
                return
            self._adopt_head(path.read_bytes(), ended)
            self._keep_newest(ended.adopt)
        except WireError as error:
            self.counters["weights_refused"] += 1
            log.warning("new global weights are not usable: %s", error)
        self._adopt = None

    def _weights(self, digest: bytes, size: int) -> Path | None:
        """The file of global weights when it is here; the head's own file where it is that (WireError: too large)."""
        if digest == self.head_digest and self._head_file.is_file():
            return self._head_file
        return self._fetcher.want(digest, size)

    def _keep_newest(self, digest: bytes) -> None:
        """One file of weights stays, for the next round usually begins with it; all before it are used and go."""
        for old in {self._newest, self.head_digest} - {b""}:
            if old != digest or digest == self.head_digest:
                self._fetcher.discard(old)
        self._newest = digest if digest != self.head_digest else b""

    def _carry_out(self, actions: list[Action]) -> None:
        self._withdraw(actions)
        try:
            self._settle()
        except (OSError, StorageFullError):
            for fetch in (
                action for action in actions if isinstance(action, FetchModel)
            ):  # nobody counts on this device
                self._withdraw(self.participant.model_refused(fetch.round, "this device's disk is full"))
            raise
        for action in actions:
            match action:
                case Send(message):
                    self._send(message)
                case FetchModel():
                    self._stop_pull()
                    self._fetch = action
                case Upload(number, payload, meta, _):
                    self.metas[number] = meta
                    self._spool_upload(number, payload)
                case EndRound(number, adopt=adopt):
                    if self._fetch is not None and self._fetch.round == number:
                        self._stop_pull()
                    if adopt:
                        if self._adopt is not None and self._adopt.adopt != adopt:
                            self._fetcher.drop(self._adopt.adopt)
                        self._adopt = action

    def _withdraw(self, actions: list[Action]) -> None:
        for number in (number for action in actions if isinstance(action, EndRound) for number in action.drop):
            self._to_drop.add(number)
            self.metas[number] = None

    def _settle(self) -> None:
        """Bring to the disk what was decided; what it does not take is raised, and stays for the next time."""
        for number in sorted(self._to_drop):  # before the state forgets what a crash would leave in the spool
            self._drop_upload(number)
            self.metas.pop(number, None)
            self._to_drop.discard(number)
        if self.participant.dirty:
            self._save()
        if self._untidy:
            if gone := self._heads.drop_others(self.participant.model, self.participant.ran):
                log.warning("%d heads of models that ran before are deleted", gone)
            self._untidy = False

    def _stop_pull(self) -> None:
        """The base is wanted no longer; what was pulled of it goes, unless it is a result that is to be adopted."""
        fetch, self._fetch = self._fetch, None
        if fetch is not None and (self._adopt is None or self._adopt.adopt != fetch.digest):
            self._fetcher.drop(fetch.digest)

    def _save(self) -> None:
        state, self.participant.dirty = self.participant.state(), True
        files.replace(self._state_file, state, mode=0o600)
        self.participant.dirty = False

    def _adopt_head(self, raw: bytes, ended: EndRound) -> None:
        """Keep the head in a round's weights for the model that the round was over (WireError: one that is no head)."""
        update = decode_update(raw, max_bytes=self._fetcher.max_bytes)
        if not head_of(update.tensors):
            return
        running, model = self.participant.model, ended.model
        if named := named_models(update.meta):
            model = next((one for one in (running, model) if one in named), None)
        if model != running:
            self._set_aside(f"round {ended.round} was over another model than the one that runs")
        if model is None:
            return
        if model != running or ended.adopt != self.head_digest:
            self._heads.keep(model, raw)
            self._untidy = True
        if model == running:
            self._use_head()
        self._settle()
