"""Which devices a round invites, by the operating system's randomness.

``all``; ``fixed``: a share of them, exactly; ``poisson``: each by a coin flip of its own. Privacy accounting
(`gateway.accounting`) counts on what is done here: only independent flips are amplified as such.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

KINDS = ("all", "fixed", "poisson")


def choose_devices(
    devices: Sequence[str], participation: str, share: float, *, source: random.Random | None = None
) -> list[str]:
    """The devices to invite, sorted.

    Args:
        devices: who could be invited.
        participation: one of `KINDS`.
        share: probability or part, in (0, 1].
        source: of randomness; the operating system's unless a simulation must repeat.

    Raises:
        ConfigError: an unknown kind or a share outside its range.
    """
    if participation not in KINDS or not 0 < share <= 1:
        raise ConfigError(f"participation is one of {', '.join(KINDS)}, sample_share lies in (0, 1]")
    draw = source or random.SystemRandom()
    if participation == "fixed":
        return sorted(draw.sample(sorted(devices), max(1, round(share * len(devices)))))
    if participation == "poisson":
        return sorted(name for name in devices if draw.random() < share)
    return sorted(devices)
