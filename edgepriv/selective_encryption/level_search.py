"""Find how many encrypted units each level gives back, so that its quality meets a target on the owner's data.

Fixed shares are not used: below a share of about 0.4 a level is worth nothing, and where the useful part begins differs
from model to model. The levels are prefixes of one order of the units. A bisection finds a crossing of the target;
quality is not monotone from unit to unit and may jump at one, so then (1) neighbouring counts are tried, and (2) where
none is close enough, the unit at the jump changes places with a later, less important one. Levels that were found
before are never touched by that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

NEIGHBOURS, EXCHANGES = 6, 40  # counts that are tried on each side; units that are tried at the jump
VERY_CLOSE, CLOSE = 0.002, 0.008  # relative to the target, or to 1 where the target is smaller


class LevelSearch:
    """Searches on one order of units; ``order`` may change places behind the levels that were found."""

    def __init__(
        self, measure: Callable[[NDArray[np.int64]], float], order: NDArray[np.int64], log: Callable[[str], None]
    ) -> None:
        """Take the measure and the order.

        Args:
            measure: quality with these units restored.
            order: all encrypted units, most important first, int64 [n, 2].
            log: progress.
        """
        self.order, self._measure, self._log = order.copy(), measure, log
        self._seen: dict[int, float] = {}

    def at(self, count: int) -> float:
        """Quality with the first ``count`` units of the order restored."""
        if count not in self._seen:
            self._seen[count] = self._measure(self.order[:count])
        return self._seen[count]

    def find(self, targets: Sequence[float]) -> list[tuple[int, float]]:
        """Counts and qualities for rising targets below the whole model's quality; counts rise strictly.

        Raises:
            ConfigError: a target cannot be met between its neighbours.
        """
        found: list[tuple[int, float]] = []
        low, total = 0, len(self.order)
        for target in targets:
            if self.at(total) < target:
                raise ConfigError(f"target {target:g} is above the whole model's {self.at(total):.4g}", hint=_LOWER)
            low = self._one(target, low, total)
            self._log(f"target {target:g}: {low} of {total} units give {self.at(low):.4g}")
            found.append((low, self.at(low)))
        _check_rising(found, targets)
        return found

    def _one(self, target: float, low: int, total: int) -> int:
        crossing, below = total, low
        while crossing - below > 1:
            middle = (below + crossing) // 2
            below, crossing = (middle, crossing) if self.at(middle) < target else (below, middle)
        count = self._nearby(target, crossing, low, total)
        for place in (crossing - 1, crossing, crossing - 2, crossing + 1):
            if self._miss(count, target) <= CLOSE:
                break
            if low <= place < total - 1:
                count = self._exchange(target, count, place)
        return count

    def _miss(self, count: int, target: float) -> float:
        return abs(self.at(count) - target) / max(1.0, abs(target))

    def _nearby(self, target: float, crossing: int, low: int, total: int) -> int:
        best = crossing
        for distance in range(1, NEIGHBOURS + 1):
            if self._miss(best, target) <= VERY_CLOSE:
                break
            inside = [count for count in (crossing - distance, crossing + distance) if low < count < total]
            best = min([best, *inside], key=lambda count: self._miss(count, target))
        return best

    def _exchange(self, target: float, best: int, place: int) -> int:
        """Try later units in one place of the order; keeps the exchange that comes closest, if it beats ``best``."""
        miss, chosen = self._miss(best, target), -1
        for other in np.unique(np.linspace(place + 1, len(self.order) - 1, EXCHANGES).astype(int)):
            value = self._measure(np.concatenate([self.order[:place], self.order[other : other + 1]]))
            if abs(value - target) / max(1.0, abs(target)) < miss:
                miss, chosen = abs(value - target) / max(1.0, abs(target)), int(other)
            if miss <= VERY_CLOSE:
                break
        if chosen < 0:
            return best
        self.order[[place, chosen]] = self.order[[chosen, place]]
        self._seen = {count: value for count, value in self._seen.items() if not place < count <= chosen}
        return place + 1


_LOWER = "lower --levels"


def _check_rising(found: Sequence[tuple[int, float]], targets: Sequence[float]) -> None:
    for (count, value), (after, value_after), target in zip(found, found[1:], targets[1:], strict=False):
        if after <= count or value_after <= value:
            raise ConfigError(
                f"target {target:g} cannot be told from the level below it", hint="space the --levels further apart"
            )
