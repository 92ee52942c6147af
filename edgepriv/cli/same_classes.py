"""One numbering of classes for data sets that are used together.

A folder of pictures numbers its sub-folders, so that label 0 of one folder may be label 5 of another: labels are
brought together by the classes' names. Where one set has names and the other numbers, nobody can say which is which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgepriv.datasets import Dataset
from edgepriv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["all_names", "check_several", "contained", "renumbered"]

SHOWN = 12


def all_names(first: Dataset, *others: Dataset | None) -> tuple[str, ...]:
    """The classes of the first set in its order, then those that only the others have."""
    names = dict.fromkeys(first.class_names)
    for other in others:
        if other is not None:
            _check_alike(first.class_names, other)
            known = {_key(name) for name in names}
            names.update(dict.fromkeys(name for name in other.class_names if _key(name) not in known))
    return tuple(names)


def renumbered(data: Dataset, names: Sequence[str]) -> Dataset:
    """The same pictures with labels that count ``names``.

    Raises:
        DataError: it has a class that is not among them, or numbers where they are names.
    """
    _check_alike(names, data)
    place = {_key(name): label for label, name in enumerate(names)}
    if unknown := [name for name in data.class_names if _key(name) not in place]:
        raise DataError(
            f"{data.name} has classes that are not among {_listed(names)}: {_listed(unknown)}",
            hint="give the classes the same names in both data sets, or leave these out",
        )
    moved = np.array([place[_key(name)] for name in data.class_names], np.int64)
    return Dataset(data.name, data.images, moved[data.labels], tuple(names))


def contained(a: Dataset, b: Dataset) -> tuple[Dataset, Dataset]:
    """Both in the numbering of the one that has every class of the other, as a model of all classes counts them."""
    mine, theirs = ({_key(name) for name in data.class_names} for data in (a, b))
    names = b.class_names if mine < theirs else a.class_names
    return renumbered(a, names), renumbered(b, names)


def check_several(name: str, labels: np.ndarray, names: Sequence[str]) -> None:
    """Refuse pictures of a single class: nothing can be classified there."""
    found = np.unique(labels)
    if len(found) < 2:
        raise DataError(f"{name} needs at least two classes, and has {_listed([names[i] for i in found])} alone")


def _check_alike(names: Sequence[str], data: Dataset) -> None:
    if names and data.class_names and _numbered(names) != _numbered(data.class_names):
        raise DataError(
            f"the classes of {data.name} are {_listed(data.class_names)}, those of the other data {_listed(names)}: "
            "which is which cannot be told",
            hint="give both as folders whose sub-folders have the same names, or both with numbers",
        )


def _numbered(names: Sequence[str]) -> bool:
    return all(name.isascii() and name.isdigit() for name in names)


def _key(name: str) -> str:
    return str(int(name)) if _numbered([name]) else name


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
