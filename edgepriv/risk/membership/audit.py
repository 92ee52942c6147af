"""Run every attack that the arrays allow, on the classifier and on the released set, and name the strongest.

The headline is the strongest attack: a weak attack near one half proves nothing. A report always carries the two
nulls (permuted membership, random scores): when one of them is off, the figures are void and the verdict says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError
from edgepriv.risk.membership import attacks, evaluate, one_run
from edgepriv.risk.membership.quantile import MIN_REFERENCES, quantile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgepriv.risk.membership.shadows import ShadowScores

    Scores = NDArray[np.float64]
    Masks = NDArray[np.bool_]

__all__ = [
    "AttackResult",
    "AuditReport",
    "TargetView",
    "attack_target",
    "audit_released_sets",
    "audit_shadows",
    "report",
]

RELEASE_ATTACKS = frozenset({"nearest", "nearest_lira", "nearest_difference"})
CALIBRATED = frozenset({"lira", "rmia_all", "rmia_out", "label_only_calibrated", "nearest_lira", "nearest_difference"})
MIN_NON_MEMBERS_FOR_TENTH = 5000


@dataclass(frozen=True, slots=True)
class TargetView:
    """What the attacker holds about one target: its scores [n], and those of its shadows [K, n] with their masks.

    ``None`` means that the attacker does not hold it; the attacks that need it are left out.
    """

    margins: Scores | None = None
    log_probabilities: Scores | None = None
    agreements: Scores | None = None
    nearness: Scores | None = None
    shadow_masks: Masks | None = None
    shadow_margins: Scores | None = None
    shadow_log_probabilities: Scores | None = None
    shadow_agreements: Scores | None = None
    shadow_nearness: Scores | None = None
    features: Scores | None = None
    reference_margins: Scores | None = None
    reference_features: Scores | None = None


@dataclass(frozen=True, slots=True)
class AttackResult:
    """One attack over all targets."""

    attack: str
    surface: str
    auc: float
    auc_interval: tuple[float, float]
    tpr_at_1pct: float | None
    tpr_at_01pct: float | None
    sd_targets: float

    def tpr_at(self, rate: float) -> float | None:
        """TPR at an FPR of 0.01, or of 0.001 where enough non-members were there."""
        return self.tpr_at_1pct if rate >= 0.01 else self.tpr_at_01pct

    def as_json(self) -> dict[str, Any]:
        """Plain values, rounded to 4 decimals."""
        return {
            "attack": self.attack,
            "surface": self.surface,
            "auc": round(self.auc, 4),
            "auc_interval": [round(value, 4) for value in self.auc_interval],
            "tpr_at_1pct": _rounded(self.tpr_at_1pct),
            "tpr_at_01pct": _rounded(self.tpr_at_01pct),
            "sd_targets": round(self.sd_targets, 4),
        }


@dataclass(frozen=True, slots=True)
class AuditReport:
    """All attacks, the nulls, and what the result is worth."""

    attacks: list[AttackResult]
    targets: int
    shadows: int
    members: int
    non_members: int
    dropped: int
    null_auc: float
    null_interval: tuple[float, float]
    noise_null: float | None
    one_run_epsilon: float
    weak: bool
    warnings: list[str] = field(default_factory=list)

    @property
    def strongest(self) -> AttackResult:
        """The attack with the largest AUC."""
        return max(self.attacks, key=lambda result: result.auc)

    @property
    def null_holds(self) -> bool:
        """Whether the permuted null reads one half within its own 99.9 % interval."""
        return self.null_interval[0] <= self.null_auc <= self.null_interval[1]

    def verdict(self, max_auc: float = 0.60, max_tpr: float = 0.05, *, rate: float = 0.01) -> str:
        """One sentence: void, leak, weak evidence, or nothing found."""
        top = self.strongest
        if not self.null_holds:
            return f"Void: the permuted null reads {self.null_auc:.3f}, so the evaluation itself is wrong."
        if self.exceeds(max_auc, max_tpr, rate=rate):
            return f"Leak: {top.attack} on the {top.surface} reaches AUC {top.auc:.3f}{self._worst_rate(rate)}."
        held = f"the strongest of {len(self.attacks)} attacks ({top.attack}) reaches AUC {top.auc:.3f}"
        if self.weak:
            return f"Weak evidence: without shadow models only weak attacks ran; {held}. This does not show safety."
        return f"Nothing found above the threshold: {held}. An empirical result, not a proof."

    def exceeds(self, max_auc: float, max_tpr: float, *, rate: float = 0.01) -> bool:
        """Whether any attack passes a threshold on AUC or on TPR at the FPR ``rate`` (0.01 or 0.001)."""
        return any(a.auc > max_auc or (a.tpr_at(rate) or 0.0) > max_tpr for a in self.attacks)

    def _worst_rate(self, rate: float) -> str:
        known = [(value, a.attack) for a in self.attacks if (value := a.tpr_at(rate)) is not None]
        return f"; the largest TPR at {rate:.1%} FPR is {max(known)[0]:.1%} ({max(known)[1]})" if known else ""

    def as_json(self) -> dict[str, Any]:
        """The keys of a release card's ``audit``, then the rest."""
        top = self.strongest
        return {
            "strongest": top.attack,
            "auc": round(top.auc, 4),
            "auc_interval": [round(value, 4) for value in top.auc_interval],
            "tpr_at_1pct": _rounded(top.tpr_at_1pct),
            "null_auc": round(self.null_auc, 4),
            "null_interval": [round(value, 4) for value in self.null_interval],
            "noise_null": _rounded(self.noise_null),
            "one_run_epsilon_lower_bound": round(self.one_run_epsilon, 4),
            "targets": self.targets,
            "shadows": self.shadows,
            "members": self.members,
            "non_members": self.non_members,
            "dropped": self.dropped,
            "weak": self.weak,
            "warnings": self.warnings,
            "attacks": [result.as_json() for result in sorted(self.attacks, key=lambda result: -result.auc)],
        }


