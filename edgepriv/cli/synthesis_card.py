"""From a release and its audit to the card: figures, warnings, and what the models were that were measured."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from edgepriv.synthesis import card as cards
from edgepriv.synthesis import generator

if TYPE_CHECKING:
    from edgepriv.cli.synthesis_parts import Parts
    from edgepriv.cli.synthesis_study import Controls, Release, Settings, Study

__all__ = ["fill_card", "with_controls"]


def fill_card(parts: Parts, settings: Settings, release: Release, found: Study | None) -> cards.ReleaseCard:
    """Put figures and words on the card."""
    mechanism, config = release.mechanism, release.vae.config
    budget = (settings.dp.epsilon, settings.dp.delta) if settings.vae_from == "dp" and settings.dp else None
    proved = generator.guarantee(mechanism, config.latent_dim, settings.vae_from, budget)
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
        classes=parts.classes,
        class_names=list(parts.names),
        warnings=_warnings(parts, settings, release),
    )
    if found is None:
        return replace(card, recommendation=cards.recommend(card))
    card = replace(
        card,
        accuracy_synthetic=float(found.synthetic.mean()),
        audit={
            **found.audit.as_json(),
            "outcome": found.audit.outcome(settings.limits),
            "verdict": found.audit.verdict(settings.limits),
            "limits": asdict(settings.limits),
        },
        suggestion=found.suggestion,
        measured_on=(
            f"Accuracies and audit are of {found.audit.targets} fresh runs of this pipeline, each on a random half of "
            f"{found.audit.members + found.audit.non_members} private records, not of this very release."
        ),
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


def _warnings(parts: Parts, settings: Settings, release: Release) -> list[str]:
    found = []
    if parts.held_out:
        found = [parts.note, f"the {parts.held_out} held-out images are not protected: treat them as published"]
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
