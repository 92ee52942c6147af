"""Whether an update that comes after its round may count in a later one.

Staleness weighting assumes one line of weights: each round's result is the next round's base. Where an operator has put
the weights of another model in force since, an update of the earlier line is noise of any size, and it is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgepriv.federated.lineage import named_models
from edgepriv.wire.update import read_header

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.conductor import Conductor
    from gateway.round_plan import RoundPlan
    from gateway.rounds import Round


OTHER_LINE = "late: the weights in force are for another model than the update was trained over"


def records_needed(conductor: Conductor, records: list[dict[str, Any]]) -> int:
    """How many of the last rounds' weights `same_line` may be asked about: as far back as a late update may come."""
    late = [current.plan.max_staleness for current in conductor.rounds.values() if current.plan.late == "next"]
    return 1 + max([*late, *(r.get("late_rounds", 0) for r in records[-1:])], default=0)


def later_round(conductor: Conductor, number: int, current: Round | None, device: str) -> tuple[Round | None, str]:
    """The round in which an update of a round that is over counts, or why none that would take it can."""
    newer = [r for r in conductor.singles() if r.plan.round > number and r.plan.late == "next"]
    newer = [r for r in newer if r.state == "collecting"]
    if not newer or _was_taken(conductor, number, current, device):
        return None, ""
    fitting = next((r for r in newer if _too_old(number, r) or same_line(conductor, number, r.plan)), None)
    return fitting, "" if fitting else OTHER_LINE


def _too_old(number: int, later: Round) -> bool:
    """Whether the later round refuses it by itself; the weights that it began with may be gone."""
    return later.plan.round - number > later.plan.max_staleness


def _was_taken(conductor: Conductor, number: int, current: Round | None, device: str) -> bool:
    if current is not None:
        return bool(current.record and device in current.record.participants)
    return device in conductor.store.record(number).get("participants", ())


def same_line(conductor: Conductor, number: int, plan: RoundPlan) -> bool:
    """Whether round ``number`` trained the same model as this plan, over weights that are for the same models."""
    model, base = _trained(conductor, number)
    if model != plan.model or not base:
        return False
    before, now = _over(conductor.model_path(base)), _over(conductor.model_path(plan.base))
    return before == now or (before is None and not now)


def _trained(conductor: Conductor, number: int) -> tuple[str, bytes]:
    """Id and base weights of an earlier round; empty where it is not known."""
    if current := conductor.rounds.get(number):
        return current.plan.model, current.plan.base
    record = conductor.store.record(number)
    return (record["model"], bytes(record["before"])) if record else ("", b"")


def _over(path: Path) -> frozenset[bytes] | None:
    """The models that weights name; None where the file is gone."""
    try:
        with path.open("rb") as file:
            header, _ = read_header(file.read(8), file.read, path.stat().st_size)
    except FileNotFoundError:
        return None
    return frozenset(named_models(header["meta"]))
