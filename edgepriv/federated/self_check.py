"""The device's last look at its own update before it leaves; numpy only, well under a second for a head.

Rules: no inversion is run here; everything found stays on the device but the verdict; the policy is the owner's,
never the announcement's. Sources: the checks follow arXiv 2202.06924's finding that BatchNorm's running statistics
give the batch's mean and variance away; thresholds are ours.

Policies, when something is above its limit: ``send`` (report only), ``drop_bn`` (keep running statistics at home, and
nothing else: an update of a head alone goes out as it is), ``add_noise`` (statistics stay at home, and the smallest
noise that meets the limit; the default), ``refuse`` (nothing leaves). An update is called within the limits only where
the bound of what is sent says so and no other finding stays; without a bound nothing is claimed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import ConfigError, DataError, RefusedError
from edgepriv.federated.head import BIAS, WEIGHT
from edgepriv.federated.head_leakage import feature_bound, head_jacobian, noise_for
from edgepriv.federated.privacy import update_norm
from edgepriv.wire.rounds import ENCODINGS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgepriv.federated.head_leakage import HeadJacobian
    from edgepriv.federated.local_recipe import LocalRecipe

    Tensors = Mapping[str, NDArray[Any]]

FLOAT32_STEP = 2.0**-24  # of a value that is subtracted from another, relative to the larger
ACTIONS = ("send", "drop_bn", "add_noise", "refuse")
STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")


@dataclass(frozen=True, slots=True)
class CheckPolicy:
    """What the owner allows.

    Attributes:
        action: what to do above a limit.
        max_explained_variance: of the features, by the bound, for the worst example.
        min_images: fewer images in a round count as a finding.
        noise_multiplier: noise std over the update's norm where no features are given to compute it from.
        noise_sigma: noise that is already added elsewhere before anybody sees this update (0 = none). Behind masks
            a single update is not seen at all: do not check the sum's noise here, pass ``masked``.
        masked: the round hides single updates; findings are reported and nothing is changed.
        encoding: of the upload: what it rounds away is the least noise there is (see :func:`rounding`).
    """

    action: str = "add_noise"
    max_explained_variance: float = 0.2
    min_images: int = 9
    noise_multiplier: float = 0.1
    noise_sigma: float = 0.0
    masked: bool = False
    encoding: str = "float32"

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ConfigError(f"policy {self.action!r} is unknown", hint="one of " + ", ".join(ACTIONS))
        if self.encoding not in ENCODINGS:
            raise ConfigError(f"encoding {self.encoding!r} is unknown", hint="one of " + ", ".join(sorted(ENCODINGS)))
        if not 0 < self.max_explained_variance <= 1:
            raise ConfigError("max_explained_variance must lie in (0, 1]")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found: a stable code, words, a figure and whether it is above its limit."""

    code: str
    words: str
    value: float
    above: bool


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """The outcome.

    Attributes:
        action: what was done: ``send``, ``drop_bn`` or ``add_noise``.
        within_limits: whether what is sent meets the policy: true only by the bound of what is sent and where no
            finding stays above its limit; ``None`` where nothing is above but no bound was computed.
        findings: what was found before anything was changed.
        sigma: noise std that was added.
        explained_variance: of the features, by the bound, worst example, as sent; ``None`` without features.
        update: what may be sent.
    """

    action: str
    within_limits: bool | None
    findings: tuple[Finding, ...]
    sigma: float
    explained_variance: float | None
    update: dict[str, NDArray[Any]] = field(repr=False)

    def record(self) -> dict[str, Any]:
        """Return what may be logged: no array, no per-image figure."""
        rows = [{"code": f.code, "words": f.words, "value": f.value, "above": f.above} for f in self.findings]
        return {
            "schema": "edgepriv.self-check/1",
            "action": self.action,
            "within_limits": self.within_limits,
            "sigma": self.sigma,
            "explained_variance": self.explained_variance,
            "findings": rows,
        }


