"""Carries out what `gateway.rounds` decides: joins the state machine, the aggregator and a store. No network.

The daemon hands in messages, offers, completed uploads and the time; it gets `Tell`, `OpenUpload` and `DropUpload`
back and passes them on. Staging files are the daemon's; this file reads a complete one in `tick` (where everything
that takes long happens, several uploads in one pass) and acknowledges it after the sum that holds it is durable.

A masked round over more devices than ``max_cohort`` is divided into cohorts, and a round over shards consists of what
other gateways bring: `gateway.parted`, carried out by `gateway.cohorts`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
from typing import TYPE_CHECKING, Any

from edgepriv import files, primitives
from edgepriv.errors import DataError, EdgeprivError, RefusedError, StorageFullError, TemporaryError, WireError
from edgepriv.federated.privacy import next_clip
from edgepriv.wire import cbor
from edgepriv.wire import rounds as wire_rounds
from edgepriv.wire.messages import Ack, Offer, RoundMessage
from edgepriv.wire.rounds import CLEAR, MASKED, Confirm, Join
from gateway import aggregate, robust_sum, round_events, shards
from gateway.aggregate import Staged
from gateway.cohorts import Parts
from gateway.late_updates import later_round, records_needed
from gateway.parted import PartedRound, cohorts_of
from gateway.round_ports import DropUpload, OpenUpload, Outgoing, RoundStore, Tell
from gateway.round_start import check_plan
from gateway.rounds import ENDED, Round
from gateway.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from edgepriv.wire.trust import TrustList
    from gateway.round_events import Action, Event
    from gateway.round_plan import RoundPlan
    from gateway.round_record import RoundRecord


class Conductor(Weights):
    """All running rounds of one gateway shard. ``folder`` holds a folder for each round and the global weights."""

    def __init__(self, folder: Path, store: RoundStore, trust: TrustList, *, keep_models: int = 3) -> None:
        super().__init__(folder)
        self.folder, self.store, self.trust, self.keep_models = folder, store, trust, keep_models
        self.rounds: dict[int, Round | PartedRound] = {}
        self.cohorts: dict[tuple[int, str], Round] = {}
        self.parts = Parts(self)
        self.records: list[RoundRecord] = []
        self.counters = {"steps_refused": 0, "updates_refused": 0, "updates_folded": 0, "late": 0, "shares_wrong": 0}
        self._pending: dict[str, dict[tuple[str, bytes], Staged]] = {}
        self._paths: dict[bytes, Path] = {}
        self._unmaskers: dict[str, Any] = {}
        self._seeds: dict[str, Any] = {}
        self.over: list[str] = []  # folders that the next tick deletes
        self._dirty: dict[str, Round | PartedRound] = {}
        self._saved: dict[str, bytes] = {}
        self.deferred = False  # True: the caller calls `flush` before it commits, one save for many events
        self.noise_seed = b""  # simulations only: empty takes the operating system's randomness

    # --- what the daemon calls ----------------------------------------------------------------------------

    def open_round(self, plan: RoundPlan, devices: Iterable[str], now: float) -> list[Outgoing]:
        """Start a round.

        Raises:
            ConfigError: the plan's arithmetic could overflow, or every device would decline it.
            RefusedError: its number was used, its base is not here, or it would pass the privacy budget.
        """
        self._check_new(plan)
        names = sorted(set(devices))
        if plan.privacy == MASKED and len(names) > plan.max_cohort:
            random.SystemRandom().shuffle(names)
            return self._open_parted(plan, cohorts_of(names, plan.max_cohort), now, remote=False)
        current = Round(plan, names, now)
        self._check_budget(current)
        self.rounds[plan.round] = current
        self.make_folder(plan.key)
        self.store.save(plan.round, current.to_bytes())
        return self.carry_out(current, current.start(), now)

    def open_sharded(self, plan: RoundPlan, shard_names: Sequence[str], now: float) -> list[Outgoing]:
        """Start a round whose parts are other gateways' partial sums; errors as `open_round`."""
        self._check_new(plan)
        return self._open_parted(plan, dict.fromkeys(shard_names, ()), now, remote=True)

    def take_shard(self, number: int, shard: str, path: Path, now: float) -> list[Outgoing]:
        """Add a shard's partial sum to its round; done already is well.

        Raises:
            WireError: no such round runs, or the file is not a partial sum of it.
            DataError: a device would count twice.
        """
        self.shard_objection(number, shard)
        parent = self.rounds[number]
        if not isinstance(parent, PartedRound) or parent.parts[shard].state == "done":
            return []
        return self._flushed(self.parts.take_shard(parent, shard, path, now))

    def shard_objection(self, number: int, shard: str) -> None:
        """WireError where a shard's partial sum is not wanted."""
        parent = self.rounds.get(number)
        if not isinstance(parent, PartedRound) or not parent.remote:
            raise WireError(f"late: round {number} is not running")
        if parent.parts.get(shard) and parent.parts[shard].state == "done":
            return
        if reason := parent.objection(shard):
            raise WireError(reason)

    def prune_models(self, keep: set[bytes]) -> None:
        """Delete weights that nothing needs: not in ``keep``, not of a running round nor of the last few records."""
        needed = [current.plan for current in self.rounds.values()]
        records = self.store.records()
        kept = records[-max(self.keep_models, records_needed(self, records)) :]
        named = [dataclasses.asdict(plan) for plan in needed] + kept
        self.prune(
            keep | {bytes(row[k]) for row in named for k in ("base", "before", "after", "reference") if row.get(k)}
        )

    def _open_parted(
        self, plan: RoundPlan, parts: Mapping[str, Sequence[str]], now: float, *, remote: bool
    ) -> list[Outgoing]:
        parent = self.parts.open(plan, parts, now, remote=remote)
        self._check_budget(parent)
        self.rounds[plan.round] = parent
        self.make_folder(plan.key)
        self.store.save(plan.round, parent.to_bytes())
        return self._flushed(self.parts.carry_out(parent, parent.start(), now))

    def _check_new(self, plan: RoundPlan) -> None:
        check_plan(plan)
        if plan.round in self.rounds or self.store.last().get("round", -1) >= plan.round:
            raise RefusedError(f"round {plan.round} is not new: a new attempt is a new number")
        if not self.model_path(plan.base).exists() or (plan.reference and not self.model_path(plan.reference).exists()):
            raise RefusedError("the round's base weights, or its reference update, are not here")

    def _check_budget(self, current: Round | PartedRound) -> None:
        spent, most = self.spent(current), current.plan.max_epsilon
        if most and spent > most:
            raise RefusedError(f"the privacy budget would be passed: epsilon {spent:.2f} of {most:g}")

    def resume(self, now: float, staged: dict[bytes, Path] | None = None) -> list[Outgoing]:
        """After a restart: load what was saved; ``staged``: complete uploads by digest that the daemon still has."""
        self._paths.update(staged or {})
        self._load()
        out: list[Outgoing] = []
        for current in self.singles():
            with contextlib.suppress(EdgeprivError):
                for device, digest in self._in_sum(current):
                    out += self.carry_out(current, self._note_folded(current, device, digest, now), now)
            out += self.carry_out(current, current.resume(now), now)
        for parent in [r for r in self.rounds.values() if isinstance(r, PartedRound)]:
            out += self.parts.carry_out(parent, parent.resume(now), now)
        kept = {self._round_folder(r.plan.key) for r in [*self.rounds.values(), *self.cohorts.values()]}
        for folder in self.folder.glob("round-*"):
            if folder not in kept:
                self.over.append(folder.name.removeprefix("round-"))
        self.flush()
        return out

    def _load(self) -> None:
        for raw in self.store.load():
            body = cbor.decode_map(raw, max_bytes=256 << 20)
            if "parts" in body:
                parent = PartedRound.from_map(body)
                self.rounds[parent.plan.round] = parent
                continue
            current = Round.from_bytes(raw)
            if current.plan.part:
                self.cohorts[current.plan.round, current.plan.part] = current
            else:
                self.rounds[current.plan.round] = current

    def on_message(self, device: str, outer: RoundMessage, now: float) -> list[Outgoing]:
        """A step from an authenticated device.

        Raises:
            WireError: malformed (the caller counts it).
        """
        current = self._round_of(outer.round, device)
        if current is None:
            return []
        try:
            body = wire_rounds.read_step(outer, up=True)
            self._check_step(current, device, body)
        except EdgeprivError as error:
            self.counters["steps_refused"] += 1
            raise WireError(f"round {outer.round}: {error}") from error
        return self.event(current, round_events.Stepped(device, body), now)

    def on_offer(self, device: str, offer: Offer, now: float) -> list[Outgoing]:
        """An update is offered; the answer may come at once or later, in any call."""
        current, stale, reason = self._round_of(offer.round, device), 0, ""
        if current is None or current.state in {"finishing", *ENDED}:
            if self._waits_for_next(offer.round, current, device, offer.digest):
                return []  # a late update: its device offers it again when the next round runs
            newer, reason = later_round(self, offer.round, current, device)
            if newer or reason:
                current, stale = newer, newer.plan.round - offer.round if newer else 0
        if current is None:
            self.counters["late"] += 1
            reason = reason or f"round {offer.round} is not running"
            return [Tell(device, Ack(offer.digest, "rejected", reason)), DropUpload(device, offer.digest)]
        examples = offer.meta.get("examples", 0)
        examples = examples if type(examples) is int else 0
        return self.event(current, round_events.Offered(device, offer.digest, offer.size, examples, stale), now)

    def on_progress(self, device: str, digest: bytes, now: float) -> None:
        """A chunk arrived (call it once a second or so for each open upload: it keeps the slot)."""
        for current in self._running():
            current.handle(round_events.Progressed(device, digest), now)

    def on_complete(self, device: str, digest: bytes, path: Path, now: float) -> list[Outgoing]:
        """An upload is durable at ``path`` and its SHA-256 is right. The file must stay until `DropUpload`."""
        self._paths[digest] = path
        for current in self._running():
            if current.knows(device, digest):
                return self.event(current, round_events.UploadComplete(device, digest), now)
        return [Tell(device, Ack(digest, "rejected", "no round wants it")), DropUpload(device, digest)]

    def cancel(self, round_number: int, reason: str, now: float) -> list[Outgoing]:
        """Stop a round."""
        current = self.rounds.get(round_number)
        if isinstance(current, PartedRound):
            return self._flushed(self.parts.carry_out(current, current.cancel(reason, now), now))
        return self._flushed(self.event(current, round_events.Cancelled(reason), now) if current else [])

    def tick(self, now: float) -> list[Outgoing]:
        """Let time pass and do the heavy work that is due. Call it at least once a second."""
        out: list[Outgoing] = []
        while self.over:  # the caller's transaction that holds the record is over by now
            shutil.rmtree(self._round_folder(self.over.pop()), ignore_errors=True)
        for current in self.singles():
            out += self._fold_pending(current, now)
            if current.state not in ENDED:
                out += self.event(current, round_events.Tick(), now)
        for parent in [r for r in self.rounds.values() if isinstance(r, PartedRound)]:
            out += self.parts.carry_out(parent, parent.tick(now), now)
        return self._flushed(out)

    # --- inside -------------------------------------------------------------------------------------------

    def singles(self) -> list[Round]:
        """Rounds and cohorts that devices take part in."""
        return [*(r for r in self.rounds.values() if isinstance(r, Round)), *self.cohorts.values()]

    def _running(self) -> list[Round]:
        return [r for r in self.singles() if r.state not in ENDED]

    def _round_of(self, number: int, device: str) -> Round | None:
        """The round of this number, or the cohort of it that the device is in."""
        found = self.rounds.get(number)
        if isinstance(found, PartedRound):
            return next((r for (n, _), r in self.cohorts.items() if n == number and device in r.devices), None)
        return found

    def _flushed(self, out: list[Outgoing]) -> list[Outgoing]:
        self.flush()
        return out

    def touch(self, current: Round | PartedRound) -> None:
        """Note that a round must be saved."""
        self._dirty[current.plan.key] = current

    def make_folder(self, key: str) -> Path:
        """The folder of a round or of a part of it."""
        folder = self._round_folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def spent(self, current: Round | PartedRound) -> float:
        """Epsilon of all rounds on this model with this one; 0 where rounds promise nothing."""
        plan = current.plan
        if plan.noise == "none":
            return 0.0
        from gateway.accounting import spent_epsilon

        names = (
            "noise", "noise_multiplier", "participation", "sample_share", "population", "adaptive_clip", "clip_noise",
        )  # fmt: skip
        now: dict[str, Any] = {name: getattr(plan, name) for name in names}
        if isinstance(current, PartedRound):
            now["invited"] = sum(len(part.members) for part in current.parts.values())
        else:
            now["invited"] = sum(1 for name in current.devices if "~" not in name)
        past = [r for r in self.store.records() if r["model"] == plan.model and r["round"] != plan.round]
        return spent_epsilon([*past, now], plan.delta)

    def _round_folder(self, key: str) -> Path:
        return self.folder / f"round-{key}"

    def _waits_for_next(self, number: int, current: Round | None, device: str, digest: bytes) -> bool:
        """Whether a round that is over puts this offer off until the next one, which does not run yet."""
        if any(n > number for n in self.rounds):
            return False
        if current is not None:
            taken = device not in current.devices or current.in_sum(device, digest)
            return current.plan.late == "next" and not taken
        last = self.store.last()  # after a restart only the record is left
        return last.get("round") == number and last.get("late_rounds", 0) > 0 and device not in last["participants"]

    def _check_step(self, current: Round, device: str, body: Any) -> None:
        """What needs the trust list: adverts and signatures, so that one bad device cannot spoil a cohort."""
        if isinstance(body, Join) and body.accept and current.plan.privacy == MASKED:
            advert = wire_rounds.read_advert(body.advert, self.trust)
            expected = (current.plan.round, current.plan.cohort, current.plan.base, device)
            if (advert.round, advert.cohort, advert.base, advert.device) != expected:
                raise WireError("an advertisement is of another round or device")
            for key in (advert.share_key, advert.mask_key):  # one that agrees on nothing would stop all other members
                primitives.backend().x25519(primitives.random_bytes(32), key)
        if isinstance(body, Confirm):
            names = [current.cohort[i] for i in current.survivors]
            plan = current.plan
            digest = wire_rounds.survivors_digest(plan.round, plan.cohort, plan.base, names)
            self.trust.party(device, "device").verify(wire_rounds.SURVIVORS_USE, digest, body.signature)

    def event(self, current: Round, event: Event, now: float) -> list[Outgoing]:
        """Hand an event to a round, save it, and do what it decides."""
        actions = current.handle(event, now)
        self.touch(current)
        self.saved()
        return self.carry_out(current, actions, now)

    def saved(self) -> None:
        """Save what changed, unless the caller does so before its transaction ends."""
        if not self.deferred:
            self.flush()

    def flush(self) -> None:
        """Save the rounds that changed. With ``deferred`` the caller does this before its transaction ends."""
        for key, current in sorted(self._dirty.items()):
            if current.record:
                continue
            raw = current.to_bytes()
            if raw != self._saved.get(key):
                self.store.save(current.plan.round, raw, current.plan.part)
                self._saved[key] = raw
        self._dirty.clear()

    def _note_folded(self, current: Round, device: str, digest: bytes, now: float) -> list[Action]:
        return [] if current.record else current.handle(round_events.Folded(device, digest), now)

    def carry_out(self, current: Round, actions: list[Action], now: float) -> list[Outgoing]:
        """Do what a round decided."""
        out: list[Outgoing] = []
        for action in actions:
            match action:
                case round_events.Send(device, step, body):
                    out.append(Tell(device, wire_rounds.step_message(current.plan.round, step, body)))
                case round_events.GrantUpload(device, digest, size):
                    out.append(OpenUpload(device, digest, size))
                case round_events.Accept(device, digest):
                    out += [Tell(device, Ack(digest, "stored", "")), DropUpload(device, digest)]
                case round_events.Reject(device, digest, reason):
                    out += [Tell(device, Ack(digest, "rejected", reason[:400])), DropUpload(device, digest)]
                case round_events.PutOff(device, digest):
                    out.append(DropUpload(device, digest))
                case round_events.Fold(device, digest, weight, stale):
                    if path := self._paths.get(digest):
                        pending = self._pending.setdefault(current.plan.key, {})
                        pending[device, digest] = Staged(device, digest, path, weight, stale)
                    else:
                        out += self.event(current, round_events.Folded(device, digest, "lost in staging"), now)
                case round_events.RemoveMasks():
                    out += self._remove_masks(current, action, now)
                case round_events.Finish():
                    out += self.event(current, self._finish(current), now)
                case round_events.Close(record) if current.plan.part:
                    out += self.parts.cohort_closed(current, record, now)
                case round_events.Close(record):
                    self.close_round(record)
        return out

    def _fold_pending(self, current: Round, now: float) -> list[Outgoing]:
        pending = self._pending.pop(current.plan.key, {})
        if not pending:
            return []
        try:
            refused = self._add(current, list(pending.values()))
        except DataError as error:  # the durable sum cannot be read: nobody knows any more who is in it
            return self.event(current, round_events.Cancelled(str(error)), now)
        reasons = {(r.device, r.digest): r.reason for r in refused}
        out: list[Outgoing] = []
        for device, digest in pending:
            reason = reasons.get((device, digest), "")
            self.counters["updates_refused" if reason else "updates_folded"] += 1
            out += self.event(current, round_events.Folded(device, digest, reason), now)
            self._paths.pop(digest, None)
        return out

    def _add(self, current: Round, items: list[Staged]) -> list[aggregate.Refusal]:
        """Put checked updates where the round's rule needs them; the refused ones come back."""
        folder, rule = self._round_folder(current.plan.key), current.plan.rule
        if rule in robust_sum.RULES:
            return robust_sum.keep(folder, current.opened, items)
        refused: list[aggregate.Refusal] = []
        if current.plan.privacy == CLEAR:
            items = [aggregate.declared(item, current.opened) for item in items]
        if rule == "fltrust":
            reference = self.model_path(current.plan.reference)
            judged = [robust_sum.trusted(item, reference, current.opened) for item in items]
            refused = [j for j in judged if isinstance(j, aggregate.Refusal)]
            items = [j for j in judged if isinstance(j, Staged)]
        return [*refused, *aggregate.fold(folder, current.opened, items)[1]]

    def _in_sum(self, current: Round) -> list[tuple[str, bytes]]:
        """Device and digest of what the round's folder durably holds."""
        folder = self._round_folder(current.plan.key)
        if current.plan.rule in robust_sum.RULES:
            return robust_sum.kept_updates(folder)
        return [(row[0], row[2]) for row in aggregate.load_checkpoint(folder, current.opened).taken]

    def _remove_masks(self, current: Round, action: round_events.RemoveMasks, now: float) -> list[Outgoing]:
        from gateway.unmasking import MAX_SEARCHES, Seeds, UnfinishedError, rebuild

        key, known = current.plan.key, self._seeds.setdefault(current.plan.key, Seeds())
        before = len(known.wrong)
        try:
            self._unmaskers[key] = rebuild(current, action, self.trust, known, searches=MAX_SEARCHES)
        except EdgeprivError as error:
            return self.event(current, round_events.UnmaskFailed(isinstance(error, UnfinishedError)), now)
        finally:
            self.counters["shares_wrong"] += len(known.wrong) - before
        actions = current.masks_removed(now)
        self.touch(current)
        return self.carry_out(current, actions, now)

    def _finish(self, current: Round) -> round_events.Finished:
        plan = current.plan
        folder, base = self._round_folder(plan.key), self.model_path(plan.base)
        out = folder / "weights.bin"
        try:
            if plan.rule in robust_sum.RULES:
                result = robust_sum.robust_finish(
                    folder, current.opened, base, out, rule=plan.rule, rate=plan.server_rate
                )
            else:
                result = self._finish_sum(current, folder, base, out)
            return self.publish(plan, result, out, 0.0 if plan.part else self.spent(current))
        except (StorageFullError, TemporaryError):
            raise  # the store is away: the whole turn is done again
        except (EdgeprivError, OSError) as error:
            return round_events.not_finished(error)

    def publish(self, plan: RoundPlan, result: aggregate.Result, out: Path, epsilon: float) -> round_events.Finished:
        """Put finished weights (or a partial sum) where they are fetched from."""
        if not result.digest:
            return round_events.Finished()  # a cohort's sum is in its parent's
        files.rename(out, self.model_path(result.digest))
        clip = 0.0
        if plan.adaptive_clip and plan.publish == "weights":
            clip = next_clip(plan.clip, result.within, quantile=plan.clip_quantile, rate=plan.clip_rate)
        return round_events.Finished(result.digest, result.size, epsilon, "", result.within, clip)

    def _finish_sum(self, current: Round, folder: Path, base: Path, out: Path) -> aggregate.Result:
        plan, opened = current.plan, current.opened
        unmask = self._unmaskers.pop(plan.key, None)
        if plan.privacy == MASKED and unmask is None:  # after a restart: the reveals are stored, the seeds are not
            from gateway.unmasking import rebuild

            unmask = rebuild(current, current.reveals_for_unmasking(), self.trust)
        if plan.part:
            return self.parts.add_cohort(current, folder, unmask)
        if plan.publish == "partial":
            return shards.export_partial(folder, opened, out, unmask=unmask)
        noise, count_noise = shards.central_noise(opened, self.noise_seed)
        return aggregate.finish(
            folder, opened, base, out, unmask=unmask, noise=noise, count_noise=count_noise, rate=plan.server_rate
        )

    def close_round(self, record: RoundRecord) -> None:
        """Keep a round's record and let go of the rest."""
        self.store.close(record)
        if all(r.round != record.round for r in self.records):
            self.records.append(record)
        self._drop(str(record.round))
        for number in sorted(n for n, r in self.rounds.items() if r.state in ENDED)[:-2]:
            del self.rounds[number]  # the last two are kept to answer latecomers

    def forget(self, plan: RoundPlan) -> None:
        """A cohort is over: its bytes and its folder may go; the object answers latecomers until its parent ends."""
        self.store.save(plan.round, b"", plan.part)
        self._dirty.pop(plan.key, None)
        self._drop(plan.key)

    def _drop(self, key: str) -> None:
        self._pending.pop(key, None)
        self._saved.pop(key, None)
        self._seeds.pop(key, None)
        self.over.append(key)
