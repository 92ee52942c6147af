"""The records that a membership audit judges: members and non-members, checked and numbered alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgepriv import datasets
from edgepriv.cli.same_classes import check_several, contained, renumbered
from edgepriv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["Records", "load_records"]


@dataclass(frozen=True, slots=True)
class Records:
    """Members, then non-members, then a part of the non-members that the attacker is allowed to know as such."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    members: NDArray[np.bool_]
    known: tuple[NDArray[np.uint8], NDArray[np.int64]]


def load_records(
    members: str, non_members: str, limit: int | None, rate: float, *, hold_out: bool, names: Sequence[str] = ()
) -> Records:
    """Load both sets in the order in which they lie: a file of shadow scores counts its records so.

    Args:
        members: what was trained on.
        non_members: what was not.
        limit: only the first records of each set.
        rate: the FPR at which rates are read.
        hold_out: a third of the non-members is known to the attacker and not judged.
        names: the classes as the labels of the release count them; without, the larger set's own.

    Raises:
        DataError: the sets do not fit together, share a picture, have one class, or too few non-members.
    """
    inside = datasets.load(members, split="whole", limit=limit)
    outside = datasets.load(non_members, split="whole", limit=limit)
    inside, outside = (renumbered(inside, names), renumbered(outside, names)) if names else contained(inside, outside)
    _check_pictures(inside, outside)
    check_several("the audit", np.concatenate([inside.labels, outside.labels]), inside.class_names)
    known = np.arange(len(outside)) % 3 == 2 if hold_out else np.zeros(len(outside), np.bool_)  # of every class
    tested = int((~known).sum())
    if tested * rate < 1 or (rate < 0.01 and tested < 5000):
        needed = 100 if rate >= 0.01 else 5000
        raise DataError(
            f"{tested} non-members are too few to read a false-positive rate of {rate:g}",
            hint=f"give at least {needed + (needed // 2 if hold_out else 0)}, or ask for --fpr 0.01",
        )
    return Records(
        np.concatenate([inside.images, outside.images[~known]]),
        np.concatenate([inside.labels, outside.labels[~known]]),
        np.arange(len(inside) + tested) < len(inside),
        (outside.images[known], outside.labels[known]),
    )


def _check_pictures(inside: datasets.Dataset, outside: datasets.Dataset) -> None:
    if inside.images.shape[1:] != outside.images.shape[1:]:
        raise DataError(f"members are {inside.images.shape[1:]}, non-members {outside.images.shape[1:]}")
    shared = {image.tobytes() for image in inside.images} & {image.tobytes() for image in outside.images}
    if shared:
        raise DataError(
            f"{len(shared)} pictures are both among the members and among the non-members",
            hint="remove them from one side: they would make every figure meaningless",
        )
