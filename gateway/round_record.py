"""How a round ended, for ever."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgepriv.wire.rounds import RoundResult

if TYPE_CHECKING:
    from gateway.round_events import Finished
    from gateway.round_plan import RoundPlan


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """How a round ended, for ever: who took part, what was rejected and why, digests before and after, what it cost.

    ``within``: noisy share of the devices that were within the clip, ``clip_after``: the clip that follows from it
    (adaptive clipping). ``reference``, ``reference_by``: fltrust's trusted update and its signer. ``parts``: cohorts or
    shards with state (``done``, ``out``), reason and number of devices. ``clip``, ``statistics`` and ``training`` are
    the recipe that devices followed: what an auditor repeats on canaries.
    """

    round: int
    cohort: str
    model: str
    privacy: str
    rule: str
    outcome: str
    reason: str
    started: float
    ended: float
    invited: int
    population: int
    participants: tuple[str, ...]
    rejected: tuple[tuple[str, str], ...]
    before: bytes
    after: bytes
    after_bytes: int
    publish: str
    noise: str
    noise_multiplier: float
    participation: str
    sample_share: float
    epsilon: float
    delta: float
    clip: float = 0.0
    statistics: str = "home"
    training: dict[str, Any] = field(default_factory=dict)
    adaptive_clip: bool = False
    clip_noise: float = 0.0
    within: float = 0.0
    clip_after: float = 0.0
    parts: tuple[tuple[str, str, str, int], ...] = ()
    reference: bytes = b""
    reference_by: str = ""
    late_rounds: int = 0

    def result(self) -> RoundResult:
        """What devices are told."""
        return RoundResult(
            self.outcome,
            self.reason[:400],
            self.after if self.publish == "weights" else b"",
            self.after_bytes if self.publish == "weights" else 0,
            len(self.participants),
            self.privacy,
            self.epsilon,
            self.delta,
        )

    def to_row(self) -> list[Any]:
        """Plain values, in the order of the fields."""
        values = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return [[list(v) if isinstance(v, tuple) else v for v in x] if isinstance(x, tuple) else x for x in values]

    @classmethod
    def from_row(cls, row: list[Any]) -> RoundRecord:
        """Restore what `to_row` gave; rows of an earlier release lack the last fields."""
        values = dict(zip((f.name for f in dataclasses.fields(cls)), row, strict=False))
        values["participants"] = tuple(values["participants"])
        values["rejected"] = tuple(tuple(pair) for pair in values["rejected"])
        values["parts"] = tuple(tuple(part) for part in values.get("parts", ()))
        return cls(**values)


def closing_record(
    plan: RoundPlan,
    outcome: str,
    reason: str,
    times: tuple[float, float],
    invited: int,
    taken: tuple[str, ...],
    rejected: tuple[tuple[str, str], ...],
    finished: Finished,
) -> RoundRecord:
    """The record of a round that ends now; ``times``: its start and its end."""
    return RoundRecord(
        round=plan.round,
        cohort=plan.cohort,
        model=plan.model,
        privacy=plan.privacy,
        rule=plan.rule,
        outcome=outcome,
        reason=reason,
        started=times[0],
        ended=times[1],
        invited=invited,
        population=plan.population,
        participants=taken,
        rejected=rejected,
        before=plan.base,
        after=finished.model,
        after_bytes=finished.model_bytes,
        publish=plan.publish,
        noise=plan.noise,
        noise_multiplier=plan.noise_multiplier,
        participation=plan.participation,
        sample_share=plan.sample_share,
        epsilon=finished.epsilon,
        delta=plan.delta if plan.noise != "none" else 0.0,
        clip=plan.clip,
        statistics=plan.statistics,
        training=dict(plan.training),
        adaptive_clip=plan.adaptive_clip,
        clip_noise=plan.clip_noise,
        reference=plan.reference,
        reference_by=plan.reference_by,
        late_rounds=plan.max_staleness if plan.late == "next" else 0,
        within=finished.within,
        clip_after=finished.clip_after,
    )
