"""Staged rollout of a model by share of devices, halted by itself on failures. A pure state machine: no clock, no I/O.

Rules, in order:

* Which devices are in a stage is fixed by a hash of (model digest, device id): a larger stage contains the
  smaller ones, nobody is chosen by hand, and a restart of the gateway changes nothing.
* A stage has at least one device: where the hash puts nobody of a small fleet into it, the next one in order is taken
  (``reach``), and the stage begins then.
* A device reports ``good`` (confirmed after its own self-test) or ``bad`` with its reason; the last report counts, and
  a ``good`` may still turn ``bad``. Reports of devices outside the stage are noted; they neither move nor halt it.
* A stage is passed when at least ``min_good`` of its devices (or all of them) are good, ``settle_s`` seconds have gone
  by since it began, and failures are within bounds.
* The rollout halts at once when more than ``max_failed_share`` of the stage's devices that reported are bad and at
  least ``min_failures`` of them are. A halt is final until an operator resumes it; halted = offered to nobody new.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection

RUNNING, HALTED, DONE = "running", "halted", "done"
GOOD, BAD = "good", "bad"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a rollout goes: stages as rising percentages of the fleet, the last one 100."""

    stages: tuple[int, ...] = (5, 25, 100)
    settle_s: float = 3600.0
    min_good: int = 3
    max_failed_share: float = 0.1
    min_failures: int = 2

    def __post_init__(self) -> None:
        """Check that the stages rise to 100 and the bounds make sense."""
        rising = all(0 < a < b for a, b in zip(self.stages, self.stages[1:], strict=False))
        if not self.stages or not rising or self.stages[0] <= 0 or self.stages[-1] != 100:
            raise ConfigError(f"rollout stages {self.stages} must rise to 100", hint="for example 5,25,100")
        if not 0 <= self.max_failed_share < 1 or self.min_good < 1 or self.min_failures < 1 or self.settle_s < 0:
            raise ConfigError("rollout bounds are not valid", hint="0 <= max_failed_share < 1; counts from 1")


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout. ``reports`` maps device id to (``good`` or ``bad``, reason); ``reach``: the first buckets are in."""

    model: bytes
    plan: Plan
    began_s: float
    state: str = RUNNING
    stage: int = 0
    reason: str = ""
    reports: dict[str, tuple[str, str]] = field(default_factory=dict)
    reach: int = 0

    @property
    def share(self) -> int:
        """Percentage of the fleet that is offered the model now."""
        return self.plan.stages[self.stage]

    def offered(self, device: str) -> bool:
        """Whether this device is offered the model; a halted rollout offers it to nobody who has not got it."""
        if self.state == HALTED:
            return self.reports.get(device, ("", ""))[0] == GOOD
        return self.within(device)

    def within(self, device: str) -> bool:
        """Whether this device is in the stage, halted or not."""
        return bucket(self.model, device) < max(100 * self.share, self.reach)

    def as_fields(self) -> dict[str, Any]:
        """For the store; `from_fields` reads it."""
        return {
            "model": self.model,
            "stages": list(self.plan.stages),
            "settle_s": self.plan.settle_s,
            "min_good": self.plan.min_good,
            "max_failed_share": self.plan.max_failed_share,
            "min_failures": self.plan.min_failures,
            "began_s": self.began_s,
            "state": self.state,
            "stage": self.stage,
            "reason": self.reason,
            "reports": {device: list(report) for device, report in self.reports.items()},
            "reach": self.reach,
        }


def from_fields(fields: dict[str, Any]) -> Rollout:
    """Read what `Rollout.as_fields` wrote."""
    plan = Plan(
        tuple(fields["stages"]),
        fields["settle_s"],
        fields["min_good"],
        fields["max_failed_share"],
        fields["min_failures"],
    )
    reports = {device: (str(report[0]), str(report[1])) for device, report in fields["reports"].items()}
    began, reach = fields["began_s"], fields.get("reach", 0)
    return Rollout(fields["model"], plan, began, fields["state"], fields["stage"], fields["reason"], reports, reach)


def bucket(model: bytes, device: str) -> int:
    """A device's fixed place among 10,000 for one model."""
    digest = hashlib.sha256(b"edgepriv/rollout/v1\x00" + model + device.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10_000


def report(rollout: Rollout, device: str, *, good: bool, reason: str = "") -> Rollout:
    """Take a device's report; may halt the rollout at once."""
    noted = {**rollout.reports, device: (GOOD, "") if good else (BAD, reason or "no reason given")}
    rollout = replace(rollout, reports=noted)
    if rollout.state != RUNNING and not (rollout.state == DONE and not good):
        return rollout
    members = sorted(d for d in noted if rollout.within(d))
    bad = [d for d in members if noted[d][0] == BAD]
    if len(bad) >= rollout.plan.min_failures and len(bad) > rollout.plan.max_failed_share * len(members):
        why = f"{len(bad)} of {len(members)} devices failed; {bad[-1]}: {noted[bad[-1]][1]}"
        return replace(rollout, state=HALTED, reason=why)
    return rollout


def advance(rollout: Rollout, fleet: Collection[str], now_s: float) -> Rollout:
    """Go to the next stage when the present one has passed; call as often as you like.

    Members are the stage's devices in ``fleet``, those that are there now, and those that have reported.
    """
    if rollout.state != RUNNING or not fleet:
        return rollout
    members = [device for device in {*fleet, *rollout.reports} if rollout.within(device)]
    if not members:
        return replace(rollout, reach=min(bucket(rollout.model, device) for device in fleet) + 1, began_s=now_s)
    if now_s - rollout.began_s < rollout.plan.settle_s:
        return rollout
    good = sum(rollout.reports.get(device, ("", ""))[0] == GOOD for device in members)
    if good < min(rollout.plan.min_good, len(members)):
        return rollout
    if rollout.share == 100:
        finished = all(device in rollout.reports for device in members)
        return replace(rollout, state=DONE) if finished else rollout
    return replace(rollout, stage=rollout.stage + 1, began_s=now_s)


def halt(rollout: Rollout, reason: str) -> Rollout:
    """Stop it by hand."""
    return replace(rollout, state=HALTED, reason=reason)


def resume(rollout: Rollout, now_s: float) -> Rollout:
    """Go on after a halt; bad reports are forgotten, because whoever resumes has mended the cause."""
    kept = {device: report for device, report in rollout.reports.items() if report[0] == GOOD}
    return replace(rollout, state=RUNNING, reason="", reports=kept, began_s=now_s)
