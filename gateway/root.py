"""The root's end of rounds over several gateways: what a shard is told when it asks, and what it may bring.

Every shard asks the root ``shard-round`` once a second or so under its own sealed session (`gateway.uplink`). The
question says what the shard does; the answer names the weights that are in force and the round that runs. Nothing is
pushed, so either side may be killed and started again at any time. What counts is decided in `gateway.parted`.

Query ``shard-round`` (gateway): ``round`` the number that the shard is in, ``state`` (``new``, ``running``, ``done``,
``out``), ``reason``, ``last`` its highest number -> ``{"head": {"digest", "size", "model", "round", ...}, "round":
fields of a `RoundPlan` or None, "part": state of this shard's part}``.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from edgepriv.errors import ConfigError, TrustError
from gateway import query_args
from gateway.parted import PartedRound
from gateway.round_device import plain
from gateway.round_plan import RoundPlan

if TYPE_CHECKING:
    from gateway.round_driver import RoundDriver
    from gateway.sessions import Session

QUESTION = "shard-round"
MOST_USED = 1 << 40  # a shard says no higher number of its own than this, so that numbers never run out
# what every shard decides for itself
OWN = {"cohort", "publish", "part", "reference", "reference_by", "population", "quorum", "max_epsilon"}
RESULT = ("participants", "privacy", "epsilon", "delta")


class Root:
    """Answers the shards that ``[rounds] shards`` names."""

    def __init__(self, rounds: RoundDriver) -> None:
        self._rounds = rounds
        self.highest = 0  # of all numbers that shards have used

    @property
    def shards(self) -> tuple[str, ...]:
        """Full names of the gateways whose partial sums are added here."""
        return shard_names(self._rounds.settings)

    def current(self) -> PartedRound | None:
        """The round over shards that runs now."""
        for current in self._rounds.conductor.rounds.values():
            if isinstance(current, PartedRound) and current.remote and current.record is None:
                return current
        return None

    def answer(self, session: Session, _role: str, args: dict[str, Any], now: float) -> dict[str, Any]:
        """See the module; raises TrustError for a gateway that is not a shard of this one."""
        name = session.party
        if name not in self.shards:
            raise TrustError(f"{name} is not a shard of this gateway")
        most = max(MOST_USED, self._rounds.last_number())
        self.highest = max(self.highest, query_args.whole(args, "last", 0, least=0, most=most))
        parent = self.current()
        if parent:
            self._note(parent, name, args, now)
        parent = self.current()
        return {
            "head": self._head(),
            "round": plan_map(parent.plan) if parent else None,
            "part": parent.parts[name].state if parent and name in parent.parts else "",
        }

    def _note(self, parent: PartedRound, name: str, args: dict[str, Any], now: float) -> None:
        parent.heard(name, now)
        self._rounds.conductor.touch(parent)
        out = args.get("round") == parent.plan.round and args.get("state") == "out"
        if out and not parent.objection(name) and parent.parts[name].state != "done":
            parent.ended(name, str(args.get("reason", ""))[:200] or "sits out")
            self._rounds.carry_out_parts(parent, now)

    def _head(self) -> dict[str, Any]:
        head = self._rounds.newest_head()
        record = self._rounds.table.record(head.get("round", 0))
        told = {k: record[k] for k in RESULT if k in record}
        if "participants" in told:
            told["participants"] = len(told["participants"])
        return {**head, **told}


def shard_names(settings: dict[str, Any]) -> tuple[str, ...]:
    """Names in ``[rounds] shards``.

    Raises:
        ConfigError: not a list of gateways' full names, or one twice.
    """
    names = settings.get("shards", ())
    good = isinstance(names, (list, tuple)) and all(isinstance(n, str) and n.startswith("gateway-") for n in names)
    if not good or len(set(names)) != len(names):
        raise ConfigError("[rounds] shards is a list of gateways' names", hint='shards = ["gateway-a", "gateway-b"]')
    return tuple(names)


def root_of(settings: dict[str, Any], own: str) -> tuple[str, int] | None:
    """Name and topic shard of this gateway's root, or None where it has none.

    Raises:
        ConfigError: not another gateway, or this gateway is a root itself.
    """
    name, shard = settings.get("root"), settings.get("root_shard", 0)
    if name is None:
        return None
    if not isinstance(name, str) or not name.startswith("gateway-") or name == own:
        raise ConfigError("[rounds] root is another gateway's full name", hint='root = "gateway-root"')
    if settings.get("shards"):
        raise ConfigError("[rounds] names a root and shards: a gateway is one or the other")
    if type(shard) is not int or not 0 <= shard <= 999:
        raise ConfigError("[rounds] root_shard is the root's [gateway] shard, 0 to 999")
    return name, shard


def plan_map(plan: RoundPlan) -> dict[str, Any]:
    """What shards are told of a plan."""
    return {f.name: plain(getattr(plan, f.name)) for f in dataclasses.fields(RoundPlan) if f.name not in OWN}


def shard_plan(told: dict[str, Any], shard: str, settings: dict[str, Any], population: int) -> RoundPlan:
    """A shard's own plan of the root's round; ConfigError where the two releases do not understand each other."""
    known = {f.name for f in dataclasses.fields(RoundPlan)} - OWN
    if unknown := told.keys() - known:
        raise ConfigError(f"the root's round has an unknown setting {min(unknown)!r}", hint="install the same release")
    least = max(int(told.get("min_cohort", 2)), int(settings.get("min_cohort", 2)))
    budget = float(settings.get("max_epsilon", 0.0))
    return RoundPlan(
        **{**told, "tensors": tuple(told["tensors"]), "min_cohort": least}, cohort=shard, publish="partial",
        population=population, quorum=1, max_epsilon=budget,
    )  # fmt: skip
