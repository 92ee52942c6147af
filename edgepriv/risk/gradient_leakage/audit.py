"""One update judged: attack, measures and bound on canaries, and a verdict that says what it rests on.

*Canaries* are public or proxy images that the auditor trains on itself with the declared recipe, the current global
model and the declared protection, so truth is known. Rules: no score is ever given for images that the auditor does
not hold; a real device's update is never inverted here; every record states recipe, protection and attack budget.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError
from edgepriv.federated.torch_trainer import train_locally
from edgepriv.risk.gradient_leakage.bound import CAVEAT, affordable_subspace, bound, jacobian
from edgepriv.risk.gradient_leakage.head_inversion import invert_head
from edgepriv.risk.gradient_leakage.inversion import Attack, check_update, invert
from edgepriv.risk.gradient_leakage.measures import score, train_features
from edgepriv.risk.gradient_leakage.protections import ClippedNoise, NoProtection, update_norm
from edgepriv.risk.gradient_leakage.verdict import AT_RISK, CONTAINED, LEAKS, Limits, judge, worse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from edgepriv.federated.local_recipe import LocalRecipe
    from edgepriv.risk.gradient_leakage.bound import Bound
    from edgepriv.risk.gradient_leakage.inversion import Progress, Reconstruction
    from edgepriv.risk.gradient_leakage.measures import Features, Leakage
    from edgepriv.risk.gradient_leakage.protections import Protection

__all__ = [
    "AT_RISK", "CONTAINED", "LEAKS", "Canaries", "Limits", "UpdateAudit", "audit_round", "canaries_alone",
    "canary_update", "judge", "judge_update", "make_canaries", "with_rounding",
]  # fmt: skip
FLOAT32_STEP = 2.0**-24
MID_GREY = 0.5
_NO_NOISE = np.random.default_rng(0)


@dataclass(frozen=True, slots=True)
class Canaries:
    """Images whose truth the auditor holds, and public ones of the same kind.

    Attributes:
        images: float32 [n, c, h, w] in 0..1, in the order of training.
        labels: int64 [n].
        public: float32 [m, c, h, w]: prior, pool of IIP, label inference.
        public_labels: int64 [m].
        features: phi, trained on the public images only.
        apart: whether the public images are others than the canaries. If not, they are no prior: nothing but
            mid-grey is known beforehand, and the verdict says so.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    public: NDArray[np.float32]
    public_labels: NDArray[np.int64]
    features: Features = field(repr=False)
    apart: bool = True

    def take(self, rows: slice) -> Canaries:
        """Return the same with some of the images."""
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    @property
    def prior(self) -> NDArray[np.float32] | None:
        """Public images as the attacker has them; ``None`` where the auditor has none but the canaries."""
        return self.public if self.apart else None

    @property
    def prior_image(self) -> NDArray[np.float32]:
        """What anybody would guess [h, w, c]: the mean public image, or mid-grey."""
        guess = np.full_like(self.images[0], MID_GREY) if self.prior is None else self.prior.mean(axis=0)
        return np.asarray(guess.transpose(1, 2, 0), np.float32)


@dataclass(frozen=True, slots=True)
class UpdateAudit:
    """Everything about one update; ``record()`` for JSON, the arrays for pictures."""

    leakage: Leakage
    ceiling: Bound | None
    reconstruction: Reconstruction = field(repr=False)
    verdict: str
    reason: str

    def record(self) -> dict[str, Any]:
        """Return the keys of ``edgepriv.audit-update/1``."""
        found = self.leakage
        attack = {
            "psnr_db": found.psnr_db,
            "ssim": found.ssim,
            "iip": found.iip,
            "rdlv": found.rdlv,
            "seconds": self.reconstruction.seconds,
            "mean_mse_psnr_db": found.mean_mse_psnr_db,
            "iip_interval": list(found.iip_interval),
            "iip_pixel": found.iip_pixel,
            "iip_same_label": found.iip_same_label,
            "feature_distance": found.feature_distance,
            "prior_ssim": found.prior_ssim,
            "pool_size": found.pool_size,
            "identified": found.identified,
            "iip_chance": found.iip_chance,
            "best_psnr_db": max(found.per_image_psnr_db),
            "best_ssim": max(found.per_image_ssim),
            "ssim_chance": found.ssim_chance,
            "images": found.n,
            "matching_loss": self.reconstruction.matching_loss,
            "statistics_loss": self.reconstruction.statistics_loss,
            "statistics_layers": self.reconstruction.recovered_layers,
        }
        ceiling = None if self.ceiling is None else self.ceiling.record()
        return {
            "schema": "edgepriv.audit-update/1",
            "attack": attack,
            "bound_psnr_db": None if ceiling is None else ceiling["psnr_db"],
            "bound_floor_db": None if ceiling is None else ceiling["floor_db"],
            "bound": ceiling,
            "verdict": self.verdict,
            "reason": self.reason,
            "caveat": CAVEAT,
        }


