"""What is checked before a round starts, beyond a plan's own contradictions.

These checks are made once, at the start: a round that runs and was stored by an earlier release is loaded as it is.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from edgepriv.errors import ConfigError, RefusedError
from edgepriv.federated.local_recipe import LocalRecipe
from edgepriv.federated.noise import MIN_STEPS, device_deviation
from edgepriv.wire import cbor, message, messages
from edgepriv.wire.rounds import MASKED, MAX_COHORT, Advert, Cohort, step_message
from edgepriv.wire.transfer import PACKET_OVERHEAD_BYTES
from gateway.round_plan import RoundPlan, announcement

if TYPE_CHECKING:
    from collections.abc import Iterable

KEY, SIGNATURE = bytes(32), bytes(64)


def check_plan(plan: RoundPlan) -> None:
    """Refuse a plan that every device would decline, or that breaks the model's privacy budget by adding no noise.

    Raises:
        ConfigError: the training settings, or the noise, are not ones that a device accepts.
        RefusedError: a budget, and no noise.
    """
    fixed = {"trainable", "shares_statistics"}
    if unknown := plan.training.keys() - ({f.name for f in dataclasses.fields(LocalRecipe)} - fixed):
        raise ConfigError(f"[rounds] training: unknown setting {min(unknown)!r}")
    LocalRecipe(**plan.training)
    if plan.privacy == MASKED and plan.max_cohort > MAX_COHORT:
        raise ConfigError(f"devices take part in cohorts of at most {MAX_COHORT}", hint="[rounds] max_cohort = 64")
    if plan.max_epsilon and plan.noise == "none":
        raise RefusedError(
            f"the round adds no noise, and the privacy budget is epsilon {plan.max_epsilon:g}",
            hint='noise = "distributed" or "central"; without [rounds] max_epsilon there is no budget',
        )
    if plan.noise == "distributed":
        _check_shares(plan)


def _check_shares(plan: RoundPlan) -> None:
    """Each device's share of the noise must be there, and wider than the steps of the sum."""
    survivors = announcement(plan, 1, 0.0).survivors
    if not 0 <= plan.colluders < survivors:
        raise ConfigError(
            f"{plan.colluders} colluders leave no honest noise of {survivors} devices",
            hint="colluders below max(quorum, min_cohort)",
        )
    widths = [plan.noise_multiplier * plan.clip, *([plan.clip_noise] if plan.adaptive_clip else [])]
    steps = device_deviation(min(widths), 2.0**plan.fraction_bits, survivors, plan.colluders)
    if steps < MIN_STEPS:
        raise ConfigError(f"a device's noise would be {steps:.2g} steps wide", hint="more [rounds] fraction_bits")


def check_packets(plan: RoundPlan, devices: Iterable[str], limit: int) -> None:
    """Refuse a round whose announcement, or list of members, is larger than what the broker takes in one packet.

    Raises:
        ConfigError: it does not fit.
    """
    names = sorted(devices)
    sizes = {"announcement": _packet(plan, "open", announcement(plan, max(len(names), 1), 0.0))}
    if plan.privacy == MASKED:
        longest = sorted(names, key=len)[-plan.max_cohort :]  # a larger round is divided into cohorts
        cohort = f"{plan.cohort}.000" if len(names) > plan.max_cohort else plan.cohort
        adverts = (Advert(plan.round, cohort, plan.base, name, KEY, KEY, KEY, KEY) for name in longest)
        signed = tuple(cbor.encode([message.encode(a), SIGNATURE]) for a in adverts)
        sizes["list of members"] = _packet(plan, "cohort", Cohort(signed))
    for what, size in sizes.items():
        if size > limit:
            raise ConfigError(
                f"the round's {what} has {size} bytes, the broker's packets at most {limit}",
                hint="raise the broker's packet limit, or lower [rounds] max_cohort or the number of tensors",
            )


def _packet(plan: RoundPlan, step: str, body: object) -> int:
    return len(messages.encode(step_message(plan.round, step, body))) + PACKET_OVERHEAD_BYTES