def self_check(
    update: Tensors,
    recipe: LocalRecipe,
    policy: CheckPolicy,
    *,
    n_images: int,
    round_number: int | None = None,
    head: Tensors | None = None,
    features: NDArray[Any] | None = None,
    labels: NDArray[Any] | None = None,
    examples: int | None = None,
    rng: np.random.Generator | None = None,
) -> SelfCheck:
    """Check an update and protect it as the policy says.

    Args:
        update: changes by name.
        recipe: what was done to get it.
        policy: see :class:`CheckPolicy`.
        n_images: images trained on.
        round_number: 0 and 1 are flagged: a fresh network gives most away.
        head: ``head.weight`` and ``head.bias`` before the round, for the bound of an update that trains nothing else.
        features: [n, d] what the head was trained on, for the bound.
        labels: [n].
        examples: how many of them the bound looks at, the others taken as known; all of them by default.
        rng: for the noise; the operating system's entropy by default.

    Raises:
        RefusedError: the policy is ``refuse`` and something is above its limit.
        DataError: NaN or infinity, or a counter that contradicts the recipe.
    """
    _check_finite(update)
    jacobian = _jacobian(head, features, labels, recipe, examples) if _head_only(update) else None
    there: NDArray[np.float64] | float = 0.0
    before = None
    if jacobian is not None and head is not None:
        there = np.hypot(rounding(update, head, policy.encoding), policy.noise_sigma)
        before = max(feature_bound(jacobian, there).per_example)
    findings = [
        *_size_findings(recipe, policy, n_images, round_number, before),
        *_statistics_findings(update, recipe, n_images),
        *_feature_findings(policy, before),
    ]
    above = [f for f in findings if f.above]
    if policy.masked:
        return SelfCheck("send", within_limits=True, findings=tuple(findings), sigma=0.0, explained_variance=before,
                         update=dict(update))  # fmt: skip
    if not above or policy.action == "send":
        within = _within(above, before, policy)
        return SelfCheck("send", within, tuple(findings), 0.0, before, dict(update))
    if policy.action == "refuse":
        raise RefusedError(
            "this update stays on the device: " + "; ".join(f.words for f in above),
            hint="train on more images, share no BatchNorm statistics, or allow noise",
        )
    return _protect(update, policy, findings, jacobian, there, before, rng or np.random.default_rng())


def _head_only(update: Tensors) -> bool:
    """Whether a head is all that is trained: the bound knows nothing of other tensors."""
    return {name for name in update if not name.endswith(STATISTICS)} == {WEIGHT, BIAS}


def rounding(update: Tensors, weights: Tensors, encoding: str) -> NDArray[np.float64]:
    """Return the std of what is rounded away of each value of a head's update, weight before bias.

    Training ends in float32 weights, so their difference is known to float32 of the larger of both. float16 and int8
    round the difference once more. topk and randomk send fewer values as float32; the others may follow in later
    rounds, so they count as sent.
    """
    parts = []
    for name in (WEIGHT, BIAS):
        change = np.asarray(update[name], np.float64)
        size = max(_rms(np.asarray(weights[name], np.float64)), _rms(change), 1e-12)
        step = np.full(change.size, FLOAT32_STEP * size)
        if encoding == "float16":
            step = np.hypot(step, np.spacing(np.abs(change.ravel()).clip(0, 65000).astype(np.float16)))
        elif encoding == "int8":
            step = np.hypot(step, np.abs(change).max() / 127)
        parts.append(step / 12**0.5)
    return np.concatenate(parts)


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values * values)))


def _within(above: list[Finding], explained: float | None, policy: CheckPolicy) -> bool | None:
    """What may be said of an update as sent: yes by its bound alone, no by any finding, else nothing."""
    if above:
        return False
    return None if explained is None else explained <= policy.max_explained_variance


