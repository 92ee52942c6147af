"""What all rounds on one model have told about one device, by dp-accounting's Renyi accountant.

Events, as the security design names them: noise added on devices is a Gaussian without amplification (the gateway
knows who was sampled). Noise added by the gateway is a Poisson-sampled Gaussian only where devices were chosen by
independent coin flips; a sample of fixed size is accounted with replace-one neighbours, where one device can move
the sum by twice the clip; ``all`` is a plain Gaussian. One replace-one round makes the whole history replace-one.
Aborted rounds count. With adaptive clipping the noisy sum and the noisy count of one round are one Gaussian
(`edgepriv.federated.privacy.joint_multiplier`), amplified as the round is.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from edgepriv.errors import MissingDependencyError
from edgepriv.federated.privacy import joint_multiplier

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ORDERS = [1.1, 1.25, 1.5, 1.75, 2.0, 2.5, *(float(x) for x in range(3, 64)), 80.0, 96.0, 128.0, 192.0, 256.0, 512.0]


def spent_epsilon(rounds: Iterable[Mapping[str, Any]], delta: float) -> float:
    """Epsilon at ``delta`` after these rounds.

    Args:
        rounds: maps with ``noise``, ``noise_multiplier``, ``participation``, ``sample_share``, ``invited``,
            ``population`` and, where the clip adapts, ``adaptive_clip`` and ``clip_noise`` (fields of `RoundRecord`);
            rounds without noise are not counted (they promise nothing).
        delta: above 0.

    Raises:
        MissingDependencyError: dp-accounting is not installed.
    """
    noisy = [r for r in rounds if r["noise"] != "none"]
    if not noisy:
        return 0.0
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as error:
        raise MissingDependencyError(
            "privacy accounting needs dp-accounting", hint="pip install 'edgepriv[gateway]'"
        ) from error
    replace = any(r["noise"] == "central" and r["participation"] == "fixed" for r in noisy)
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE if replace else None
    accountant = rdp.RdpAccountant(ORDERS, **({"neighboring_relation": relation} if relation else {}))
    for event, count in Counter(_event(dp_accounting, item, replace=replace) for item in noisy).items():
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def _event(accounting: Any, item: Mapping[str, Any], *, replace: bool) -> Any:
    joint = joint_multiplier(
        item["noise_multiplier"], item.get("clip_noise", 0.0), adaptive=bool(item.get("adaptive_clip"))
    )
    gaussian = accounting.GaussianDpEvent(joint / (2 if replace else 1))
    population, sample, share = item["population"], item["invited"], item["sample_share"]
    if item["noise"] != "central":
        return gaussian
    if item["participation"] == "poisson" and not replace and share < 1:
        return accounting.PoissonSampledDpEvent(share, gaussian)  # the coin's probability, not how it fell
    if item["participation"] == "fixed" and 0 < sample < population:
        return accounting.SampledWithoutReplacementDpEvent(population, sample, gaussian)
    return gaussian
