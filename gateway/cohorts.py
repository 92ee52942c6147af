"""Rounds that are made of parts, carried out: the conductor's hands for `gateway.parted`.

A cohort is a `gateway.rounds.Round` of its own with ``publish = "partial"`` and its parent's number; when its masks are
off, its sum is added to the parent's durable sum, from which the parent makes the new weights (or, where this gateway
is itself a shard, one partial sum). Shards bring partial sums as files.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from edgepriv.errors import DataError, EdgeprivError, StorageFullError, TemporaryError, WireError
from edgepriv.wire import rounds as wire_rounds
from gateway import aggregate, round_events, shards
from gateway.parted import CancelPart, OpenPart, PartedRound
from gateway.round_events import Close, Finish, Finished, Send, not_finished
from gateway.round_ports import Tell
from gateway.rounds import Round

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgepriv.wire.rounds import RoundOpen
    from gateway.conductor import Conductor
    from gateway.parted import PartAction
    from gateway.round_plan import RoundPlan
    from gateway.round_ports import Outgoing
    from gateway.round_record import RoundRecord


class Parts:
    """Opens cohorts, takes sums, finishes parents; all state is the conductor's."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    def open(self, plan: RoundPlan, parts: Mapping[str, Sequence[str]], now: float, *, remote: bool) -> PartedRound:
        """A round over these parts (not yet started); raises ConfigError where its arithmetic could overflow."""
        parent = PartedRound(plan, parts, now, remote=remote)
        self.whole(parent)
        return parent

    def whole(self, parent: PartedRound) -> RoundOpen:
        """The announcement that stands for all parts, with what those that are in the sum count on."""
        plan, parts = parent.plan, list(parent.parts.values())
        devices = sum(len(part.members) for part in parts)
        opened = shards.whole_of(plan, max(devices, 1), parent.started)
        if parent.remote:
            opened = shards.widened(opened, opened.survivors, shards.MOST_DEVICES)
        survivors = sum(part.survivors for part in parts)
        return dataclasses.replace(opened, survivors=survivors) if survivors else opened

    def carry_out(self, parent: PartedRound, actions: Sequence[PartAction], now: float) -> list[Outgoing]:
        """Do what the parent decided."""
        out: list[Outgoing] = []
        for action in actions:
            match action:
                case OpenPart(name):
                    out += self._open_cohort(parent, name, now)
                case CancelPart(name, reason):
                    if cohort := self._conductor.cohorts.get((parent.plan.round, name)):
                        out += self._conductor.event(cohort, round_events.Cancelled(reason), now)
                case Finish():
                    out += self.carry_out(parent, parent.finished(self._finish(parent), now), now)
                case Send(device, step, body):
                    out.append(Tell(device, wire_rounds.step_message(parent.plan.round, step, body)))
                case Close(record):
                    self._conductor.close_round(record)
                    self._forget_cohorts(parent)
        self._conductor.touch(parent)
        return out

    def _open_cohort(self, parent: PartedRound, name: str, now: float) -> list[Outgoing]:
        key = parent.plan.round, name
        if key in self._conductor.cohorts:
            return []
        plan = dataclasses.replace(
            parent.plan, cohort=f"{parent.plan.cohort}.{name}", part=name, publish="partial", quorum=1
        )
        cohort = self._conductor.cohorts[key] = Round(plan, parent.parts[name].members, now)
        self._conductor.make_folder(plan.key)
        self._conductor.touch(cohort)
        return self._conductor.carry_out(cohort, cohort.start(), now)

    def _forget_cohorts(self, parent: PartedRound) -> None:
        for name in parent.parts:
            if cohort := self._conductor.cohorts.pop((parent.plan.round, name), None):
                self._conductor.forget(cohort.plan)

    # --- sums ---------------------------------------------------------------------------------------------

    def add_cohort(self, cohort: Round, folder: Path, unmask: Any) -> aggregate.Result:
        """Add a cohort's open sum to its parent's."""
        parent = self._parent(cohort.plan)
        whole = self._conductor.make_folder(str(cohort.plan.round))
        checkpoint = shards.add_cohort(whole, self.whole(parent), folder, cohort.opened, unmask)
        return aggregate.Result(b"", 0, 0.0, len(checkpoint.taken))

    def cohort_closed(self, cohort: Round, record: RoundRecord, now: float) -> list[Outgoing]:
        """A cohort has ended: what the durable sum names counts, whatever a crash made of the cohort's own end."""
        parent, name = self._parent(cohort.plan), cohort.plan.part
        members = set(parent.parts[name].members)
        taken = [device for device in self._in_sum(parent) if device in members]
        counts = cohort.opened.survivors, cohort.opened.devices
        rejected = [row for row in record.rejected if row[0] not in taken]
        parent.ended(name, record.reason, taken=taken, rejected=rejected, counts=counts)
        self._conductor.touch(parent)
        self._conductor.saved()  # before the cohort is forgotten: a restart would open it a second time
        self._conductor.forget(cohort.plan)
        return self.carry_out(parent, parent.advance(), now)

    def take_shard(self, parent: PartedRound, shard: str, path: Path, now: float) -> list[Outgoing]:
        """Add a shard's partial sum, durably when this returns.

        Raises:
            WireError: it is not a partial sum, or not of this round.
            DataError: one of its devices is in another shard's sum.
        """
        if reason := parent.objection(shard):
            raise WireError(reason)
        whole = self.whole(parent)
        with path.open("rb") as file:
            partial = shards.Partial(file, path)
            if different := partial.differs(whole):
                raise WireError(f"the partial sum is of another round: {different} differs")
            if partial.opened.cohort != shard:
                raise WireError("a partial sum under another shard's name")
            if partial.opened.devices + sum(p.devices for p in parent.parts.values()) > whole.devices:
                raise DataError("more devices than the round's arithmetic allows")
            shards.add_sum(self._conductor.make_folder(str(parent.plan.round)), whole, partial.rows, partial)
        taken = [name if not stale else f"{name}~{stale}" for name, stale in partial.taken]
        parent.ended(shard, "", taken=taken, counts=(partial.opened.survivors, partial.opened.devices))
        return self.carry_out(parent, parent.advance(), now)

    def _parent(self, plan: RoundPlan) -> PartedRound:
        parent = self._conductor.rounds[plan.round]
        if not isinstance(parent, PartedRound):
            raise DataError(f"round {plan.round} has no parts")
        return parent

    def _in_sum(self, parent: PartedRound) -> list[str]:
        folder = self._conductor.make_folder(str(parent.plan.round))
        return [row[0] for row in aggregate.load_checkpoint(folder, self.whole(parent)).taken]

    def _finish(self, parent: PartedRound) -> Finished:
        plan, whole = parent.plan, self.whole(parent)
        folder = self._conductor.make_folder(str(plan.round))
        out, base = folder / "weights.bin", self._conductor.model_path(plan.base)
        done = sum(part.state == "done" for part in parent.parts.values())
        try:
            if parent.count < plan.quorum:
                return Finished(reason=parent.reason)
            if plan.publish == "partial":
                result = shards.export_partial(folder, whole, out, unmask=None)
            else:
                noise, count_noise = shards.central_noise(whole, self._conductor.noise_seed)
                result = aggregate.finish(
                    folder, whole, base, out, noise=noise, count_noise=count_noise, rate=plan.server_rate, cohorts=done
                )
            return self._conductor.publish(plan, result, out, self._conductor.spent(parent))
        except (StorageFullError, TemporaryError):
            raise  # the store is away: the whole turn is done again
        except (EdgeprivError, OSError) as error:
            return not_finished(error)
