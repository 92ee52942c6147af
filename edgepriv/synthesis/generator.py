"""Private images in, synthetic images out: encode, clip, noise, rescale, decode, and what may be said about it.

``Mechanism`` is everything that is fixed before the private records are touched. ``synthesize`` is the only function
that sees them, and it returns released values only. ``claim`` is the one place where a guarantee is worded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from edgepriv.errors import ConfigError, DataError
from edgepriv.synthesis import accountant, metric_privacy
from edgepriv.synthesis.training import to_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgepriv.synthesis.vae import Vae

__all__ = ["Guarantee", "LatentScale", "Mechanism", "guarantee", "latent_scale", "mechanism_for", "synthesize"]

Mode = Literal["noised", "prior", "unsafe_no_noise"]
CLIP_FACTOR = 1.6
CHUNK = 2048


@dataclass(frozen=True, slots=True)
class LatentScale:
    """Spread of the codes, measured on images that are not private (or, with a warning, that are)."""

    mean_norm: float
    rms: float


@dataclass(frozen=True, slots=True)
class Mechanism:
    """What turns one record into synthetic ones; ``epsilon`` is per unit of latent distance.

    ``extra`` pictures a record are decoded from N(0, I) under the record's released label: they carry no code, so they
    cost nothing beyond the label, and they fill the release where noise has thinned it out. ``classes`` is needed with
    ``label_epsilon`` alone, and must not be counted on the private labels.
    """

    mode: Mode
    epsilon: float
    clip_radius: float
    latent_rms: float
    rescale: bool = True
    copies: int = 1
    label_epsilon: float | None = None
    extra: int = 0
    classes: int = 0

    def noise_ratio(self, dim: int) -> float:
        """Noise over latent standard deviation, per coordinate."""
        return metric_privacy.noise_sd(dim, self.epsilon) / self.latent_rms if self.mode == "noised" else math.nan


def latent_scale(vae: Vae, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> LatentScale:
    """Mean norm and root mean square (mean norm / sqrt(n)) of the encoder's means."""
    norm = float(np.linalg.norm(_means(vae, images, labels), axis=1).mean())
    return LatentScale(norm, norm / math.sqrt(vae.config.latent_dim))


def mechanism_for(
    scale: LatentScale,
    dim: int,
    *,
    noise_ratio: float | None = None,
    epsilon: float | None = None,
    mode: Mode = "noised",
    copies: int = 1,
    label_epsilon: float | None = None,
    extra: int = 0,
    classes: int = 0,
) -> Mechanism:
    """Choose the clip radius and, from the noise ratio (default 2) or ``epsilon``, the noise.

    Raises:
        ConfigError: both knobs given, one that is not positive or has no effect in this mode, or randomised labels
            of fewer than two classes.
    """
    if noise_ratio is not None and epsilon is not None:
        raise ConfigError("give a noise ratio or an epsilon, not both")
    if mode != "noised" and (noise_ratio, epsilon) != (None, None):
        raise ConfigError(f"mode {mode} adds no noise to codes, so that a noise ratio or an epsilon has no effect")
    if label_epsilon is not None:
        if classes < 2:
            raise ConfigError(f"randomised response needs at least 2 classes, not {classes}")
        accountant.randomised_response_keep(label_epsilon, classes)  # refuses what is not positive
    if copies < 1 or extra < 0:
        raise ConfigError(f"the copies of a record must be at least 1, not {copies}; its extra pictures at least 0")
    if mode == "noised" and epsilon is None:
        epsilon = metric_privacy.epsilon_for_ratio(2.0 if noise_ratio is None else noise_ratio, dim, scale.rms)
    if mode == "noised":
        metric_privacy.noise_sd(dim, epsilon or 0.0)  # refuses an epsilon that is not positive
    radius = CLIP_FACTOR * scale.mean_norm
    unbounded = 0.0 if mode == "prior" else math.inf
    chosen = epsilon if mode == "noised" and epsilon else unbounded
    return Mechanism(mode, chosen, radius, scale.rms, True, copies, label_epsilon, extra, classes)


