"""A federated round as a pure state machine: events in, actions out; no clock, disk, link or key.

States: ``joining`` -> ``sharing`` -> ``collecting`` -> ``confirming`` -> ``unmasking`` -> ``finishing`` -> ``done`` |
``aborted``. A clear round starts in ``collecting`` and goes on to ``finishing``; a masked round has them all.

Rules.
 1. A round never waits for all: ``collecting`` ends when every device has answered for good, or at the deadline. With
    at least ``quorum`` folded uploads it finishes, else it aborts with a reason. Every round ends as a `RoundRecord`.
 2. One upload for each device and round: the digest of the first offer is binding, another is rejected.
 3. At most ``uploads_at_once`` uploads are open; others wait in the order of their offers. A slot that shows no
    progress for ``stall_s`` goes to the next; the stalled device offers again.
 4. An upload counts only when `Folded` says that it is in the durable sum; what is in the sum is never removed.
 5. Late uploads (after ``collecting``): dropped, or, in clear rounds with ``late="next"``, taken into the next round
    with their weight divided by sqrt(1 + staleness), at most ``max_staleness`` rounds later; what was staged of them
    is deleted and their devices offer them again. Late uploads with masks are deleted unread; asking for
    ``late="next"`` with masks or noise is a configuration error.
 6. Masked rounds: too small a cohort aborts. The survivor set is frozen by the state that `to_bytes` stores before
    the set is sent (rule 8) and never changes; ``unmasking`` goes only to ``finishing`` or ``aborted``. No upload is
    folded after the freeze.
 7. Unanswered steps are sent again every ``resend_s``; devices answer a repeated step with the same bytes.
 8. The caller stores `to_bytes` after each event and *before* it carries out the actions; after a restart it loads
    the bytes and calls `resume`, which returns the actions that may have been lost. Every action may be carried out
    twice without harm.

What a store keeps for each round: number (unique, only ever growing), `to_bytes` (replaced after each event), and at
the end `RoundRecord`. `gateway.conductor` joins this file with `gateway.aggregate` and such a store.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from edgepriv.wire import cbor
from edgepriv.wire.rounds import (
    CLEAR,
    MASKED,
    Cohort,
    Confirm,
    Join,
    Reveal,
    SharesDown,
    SharesUp,
    Survivors,
    Unmask,
)
from gateway.round_device import SETTLED, Device, plain
from gateway.round_events import (
    Accept,
    Action,
    Cancelled,
    Close,
    Event,
    Finish,
    Finished,
    Fold,
    Folded,
    GrantUpload,
    Offered,
    Progressed,
    PutOff,
    Reject,
    RemoveMasks,
    Send,
    Stepped,
    Tick,
    UnmaskFailed,
    UploadComplete,
)
from gateway.round_plan import RoundPlan, announcement
from gateway.round_record import RoundRecord, closing_record

if TYPE_CHECKING:
    from collections.abc import Iterable

ENDED = {"done", "aborted"}


class Round:
    """One round. `start`, then `handle` every event; see the rules above."""

    def __init__(self, plan: RoundPlan, invited: Iterable[str], now: float) -> None:
        self.plan = plan
        self.state = "joining" if plan.privacy == MASKED else "collecting"
        self.started, self.state_since, self.resent = now, now, now
        self.devices: dict[str, Device] = {name: Device() for name in sorted(set(invited))}
        self.queue: list[str] = []
        self.cohort: list[str] = []  # members in order of position, once formed
        self.sharers: list[int] = []
        self.survivors: list[int] = []
        self.reveals: dict[int, Reveal] = {}
        self.tried, self.ticked = 0, False
        self.record: RoundRecord | None = None
        self.opened = announcement(plan, sum(1 for n in self.devices if "~" not in n), now)

    # --- storage ------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Everything, as canonical CBOR."""
        body: dict[str, Any] = {
            "plan": {f.name: plain(getattr(self.plan, f.name)) for f in dataclasses.fields(RoundPlan)},
            "state": self.state,
            "times": [self.started, self.state_since],
            "devices": {n: d.to_row() for n, d in self.devices.items()},
            "queue": self.queue,
            "cohort": self.cohort,
            "sharers": self.sharers,
            "survivors": self.survivors,
            "reveals": [[p, list(r.members), list(r.shares)] for p, r in sorted(self.reveals.items())],
            "record": self.record.to_row() if self.record else None,
        }
        return cbor.encode(body)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Round:
        """Restore what `to_bytes` gave (the gateway's own store: trusted)."""
        body = cbor.decode_map(raw, max_bytes=256 << 20)
        plan = RoundPlan(**{**body["plan"], "tensors": tuple(body["plan"]["tensors"])})
        self = cls(plan, body["devices"], body["times"][0])
        self.state, self.state_since = body["state"], body["times"][1]
        self.devices.update({name: Device.from_row(row) for name, row in body["devices"].items()})
        self.queue, self.cohort = body["queue"], body["cohort"]
        self.sharers, self.survivors = body["sharers"], body["survivors"]
        self.reveals = {p: Reveal(tuple(m), tuple(s)) for p, m, s in body["reveals"]}
        self.record = RoundRecord.from_row(body["record"]) if body["record"] else None
        return self

    # --- events -------------------------------------------------------------------------------------------

    def start(self) -> list[Action]:
        """Announce the round."""
        return [Send(name, "open", self.opened) for name in self.devices]

    def resume(self, now: float) -> list[Action]:
        """After a restart: what may not have been carried out. The aggregator tells again what is in its sum."""
        if self.record:
            return [*self._results(), Close(self.record)]
        self.queue = [n for n, d in self.devices.items() if d.state in {"offered", "open"}]
        for device in self.devices.values():
            if device.state == "open":
                device.state = "offered"
        actions: list[Action] = self._resend(now)
        actions += [self._fold(n) for n, d in self.devices.items() if d.state == "complete"]
        if self.state == "finishing":
            actions.append(Finish())
        elif self.state == "unmasking":
            actions += self._try_unmask()
        return [*actions, *self._fill(now)]

    def handle(self, event: Event, now: float) -> list[Action]:
        """Apply an event.

        Args:
            event: what happened; events of devices that were not invited change nothing.
            now: Unix seconds; a clock that goes back is harmless.

        Returns:
            Actions, in order.
        """
        if self.state in ENDED:
            return self._after_end(event)
        self.ticked = isinstance(event, Tick)
        match event:
            case Stepped(name, body) if name in self.devices:
                actions = self._step(name, body)
            case Offered():
                actions = self._offered(event, now)
            case Progressed(name, digest):
                actions = self._progressed(name, digest, now)
            case UploadComplete(name, digest):
                actions = self._complete(name, digest)
            case Folded(name, digest, reason):
                actions = self._folded(name, digest, reason)
            case UnmaskFailed(again):
                self.tried = 0 if again else len(self.reveals)
                actions = []
            case Finished():
                return self._finished(event, now)
            case Cancelled(reason):
                return self._end("aborted", reason, now)
            case _:
                actions = []
        return [*actions, *self._advance(now)]

    def _after_end(self, event: Event) -> list[Action]:
        """Tell a device that asks about an ended round how it ended."""
        match event:
            case Offered(name, digest):
                if self.in_sum(name, digest):
                    return [Accept(name, digest)]
                return [Reject(name, digest, "late: the round has ended"), *self._results(name)]
            case Stepped(name, _) if name in self.devices:
                return self._results(name)
        return []

    def in_sum(self, name: str, digest: bytes) -> bool:
        """Say whether this very update is in the sum."""
        device = self.devices.get(name)
        return device is not None and device.state == "folded" and device.digest == digest

    # --- steps of devices ---------------------------------------------------------------------------------

    def _step(self, name: str, body: Any) -> list[Action]:
        device = self.devices[name]
        if isinstance(body, Join):
            self._join(device, body)
        elif isinstance(body, SharesUp) and self.state == "sharing" and name in self.cohort:
            if device.state == "joined" and len(body.boxes) == len(self.cohort):
                device.state, device.boxes = "shared", body.boxes
        elif isinstance(body, Confirm) and self.state in {"confirming", "unmasking"}:
            if self._position(name) in self.survivors and not device.signature:
                device.signature = body.signature
        elif isinstance(body, Reveal) and self.state == "unmasking":
            position = self._position(name)
            if device.signature and position not in self.reveals and len(body.members) == len(self.sharers):
                self.reveals[position] = body
        return []

    def _join(self, device: Device, body: Join) -> None:
        if not body.accept:
            if device.state not in {"folded", "complete"}:
                device.state, device.reason = "declined", body.reason or "declined"
            return
        if device.state == "invited" and (self.plan.privacy == CLEAR or self.state == "joining"):
            device.state, device.advert = "joined", body.advert

    def _position(self, name: str) -> int:
        return self.cohort.index(name) if name in self.cohort else -1

    # --- uploads ------------------------------------------------------------------------------------------

    def _offered(self, offer: Offered, now: float) -> list[Action]:
        key = offer.device if not offer.stale else f"{offer.device}~{offer.stale}"
        if reason := self._offer_objection(offer, key):
            return [Reject(offer.device, offer.digest, reason)]
        device = self.devices.setdefault(key, Device("joined"))
        if device.digest and device.digest != offer.digest:
            return [Reject(offer.device, offer.digest, "one upload for each device and round")]
        if device.state == "folded":
            return [Accept(offer.device, offer.digest)]
        if device.state == "rejected":
            return [Reject(offer.device, offer.digest, device.reason)]
        if device.state == "complete":
            return []
        device.digest, device.size, device.stale = offer.digest, offer.size, offer.stale
        device.examples = max(1, min(offer.examples, self.plan.max_weight))
        if device.state == "open":
            return [GrantUpload(offer.device, offer.digest, offer.size)]
        if key not in self.queue:
            device.state = "offered"
            self.queue.append(key)
        return self._fill(now)

    def _offer_objection(self, offer: Offered, key: str) -> str:
        if offer.device not in self.devices:
            return "this device was not invited"
        if self.state != "collecting":
            known = self.devices.get(key)
            late = self.state not in {"joining", "sharing"} and not (known and known.digest == offer.digest)
            return (
                "late: the sum is closed" if late else ("" if known and known.digest else "the round is not open yet")
            )
        if offer.size > self.plan.max_update_bytes:
            return f"an update may have {self.plan.max_update_bytes} bytes, this has {offer.size}"
        if offer.stale and (self.plan.late != "next" or offer.stale > self.plan.max_staleness):
            return "late: updates of earlier rounds are not taken"
        if self.plan.privacy == MASKED and self._position(offer.device) not in self.sharers:
            return "this device is not in the cohort"
        return ""

    def _fill(self, now: float) -> list[Action]:
        """Give free slots to the offers that wait longest."""
        open_now = [d for d in self.devices.values() if d.state == "open"]
        actions: list[Action] = []
        while self.state == "collecting" and self.queue and len(open_now) < self.plan.uploads_at_once:
            key = self.queue.pop(0)
            device = self.devices[key]
            if device.state != "offered":
                continue
            device.state, device.at = "open", now
            open_now.append(device)
            actions.append(GrantUpload(_name(key), device.digest, device.size))
        return actions

    def knows(self, name: str, digest: bytes) -> bool:
        """Say whether this device offered this digest to this round."""
        return bool(self._find(name, digest))

    def _find(self, name: str, digest: bytes) -> str:
        for key in (name, *(f"{name}~{n}" for n in range(1, self.plan.max_staleness + 1))):
            if key in self.devices and self.devices[key].digest == digest:
                return key
        return ""

    def _progressed(self, name: str, digest: bytes, now: float) -> list[Action]:
        if key := self._find(name, digest):
            self.devices[key].at = now
        return []

    def _complete(self, name: str, digest: bytes) -> list[Action]:
        key = self._find(name, digest)
        if not key or self.state != "collecting":
            return [Reject(name, digest, "late: the sum is closed")]
        device = self.devices[key]
        if device.state == "folded":
            return [Accept(name, digest)]
        if device.state in {"open", "offered"}:
            device.state = "complete"
            return [self._fold(key)]
        return []

    def _fold(self, key: str) -> Fold:
        device = self.devices[key]
        weight = max(1, math.floor(device.examples / math.sqrt(1 + device.stale)))
        return Fold(_name(key), device.digest, weight, device.stale)

    def _folded(self, name: str, digest: bytes, reason: str) -> list[Action]:
        if not (key := self._find(name, digest)):
            return []
        device = self.devices[key]
        if reason:
            device.state, device.reason = "rejected", reason
            return [Reject(name, digest, reason)]
        device.state = "folded"
        return [Accept(name, digest)]

    # --- progress -----------------------------------------------------------------------------------------

    def _advance(self, now: float) -> list[Action]:
        before, actions = self.state, getattr(self, f"_advance_{self.state}")(now)
        if self.state != before and self.state not in ENDED:
            self.state_since = self.resent = now
            actions = [*actions, *self._advance(now)]
        elif self.state == before and now - self.resent >= self.plan.resend_s:
            actions = [*actions, *self._resend(now)]
        return list(actions)

    def _advance_joining(self, now: float) -> list[Action]:
        if any(d.state == "invited" for d in self.devices.values()) and now < self.opened.join_by:
            return []
        self.cohort = sorted(n for n, d in self.devices.items() if d.state == "joined")
        if len(self.cohort) < max(self.plan.min_cohort, self.plan.quorum, 2):
            return self._end("aborted", f"only {len(self.cohort)} devices joined the cohort", now)
        self.state = "sharing"
        return self._resend(now)

    def _advance_sharing(self, now: float) -> list[Action]:
        waiting = [n for n in self.cohort if self.devices[n].state == "joined"]
        if waiting and now < self.state_since + self.plan.step_s:
            return []
        self.sharers = [i for i, n in enumerate(self.cohort) if self.devices[n].state == "shared"]
        if len(self.sharers) < max(self.plan.min_cohort, self.plan.quorum, self.threshold):
            return self._end("aborted", f"only {len(self.sharers)} devices shared their keys", now)
        self.state = "collecting"
        return self._resend(now)

    def _advance_collecting(self, now: float) -> list[Action]:
        self._drop_stalled(now)
        actions = self._fill(now)
        if any(d.state == "complete" for d in self.devices.values()):
            return actions  # the aggregator will say Folded; the deadline waits for it
        names = [self.cohort[i] for i in self.sharers] if self.plan.privacy == MASKED else list(self.devices)
        pending = [n for n in names if self.devices[n].state not in SETTLED]
        if pending and now < self.opened.deadline:
            return actions
        return [*actions, *self._close_sum(now)]

    def _drop_stalled(self, now: float) -> None:
        for key, device in self.devices.items():
            if device.state == "open" and now - device.at >= self.plan.stall_s:
                device.state = "offered"
                self.queue.append(key)

    def _close_sum(self, now: float) -> list[Action]:
        folded = [n for n, d in self.devices.items() if d.state == "folded"]
        unread: list[Action] = [
            PutOff(_name(n), d.digest)
            if self.plan.late == "next" and d.stale < self.plan.max_staleness
            else Reject(_name(n), d.digest, "late: the sum is closed")
            for n, d in self.devices.items()
            if d.state in {"open", "offered"}
        ]
        if self.plan.privacy == CLEAR:
            if len(folded) < self.plan.quorum:
                return [*unread, *self._end("aborted", f"{len(folded)} updates, the quorum is {self.plan.quorum}", now)]
            self.state = "finishing"
            return [*unread, Finish()]
        self.survivors = sorted(self.cohort.index(n) for n in folded)
        if len(folded) < max(self.plan.quorum, self.plan.min_cohort, self.threshold):
            return [*unread, *self._end("aborted", f"only {len(folded)} devices survived", now)]
        self.state = "confirming"
        return [*unread, *self._resend(now)]

    def _advance_confirming(self, now: float) -> list[Action]:
        signed = self._signers()
        if len(signed) < self.threshold:
            if now < self.state_since + self.plan.step_s:
                return []
            return self._end("aborted", f"only {len(signed)} survivors confirmed the set", now)
        if len(signed) < len(self.survivors) and now < self.state_since + self.plan.step_s / 4:
            return []  # a little patience: every signer can reveal later
        self.state = "unmasking"
        return self._resend(now)

    def _advance_unmasking(self, now: float) -> list[Action]:
        actions = self._try_unmask() if self.ticked else []  # much work: not at every single reveal
        self.resent = now if actions else self.resent  # a repeat would come after the result
        if not self.ticked or actions or now < self.state_since + self.plan.step_s:
            return actions
        wrong = "" if len(self.reveals) < self.threshold else ", and too many of them are wrong"
        return self._end("aborted", f"only {len(self.reveals)} of {self.threshold} shares were revealed{wrong}", now)

    def _try_unmask(self) -> list[Action]:
        if len(self.reveals) < max(self.threshold, self.tried + 1):
            return []
        self.tried = len(self.reveals)
        return [self.reveals_for_unmasking()]

    def reveals_for_unmasking(self) -> RemoveMasks:
        """All that devices have revealed."""
        return RemoveMasks(tuple(self.sharers), tuple(self.survivors), dict(self.reveals))

    def masks_removed(self, now: float) -> list[Action]:
        """The seeds were rebuilt and checked: the sum can be opened."""
        if self.state != "unmasking":
            return []
        self.state, self.state_since = "finishing", now
        return [Finish()]

    def _advance_finishing(self, _now: float) -> list[Action]:
        return []

    def _finished(self, event: Finished, now: float) -> list[Action]:
        if self.state != "finishing":
            return []
        if event.reason:
            return self._end("aborted", event.reason, now)
        return self._end("done", "", now, event)

    # --- ends and repeats ---------------------------------------------------------------------------------

    @property
    def threshold(self) -> int:
        """Shares that rebuild a seed: more than half of the cohort, or of two thirds against a lying gateway."""
        n = len(self.cohort)
        return (2 * n) // 3 + 1 if self.plan.threshold_active else n // 2 + 1

    def _signers(self) -> list[int]:
        return [i for i in self.survivors if self.devices[self.cohort[i]].signature]

    def _end(self, outcome: str, reason: str, now: float, finished: Finished | None = None) -> list[Action]:
        self.state = outcome
        taken = tuple(sorted(n for n, d in self.devices.items() if d.state == "folded")) if outcome == "done" else ()
        rejected = tuple((n, d.reason or "no update in time") for n, d in self.devices.items() if n not in taken)
        invited = sum(1 for n in self.devices if "~" not in n)
        self.record = closing_record(
            self.plan, outcome, reason, (self.started, now), invited, taken, rejected, finished or Finished()
        )
        return [*self._results(), Close(self.record)]

    def _results(self, only: str = "") -> list[Action]:
        record = self.record
        if record is None or (self.plan.part and record.outcome == "done"):
            return []  # a cohort's devices hear from `gateway.parted` how the whole round ended
        body = record.result()
        return [Send(n, "result", body) for n in ([only] if only else self.devices) if "~" not in n]

    def _resend(self, now: float) -> list[Action]:
        self.resent = now
        match self.state:
            case "joining" | "collecting" if self.plan.privacy == CLEAR or self.state == "joining":
                return [Send(n, "open", self.opened) for n, d in self.devices.items() if d.state == "invited"]
            case "sharing":
                body = Cohort(tuple(self.devices[n].advert for n in self.cohort))
                return [Send(n, "cohort", body) for n in self.cohort if self.devices[n].state == "joined"]
            case "collecting":
                return [
                    Send(self.cohort[i], "shares", self._shares_for(i))
                    for i in self.sharers
                    if self.devices[self.cohort[i]].state == "shared"
                ]
            case "confirming":
                body_ = Survivors(tuple(self.survivors))
                names = [self.cohort[i] for i in self.survivors]
                return [Send(n, "survivors", body_) for n in names if not self.devices[n].signature]
            case "unmasking":
                signed = self._signers()
                proof = Unmask(tuple(signed), tuple(self.devices[self.cohort[i]].signature for i in signed))
                return [Send(self.cohort[i], "unmask", proof) for i in signed if i not in self.reveals]
        return []

    def _shares_for(self, position: int) -> SharesDown:
        boxes = tuple(self.devices[self.cohort[i]].boxes[position] for i in self.sharers)
        return SharesDown(tuple(self.sharers), boxes)


def _name(key: str) -> str:
    """The device of a key: a late update stands beside the device's own under ``device~staleness``."""
    return key.split("~", 1)[0]
