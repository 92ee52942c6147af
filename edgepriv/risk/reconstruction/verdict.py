"""The verdict: made to leak, leaking for unknown cause, or not leaking more than is allowed.

Rules: "vicious" is said only against honest references that the auditor trained itself; the p-value is a rank among
them and needs at least 19; without references leakage is leakage, of unknown cause. A "low leakage" verdict holds for
the audited policies and auditors only: no audit bounds an unknown decoder, the bits of the policy do. An accusation
needs at least ``REFERENCES_TO_ACCUSE`` references, ``PICTURES_TO_ACCUSE`` scoring pictures and a detector score that
stays above threshold and references when the pictures are drawn again (:func:`least_margin`); short of that a
suspicious model is of "high leakage, cause unknown": withheld, not accused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.risk.reconstruction.calibration import SHIPPED, Calibration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgepriv.risk.reconstruction.detectors import Evidence

    Array = NDArray[np.float64]

VICIOUS, HIGH, LOW = "vicious", "high leakage", "low leakage"
REFERENCES_FOR_P = 19
DEFAULT_MAX_EXPLAINED_VARIANCE = 0.25
REFERENCES_TO_ACCUSE = 3
PICTURES_TO_ACCUSE = 60
RESAMPLINGS = 400


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


def least_margin(
    model: Evidence, references: Sequence[Evidence], *, known: bool, calibration: Calibration = SHIPPED, seed: int = 0
) -> float:
    """Return how far the model's score stays above threshold and references when the pictures are drawn again.

    The 2.5 % quantile over bootstrap samples of the scoring pictures, the same ones for the model and its references:
    at most 0 says that other pictures of the same kind might not have shown a difference.
    """
    n = len(model.available)
    rows = np.random.default_rng(seed).integers(0, n, (RESAMPLINGS, n))
    everyone = (model, *references)
    names = [name for name in calibration.weights if all(name in one.lost for one in everyone)] or ["ridge"]
    resampled = {
        name: np.stack([1 - one.lost[name][rows].sum(1) / one.available[rows].sum(1) for one in everyone])
        for name in {*names, "ridge"}
    }
    middle = np.mean if known else np.max

    def score(at: int, others: list[int]) -> Array:
        total = np.full(RESAMPLINGS, calibration.bias)
        for name, weight in calibration.weights.items():
            values = resampled[name if name in names else "ridge"]
            total += weight * (values[at] - middle(values[others], axis=0))
        return total

    numbers = list(range(1, len(everyone)))
    limits = [score(at, [other for other in numbers if other != at]) for at in numbers] if len(numbers) > 1 else []
    margin = score(0, numbers) - np.maximum.reduce([np.full(RESAMPLINGS, calibration.threshold), *limits])
    return float(np.quantile(margin, 0.025))


def too_weak_to_accuse(references: int, pictures: int, margin: float) -> str:
    """Return why a score above every reference is no proof yet, or nothing where it is."""
    if references < REFERENCES_TO_ACCUSE:
        return f"{references} honest models are too few to call it vicious ({REFERENCES_TO_ACCUSE} are the least)"
    if pictures < PICTURES_TO_ACCUSE:
        return f"{pictures} scoring pictures are too few to call it vicious ({PICTURES_TO_ACCUSE} are the least)"
    if margin <= 0:
        return f"with {pictures} scoring pictures that may be chance: audit it with more of them"
    return ""


def judge(
    model: dict[str, float | None] | None,
    references: Sequence[dict[str, float | None]],
    largest_leakage: float,
    *,
    known: bool,
    limit: float = DEFAULT_MAX_EXPLAINED_VARIANCE,
    calibration: Calibration = SHIPPED,
    doubt: str = "",
) -> Verdict:
    """Reach a verdict.

    Args:
        model: features of the model, None where no references were trained.
        references: features of honest models on the same bench.
        largest_leakage: largest explained variance over the audited policies.
        known: whether the references have the model's architecture.
        limit: explained variance above which leakage is called high.
        calibration: weights and threshold of the detector.
        doubt: why a suspicious score is no proof, from :func:`too_weak_to_accuse`.
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
            if doubt:
                reason = f"{reason}, cause unknown: {doubt}"
            return Verdict(HIGH if doubt else VICIOUS, reason, p_value, score, interval, len(references))
    cause = "no more than honest models do" if references else "cause unknown: no reference models were trained"
    if largest_leakage > limit:
        reason = f"{largest_leakage:.2f} of what the class does not tell can be rebuilt; {cause}"
        return Verdict(HIGH, reason, p_value, score, interval, len(references))
    reason = f"at most {largest_leakage:.2f} of what the class does not tell was rebuilt from the audited policies"
    return Verdict(LOW, reason, p_value, score, interval, len(references))
