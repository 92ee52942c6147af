"""Train N models through the whole pipeline, each on its own random half of the pool, and keep only their scores.

Each model is once the target; the others are then its shadows. The pipeline is a callable, so the audit judges
whatever made the training set (a synthetic release, a defence, nothing) without knowing it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgepriv.errors import DataError
from edgepriv.risk.membership import classifier, released_set
from edgepriv.risk.membership.attacks import agreement
from edgepriv.risk.membership.scores import log_probability, margin

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch.nn import Module

    from edgepriv.risk.membership.classifier import Recipe
    from edgepriv.risk.membership.kept_rows import KeptRows

    Images = NDArray[np.uint8]
    Labels = NDArray[np.int64]
    Pipeline = Callable[[Images, Labels, int], tuple[Images, Labels]]

__all__ = ["ShadowScores", "features_of", "no_defence", "run_shadows", "shadow_nearness"]

FEATURES = 12
MAX_ROWS_FOR_AXES = 1000


@dataclass(frozen=True, slots=True)
class ShadowScores:
    """Scores of N models on n pool records and m known non-members; [N, n], [N, m]; accuracies [N]."""

    masks: NDArray[np.bool_]
    margins: NDArray[np.float64]
    log_probabilities: NDArray[np.float64]
    agreements: NDArray[np.float64]
    nearness: NDArray[np.float64] | None
    reference_margins: NDArray[np.float64]
    features: NDArray[np.float64]
    reference_features: NDArray[np.float64]
    accuracies: NDArray[np.float64]
    nearness_any: NDArray[np.float64] | None = None


def no_defence(images: Images, labels: Labels, seed: int) -> tuple[Images, Labels]:  # noqa: ARG001
    """The pipeline that trains on the real records."""
    return images, labels


def run_shadows(
    pool: tuple[Images, Labels],
    unseen: tuple[Images, Labels],
    masks: NDArray[np.bool_],
    pipeline: Pipeline,
    recipe: Recipe,
    *,
    seed: int,
    released: bool = True,
    any_class: bool = False,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    kept: KeptRows | None = None,
) -> ShadowScores:
    """Run the pipeline and train a classifier for each row of ``masks`` [N, n].

    Args:
        pool: the records in question, images uint8 [n, h, w, c] and labels [n].
        unseen: images no model was trained on: they give the accuracy and the known non-members.
        masks: membership of each record in each model.
        pipeline: members and a seed in, the training set out.
        recipe: how classifiers are trained.
        seed: model k uses seed + k.
        released: the training set itself is published, so that it is attacked too.
        any_class: its labels are not exact, so that it is also attacked without asking the class.
        device: torch device.
        progress: called with (done, all).
        kept: where finished models' scores are kept, and taken from instead of training those again.
    """
    images, labels = pool
    if masks.shape[1:] != (len(images),):
        raise DataError(f"masks {masks.shape} do not fit {len(images)} records")
    classes = int(max(labels.max(), unseen[1].max())) + 1
    rows: list[tuple[NDArray[np.float64], ...]] = []
    for k, mask in enumerate(masks):
        row = kept.read(k) if kept else None
        if row is None:
            made = pipeline(images[mask], labels[mask], seed + k)
            model = classifier.train_classifier(*made, classes, recipe, seed=seed + k, device=device)
            row = (*_scores(model, pool, unseen), *_near(pool, made, released=released, any_class=any_class))
            if kept:
                kept.write(k, row)
        rows.append(row)
        if progress:
            progress(k + 1, len(masks))
    margins, logs, agreements, reference, right, near, near_any = (np.stack(c) for c in zip(*rows, strict=True))
    features, reference_features = features_of(images, labels, *unseen)
    return ShadowScores(
        masks=masks,
        margins=margins,
        log_probabilities=logs,
        agreements=agreements,
        nearness=near if released else None,
        reference_margins=reference,
        features=features,
        reference_features=reference_features,
        accuracies=right.ravel(),
        nearness_any=near_any if released and any_class else None,
    )


def shadow_nearness(
    pool: tuple[Images, Labels], masks: NDArray[np.bool_], pipeline: Pipeline, *, seed: int, any_class: bool = False
) -> NDArray[np.float64]:
    """Nearness [N, n] of each record to what the pipeline releases for each row of masks; trains no classifier."""
    images, labels = pool
    made = (pipeline(images[mask], labels[mask], seed + k) for k, mask in enumerate(masks))
    if any_class:
        return np.stack([released_set.nearness_any(images, pictures) for pictures, _ in made])
    return np.stack([released_set.nearness(images, labels, *released) for released in made])


def _near(
    pool: tuple[Images, Labels], made: tuple[Images, Labels], *, released: bool, any_class: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nearness within the class and over all classes; empty where that surface is not attacked."""
    nothing = np.zeros(0)
    return (
        released_set.nearness(*pool, *made) if released else nothing,
        released_set.nearness_any(pool[0], made[0]) if released and any_class else nothing,
    )


def _scores(
    model: Module, pool: tuple[Images, Labels], unseen: tuple[Images, Labels]
) -> tuple[NDArray[np.float64], ...]:
    own, other = classifier.logits(model, pool[0]), classifier.logits(model, unseen[0])
    votes = agreement(lambda x: classifier.logits(model, x).argmax(1), *pool)
    accuracy = np.array([(other.argmax(1) == unseen[1]).mean()])
    return margin(own, pool[1]), log_probability(own, pool[1]), votes, margin(other, unseen[1]), accuracy


def features_of(
    images: Images, labels: Labels, reference: Images, reference_labels: Labels
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For the quantile attack: principal components of the non-members' pixels, and the class as one-hot."""
    flat, known = _flat(images), _flat(reference)
    centre = known.mean(axis=0)
    axes = _principal_axes(known[:MAX_ROWS_FOR_AXES] - centre, min(FEATURES, len(known) // 8, known.shape[1]))
    eye = np.eye(int(max(labels.max(), reference_labels.max())) + 1)[:, 1:]
    return (
        np.hstack([(flat - centre) @ axes, eye[labels]]),
        np.hstack([(known - centre) @ axes, eye[reference_labels]]),
    )


def _principal_axes(rows: NDArray[np.float32], keep: int) -> NDArray[np.float64]:
    """The first axes [d, keep], from the smaller of the two Gram matrices: pictures may have many pixels."""
    if rows.shape[1] <= len(rows):
        axes: NDArray[np.float64] = np.linalg.eigh(rows.T @ rows)[1][:, -keep:]
        return axes
    values, vectors = np.linalg.eigh(rows @ rows.T)
    scale = np.sqrt(np.maximum(values[-keep:], 1e-9))
    return np.asarray(rows.T @ vectors[:, -keep:] / scale, dtype=np.float64)


def _flat(images: Images) -> NDArray[np.float32]:
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255.0)
