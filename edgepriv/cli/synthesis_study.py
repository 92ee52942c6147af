"""Joins the generator and the audit: make a release, train on it, attack it, and fill in its card.

``synthesis`` and ``risk`` never import each other; this module hands the one's pipeline to the other as a callable.
The audited models are N fresh runs of the whole pipeline on random halves of the private records, never the release
itself: that is made from all private records with the same settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from edgepriv.cli.synthesis_card import fill_card, with_controls
from edgepriv.cli.synthesis_parts import Parts, take_parts
from edgepriv.errors import ConfigError, DataError
from edgepriv.risk.membership import audit as membership
from edgepriv.risk.membership import kept_rows
from edgepriv.risk.membership import scores as membership_scores
from edgepriv.risk.membership import shadows as membership_shadows
from edgepriv.risk.membership.classifier import Recipe
from edgepriv.synthesis import card as cards
from edgepriv.synthesis import generator, training
from edgepriv.synthesis.vae import VaeConfig, default_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from edgepriv.synthesis.vae import Vae

    Images = NDArray[np.uint8]
    Labels = NDArray[np.int64]
    Progress = Callable[[str, int, int], None]

__all__ = [
    "Controls",
    "Parts",
    "Release",
    "Settings",
    "Study",
    "check",
    "fill_card",
    "make_release",
    "mechanism_of",
    "pipeline_of",
    "prior_pictures",
    "prior_settings",
    "public_only",
    "run_controls",
    "shadows_of",
    "study",
    "suggest_ratio",
    "take_parts",
    "with_controls",
]

MIN_AUDITED = 250  # so that the non-members of each target are at least 100
ROW_FORMAT = 2  # of the kept scores
RATIO_FACTORS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a release is made with.

    ``seed`` cuts the data and seeds the audit and may be known; ``noise_seed`` makes the noise and must not be.
    ``keep`` is a folder for the scores of the audit's finished models. ``limits`` say what the audit calls a leak.
    """

    noise_ratio: float | None = None
    epsilon: float | None = None
    mode: generator.Mode = "noised"
    copies: int = 1
    extra: int = 1
    label_epsilon: float | None = None
    vae_from: str = "public"
    dp: training.DpSgd | None = None
    conditional: bool = True
    latent_dim: int | None = None
    vae_epochs: int | None = None
    beta: float | None = None
    recipe: Recipe = field(default_factory=Recipe)
    targets: int = 16
    audit_records: int = 2000
    device: str = "cpu"
    seed: int = 0
    noise_seed: int = 1
    keep: Path | None = None
    limits: membership.Limits = membership.LIMITS


@dataclass(frozen=True, slots=True)
class Release:
    """Released pictures and labels, the VAE that made them, and the mechanism."""

    images: Images
    labels: Labels
    vae: Vae
    mechanism: generator.Mechanism


@dataclass(frozen=True, slots=True)
class Study:
    """The audit of the pipeline, its accuracies [targets], and its controls where they are known already."""

    audit: membership.AuditReport
    synthetic: NDArray[np.float64]
    controls: Controls | None
    suggestion: cards.Suggestion | None = None


@dataclass(frozen=True, slots=True)
class Controls:
    """Accuracies [targets] of what needs no private code: real data, public data alone, generator samples.

    Without labels the generator's samples have none either, and there is no such control.
    """

    real: NDArray[np.float64]
    public_only: NDArray[np.float64]
    prior_samples: NDArray[np.float64] | None


def check(settings: Settings, parts: Parts, *, audited: bool) -> None:
    """Refuse wrong settings before anything is trained."""
    _mechanism(generator.LatentScale(1.0, 1.0), 2, parts, settings)
    if audited:
        membership_scores.check_shadow_count(settings.targets - 1, 0.01)
        _pool(parts, settings)
    _dp(settings)


def make_release(
    parts: Parts, settings: Settings, checkpoint: Path | None = None, progress: Progress | None = None
) -> Release:
    """Train (or resume) the VAE and synthesise all private records once."""
    config = _config(parts, settings)
    source = parts.public if settings.vae_from == "public" else parts.private
    vae = training.train_vae(
        *source,
        config,
        seed=settings.noise_seed if settings.vae_from == "dp" else settings.seed,
        device=settings.device,
        dp=_dp(settings),
        checkpoint=checkpoint,
        progress=(lambda done, of: progress("VAE", done, of)) if progress else None,
    )
    mechanism = mechanism_of(vae, parts, settings)
    images, labels = generator.synthesize(vae, *parts.private, mechanism, np.random.default_rng(settings.noise_seed))
    return Release(images, labels, vae, mechanism)