def attack_target(view: TargetView) -> dict[str, Scores]:
    """Scores [n] of every attack that the attacker's holdings allow."""
    found: dict[str, Scores] = {}
    masks = view.shadow_masks
    if view.margins is not None:
        found["threshold"] = attacks.threshold(view.margins)
        known, described = view.reference_margins, view.reference_features
        if view.features is not None and known is not None and described is not None and len(known) >= MIN_REFERENCES:
            found["quantile"] = quantile(view.margins, view.features, known, described)
        if masks is not None and view.shadow_margins is not None:
            found["lira"] = attacks.lira(view.margins, view.shadow_margins, masks)
    if view.log_probabilities is not None and masks is not None and view.shadow_log_probabilities is not None:
        found["rmia_all"] = attacks.rmia_all(view.log_probabilities, view.shadow_log_probabilities, masks)
        found["rmia_out"] = attacks.rmia_out(view.log_probabilities, view.shadow_log_probabilities, masks)
    if view.agreements is not None:
        found["label_only"] = attacks.threshold(view.agreements)
        if masks is not None and view.shadow_agreements is not None:
            found["label_only_calibrated"] = attacks.calibrated_difference(
                view.agreements, view.shadow_agreements, masks
            )
    if view.nearness is not None:
        found["nearest"] = attacks.threshold(view.nearness)
        if masks is not None and view.shadow_nearness is not None:
            found["nearest_lira"] = attacks.lira(view.nearness, view.shadow_nearness, masks)
            found["nearest_difference"] = attacks.calibrated_difference(view.nearness, view.shadow_nearness, masks)
    return found


def audit_shadows(shadows: ShadowScores, rng: np.random.Generator, *, targets: int | None = None) -> AuditReport:
    """Audit with each model as target once and all others as its shadows."""
    count = len(shadows.masks) if targets is None else min(targets, len(shadows.masks))
    views = [_leave_one_out(shadows, k) for k in range(count)]
    found = [attack_target(view) for view in views]
    members = [shadows.masks[k] for k in range(count)]
    noise = _noise_null([view.shadow_masks for view in views if view.shadow_masks is not None], members, rng)
    return report(found, members, rng, shadow_masks=np.delete(shadows.masks, 0, axis=0), noise_null=noise)


def audit_released_sets(nearness: Scores, masks: Masks, rng: np.random.Generator) -> AuditReport:
    """Audit released sets alone from nearness [N, n]: each is the target once and the others are its shadows."""
    found = [
        attack_target(
            TargetView(
                nearness=nearness[k],
                shadow_masks=np.delete(masks, k, axis=0),
                shadow_nearness=np.delete(nearness, k, axis=0),
            )
        )
        for k in range(len(masks))
    ]
    return report(found, list(masks), rng, shadow_masks=masks[1:])


