"""The verdict: made to leak, leaking for unknown cause, or not leaking more than is allowed.

Rules: "vicious" is said only against honest references that the auditor trained itself; the p-value is a rank among
them and needs at least 19; without references leakage is leakage, of unknown cause. A "low leakage" verdict holds for
the audited policies and auditors only: no audit bounds an unknown decoder, the bits of the policy do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.risk.reconstruction.calibration import SHIPPED, Calibration

if TYPE_CHECKING:
    from collections.abc import Sequence

VICIOUS, HIGH, LOW = "vicious", "high leakage", "low leakage"
REFERENCES_FOR_P = 19
DEFAULT_MAX_EXPLAINED_VARIANCE = 0.25


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the audit concludes, with what it rests on.

    Attributes:
        word: ``vicious``, ``high leakage`` or ``low leakage``.
        reason: one sentence.
        p_value: rank of the model's detector score among the references, or None with fewer than 19.
        detector_score: log-odds of the calibrated detector, None without references.
        reference_interval: smallest and largest detector score of a reference against the others.
        references: how many.
    """

    word: str
    reason: str
    p_value: float | None
    detector_score: float | None
    reference_interval: tuple[float, float] | None
    references: int

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict's part of the JSON report."""
        return {
            "verdict": self.word,
            "reason": self.reason,
            "p_value": self.p_value,
            "detector": {
                "score": self.detector_score,
                "reference_interval": None if self.reference_interval is None else list(self.reference_interval),
                "references": self.references,
            },
        }


def against(
    model: dict[str, float | None], references: Sequence[dict[str, float | None]], *, known: bool
) -> dict[str, float | None]:
    """Return each feature's distance above the references: above their mean, or above the most leaking stand-in."""
    out: dict[str, float | None] = {}
    for name, value in model.items():
        others = [float(v) for v in (reference[name] for reference in references) if v is not None]
        middle = (np.mean if known else np.max)(others) if others else 0.0
        out[name] = None if value is None or not others else value - float(middle)
    return out


def reference_scores(
    references: Sequence[dict[str, float | None]], *, known: bool, calibration: Calibration = SHIPPED
) -> list[float]:
    """Score every reference against the others, as the model is scored against all."""
    if len(references) < 2:
        return []
    rest = [[other for other in references if other is not reference] for reference in references]
    return [
        calibration.score(against(reference, others, known=known))
        for reference, others in zip(references, rest, strict=True)
    ]


def judge(
    model: dict[str, float | None] | None,
    references: Sequence[dict[str, float | None]],
    largest_leakage: float,
    *,
    known: bool,
    limit: float = DEFAULT_MAX_EXPLAINED_VARIANCE,
    calibration: Calibration = SHIPPED,
) -> Verdict:
    """Reach a verdict.

    Args:
        model: features of the model, None where no references were trained.
        references: features of honest models on the same bench.
        largest_leakage: largest explained variance over the audited policies.
        known: whether the references have the model's architecture.
        limit: explained variance above which leakage is called high.
        calibration: weights and threshold of the detector.
    """
    score, interval, p_value = None, None, None
    if model is not None and references:
        score = calibration.score(against(model, references, known=known))
        others = reference_scores(references, known=known, calibration=calibration)
        interval = (min(others), max(others)) if others else None
        if len(references) >= REFERENCES_FOR_P:
            p_value = (1 + sum(other >= score for other in others)) / (len(references) + 1)
        if score > calibration.threshold and (interval is None or score > interval[1]):
            reason = f"it leaks more than any of {len(references)} honest models trained for comparison"
            return Verdict(VICIOUS, reason, p_value, score, interval, len(references))
    cause = "no more than honest models do" if references else "cause unknown: no reference models were trained"
    if largest_leakage > limit:
        reason = f"{largest_leakage:.2f} of what the class does not tell can be rebuilt; {cause}"
        return Verdict(HIGH, reason, p_value, score, interval, len(references))
    reason = f"at most {largest_leakage:.2f} of what the class does not tell was rebuilt from the audited policies"
    return Verdict(LOW, reason, p_value, score, interval, len(references))
