"""Whether an update that comes after its round may count in a later one.

Staleness weighting assumes one line of weights: each round's result is the next round's base. Where an operator has put
the weights of another model in force since, an update of the earlier line is noise of any size, and it is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepriv.federated.lineage import named_models
from edgepriv.wire.update import read_header

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.conductor import Conductor
    from gateway.round_plan import RoundPlan


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
    record = next((r for r in reversed(conductor.store.records()) if r["round"] == number), None)
    return (record["model"], bytes(record["before"])) if record else ("", b"")


def _over(path: Path) -> frozenset[bytes] | None:
    """The models that weights name; None where the file is gone."""
    try:
        with path.open("rb") as file:
            header, _ = read_header(file.read(8), file.read, path.stat().st_size)
    except FileNotFoundError:
        return None
    return frozenset(named_models(header["meta"]))
