"""Run every attack that the arrays allow, on the classifier and on the released set, and name the strongest.

The headline is the strongest attack: a weak attack near one half proves nothing. A report carries the permuted null
and, wherever shadows were used, LiRA on random scores with their masks: when one of them leaves its interval, the
figures are void and the verdict says so. ``Limits`` is the one place that says what counts as a leak.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgepriv.errors import DataError
from edgepriv.risk.membership import attacks, evaluate, one_run
from edgepriv.risk.membership.quantile import MIN_REFERENCES, quantile
from edgepriv.risk.membership.scores import calibrated_records

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgepriv.risk.membership.shadows import ShadowScores

    Scores = NDArray[np.float64]
    Masks = NDArray[np.bool_]
    NoiseNull = tuple[float, tuple[float, float]]

__all__ = [
    "LIMITS",
    "AttackResult",
    "AuditReport",
    "Limits",
    "Outcome",
    "TargetView",
    "attack_target",
    "audit_released_sets",
    "audit_shadows",
    "report",
]

Outcome = Literal["void", "leak", "weak", "none"]

NEAREST_CALIBRATED = frozenset({"nearest_lira", "nearest_difference", "nearest_any_lira", "nearest_any_difference"})
RELEASE_ATTACKS = NEAREST_CALIBRATED | {"nearest", "nearest_any"}
CALIBRATED = NEAREST_CALIBRATED | {"lira", "rmia_all", "rmia_out", "label_only_calibrated"}
MIN_NON_MEMBERS_FOR_TENTH = 5000


@dataclass(frozen=True, slots=True)
class Limits:
    """Above one of these an attack counts as a leak; ``rate`` is the FPR (0.01 or 0.001) at which TPR is read."""

    auc: float = 0.60
    tpr: float = 0.05
    rate: float = 0.01


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class TargetView:
    """What the attacker holds about one target: its scores [n], and those of its shadows [K, n] with their masks.

    ``None`` means that the attacker does not hold it; the attacks that need it are left out.
    """

    margins: Scores | None = None
    log_probabilities: Scores | None = None
    agreements: Scores | None = None
    nearness: Scores | None = None
    nearness_any: Scores | None = None
    shadow_masks: Masks | None = None
    shadow_margins: Scores | None = None
    shadow_log_probabilities: Scores | None = None
    shadow_agreements: Scores | None = None
    shadow_nearness: Scores | None = None
    shadow_nearness_any: Scores | None = None
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
    """All attacks, the nulls, and what the result is worth; ``weak_because`` says why it is little, if it is."""

    attacks: list[AttackResult]
    targets: int
    shadows: int
    members: int
    non_members: int
    dropped: int
    null_auc: float
    null_interval: tuple[float, float]
    noise_null: float | None
    noise_null_interval: tuple[float, float] | None
    one_run_epsilon: float | None
    weak_because: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def strongest(self) -> AttackResult:
        """The attack with the largest AUC."""
        return max(self.attacks, key=lambda result: result.auc)

    @property
    def weak(self) -> bool:
        """Whether an audit that found nothing shows little."""
        return bool(self.weak_because)

    @property
    def null_holds(self) -> bool:
        """Whether each null reads one half within its own 99.9 % interval."""
        return not self._void_nulls()

    def outcome(self, limits: Limits = LIMITS) -> Outcome:
        """What the verdict says, in a word."""
        if not self.null_holds:
            return "void"
        if self.exceeds(limits):
            return "leak"
        return "weak" if self.weak else "none"

    def verdict(self, limits: Limits = LIMITS) -> str:
        """One sentence: void, leak, weak evidence, or nothing found."""
        top, outcome = self.strongest, self.outcome(limits)
        if outcome == "void":
            return f"Void: {' and '.join(self._void_nulls())}, so the evaluation itself is wrong."
        if outcome == "leak":
            return f"Leak: {top.attack} on the {top.surface} reaches AUC {top.auc:.3f}{self._worst_rate(limits.rate)}."
        held = f"the strongest of {len(self.attacks)} attacks ({top.attack}) reaches AUC {top.auc:.3f}"
        if outcome == "weak":
            return f"Weak evidence: {'; '.join(self.weak_because)}; {held}. This does not show safety."
        return f"Nothing found above the threshold: {held}. An empirical result, not a proof."

    def exceeds(self, limits: Limits) -> bool:
        """Whether any attack passes a limit."""
        return any(a.auc > limits.auc or (a.tpr_at(limits.rate) or 0.0) > limits.tpr for a in self.attacks)

    def largest_tpr(self, rate: float) -> tuple[float, str] | None:
        """The largest TPR at this FPR with its attack, which need not be the strongest; None where it was not read."""
        known = [(value, a.attack) for a in self.attacks if (value := a.tpr_at(rate)) is not None]
        return max(known) if known else None

    def _worst_rate(self, rate: float) -> str:
        worst = self.largest_tpr(rate)
        return f"; the largest TPR at {rate:.1%} FPR is {worst[0]:.1%} ({worst[1]})" if worst else ""

    def _void_nulls(self) -> list[str]:
        nulls = [("permuted null", self.null_auc, self.null_interval)]
        if self.noise_null is not None and self.noise_null_interval is not None:
            nulls.append(("null of random scores", self.noise_null, self.noise_null_interval))
        return [f"the {name} reads {value:.3f}" for name, value, (low, high) in nulls if not low <= value <= high]

    def as_json(self) -> dict[str, Any]:
        """The keys of a release card's ``audit``, then the rest."""
        top = self.strongest
        return {
            "strongest": top.attack,
            "auc": round(top.auc, 4),
            "auc_interval": [round(value, 4) for value in top.auc_interval],
            "tpr_at_1pct": _rounded(top.tpr_at_1pct),
            "max_tpr_at_1pct": _named(self.largest_tpr(0.01)),
            "max_tpr_at_01pct": _named(self.largest_tpr(0.001)),
            "null_auc": round(self.null_auc, 4),
            "null_interval": [round(value, 4) for value in self.null_interval],
            "noise_null": _rounded(self.noise_null),
            "noise_null_interval": self.noise_null_interval and [round(v, 4) for v in self.noise_null_interval],
            "one_run_epsilon_lower_bound": _rounded(self.one_run_epsilon),
            "targets": self.targets,
            "shadows": self.shadows,
            "members": self.members,
            "non_members": self.non_members,
            "dropped": self.dropped,
            "weak": self.weak,
            "weak_because": self.weak_because,
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
    found |= _release_attacks("nearest", view.nearness, view.shadow_nearness, masks)
    return found | _release_attacks("nearest_any", view.nearness_any, view.shadow_nearness_any, masks)


def _release_attacks(
    name: str, nearness: Scores | None, shadow_nearness: Scores | None, masks: Masks | None
) -> dict[str, Scores]:
    if nearness is None:
        return {}
    found = {name: attacks.threshold(nearness)}
    if masks is not None and shadow_nearness is not None:
        found[f"{name}_lira"] = attacks.lira(nearness, shadow_nearness, masks)
        found[f"{name}_difference"] = attacks.calibrated_difference(nearness, shadow_nearness, masks)
    return found


def audit_shadows(shadows: ShadowScores, rng: np.random.Generator, *, targets: int | None = None) -> AuditReport:
    """Audit with each model as target once and all others as its shadows."""
    count = len(shadows.masks) if targets is None else min(targets, len(shadows.masks))
    found = [attack_target(_leave_one_out(shadows, k)) for k in range(count)]
    others, members = [np.delete(shadows.masks, k, axis=0) for k in range(count)], list(shadows.masks[:count])
    return report(found, members, rng, shadow_masks=others, noise_null=_noise_null(others, members, rng))


def audit_released_sets(
    nearness: Scores, masks: Masks, rng: np.random.Generator, *, nearness_any: Scores | None = None
) -> AuditReport:
    """Audit released sets alone from nearness [N, n]: each is the target once and the others are its shadows."""
    others = [np.delete(masks, k, axis=0) for k in range(len(masks))]
    found = [
        attack_target(
            TargetView(
                nearness=nearness[k],
                nearness_any=None if nearness_any is None else nearness_any[k],
                shadow_masks=others[k],
                shadow_nearness=np.delete(nearness, k, axis=0),
                shadow_nearness_any=None if nearness_any is None else np.delete(nearness_any, k, axis=0),
            )
        )
        for k in range(len(masks))
    ]
    return report(found, list(masks), rng, shadow_masks=others)


def report(
    found: Sequence[dict[str, Scores]],
    members: Sequence[Masks],
    rng: np.random.Generator,
    *,
    shadow_masks: Sequence[Masks] = (),
    noise_null: NoiseNull | None = None,
    rate: float = 0.01,
    fair_coins: bool = True,
) -> AuditReport:
    """Turn attack scores of each target and its true membership into a report.

    Args:
        found: scores [n] by attack, for each target.
        members: who was a member of each target.
        rng: for the bootstrap and the nulls.
        shadow_masks: membership [K, n] in the shadows of each target, where there are any.
        noise_null: where it was computed already.
        rate: the FPR that matters: more records than that without calibration make the report weak.
        fair_coins: membership was drawn by fair coins, which the one-run bound needs.

    Raises:
        DataError: no attack could be run.
    """
    if not found or not found[0]:
        raise DataError("no attack can be run on what was given", hint="give scores of the target on all records")
    results = [_judge(name, [target[name] for target in found], members, rng) for name in found[0]]
    top = max(results, key=lambda result: result.auc)
    strongest = [target[top.attack] for target in found]
    dropped = max(int(np.isnan(scores).sum()) for target in found for scores in target.values())
    null_auc = evaluate.permuted_null(strongest, members, rng)
    noise = noise_null or _noise_null(shadow_masks, members, rng)
    return AuditReport(
        attacks=results,
        targets=len(found),
        shadows=len(shadow_masks[0]) if shadow_masks else 0,
        members=int(members[0].sum()),
        non_members=int((~members[0]).sum()),
        dropped=dropped,
        null_auc=null_auc,
        null_interval=evaluate.null_interval([m[np.isfinite(s)] for s, m in zip(strongest, members, strict=True)]),
        noise_null=noise and noise[0],
        noise_null_interval=noise and noise[1],
        one_run_epsilon=_one_run(found[0], members[0]) if fair_coins else None,
        weak_because=_weaknesses(results, shadow_masks, rate),
        warnings=[*_warnings(shadow_masks[0] if shadow_masks else None), *_left_out(found[0])],
    )


def _weaknesses(results: list[AttackResult], shadow_masks: Sequence[Masks], rate: float) -> list[str]:
    if not any(result.attack in CALIBRATED for result in results):
        return ["without shadow models only weak attacks ran"]
    share = max((1.0 - float(calibrated_records(masks).mean()) for masks in shadow_masks), default=0.0)
    if share <= rate:
        return []
    return [
        (
            f"{share:.1%} of the records have fewer than two shadows with or without them, more than the "
            f"false-positive rate of {rate:g}, and the calibrated attacks say nothing about those"
        )
    ]


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

    near, near_any = shadows.nearness, shadows.nearness_any
    return TargetView(
        margins=shadows.margins[k],
        log_probabilities=shadows.log_probabilities[k],
        agreements=shadows.agreements[k],
        nearness=None if near is None else near[k],
        nearness_any=None if near_any is None else near_any[k],
        shadow_masks=np.delete(shadows.masks, k, axis=0),
        shadow_margins=others(shadows.margins),
        shadow_log_probabilities=others(shadows.log_probabilities),
        shadow_agreements=others(shadows.agreements),
        shadow_nearness=None if near is None else others(near),
        shadow_nearness_any=None if near_any is None else others(near_any),
        features=shadows.features,
        reference_margins=shadows.reference_margins[k],
        reference_features=shadows.reference_features,
    )


def _noise_null(shadow_masks: Sequence[Masks], members: Sequence[Masks], rng: np.random.Generator) -> NoiseNull | None:
    """LiRA on random scores with this very design of masks, and where it must lie: finds a design that is biased.

    None without shadows, or where they calibrate no record on one of the sides.
    """
    values, judged = [], []
    for masks, held in zip(shadow_masks, members, strict=bool(shadow_masks)):
        judged.append(held[calibrated_records(masks)])
        if not judged[-1].any() or judged[-1].all():
            return None
        noise = rng.standard_normal((len(masks) + 1, len(held)))
        values.append(evaluate.auc(attacks.lira(noise[0], noise[1:], masks), held))
    return (float(np.mean(values)), evaluate.null_interval(judged)) if values else None


def _one_run(found: dict[str, Scores], members: Masks) -> float:
    order = ("nearest_any_lira", "nearest_lira", "nearest", "rmia_out", *found)  # chosen before looking
    name = next(n for n in order if n in found)
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


def _named(worst: tuple[float, str] | None) -> dict[str, Any] | None:
    return None if worst is None else {"attack": worst[1], "tpr": round(worst[0], 4)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
