"""One federated round audited on canary devices, in a worker process that holds no key.

The round's recipe, clip and noise come from the gateway's record, the weights are those that the round began with. In
a clear round the attacker sees one device's clipped update; in a masked round the mean over the cohort, with the
cohort's own noise. Rules: only the auditor's own pictures are trained on and shown; a cohort larger than the attack can
take is played by fewer devices, which leaks more and never less, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError, EdgeprivError, TemporaryError, UnavailableError, WireError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from edgepriv.federated.local_recipe import LocalRecipe
    from edgepriv.risk.config import RoundsSection
    from edgepriv.risk.gradient_leakage.audit import Canaries, UpdateAudit

MASKED = "masked"
MAX_PLAYED = 16  # devices of a masked cohort that are played


@dataclass(frozen=True, slots=True)
class RoundTask:
    """A round as the gateway describes it, the file of the weights it began with, and with what to audit."""

    told: dict[str, Any]
    weights: Path
    settings: RoundsSection
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class RoundAnswer:
    """What a worker found: the report for the gateway and a page; or the error and whether it is final."""

    report: dict[str, Any] | None = None
    html: str = ""
    error: str = ""
    final: bool = False


def run_round_task(task: RoundTask) -> RoundAnswer:
    """Audit one round; every error of edgepriv becomes words."""
    import torch

    torch.set_num_threads(task.threads)
    try:
        return _audited(task)
    except (TemporaryError, UnavailableError, OSError) as error:
        return RoundAnswer(error=str(error))
    except EdgeprivError as error:
        return RoundAnswer(error=str(error), final=True)


def _audited(task: RoundTask) -> RoundAnswer:
    from edgepriv.risk.gradient_leakage.audit import audit_round
    from edgepriv.risk.gradient_leakage.inversion import Attack
    from edgepriv.risk.gradient_leakage.page import update_html
    from edgepriv.risk.gradient_leakage.protections import ClippedNoise
    from edgepriv.wire.update import decode_update

    told, settings = task.told, task.settings
    weights = decode_update(task.weights.read_bytes(), max_bytes=int(settings.max_weights_mb * 2**20)).tensors
    recipe = recipe_of(told, tuple(weights))
    clients = played(told, settings.images)
    canaries = canaries_of(settings, settings.images * clients)
    model = model_of(settings, weights, canaries)
    clip, noise = float(told["clip"]), _noise_of(told)
    # under masks the mean is seen: the noise of the sum over as many devices as are played
    protection = ClippedNoise(clip, noise / clients if told["privacy"] == MASKED else 0.0, recipe.shares_statistics)
    record, audit = audit_round(
        model, recipe, canaries, round_number=int(told["round"]), protection=protection, clients=clients, clip=clip,
        attack=Attack(iterations=settings.iterations), device=task.device,
    )  # fmt: skip
    return RoundAnswer(report(record, told, clients, settings.images), _page(update_html, audit, canaries, record))


def recipe_of(told: dict[str, Any], names: tuple[str, ...]) -> LocalRecipe:
    """Return the local training that the round announced; a device that trains a head alone freezes its backbone."""
    from edgepriv.federated.local_recipe import LocalRecipe

    training = dict(told["training"])
    known = {f.name for f in fields(LocalRecipe)} - {"trainable", "shares_statistics"}
    if unknown := training.keys() - known:
        raise WireError(f"the round has an unknown training setting {min(unknown)!r}")
    try:
        recipe = LocalRecipe(**training, trainable=names, shares_statistics=told["statistics"] == "shared")
    except TypeError as error:
        raise WireError("a training setting of the round is of the wrong type") from error
    head_only = all(name.startswith("head.") for name in names)
    return replace(recipe, batch_normalisation="frozen") if head_only else recipe


def played(told: dict[str, Any], images: int) -> int:
    """Return how many canary devices stand for what the gateway sees: one, or the masked cohort as far as it goes."""
    from edgepriv.risk.gradient_leakage.simulate import MAX_IMAGES

    if told["privacy"] != MASKED:
        return 1
    return max(1, min(int(told["devices"]), MAX_PLAYED, MAX_IMAGES // images))


def _noise_of(told: dict[str, Any]) -> float:
    """Noise of the sum over the clip norm before anybody sees it; central noise comes after the gateway saw the sum."""
    return float(told["noise_multiplier"]) if told["noise"] == "distributed" else 0.0


def canaries_of(settings: RoundsSection, wanted: int) -> Canaries:
    """Load the auditor's pictures: the first ``wanted`` are canaries, the others public; the same in every round."""
    from edgepriv import datasets
    from edgepriv.risk.gradient_leakage.audit import make_canaries

    data = datasets.load(settings.canaries, split="all")
    order = np.random.default_rng(7).permutation(len(data.images))[: wanted + settings.public_images]
    if len(order) < wanted + 2:
        raise DataError(f"{len(data.images)} canary pictures are too few for {wanted}", hint="[rounds] canaries")
    x = np.ascontiguousarray(data.images[order].transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    y = data.labels[order]
    return make_canaries(x[:wanted], y[:wanted], x[wanted:], y[wanted:])


def model_of(settings: RoundsSection, weights: dict[str, NDArray[Any]], canaries: Canaries) -> nn.Module:
    """Build the architecture, load what the rounds do not train, and put the round's weights in.

    Raises:
        DataError: the round's tensors are not this architecture's.
    """
    from edgepriv.risk import models

    classes = len(weights["head.bias"]) if "head.bias" in weights else int(canaries.public_labels.max()) + 1
    model = models.build(settings.model, classes, canaries.images.shape[1], canaries.images.shape[2])
    if settings.weights is not None:
        models.load_weights(model, settings.weights)
    try:
        models.put_weights(model, weights, settings.model, complete=settings.weights is None)
    except DataError as error:
        hint = "[rounds] model and weights of risk.toml must be the rounds' own"
        raise DataError(f"round: {error}", hint=hint) from error
    return model


def report(record: dict[str, Any], told: dict[str, Any], clients: int, images: int) -> dict[str, Any]:
    """Return what the gateway keeps with the round: figures about canaries, no picture and no device's name."""
    devices = int(told["devices"])
    seen = "one device's own update" if told["privacy"] != MASKED else f"the masked sum of {clients} devices"
    if told["privacy"] == MASKED and clients < devices:
        seen += f", standing for {devices}: fewer devices hide less"
    kept = ("psnr_db", "ssim", "iip", "rdlv", "pool_size", "seconds")
    return {
        "schema": "edgepriv.round-leakage/1",
        "leakage_bound": record["bound_psnr_db"],
        "leakage_floor": record["bound_floor_db"],
        "attack": {name: record["attack"][name] for name in kept},
        "verdict": record["verdict"],
        "reason": record["reason"],
        "seen": seen,
        "protection": record["protection"],
        "clients": clients,
        "canaries": images,
        "iterations": record["attack_settings"]["iterations"],
        "recipe": {key: value for key, value in record["recipe"].items() if key != "trainable"},
        "about": record["about"],
        "caveat": record["caveat"],
        "seconds": record["seconds"],
    }


def _page(render: Any, audit: UpdateAudit, canaries: Canaries, record: dict[str, Any]) -> str:
    page: str = render(audit, canaries, f"What an update of round {record['round']} gives away, on canaries")
    return page
