"""What an audit says in one word: from the attack's figures, the bound, and what anybody knows without the update.

Rules: the worst image counts, not the mean; ``contained`` needs an attack that fails on every image *and* a bound that
is near the prior for every image; a figure that is not finite is never taken for a good one; without public pictures
nothing is ever ``contained``, because there is no prior to compare with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgepriv.risk.gradient_leakage.bound import Bound
    from edgepriv.risk.gradient_leakage.measures import Leakage

LEAKS, AT_RISK, CONTAINED = "leaks", "at risk", "contained"
SEVERITY = (CONTAINED, AT_RISK, LEAKS)


@dataclass(frozen=True, slots=True)
class Limits:
    """When an update counts as leaking: the attack's own success, and how far the bound is above the prior.

    Attributes:
        max_iip: share of identified images, where the reconstructions are better than the prior on average too.
        max_ssim: of the mean, and of the best image, where it is above the prior's SSIM (with that very image).
        max_chance: identified images, or one clear image, are a leak where the same comes about by chance no more
            often than this: else tiny pictures and large cohorts would look like leaks now and then.
        max_gain_db: of bound or attack above the prior, for the mean and for each image: more is a risk.
        max_psnr_db: of the best image, only where no public pictures were given and so no prior is known.
    """

    max_iip: float = 0.25
    max_ssim: float = 0.5
    max_chance: float = 0.01
    max_gain_db: float = 3.0
    max_psnr_db: float = 20.0


def worse(one: str, other: str) -> bool:
    """Whether the first verdict is the worse."""
    return SEVERITY.index(one) > SEVERITY.index(other)


def judge(leakage: Leakage | None, ceiling: Bound | None, limits: Limits, *, public: bool = True) -> tuple[str, str]:
    """Return the verdict and what it rests on.

    Args:
        leakage: of the attack; ``None`` where none was run.
        ceiling: the bound; ``None`` where none was computed.
        limits: see :class:`Limits`.
        public: whether public pictures were given: without them figures are judged as they are, and never well.
    """
    if leakage is not None:
        seen = _seen(leakage, limits) if public else _seen_alone(leakage, limits)
        if seen:
            return LEAKS, seen
    if odd := _not_finite(leakage, ceiling):
        return AT_RISK, f"{odd} is not a finite number: nothing can be said"
    failed = "no attack was run" if leakage is None else "this attack fails"
    if not public:
        return AT_RISK, f"{failed}, but no public pictures were given: what anybody knows without the update is unknown"
    if leakage is not None and (risk := _nearer(leakage, limits)):
        return AT_RISK, risk
    if ceiling is None:
        return AT_RISK, f"{failed}, and no bound was computed: one failed attack proves nothing"
    if risk := _left_open(ceiling, limits):
        return AT_RISK, f"{failed}, but the bound leaves {risk}"
    return CONTAINED, f"{failed} and the bound of every image is near what the prior alone gives"


def _seen(leakage: Leakage, limits: Limits) -> str:
    """How the attack succeeds, empty where it does not."""
    if leakage.iip >= limits.max_iip and leakage.ssim > leakage.prior_ssim:
        return f"the attack identifies {leakage.iip:.0%} of the canaries among {leakage.pool_size} images"
    if leakage.ssim >= limits.max_ssim and leakage.ssim > leakage.prior_ssim:
        return f"the reconstructions reach SSIM {leakage.ssim:.2f} (the prior: {leakage.prior_ssim:.2f})"
    if leakage.identified and leakage.iip_chance <= limits.max_chance:
        return (
            f"the attack identifies {leakage.identified} of {leakage.n} canaries among {leakage.pool_size} images: "
            f"by chance as many come about in {leakage.iip_chance:.1%} of draws"
        )
    best, prior = max(zip(leakage.per_image_ssim, leakage.per_image_prior_ssim, strict=True))
    if best >= limits.max_ssim and best > prior and leakage.ssim_chance <= limits.max_chance:
        return f"one image is reconstructed at SSIM {best:.2f} (the prior: {prior:.2f})"
    return ""


def _seen_alone(leakage: Leakage, limits: Limits) -> str:
    """The same by absolute figures; the prior is mid-grey here, and IIP among the canaries alone says nothing."""
    for psnr, grey, clear in zip(
        leakage.per_image_psnr_db, leakage.per_image_prior_psnr_db, leakage.per_image_ssim, strict=True
    ):
        if psnr > grey + limits.max_gain_db and (psnr >= limits.max_psnr_db or clear >= limits.max_ssim):
            return (
                f"a canary is reconstructed at {psnr:.1f} dB, SSIM {clear:.2f} "
                "(no public pictures were given: judged as it is)"
            )
    return ""


def _nearer(leakage: Leakage, limits: Limits) -> str:
    """How much nearer than the prior the attack comes to one image, empty where it does not."""
    gain = max(a - b for a, b in zip(leakage.per_image_psnr_db, leakage.per_image_prior_psnr_db, strict=True))
    if gain <= limits.max_gain_db:
        return ""
    return f"no image is recognised, but the attack comes {gain:.1f} dB nearer to one than the prior does"


def _left_open(ceiling: Bound, limits: Limits) -> str:
    """What the bound leaves above the prior, over all images or for one, empty where that is little."""
    gain = ceiling.psnr_db - ceiling.floor_db
    if gain > limits.max_gain_db:
        return f"{gain:.1f} dB above what the prior alone gives"
    # images share one prior, so the floor of all is the floor of each
    worst = max(ceiling.per_image_psnr_db) - ceiling.floor_db
    return f"one image {worst:.1f} dB above what the prior alone gives" if worst > limits.max_gain_db else ""


def _not_finite(leakage: Leakage | None, ceiling: Bound | None) -> str:
    """The first figure that is not finite; an infinite bound is one, and means that nothing is hidden."""
    if leakage is not None:
        single = {name: (getattr(leakage, name),) for name in ("psnr_db", "ssim", "prior_ssim", "iip")}
        rows = {name: getattr(leakage, f"per_image_{name}") for name in ("ssim", "psnr_db", "prior_ssim")}
        for name, values in [*single.items(), *rows.items()]:
            if not all(map(math.isfinite, values)):
                return f"the attack's {name}"
    if ceiling is not None and not (
        math.isfinite(ceiling.floor_db)
        and all(math.isfinite(v) or v == math.inf for v in (ceiling.psnr_db, *ceiling.per_image_psnr_db))
    ):
        return "the bound"
    return ""
