"""Honest reference models that the auditor trains itself: what leaks from a model of this kind that nobody rigged.

Rules: the architecture is that of the model under audit where its graph can be read or is named; else several stand in
and the verdict uses the most leaking of them. Recipes differ on purpose (few and many epochs, weight decay, label
smoothing), because the supplier's recipe is unknown and an honest choice of it must not look like an attack.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepriv.risk.reconstruction.detectors import DetectorSettings, Evidence, evidence, outputs_of, pictures_of
from edgepriv.risk.reconstruction.networks import classifier
from edgepriv.risk.reconstruction.vicious import Recipe, TrainingSet, train

if TYPE_CHECKING:
    from collections.abc import Callable

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
    """The very graph of the model under audit, with fresh weights."""

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
        found.append(evidence(bench, outputs_of(network, x), network, settings))
        if progress:
            progress(f"reference {number + 1}/{count}: explained variance {found[-1].values['ridge']:.3f}")
    return found
