"""Joins the generator and the audit: make a release, train on it, attack it, and fill in its card.

``synthesis`` and ``risk`` never import each other; this module hands the one's pipeline to the other as a callable.
The audited models are N fresh runs of the whole pipeline on random halves of the private records, never the release
itself: that is made from all private records with the same settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from edgepriv.errors import ConfigError, DataError
from edgepriv.risk.membership import audit as membership
from edgepriv.risk.membership import kept_rows
from edgepriv.risk.membership import scores as membership_scores
from edgepriv.risk.membership import shadows as membership_shadows
from edgepriv.risk.membership.classifier import Recipe
from edgepriv.synthesis import accountant, generator, training
from edgepriv.synthesis import card as cards
from edgepriv.synthesis.vae import VaeConfig, default_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from edgepriv.datasets import Dataset
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
RATIO_FACTORS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


@dataclass(frozen=True, slots=True)
class Parts:
    """Disjoint parts of the data; ``classes`` counts the labels, ``note`` says where the public part comes from."""

    name: str
    private: tuple[Images, Labels]
    public: tuple[Images, Labels]
    test: tuple[Images, Labels]
    classes: int
    note: str


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a release is made with.

    ``seed`` cuts the data and seeds the audit and may be known; ``noise_seed`` makes the noise and must not be.
    ``keep`` is a folder for the scores of the audit's finished models.
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


def take_parts(data: Dataset, public: Dataset | None, seed: int, test: Dataset | None = None) -> Parts:
    """Cut the data into disjoint private, public and test parts; only what was not given apart is taken from them.

    Raises:
        DataError: too few images, different shapes, a class that has no image, or a picture on two sides.
    """
    order = np.random.default_rng(seed).permutation(len(data))
    images, labels = data.images[order], data.labels[order]
    classes = max(len(part.class_names) for part in (data, public, test) if part)
    tests = 0 if test else max(1, (len(data) * 2) // 9)
    helds = 0 if public else len(data) // 3
    rest = tests + helds
    private = (images[rest:], labels[rest:])
    outside = _apart(private[0], (images[tests:rest], labels[tests:rest]), public, "public")
    measured = _apart(private[0], (images[:tests], labels[:tests]), test, "test")
    found = f"{len(outside[0])} images were held out as public"
    note = f"public data: {public.name}" if public else f"no public data given: {found}"
    missing = sorted(set(range(len(data.class_names))) - set(private[1].tolist()))
    if missing:
        raise DataError(
            f"no private image of class {', '.join(data.class_names[i] for i in missing)}",
            hint="give every class some images, or renumber the labels",
        )
    return Parts(data.name, private, outside, measured, classes, note)


def _apart(private: Images, held_out: tuple[Images, Labels], given: Dataset | None, what: str) -> tuple[Images, Labels]:
    """The given set, which must share no picture with the private one; or the part held out, less what it shares.

    What is proved about a VAE of public images, and every accuracy, holds only when no private record is among them.
    """
    images, labels = (given.images, given.labels) if given else held_out
    if images.shape[1:] != private.shape[1:]:
        raise DataError(f"the {what} pictures are {images.shape[1:]}, the private ones {private.shape[1:]}")
    seen = {image.tobytes() for image in private}
    fresh = np.array([image.tobytes() not in seen for image in images], dtype=np.bool_)
    if given and not fresh.all():
        raise DataError(
            f"{(~fresh).sum()} of the {len(images)} {what} pictures are private ones too",
            hint=f"remove them from the {what} data: what is proved and measured would not hold",
        )
    return images[fresh], labels[fresh]


def check(settings: Settings, parts: Parts, *, audited: bool) -> None:
    """Refuse wrong settings before anything is trained."""
    generator.mechanism_for(
        generator.LatentScale(1.0, 1.0),
        2,
        noise_ratio=settings.noise_ratio,
        epsilon=settings.epsilon,
        mode=settings.mode,
        copies=settings.copies,
        extra=settings.extra,
    )
    if settings.label_epsilon is not None:
        accountant.randomised_response_keep(settings.label_epsilon, parts.classes)
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
    caught = max((a.auc for a in audit.attacks if a.surface == "release"), default=0.0)
    if settings.mode != "noised" or settings.vae_from != "public" or caught <= cards.AUC_TO_REFUSE:
        return None
    pool, masks = _pool(parts, settings)
    ratio = release.mechanism.noise_ratio(release.vae.config.latent_dim)
    for done, factor in enumerate(RATIO_FACTORS, 1):
        louder = replace(settings, noise_ratio=ratio * factor, epsilon=None)
        pipeline = pipeline_of(parts, louder, release)
        near = membership_shadows.shadow_nearness(pool, masks, pipeline, seed=settings.seed + 1000)
        read = membership.audit_released_sets(near, masks, np.random.default_rng(settings.seed + 3)).strongest
        if progress:
            progress("larger noise ratios", done, len(RATIO_FACTORS))
        if read.auc <= cards.AUC_TO_AIM_AT:
            return cards.Suggestion(round(ratio * factor, 3), read.auc)
    return cards.Suggestion(None, read.auc)


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
        device=settings.device,
        progress=(lambda done, of: progress(name, done, of)) if progress else None,
        kept=_kept(parts, settings, name, masks, vae),
    )


def _kept(
    parts: Parts, settings: Settings, name: str, masks: NDArray[np.bool_], vae: Vae | None
) -> kept_rows.KeptRows | None:
    if settings.keep is None:
        return None
    data = [array for part in (parts.private, parts.public, parts.test) for array in part]
    weights = [value.cpu().numpy() for value in vae.state_dict().values()] if vae else []
    decides = replace(settings, noise_seed=0, keep=None)  # the audit draws its own noise
    return kept_rows.KeptRows(settings.keep, kept_rows.digest_of(name, decides, masks, *data, *weights))


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


def fill_card(parts: Parts, settings: Settings, release: Release, found: Study | None) -> cards.ReleaseCard:
    """Put figures and words on the card."""
    mechanism, config = release.mechanism, release.vae.config
    budget = (settings.dp.epsilon, settings.dp.delta) if settings.vae_from == "dp" and settings.dp else None
    proved = generator.guarantee(mechanism, config.latent_dim, parts.classes, settings.vae_from, budget)
    noised = mechanism.mode == "noised"
    card = cards.ReleaseCard(
        data=parts.name,
        records=len(parts.private[0]),
        released=len(release.images),
        mode=mechanism.mode,
        latent_dim=config.latent_dim,
        clip_radius=mechanism.clip_radius,
        latent_rms=mechanism.latent_rms,
        noise_ratio=mechanism.noise_ratio(config.latent_dim) if noised else None,
        epsilon_metric=mechanism.epsilon if noised else None,
        kappa=proved.kappa,
        epsilon=proved.epsilon,
        delta=proved.delta,
        advantage_bound=proved.advantage_bound,
        copies=mechanism.copies,
        extra=mechanism.extra,
        vae_trained_on=settings.vae_from,
        vae_images=len((parts.public if settings.vae_from == "public" else parts.private)[0]),
        vae_budget=budget,
        labels="exact" if mechanism.label_epsilon is None else f"randomised_response:{mechanism.label_epsilon:g}",
        claim=proved.claim,
        held_out=parts.note,
        warnings=_warnings(parts, settings, release),
    )
    if found is None:
        return replace(card, recommendation=cards.recommend(card))
    card = replace(
        card,
        accuracy_synthetic=float(found.synthetic.mean()),
        audit={**found.audit.as_json(), "verdict": found.audit.verdict()},
        suggestion=found.suggestion,
        warnings=[*card.warnings, *found.audit.warnings],
    )
    return with_controls(card, found.controls) if found.controls else card


def with_controls(card: cards.ReleaseCard, controls: Controls) -> cards.ReleaseCard:
    """Put the controls' accuracies beside the release's, and the recommendation that follows."""
    prior = controls.prior_samples
    card = replace(
        card,
        accuracy_real=float(controls.real.mean()),
        accuracy_public_only=float(controls.public_only.mean()),
        accuracy_prior_samples=None if prior is None else float(prior.mean()),
    )
    return replace(card, recommendation=cards.recommend(card))


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
    return generator.mechanism_for(
        scale,
        vae.config.latent_dim,
        noise_ratio=settings.noise_ratio,
        epsilon=settings.epsilon,
        mode=settings.mode,
        copies=settings.copies,
        extra=settings.extra,
        label_epsilon=settings.label_epsilon,
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


def _warnings(parts: Parts, settings: Settings, release: Release) -> list[str]:
    found = [] if "held out" not in parts.note else [parts.note]
    if settings.vae_from == "private":
        found.append("the VAE saw the private records without DP-SGD: its weights give members away")
    if settings.mode == "unsafe_no_noise":
        found.append("no noise: this release gives members away")
    ratio = release.mechanism.noise_ratio(release.vae.config.latent_dim)
    if math.isfinite(ratio) and ratio < 1.5:
        found.append(f"noise ratio {ratio:.2f}: below about 2 the released-set attack was measured to succeed")
    if parts.private[0].shape[3] == 3:
        found.append("colour pictures: the VAE loses much accuracy before any noise, and no level of AUC is promised")
    return found
