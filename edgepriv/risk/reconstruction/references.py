"""Honest reference models that the auditor trains itself: what leaks from a model of this kind that nobody rigged.

Rules: the architecture is that of the model under audit where its graph can be read or is named; else several stand in
and the verdict uses the most leaking of them. Recipes differ on purpose (few and many epochs, weight decay, label
smoothing), because the supplier's recipe is unknown and an honest choice of it must not look like an attack.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgepriv.errors import DataError
from edgepriv.risk.reconstruction.detectors import DetectorSettings, Evidence, evidence, outputs_of, pictures_of
from edgepriv.risk.reconstruction.networks import classifier
from edgepriv.risk.reconstruction.vicious import Recipe, TrainingSet, train

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from edgepriv.risk.reconstruction.leakage import Bench
    from edgepriv.risk.reconstruction.onnx_reader import ImportedNetwork

RECIPES: tuple[dict[str, float], ...] = (
    {"epochs": 8},
    {"epochs": 3},
    {"epochs": 16},
    {"epochs": 8, "weight_decay": 1e-3},
    {"epochs": 8, "label_smoothing": 0.05},
)
STAND_INS = ("cnn", "linear", "mlp", "cnn-wide")
FIRST_SEED = 1000
FRESH_DRAWS = 5
LEAST_SKILL = 0.1  # below it, a model is too near to chance to compare fresh or trained networks with it
BATCH_IN_TRAINING = 125
LEAST_SPREAD, MOST_SPREAD = 5e-3, 20.0  # of what the first weights are given


class UntrainableError(DataError):
    """No honest reference can be made of this architecture here."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the auditor knows of the model's shape.

    Attributes:
        name: for the report.
        known: False where others stand in.
        build: makes a freshly initialised network from a seed and the reference's number.
    """

    name: str
    known: bool
    build: Callable[[int, int], nn.Module]


def named(name: str, shape: tuple[int, int, int], outputs: int) -> Architecture:
    """Architecture by name."""
    return Architecture(name, known=True, build=lambda _seed, _number: classifier(name, shape, outputs))


def imported(network: ImportedNetwork) -> Architecture:
    """The very graph of the model under audit, with fresh weights (:func:`check_imported` comes first)."""

    def build(seed: int, _number: int) -> nn.Module:
        fresh = copy.deepcopy(network)
        fresh.reinitialise(seed)
        return fresh

    return Architecture("as in the file", known=True, build=build)


def stand_ins(shape: tuple[int, int, int], outputs: int) -> Architecture:
    """Several small architectures in turn, where the model's own is unknown."""

    def build(_seed: int, number: int) -> nn.Module:
        return classifier(STAND_INS[number % len(STAND_INS)], shape, outputs)

    return Architecture(", ".join(STAND_INS), known=False, build=build)


def skill_needed(bench: Bench, outputs: NDArray[np.float32]) -> float | None:
    """Return the accuracy halfway between chance and the model's own; None where the model has no skill to speak of."""
    own, chance = bench.skill(outputs, outputs)
    return chance + (own - chance) / 2 if own - chance >= LEAST_SKILL else None


def check_imported(
    network: ImportedNetwork,
    bench: Bench,
    outputs: NDArray[np.float32],
    *,
    memory_bytes: int,
    work_s: float,
    pictures: int,
) -> ImportedNetwork:
    """Return the pattern for references, refused where a fresh draw is none or training it would cost too much.

    Args:
        network: the imported graph.
        bench: pictures of the audit.
        outputs: the model's own on them.
        memory_bytes: what one batch of training may take.
        work_s: processor time that all references may take, estimated from one batch.
        pictures: how often a picture is shown in all trainings together.

    Returns:
        The graph with the input factor under which fresh weights can be trained.

    Raises:
        UntrainableError: the reason.
    """
    x = pictures_of(bench.images)
    pattern = copy.deepcopy(network)
    pattern.factor = trainable_factor(network, x[:100])
    with torch.no_grad():
        needed = 4 * network.values_of_a_picture(x[:2]) * BATCH_IN_TRAINING * 2
    if needed > memory_bytes:
        raise UntrainableError(f"training it takes about {needed >> 20} MiB, more than {memory_bytes >> 20} MiB")
    enough, right = skill_needed(bench, outputs), []
    started = time.process_time()
    for draw in range(FRESH_DRAWS):
        fresh = copy.deepcopy(pattern)
        fresh.reinitialise(FIRST_SEED + draw)
        right.append(bench.skill(outputs_of(fresh, x), outputs)[0])
    work = 3 * (time.process_time() - started) / (FRESH_DRAWS * len(x)) * pictures
    if enough is not None and min(right) > enough:
        raise UntrainableError(f"a fresh draw of its weights is right in {min(right):.0%} before any training")
    if work > work_s:
        raise UntrainableError(f"training references takes about {work / 3600:.1f} h, more than {work_s / 3600:.1f} h")
    return pattern