def synthesize(
    vae: Vae, images: NDArray[np.uint8], labels: NDArray[np.int64], mechanism: Mechanism, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Synthetic images uint8 [m, h, w, c] and labels [m] from private images [n, h, w, c] and labels [n].

    m is n * (copies + extra).

    The order of the output says nothing about the order of the input: it is shuffled.
    """
    if len(images) != len(labels):
        raise DataError(f"{len(images)} images but {len(labels)} labels")
    if not vae.config.classes and (mechanism.extra or mechanism.mode == "prior"):
        raise ConfigError(
            "pictures without a record's code need a VAE that is given labels: without them their labels mean nothing",
            hint="use --conditional, or --extra 0 and --mode noised",
        )
    released = _released_labels(labels, mechanism, rng)
    codes = np.tile(_codes(vae, images, labels, mechanism), (mechanism.copies, 1))
    if mechanism.mode == "noised":
        codes = metric_privacy.add_noise(codes, mechanism.epsilon, rng)
        codes = metric_privacy.rescale(codes, mechanism.epsilon) if mechanism.rescale else codes
    elif mechanism.mode == "prior":
        codes = rng.standard_normal(codes.shape)
    codes = np.concatenate([codes, rng.standard_normal((mechanism.extra * len(images), codes.shape[1]))])
    released = np.tile(released, mechanism.copies + mechanism.extra)
    order = rng.permutation(len(codes))
    return _decode(vae, codes[order], released[order]), released[order]


def _codes(vae: Vae, images: NDArray[np.uint8], labels: NDArray[np.int64], mechanism: Mechanism) -> NDArray[np.float64]:
    if mechanism.mode == "prior":
        return np.zeros((len(images), vae.config.latent_dim))
    means = _means(vae, images, labels)
    return means if mechanism.mode == "unsafe_no_noise" else metric_privacy.clip(means, mechanism.clip_radius)


def _released_labels(labels: NDArray[np.int64], mechanism: Mechanism, rng: np.random.Generator) -> NDArray[np.int64]:
    if mechanism.label_epsilon is None:
        return labels.copy()
    count = mechanism.classes
    if len(labels) and labels.max() >= count:
        raise DataError(f"label {labels.max()} lies outside the {count} classes of the randomised response")
    keep = accountant.randomised_response_keep(mechanism.label_epsilon, count)
    moved = (labels + rng.integers(1, count, len(labels))) % count
    return np.where(rng.random(len(labels)) < keep, labels, moved)


@torch.no_grad()
def _means(vae: Vae, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    device = str(next(vae.parameters()).device)
    parts = [
        vae.encode(to_tensor(images[i : i + CHUNK], device), torch.tensor(labels[i : i + CHUNK], device=device))[0]
        for i in range(0, len(images), CHUNK)
    ]
    return torch.cat(parts).cpu().double().numpy()  # a GPU may lack doubles


@torch.no_grad()
def _decode(vae: Vae, codes: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    device = next(vae.parameters()).device
    parts = []
    for i in range(0, len(codes), CHUNK):
        z = torch.from_numpy(codes[i : i + CHUNK]).float().to(device)
        picture = torch.sigmoid(vae.decode(z, torch.tensor(labels[i : i + CHUNK], device=device)))
        parts.append((picture * 255.0).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.ascontiguousarray(np.concatenate(parts))


@dataclass(frozen=True, slots=True)
class Guarantee:
    """What the accountant proves about one record; None where nothing is proved.

    With a VAE that saw the private records without DP-SGD nothing is: ``kappa`` is then a figure of the noise alone.
    """

    kappa: float | None
    epsilon: float | None
    delta: float | None
    advantage_bound: float | None
    claim: str


def guarantee(
    mechanism: Mechanism,
    dim: int,
    trained_on: str,
    training_budget: tuple[float, float] | None = None,
    delta: float = 1e-5,
) -> Guarantee:
    """Account for a release and word the claim.

    Args:
        mechanism: what was applied.
        dim: latent dimensions.
        trained_on: ``public``, ``private`` or ``dp``: what the VAE saw.
        training_budget: (epsilon, delta) of DP-SGD under add-or-remove-one, for ``dp``.
        delta: where the curve of the noise is read.
    """
    if mechanism.mode == "unsafe_no_noise":
        return Guarantee(
            None, None, None, None, "No noise was added: each record's own code was decoded. No guarantee."
        )
    label_epsilon = mechanism.label_epsilon or 0.0
    coded = mechanism.mode != "prior"
    noise = accountant.kappa(mechanism.clip_radius, mechanism.epsilon, mechanism.copies) if coded else 0.0
    kappa = noise + label_epsilon
    if trained_on == "private":
        return Guarantee(kappa, None, None, None, _disclaimer(kappa))
    epsilon, spent, bound = 0.0, 0.0, 0.0
    if coded:
        loss = accountant.loss_distribution(noise / mechanism.copies, dim).composed(mechanism.copies)
        epsilon, spent, bound = loss.epsilon(delta), delta, loss.advantage_bound()
    if label_epsilon:
        keep = accountant.randomised_response_keep(label_epsilon, mechanism.classes)
        bound = min(1.0, bound + keep - (1 - keep) / (mechanism.classes - 1))
        epsilon += label_epsilon
    if trained_on == "dp" and training_budget:
        epsilon, spent = accountant.compose_with_training((epsilon, spent), training_budget)
        bound = accountant.advantage_of(epsilon, spent)
    words = _claim(mechanism, trained_on, kappa, (epsilon, spent), bound)
    return Guarantee(kappa, epsilon, spent, bound, words)


def _disclaimer(kappa: float) -> str:
    return (
        "An empirical defence only. The VAE was trained on the private records without DP-SGD, so its weights leak and "
        f"nothing is proved about a record. kappa {kappa:.2f} is a figure of the noise alone, for a VAE that had not "
        "seen the records."
    )


def _claim(mechanism: Mechanism, trained_on: str, kappa: float, spent: tuple[float, float], bound: float) -> str:
    given = "" if mechanism.label_epsilon else " given its label, which is released as it is"
    worth = "close to vacuous" if bound > 0.9 else "weak" if bound > 0.5 else "meaningful"
    weights = "trained without the private records" if trained_on == "public" else "trained on them by DP-SGD"
    return (
        f"With the VAE {weights}, each released picture is ({spent[0]:.2f}, {spent[1]:.1e})-differentially private "
        f"about its record{given}; kappa {kappa:.2f}. No attacker on one record has TPR - FPR above {bound:.3f} "
        f"({worth}); what was measured stands in the audit and is an empirical result."
    )
