"""Do the fleet's released outputs still look like the audited behaviour?

What is compared: the share of each class against the model's behaviour on the auditor's own pictures. Measure:
population stability index, sum of (p - q) ln(p / q) over classes with half an output added to each; 0.1 is usually
called a small and 0.25 a large shift. A shift may be the world's and not the model's: an alert says that the verdict
was reached on other behaviour, no more.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PRIOR = 0.5


@dataclass(frozen=True, slots=True)
class Drift:
    """How far one model's released outputs are from the audited ones."""

    model: str
    outputs: int
    index: float
    alert: bool


def stability_index(audited: Sequence[float], seen: Mapping[int, float]) -> float:
    """Population stability index between audited class counts and counts by class.

    Classes outside the audited range count as one class that the audit never saw.
    """
    foreign = sum(count for label, count in seen.items() if not 0 <= label < len(audited))
    expected = [*audited, 0.0]
    found = [*(float(seen.get(label, 0.0)) for label in range(len(audited))), foreign]
    total_e, total_f = sum(expected) + PRIOR * len(expected), sum(found) + PRIOR * len(found)
    shares = [((e + PRIOR) / total_e, (f + PRIOR) / total_f) for e, f in zip(expected, found, strict=True)]
    return sum((f - e) * math.log(f / e) for e, f in shares)


class DriftWatch:
    """Counts of released outputs by model over the windows that the gateway shows now (its last day)."""

    def __init__(self, *, min_outputs: int, threshold: float) -> None:
        self._min_outputs, self._threshold = min_outputs, threshold
        self._windows: dict[str, dict[tuple[str, int, int], int]] = defaultdict(dict)

    def take(self, windows: Iterable[Mapping[str, Any]]) -> int:
        """Replace the counts by the gateway's windows (``edgepriv.windows/1``); returns how many were well formed."""
        self._windows.clear()
        taken = 0
        for window in windows:
            try:
                key = (str(window["device"]), int(window["start"]), int(window["class"]))
                self._windows[str(window["model"])][key] = max(0, int(window["count"]))
            except (KeyError, TypeError, ValueError):
                continue
            taken += 1
        return taken

    def judge(self, model: str, audited: Sequence[float]) -> Drift | None:
        """Compare a model's counts with the audit's; None where too little was seen."""
        seen: dict[int, float] = defaultdict(float)
        for (_, _, label), count in self._windows.get(model, {}).items():
            seen[label] += count
        outputs = int(sum(seen.values()))
        if outputs < self._min_outputs or not sum(audited):
            return None
        index = stability_index(audited, seen)
        return Drift(model, outputs, index, index > self._threshold)
