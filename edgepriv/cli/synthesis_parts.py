"""The data of a release, cut into private, public and test parts that share no picture and number classes alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgepriv.cli.same_classes import all_names, check_several, renumbered
from edgepriv.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgepriv.datasets import Dataset

    Images = NDArray[np.uint8]
    Labels = NDArray[np.int64]

__all__ = ["Parts", "take_parts"]


@dataclass(frozen=True, slots=True)
class Parts:
    """Disjoint parts of the data; ``classes`` counts the labels, ``note`` says where the public part comes from.

    ``names`` are the classes' names by label; ``held_out`` counts the user's own pictures that serve as public ones.
    """

    name: str
    private: tuple[Images, Labels]
    public: tuple[Images, Labels]
    test: tuple[Images, Labels]
    classes: int
    note: str
    names: tuple[str, ...] = ()
    held_out: int = 0


def take_parts(data: Dataset, public: Dataset | None, seed: int, test: Dataset | None = None) -> Parts:
    """Cut the data into disjoint private, public and test parts; only what was not given apart is taken from them.

    Raises:
        DataError: too few images or classes, different shapes, a class that has no image, classes that cannot be
            brought together, or a picture on two sides.
    """
    names = all_names(data, public)
    public = renumbered(public, names) if public else None
    test = renumbered(test, names) if test else None
    order = np.random.default_rng(seed).permutation(len(data))
    images, labels = data.images[order], data.labels[order]
    tests = 0 if test else max(1, (len(data) * 2) // 9)
    helds = 0 if public else len(data) // 3
    rest = tests + helds
    private = (images[rest:], labels[rest:])
    _check_classes(data, private[1])
    outside = _given_or_held_out(private[0], (images[tests:rest], labels[tests:rest]), public, "public")
    measured = _given_or_held_out(private[0], (images[:tests], labels[:tests]), test, "test")
    outside, measured = _apart(outside, measured, public, test)
    found = f"{len(outside[0])} images were held out as public"
    note = f"public data: {public.name}" if public else f"no public data given: {found}"
    return Parts(
        name=data.name,
        private=private,
        public=outside,
        test=measured,
        classes=len(names),
        note=note,
        names=names,
        held_out=0 if public else len(outside[0]),
    )


def _check_classes(data: Dataset, labels: Labels) -> None:
    check_several(data.name, labels, data.class_names)
    missing = sorted(set(range(len(data.class_names))) - set(labels.tolist()))
    if missing:
        raise DataError(
            f"no private image of class {', '.join(data.class_names[i] for i in missing)}",
            hint="give every class some images, or renumber the labels",
        )


def _given_or_held_out(
    private: Images, held_out: tuple[Images, Labels], given: Dataset | None, what: str
) -> tuple[Images, Labels]:
    """The given set, which must share no picture with the private one; or the part held out, less what it shares.

    What is proved about a VAE of public images, and every accuracy, holds only when no private record is among them.
    """
    part = (given.images, given.labels) if given else held_out
    if part[0].shape[1:] != private.shape[1:]:
        raise DataError(f"the {what} pictures are {part[0].shape[1:]}, the private ones {private.shape[1:]}")
    left = _without(part, private)
    if given and len(left[0]) < len(part[0]):
        raise DataError(
            f"{len(part[0]) - len(left[0])} of the {len(part[0])} {what} pictures are private ones too",
            hint=f"remove them from the {what} data: what is proved and measured would not hold",
        )
    return left


def _apart(
    outside: tuple[Images, Labels], measured: tuple[Images, Labels], public: Dataset | None, test: Dataset | None
) -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    """Public and test parts without a common picture: what is measured on pictures of the VAE's training reads high."""
    if public and test:
        shared = len(measured[0]) - len(_without(measured, outside[0])[0])
        if shared:
            raise DataError(
                f"{shared} of the {len(measured[0])} test pictures are public ones too",
                hint="remove them from one side: accuracies would read too high",
            )
    elif test:
        outside = _without(outside, measured[0])
    else:
        measured = _without(measured, outside[0])
    for what, part in (("public", outside), ("test", measured)):
        if len(part[0]) == 0:
            raise DataError(f"no {what} picture is left", hint="give more pictures, or others")
    return outside, measured


def _without(part: tuple[Images, Labels], others: Images) -> tuple[Images, Labels]:
    seen = {image.tobytes() for image in others}
    fresh = np.array([image.tobytes() not in seen for image in part[0]], dtype=np.bool_)
    return part[0][fresh], part[1][fresh]
