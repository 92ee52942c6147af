"""A round made of parts, as a pure state machine beside `gateway.rounds`: cohorts of one gateway, or shards of several.

States: ``gathering`` -> ``finishing`` -> ``done`` | ``aborted``.

Rules.
 1. Parts share the round's number, base weights and arithmetic; each has a cohort name of its own. Masks never cross
    parts, so a part is an anonymity set with its own minimum, threshold and frozen survivors.
 2. Local parts (cohorts) are `gateway.rounds.Round`s here; at most ``cohorts_at_once`` of them run, so the disk holds
    few sums whatever the number of devices. Remote parts (shards) run at their own gateways, all at once.
 3. A part brings its whole sum, masks taken off, or nothing. The durable sum of the round names the devices that are
    in it and is the truth about who counts; adding a part twice changes nothing.
 4. A part that aborts or refuses sits out, and so does a shard that was not heard for ``shard_silence_s``, or that
    has not ended ``shards_limit_s`` after the start. What comes later is refused.
 5. When every part has ended the round finishes with at least ``quorum`` devices over all parts, else it aborts.
 6. Storage and repeats: as rule 8 of `gateway.rounds`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv.wire import cbor
from gateway.round_device import plain
from gateway.round_events import Action, Close, Finish, Finished, Send
from gateway.round_plan import RoundPlan
from gateway.round_record import RoundRecord, closing_record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ENDED = {"done", "aborted"}


@dataclass(frozen=True, slots=True)
class OpenPart:
    """Start the round of this cohort."""

    name: str


@dataclass(frozen=True, slots=True)
class CancelPart:
    """Stop the round of this cohort."""

    name: str
    reason: str


PartAction = OpenPart | CancelPart | Action


@dataclass
class Part:
    """Where a part stands: ``waiting open done out``. ``members``: devices invited (known for cohorts only)."""

    members: tuple[str, ...] = ()
    state: str = "waiting"
    reason: str = ""
    heard: float = 0.0
    taken: tuple[str, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    survivors: int = 0
    devices: int = 0

    def to_row(self) -> list[Any]:
        """Plain values, in the order of the fields."""
        return [plain(getattr(self, f.name)) for f in dataclasses.fields(self)]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Part:
        """Restore what `to_row` gave."""
        part = cls(*row)
        part.members, part.taken = tuple(part.members), tuple(part.taken)
        part.rejected = tuple((str(name), str(why)) for name, why in part.rejected)
        return part


class PartedRound:
    """One round over several parts; ``remote``: they are shards at other gateways."""

    def __init__(self, plan: RoundPlan, parts: Mapping[str, Sequence[str]], now: float, *, remote: bool) -> None:
        self.plan, self.remote, self.state, self.started = plan, remote, "gathering", now
        self.parts = {name: Part(tuple(members), heard=now) for name, members in parts.items()}
        self.record: RoundRecord | None = None

    # --- storage ------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Everything, as canonical CBOR."""
        body = {
            "plan": {f.name: plain(getattr(self.plan, f.name)) for f in dataclasses.fields(RoundPlan)},
            "remote": self.remote,
            "state": self.state,
            "started": self.started,
            "parts": [[name, part.to_row()] for name, part in self.parts.items()],
            "record": self.record.to_row() if self.record else None,
        }
        return cbor.encode(body)

    @classmethod
    def from_map(cls, body: Mapping[str, Any]) -> PartedRound:
        """Restore the decoded map of what `to_bytes` gave (the gateway's own store: trusted)."""
        plan = RoundPlan(**{**body["plan"], "tensors": tuple(body["plan"]["tensors"])})
        self = cls(plan, {}, body["started"], remote=body["remote"])
        self.state = body["state"]
        self.parts = {name: Part.from_row(row) for name, row in body["parts"]}
        self.record = RoundRecord.from_row(body["record"]) if body["record"] else None
        return self

    # --- events -------------------------------------------------------------------------------------------

    def start(self) -> list[PartAction]:
        """Open as many parts as may run."""
        return self._advance()

    def resume(self, now: float) -> list[PartAction]:
        """After a restart: what may not have been carried out."""
        if self.record:
            return [*self._results(), Close(self.record)]
        for part in self.parts.values():
            part.heard = now  # the silence was ours
        again: list[PartAction] = [OpenPart(n) for n, p in self.parts.items() if p.state == "open" and not self.remote]
        return [*again, *([Finish()] if self.state == "finishing" else self._advance())]

    def tick(self, now: float) -> list[PartAction]:
        """Let time pass: shards that fell silent sit out."""
        if self.state != "gathering" or not self.remote:
            return []
        for name, part in self.parts.items():
            if part.state in {"done", "out"}:
                continue
            if now - part.heard >= self.plan.shard_silence_s:
                self.ended(name, f"{name} was not heard for {self.plan.shard_silence_s:g} s")
            elif now - self.started >= self.plan.shards_limit_s:
                self.ended(name, f"{name} did not end its part in time")
        return self._advance()

    def heard(self, name: str, now: float) -> None:
        """A shard asked about this round: it lives."""
        if part := self.parts.get(name):
            part.heard = now
            part.state = "open" if part.state == "waiting" else part.state

    def objection(self, name: str) -> str:
        """Why a part's sum cannot be taken now; empty where it can."""
        part = self.parts.get(name)
        if part is None:
            return "this round has no such part"
        if self.state != "gathering" or part.state == "out":
            return f"late: {part.reason or 'the sum is closed'}"
        return ""

    def ended(
        self,
        name: str,
        reason: str,
        *,
        taken: Sequence[str] = (),
        rejected: Sequence[tuple[str, str]] = (),
        counts: tuple[int, int] = (0, 0),
    ) -> None:
        """A part brought its sum (``taken`` names its devices), or sits out for this reason; call `tick` afterwards.

        ``counts``: the fewest survivors that its noise counts on, and the most devices that its arithmetic allows.
        """
        part = self.parts[name]
        part.state, part.reason = ("done", "") if taken else ("out", reason)
        part.taken, part.rejected = tuple(taken), tuple(rejected)
        part.survivors, part.devices = counts if taken else (0, 0)

    def advance(self) -> list[PartAction]:
        """What follows from the parts' ends."""
        return self._advance() if self.state == "gathering" else []

    def cancel(self, reason: str, now: float) -> list[PartAction]:
        """The operator stops the round."""
        if self.state in ENDED:
            return []
        stopped: list[PartAction] = [CancelPart(n, reason) for n, p in self.parts.items() if p.state == "open"]
        return [*stopped, *self._end("aborted", reason, now)]

    def finished(self, event: Finished, now: float) -> list[PartAction]:
        """The new weights (or the partial sum) are durable, or could not be made."""
        if self.state != "finishing":
            return []
        return self._end("aborted" if event.reason else "done", event.reason, now, event)

    # --- inside -------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Devices in the sum."""
        return sum(len(part.taken) for part in self.parts.values())

    @property
    def reason(self) -> str:
        """Why parts sit out, or why there are too few devices."""
        out = [f"{name}: {part.reason}" for name, part in self.parts.items() if part.state == "out"]
        return f"{self.count} updates, the quorum is {self.plan.quorum}" + (f" ({'; '.join(out)})" if out else "")

    def _advance(self) -> list[PartAction]:
        actions: list[PartAction] = []
        running = sum(part.state == "open" for part in self.parts.values())
        for name, part in self.parts.items():
            if part.state == "waiting" and not self.remote and running < self.plan.cohorts_at_once:
                part.state, running = "open", running + 1
                actions.append(OpenPart(name))
        if all(part.state in {"done", "out"} for part in self.parts.values()):
            self.state = "finishing"
            actions.append(Finish())
        return actions

    def _end(self, outcome: str, reason: str, now: float, finished: Finished | None = None) -> list[PartAction]:
        self.state = outcome
        taken = tuple(sorted(n for p in self.parts.values() for n in p.taken)) if outcome == "done" else ()
        told = {name: why for part in self.parts.values() for name, why in part.rejected}
        left = [n for p in self.parts.values() for n in (*p.members, *p.taken) if n not in taken]
        rejected = tuple((n, told.get(n) or "its cohort sat out") for n in dict.fromkeys([*told, *left]))
        invited = sum(max(len(p.members), len(p.taken)) for p in self.parts.values())
        record = closing_record(
            self.plan, outcome, reason, (self.started, now), invited, taken, rejected, finished or Finished()
        )
        rows = tuple((n, p.state, p.reason, len(p.taken)) for n, p in self.parts.items())
        self.record = dataclasses.replace(record, parts=rows)
        return [*self._results(), Close(self.record)]

    def _results(self) -> list[PartAction]:
        if self.record is None:
            return []
        body = self.record.result()
        return [Send(name, "result", body) for part in self.parts.values() for name in part.members]


def cohorts_of(devices: Sequence[str], largest: int) -> dict[str, list[str]]:
    """Divide devices, in the order given, into as few cohorts of about equal size as ``largest`` allows."""
    count = max(1, -(-len(devices) // largest))
    return {str(k): sorted(devices[k::count]) for k in range(count)}