def study(
    parts: Parts,
    settings: Settings,
    release: Release,
    progress: Progress | None = None,
    controls: Controls | None = None,
) -> Study:
    """Audit the pipeline on random halves of the private records; controls that are known are not run again."""
    found = shadows_of(
        parts, settings, pipeline_of(parts, settings, release), "release", progress=progress, vae=release.vae
    )
    audit = membership.audit_shadows(found, np.random.default_rng(settings.seed + 3))
    controls = controls or run_controls(parts, settings, release, progress)
    return Study(audit, found.accuracies, controls, suggest_ratio(parts, settings, release, audit, progress))


def suggest_ratio(
    parts: Parts,
    settings: Settings,
    release: Release,
    audit: membership.AuditReport,
    progress: Progress | None = None,
) -> cards.Suggestion | None:
    """Where a released-set attack got through: the smallest larger noise ratio at which those attacks do not.

    No classifier is trained for it, so it is cheap and judges the released set alone. The ratio needed grows with the
    latent dimensions and falls with the number of records, so that no default holds everywhere.
    """
    on_release = replace(audit, attacks=[a for a in audit.attacks if a.surface == "release"])
    if settings.mode != "noised" or settings.vae_from != "public" or not on_release.exceeds(settings.limits):
        return None
    wanted = replace(settings.limits, auc=min(cards.AUC_TO_AIM_AT, settings.limits.auc))
    pool, masks = _pool(parts, settings)
    ratio = release.mechanism.noise_ratio(release.vae.config.latent_dim)
    for done, factor in enumerate(RATIO_FACTORS, 1):
        louder = replace(settings, noise_ratio=ratio * factor, epsilon=None)
        pipeline = pipeline_of(parts, louder, release)
        near = membership_shadows.shadow_nearness(pool, masks, pipeline, seed=settings.seed + 1000)
        near_any = (
            membership_shadows.shadow_nearness(pool, masks, pipeline, seed=settings.seed + 1000, any_class=True)
            if _randomised(settings)
            else None
        )
        rng = np.random.default_rng(settings.seed + 3)
        read = membership.audit_released_sets(near, masks, rng, nearness_any=near_any)
        if progress:
            progress("larger noise ratios", done, len(RATIO_FACTORS))
        if not read.exceeds(wanted):
            return cards.Suggestion(round(ratio * factor, 3), read.strongest.auc)
    return cards.Suggestion(None, read.strongest.auc)


def run_controls(parts: Parts, settings: Settings, release: Release, progress: Progress | None = None) -> Controls:
    """Train the same classifier on what needs no private code."""

    def run(name: str, pipeline: membership_shadows.Pipeline, vae: Vae | None = None) -> NDArray[np.float64]:
        return shadows_of(parts, settings, pipeline, name, released=False, progress=progress, vae=vae).accuracies

    real = run("real data", membership_shadows.no_defence)
    public = run("public only", public_only(parts, settings))
    if not settings.conditional:
        return Controls(real, public, None)
    made = pipeline_of(parts, prior_settings(settings), release)
    return Controls(real, public, run("prior samples", made, release.vae))


def shadows_of(
    parts: Parts,
    settings: Settings,
    pipeline: membership_shadows.Pipeline,
    name: str,
    *,
    released: bool = True,
    progress: Progress | None = None,
    vae: Vae | None = None,
) -> membership_shadows.ShadowScores:
    """Run a pipeline on the same random halves of the private records whatever the pipeline is.

    ``vae`` is the one that the pipeline uses; with ``settings.keep`` it decides whether finished rows are its rows.
    """
    pool, masks = _pool(parts, settings)
    membership_scores.check_shadow_count(settings.targets - 1, 0.01)
    return membership_shadows.run_shadows(
        pool,
        parts.test,
        masks,
        pipeline,
        settings.recipe,
        seed=settings.seed + 1000,
        released=released,
        any_class=_randomised(settings),
        device=settings.device,
        progress=(lambda done, of: progress(name, done, of)) if progress else None,
        kept=_kept(parts, settings, name, masks, vae),
    )


def _randomised(settings: Settings) -> bool:
    """Whether released labels are not exact, so that a record's own picture may stand in another class."""
    return settings.label_epsilon is not None


def _kept(
    parts: Parts, settings: Settings, name: str, masks: NDArray[np.bool_], vae: Vae | None
) -> kept_rows.KeptRows | None:
    if settings.keep is None:
        return None
    data = [array for part in (parts.private, parts.public, parts.test) for array in part]
    weights = [value.cpu().numpy() for value in vae.state_dict().values()] if vae else []
    decides = replace(settings, noise_seed=0, keep=None, limits=membership.LIMITS)  # the audit draws its own noise
    return kept_rows.KeptRows(settings.keep, kept_rows.digest_of(ROW_FORMAT, name, decides, masks, *data, *weights))