def trainable_factor(network: ImportedNetwork, x: torch.Tensor) -> float:
    """Return the input factor for references: the model's own, or 1 where a scale is hidden in the first weights.

    An honest supplier may fold the 1/255 of his pixels into his first weights; fresh ones of unit size that are given
    0..255 learn badly, leak little, and would make him look vicious.

    Raises:
        UntrainableError: neither brings the first weights inputs of a usual size.
    """
    sizes = []
    for factor in dict.fromkeys((network.factor, 1.0)):
        scaled = copy.deepcopy(network)
        scaled.factor = factor
        with torch.no_grad():
            given = scaled.first_weighted(x).double()
        sizes.append((float(given.std()), float(given.mean())))
        if LEAST_SPREAD <= sizes[-1][0] <= MOST_SPREAD and abs(sizes[-1][1]) <= MOST_SPREAD:
            return factor
    raise UntrainableError(
        f"its first weights take inputs of mean {sizes[0][1]:.3g} and deviation {sizes[0][0]:.3g}, unfit for fresh ones"
    )


def check_trained(references: Sequence[Evidence], bench: Bench, outputs: NDArray[np.float32]) -> None:
    """Refuse references of an imported graph that did not learn the task: their leak is no measure of an honest one's.

    Raises:
        UntrainableError: half of them are nearer to chance than to the model's accuracy.
    """
    enough = skill_needed(bench, outputs)
    middle = float(np.median([bench.skill(reference.outputs, outputs)[0] for reference in references]))
    if enough is not None and middle < enough:
        raise UntrainableError(f"references of its architecture learn little here: right in {middle:.0%}")


def times_shown(count: int, pictures: int) -> int:
    """Return how often a picture is shown in the training of so many references."""
    return sum(int(RECIPES[number % len(RECIPES)]["epochs"]) for number in range(count)) * pictures


def train_references(
    architecture: Architecture,
    data: TrainingSet,
    bench: Bench,
    count: int,
    *,
    settings: DetectorSettings,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> list[Evidence]:
    """Train honest models and measure their features on the bench.

    Args:
        architecture: what to build.
        data: pictures that are not on the bench.
        bench: where the model under audit is measured too.
        count: how many references.
        settings: of the detectors.
        device: where to train.
        progress: gets one line a reference.

    Returns:
        The evidence of each reference.

    Raises:
        UntrainableError: one of them ended in outputs that are no numbers.
    """
    found = []
    x = pictures_of(bench.images)
    for number in range(count):
        chosen = RECIPES[number % len(RECIPES)]
        recipe = Recipe(
            epochs=int(chosen["epochs"]),
            weight_decay=chosen.get("weight_decay", 0.0),
            label_smoothing=chosen.get("label_smoothing", 0.0),
            reconstruction_weight=0.0,
            seed=FIRST_SEED + number,
            device=device,
        )
        pair = train(recipe, data, build=lambda s=recipe.seed, n=number: architecture.build(s, n))  # type: ignore[misc]
        network = pair.classifier.cpu()
        outputs = outputs_of(network, x)
        if not np.isfinite(outputs).all():
            raise UntrainableError(f"reference {number + 1} gives NaN or infinite outputs after its training")
        found.append(evidence(bench, outputs, network, settings))
        if progress:
            progress(f"reference {number + 1}/{count}: explained variance {found[-1].values['ridge']:.3f}")
    return found