def make_canaries(
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    public: NDArray[np.float32],
    public_labels: NDArray[np.int64],
    *,
    seed: int = 0,
    epochs: int = 6,
) -> Canaries:
    """Put canaries together and train phi on the public images (all arrays [n, c, h, w] in 0..1).

    Public images that equal a canary are left out: they would spoil the prior, the pool and phi.
    """
    held = {image.tobytes() for image in np.asarray(images, np.float32)}
    apart = np.array([image.tobytes() not in held for image in np.asarray(public, np.float32)], bool)
    public, public_labels = public[apart], public_labels[apart]
    if len(public) < 2:
        raise DataError("the audit needs at least two public images", hint="give --public")
    phi = train_features(public.transpose(0, 2, 3, 1), public_labels, seed=seed, epochs=epochs)
    return Canaries(images, labels, public, public_labels, phi)


def canaries_alone(images: NDArray[np.float32], labels: NDArray[np.int64]) -> Canaries:
    """Return canaries without public images: the prior is mid-grey, phi is the pixels, IIP is among them alone."""
    return Canaries(images, labels, images, labels, _pixels, apart=False)


def _pixels(images: NDArray[np.float32]) -> NDArray[np.float64]:
    return images.reshape(len(images), -1).astype(np.float64)


def judge_update(
    model: nn.Module,
    update: Mapping[str, NDArray[Any]],
    recipe: LocalRecipe,
    canaries: Canaries,
    *,
    attack: Attack | None = None,
    sigmas: Mapping[str, float] | float | None = 0.0,
    clip: float | None = None,
    clients: int = 1,
    subspace: int | None = None,
    limits: Limits | None = None,
    momentum: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> UpdateAudit:
    """Attack an update of the canaries, score the result and compute the bound.

    Args:
        model: the global model before the round.
        update: what was sent for exactly these canaries.
        recipe: how it was made.
        canaries: see :class:`Canaries`.
        attack: see :class:`Attack`.
        sigmas: noise std that is in the update, for the bound; what float32 rounds away is added to it, so the
            bound is finite without noise too. ``None`` leaves the bound out.
        clip: L2 norm it was clipped to.
        clients: it is the mean over this many devices.
        subspace: see :func:`bound.jacobian`; ``None`` takes what is affordable.
        limits: for the verdict.
        momentum: buffers before the round, where the recipe carries them.
        device: a torch device.
        progress: of the attack.
    """
    check_update(model.state_dict(), update)
    attack, shape = attack or Attack(), canaries.images.shape
    found = _attack(model, update, recipe, canaries, attack, clients, momentum, device, progress)
    pool = canaries.public.transpose(0, 2, 3, 1)[: None if canaries.apart else 0]
    leakage = score(
        found.images,
        canaries.images.transpose(0, 2, 3, 1),
        pool,
        truth_labels=canaries.labels,
        pool_labels=canaries.public_labels[: len(pool)],
        features=canaries.features,
        prior=canaries.prior_image,
    )
    ceiling = None
    if sigmas is not None:
        chosen = affordable_subspace(shape) if subspace is None else subspace
        jac = jacobian(
            model, canaries.images, canaries.labels, recipe, canaries.prior,
            subspace=chosen, clients=clients, momentum=momentum, device=device,
        )  # fmt: skip
        shares = any(name.endswith(".running_mean") for name in update)
        ceiling = bound(jac, with_rounding(model.state_dict(), update, sigmas), shares_statistics=shares, clip=clip)
    verdict, reason = judge(leakage, ceiling, limits or Limits(), public=canaries.apart)
    return UpdateAudit(leakage, ceiling, found, verdict, reason)


def with_rounding(
    state: Mapping[str, Tensor], update: Mapping[str, NDArray[Any]], sigmas: Mapping[str, float] | float
) -> dict[str, float]:
    """Add to a noise what float32 rounds away when weights after and before are subtracted."""
    found = {}
    for name, change in update.items():
        sigma = sigmas if isinstance(sigmas, float | int) else sigmas.get(name)
        if sigma is None or not np.issubdtype(change.dtype, np.floating):
            continue
        weight = state[name].double()
        size = max(float((weight**2).mean()) ** 0.5, float(np.sqrt(np.mean(change.astype(np.float64) ** 2))), 1e-12)
        found[name] = float(np.hypot(sigma, FLOAT32_STEP * size / 12**0.5))
    return found


def audit_round(
    model: nn.Module,
    recipe: LocalRecipe,
    canaries: Canaries,
    *,
    round_number: int,
    protection: Protection | None = None,
    clients: int = 1,
    clip: float | None = None,
    attack: Attack | None = None,
    limits: Limits | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[dict[str, Any], UpdateAudit]:
    """Play one canary device (or a masked cohort of them) of this round and audit what it sends.

    Args:
        model: the round's global model.
        recipe: what the round announces.
        canaries: used up to the attack's limit of images.
        round_number: for the record.
        protection: what is done to what is seen: to a device's update, or under masks to the mean.
        clients: above 1: masks hide single updates and the attacker sees the mean over this many devices.
        clip: with several clients, the L2 norm to which each device clips its own update.
        attack: budget and options; 60 iterations by default.
        limits: for the verdict.
        seed: of noise and attack.
        device: a torch device.

    Returns:
        The record to be stored with the round, and the audit with its pictures.
    """
    began = time.perf_counter()
    protection = protection or NoProtection()
    attack = replace(attack or Attack(iterations=60), seed=seed)
    update = canary_update(model, recipe, canaries, clients=clients, clip=clip, seed=seed, device=device)
    sent = protection.apply(update, np.random.default_rng(seed))
    # of a mean, what clipping each part left over is all that can be said
    length = update_norm(update) if clients > 1 and clip is not None else getattr(protection, "clip", None)
    audit = judge_update(
        model, sent, recipe, canaries, attack=attack, sigmas=protection.sigmas(update),
        clip=length, clients=clients, limits=limits, device=device,
    )  # fmt: skip
    if length is not None and update_norm(update) >= length and audit.reconstruction.recovered_layers:
        # clipping scales the statistics by a factor the attacker does not know: one who ignores them may do better
        audit = _stronger(audit, model, sent, recipe, canaries, attack, clients, limits or Limits(), device)
    record = {
        **audit.record(),
        "schema": "edgepriv.round-audit/1",
        "round": round_number,
        "recipe": asdict(recipe),
        "protection": protection.name,
        "clients": clients,
        "canaries": len(canaries.images),
        "update_norm": update_norm(update),
        "attack_settings": asdict(attack),
        "about": "canaries trained by the auditor with this round's recipe; no device's images",
        "seconds": time.perf_counter() - began,
    }
    return record, audit


def _stronger(
    audit: UpdateAudit,
    model: nn.Module,
    sent: Mapping[str, NDArray[Any]],
    recipe: LocalRecipe,
    canaries: Canaries,
    attack: Attack,
    clients: int,
    limits: Limits,
    device: str,
) -> UpdateAudit:
    """Return the audit of the attacker who leaves the statistics out, where its verdict is worse or it sees more."""
    blind = replace(attack, bn_weight=0.0)
    other = judge_update(
        model, sent, recipe, canaries, attack=blind, sigmas=None, clients=clients, limits=limits, device=device
    )
    verdict, reason = judge(other.leakage, audit.ceiling, limits, public=canaries.apart)
    other = replace(other, ceiling=audit.ceiling, verdict=verdict, reason=reason)
    if verdict != audit.verdict:
        return other if worse(verdict, audit.verdict) else audit
    return other if other.leakage.psnr_db > audit.leakage.psnr_db else audit


def canary_update(
    model: nn.Module,
    recipe: LocalRecipe,
    canaries: Canaries,
    *,
    clients: int = 1,
    clip: float | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, NDArray[Any]]:
    """Return the update of the canaries in their order; the mean over equal shares where there are several clients.

    ``clip`` is the L2 norm to which each of several clients scales its own update down, as devices do under masks.
    """
    if clients == 1:
        return train_locally(
            model, canaries.images, canaries.labels, recipe, seed=seed, shuffle=False, device=device
        ).tensors
    share = len(canaries.images) // clients
    parts = []
    for index in range(clients):
        mine = canaries.take(slice(index * share, (index + 1) * share))
        part = canary_update(model, recipe, mine, seed=seed, device=device)
        parts.append(part if clip is None else ClippedNoise(clip, 0.0, recipe.shares_statistics).apply(part, _NO_NOISE))
    mean = {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}
    return {name: value.astype(parts[0][name].dtype) for name, value in mean.items()}


def _attack(
    model: nn.Module,
    update: Mapping[str, NDArray[Any]],
    recipe: LocalRecipe,
    canaries: Canaries,
    attack: Attack,
    clients: int,
    momentum: Mapping[str, Tensor] | None,
    device: str,
    progress: Progress | None,
) -> Reconstruction:
    shape = canaries.images.shape
    size = (shape[0], shape[1], shape[2], shape[3])
    if set(update) == {"head.weight", "head.bias"} and clients == 1:
        return invert_head(
            model, update, recipe, size, attack, labels=canaries.labels, prior=canaries.prior, device=device
        )
    return invert(
        model,
        update,
        recipe,
        size,
        attack,
        labels=canaries.labels,
        prior=canaries.prior,
        clients=clients,
        momentum=momentum,
        device=device,
        progress=progress,
    )