def report(
    found: Sequence[dict[str, Scores]],
    members: Sequence[Masks],
    rng: np.random.Generator,
    *,
    shadow_masks: Masks | None = None,
    noise_null: float | None = None,
) -> AuditReport:
    """Turn attack scores of each target and its true membership into a report.

    Raises:
        DataError: no attack could be run.
    """
    if not found or not found[0]:
        raise DataError("no attack can be run on what was given", hint="give scores of the target on all records")
    results = [_judge(name, [target[name] for target in found], members, rng) for name in found[0]]
    top = max(results, key=lambda result: result.auc)
    strongest = [target[top.attack] for target in found]
    dropped = max(int(np.isnan(scores).sum()) for target in found for scores in target.values())
    return AuditReport(
        attacks=results,
        targets=len(found),
        shadows=0 if shadow_masks is None else len(shadow_masks),
        members=int(members[0].sum()),
        non_members=int((~members[0]).sum()),
        dropped=dropped,
        null_auc=evaluate.permuted_null(strongest, members, rng),
        null_interval=evaluate.null_interval(members),
        noise_null=noise_null,
        one_run_epsilon=_one_run(found[0], members[0]),
        weak=not any(result.attack in CALIBRATED for result in results),
        warnings=[*_warnings(shadow_masks), *_left_out(found[0])],
    )


def _judge(name: str, scores: list[Scores], members: Sequence[Masks], rng: np.random.Generator) -> AttackResult:
    aucs = [evaluate.auc(values, held) for values, held in zip(scores, members, strict=True)]
    surface = "release" if name in RELEASE_ATTACKS else "classifier"
    tenth = [
        evaluate.true_positive_rate(s, m, 0.001) if (~m).sum() >= MIN_NON_MEMBERS_FOR_TENTH else None
        for s, m in zip(scores, members, strict=True)
    ]
    return AttackResult(
        attack=name,
        surface=surface,
        auc=float(np.mean(aucs)),
        auc_interval=evaluate.bootstrap_interval(scores, members, rng),
        tpr_at_1pct=_mean([evaluate.true_positive_rate(s, m, 0.01) for s, m in zip(scores, members, strict=True)]),
        tpr_at_01pct=_mean(tenth),
        sd_targets=float(np.std(aucs)),
    )


def _leave_one_out(shadows: ShadowScores, k: int) -> TargetView:
    def others(values: Scores) -> Scores:
        return np.delete(values, k, axis=0)

    near = shadows.nearness
    return TargetView(
        margins=shadows.margins[k],
        log_probabilities=shadows.log_probabilities[k],
        agreements=shadows.agreements[k],
        nearness=None if near is None else near[k],
        shadow_masks=np.delete(shadows.masks, k, axis=0),
        shadow_margins=others(shadows.margins),
        shadow_log_probabilities=others(shadows.log_probabilities),
        shadow_agreements=others(shadows.agreements),
        shadow_nearness=None if near is None else others(near),
        features=shadows.features,
        reference_margins=shadows.reference_margins[k],
        reference_features=shadows.reference_features,
    )


def _noise_null(shadow_masks: list[Masks], members: Sequence[Masks], rng: np.random.Generator) -> float:
    """LiRA on random scores with this very design of masks: it finds a design that is biased by itself."""
    values = []
    for masks, held in zip(shadow_masks, members, strict=True):
        noise = rng.standard_normal((len(masks) + 1, len(held)))
        values.append(evaluate.auc(attacks.lira(noise[0], noise[1:], masks), held))
    return float(np.mean(values))


def _one_run(found: dict[str, Scores], members: Masks) -> float:
    name = next(n for n in ("nearest_lira", "nearest", "rmia_out", *found) if n in found)  # chosen before looking
    usable = int(np.isfinite(found[name]).sum())
    guesses = min(100, usable // 4 * 2)
    if guesses < 2:
        return 0.0
    correct = one_run.count_correct(found[name], members, guesses)
    return one_run.epsilon_lower_bound(usable, guesses, correct)


def _warnings(masks: Masks | None) -> list[str]:
    if masks is None:
        return ["no shadow models: the calibrated attacks did not run"]
    found = []
    if len(masks) < 15:
        found.append(f"{len(masks)} shadows: fewer than 15 make the calibrated attacks read too low")
    if len(masks) > 3 and np.ptp(masks.sum(axis=0)) <= 1:
        found.append("membership is balanced by design: LiRA reads below one half; draw masks by fair coins")
    return found


def _left_out(found: dict[str, Scores]) -> list[str]:
    if "threshold" not in found or "quantile" in found:
        return []
    return [f"fewer than {MIN_REFERENCES} known non-members: the quantile attack did not run"]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