def _pool(parts: Parts, settings: Settings) -> tuple[tuple[Images, Labels], NDArray[np.bool_]]:
    pool = (parts.private[0][: settings.audit_records], parts.private[1][: settings.audit_records])
    if len(pool[0]) < MIN_AUDITED:
        raise DataError(
            f"{len(pool[0])} private records are too few to audit: half of them must show one false alarm in a hundred",
            hint=f"give at least {MIN_AUDITED} (and --audit-records not below), or --no-audit",
        )
    rng = np.random.default_rng(settings.seed + 2)
    return pool, membership_scores.draw_masks(settings.targets, len(pool[0]), rng)


def pipeline_of(
    parts: Parts, settings: Settings, release: Release, trained: dict[int, Vae] | None = None
) -> membership_shadows.Pipeline:
    """The pipeline for an audit: with a VAE that saw private records, each model trains its own VAE.

    ``trained`` keeps those VAEs by seed for further pipelines on the same halves whose VAE is trained alike.
    """
    config = _config(parts, settings)
    known = {} if trained is None else trained

    def pipeline(images: Images, labels: Labels, seed: int) -> tuple[Images, Labels]:
        vae = release.vae if settings.vae_from == "public" else known.get(seed)
        if vae is None:
            vae = training.train_vae(images, labels, config, seed=seed, device=settings.device, dp=_dp(settings))
            if trained is not None:
                trained[seed] = vae
        return generator.synthesize(
            vae, images, labels, mechanism_of(vae, parts, settings), np.random.default_rng(seed + 7)
        )

    return pipeline


def prior_settings(settings: Settings) -> Settings:
    """The control with no private code at all: as many pictures, all from the generator."""
    total = settings.copies + settings.extra
    return replace(settings, mode="prior", noise_ratio=None, epsilon=None, copies=total, extra=0)


def prior_pictures(release: Release, seed: int, each: int = 4) -> tuple[Images, Labels]:
    """A few pictures of the generator alone, for the card; none where the VAE is not given labels."""
    labels = np.repeat(np.unique(release.labels), each) if release.vae.config.classes else np.zeros(0, np.int64)
    blank = np.zeros((len(labels), *release.images.shape[1:]), np.uint8)
    prior = replace(release.mechanism, mode="prior", epsilon=0.0, copies=1, extra=0, label_epsilon=None)
    return generator.synthesize(release.vae, blank, labels, prior, np.random.default_rng(seed + 3))


def _config(parts: Parts, settings: Settings) -> VaeConfig:
    shape = parts.private[0].shape[1:]
    changes = {"latent_dim": settings.latent_dim, "epochs": settings.vae_epochs, "beta": settings.beta}
    config = default_config((shape[0], shape[1], shape[2]), parts.classes if settings.conditional else 0, **changes)
    absent = set(parts.private[1].tolist()) - set(parts.public[1].tolist())
    if settings.conditional and settings.vae_from == "public" and absent:
        raise DataError(
            f"the public data have no image of class {sorted(absent)}, so a label-conditional VAE cannot draw it",
            hint="use --no-conditional, or public data with every class",
        )
    return config


def mechanism_of(vae: Vae, parts: Parts, settings: Settings) -> generator.Mechanism:
    """The mechanism of these settings, scaled by the codes of the public images."""
    scale = generator.latent_scale(vae, *_within(parts.public, vae.config.classes))
    return _mechanism(scale, vae.config.latent_dim, parts, settings)


def _mechanism(scale: generator.LatentScale, dim: int, parts: Parts, settings: Settings) -> generator.Mechanism:
    return generator.mechanism_for(
        scale,
        dim,
        noise_ratio=settings.noise_ratio,
        epsilon=settings.epsilon,
        mode=settings.mode,
        copies=settings.copies,
        extra=settings.extra,
        label_epsilon=settings.label_epsilon,
        classes=parts.classes,
    )


def _within(part: tuple[Images, Labels], classes: int) -> tuple[Images, Labels]:
    keep = part[1] < classes if classes else np.ones(len(part[1]), dtype=np.bool_)
    return part[0][keep][:4000], part[1][keep][:4000]


def _dp(settings: Settings) -> training.DpSgd | None:
    if settings.vae_from != "dp":
        return None
    if settings.dp is None:
        raise ConfigError("a VAE trained by DP-SGD needs its epsilon", hint="give --vae-epsilon")
    return settings.dp


def public_only(parts: Parts, settings: Settings) -> membership_shadows.Pipeline:
    """The control: as many public images as the release has pictures (or all), drawn anew for each model."""

    def pipeline(images: Images, labels: Labels, seed: int) -> tuple[Images, Labels]:  # noqa: ARG001
        count = len(images) * (settings.copies + settings.extra)
        rows = np.random.default_rng(seed).permutation(len(parts.public[0]))[:count]
        return parts.public[0][rows], parts.public[1][rows]

    return pipeline