def _protect(
    update: Tensors,
    policy: CheckPolicy,
    findings: list[Finding],
    jacobian: HeadJacobian | None,
    there: NDArray[np.float64] | float,
    before: float | None,
    rng: np.random.Generator,
) -> SelfCheck:
    """Drop statistics; with ``add_noise`` add the least noise that meets the limit as well."""
    kept = {name: value for name, value in update.items() if not name.endswith(STATISTICS)}
    done = "drop_bn" if len(kept) < len(update) else "send"
    remaining = [f for f in findings if f.above and f.code != "statistics"]
    unmet = before is None or before > policy.max_explained_variance
    if policy.action == "drop_bn" or not remaining or not unmet:
        return SelfCheck(done, _within(remaining, before, policy), tuple(findings), 0.0, before, kept)
    if jacobian is None:
        sigma, after = policy.noise_multiplier * update_norm(kept), None
    else:
        sigma = noise_for(jacobian, policy.max_explained_variance, there=there)
        after = max(feature_bound(jacobian, np.hypot(there, sigma)).per_example)
        remaining = [f for f in remaining if f.code not in {"features", "single-image"}]  # what the noise is for
    noisy = {n: (v + sigma * rng.standard_normal(v.shape)).astype(v.dtype) for n, v in kept.items()}
    return SelfCheck("add_noise", _within(remaining, after, policy), tuple(findings), sigma, after, noisy)


def _check_finite(update: Tensors) -> None:
    if not update:
        raise DataError("the update is empty")
    for name, value in update.items():
        if not np.isfinite(np.asarray(value, np.float64)).all():
            raise DataError(f"{name} holds NaN or infinity", hint="training diverged: lower the learning rate")


def _size_findings(
    recipe: LocalRecipe, policy: CheckPolicy, n_images: int, round_number: int | None, known: float | None
) -> list[Finding]:
    found = [
        Finding("few-images", f"{n_images} images stand behind this update", n_images, n_images < policy.min_images)
    ]
    if min(recipe.batch_size, n_images) == 1 and recipe.steps(n_images) == 1:
        # rounding or noise may hide it all the same, where the bound says so
        readable = known is None or known > policy.max_explained_variance
        found.append(Finding("single-image", "one image in one step: its features can be read", 1.0, readable))
    if round_number is not None and round_number <= 1:
        found.append(Finding("fresh-model", "a fresh model gives most away", round_number, above=False))
    return found


def _feature_findings(policy: CheckPolicy, known: float | None) -> list[Finding]:
    if known is None:
        return []
    words = "share of the worst example's features that the head's change gives away at most"
    return [Finding("features", words, known, known > policy.max_explained_variance)]


def _statistics_findings(update: Tensors, recipe: LocalRecipe, n_images: int) -> list[Finding]:
    """Shared buffers: how many, and whether the counters agree with the recipe."""
    shared = [name for name in update if name.endswith(STATISTICS[:2])]
    steps = recipe.steps(n_images)
    for name, value in update.items():
        counted = round(float(np.asarray(value).sum())) if name.endswith(STATISTICS[2]) else steps
        if counted % steps or counted <= 0:
            raise DataError(
                f"{name} counted {counted} batches, the recipe means {steps}", hint="check batch size, epochs, images"
            )
    if not shared:
        return []
    words = f"{len(shared)} BatchNorm buffers give the batch's mean and variance away exactly"
    return [Finding("statistics", words, len(shared), above=True)]


def _jacobian(
    head: Tensors | None,
    features: NDArray[Any] | None,
    labels: NDArray[Any] | None,
    recipe: LocalRecipe,
    examples: int | None,
) -> HeadJacobian | None:
    if head is None or features is None or labels is None:
        return None
    if WEIGHT not in head or BIAS not in head:
        raise DataError(f"the head needs {WEIGHT} and {BIAS}")
    return head_jacobian(head, features, labels, recipe, examples=examples)
