"""From scores to positions: which units are encrypted, within a budget of weights. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgepriv.selective_encryption.carrier import Layer

SCOPES = ("global", "layer")


@dataclass(frozen=True, slots=True)
class Choice:
    """Selected units of each layer (name -> bool [units]) and in what order levels give them back.

    ``order`` lists (layer number, unit) rows, most important first, int64 [n, 2].
    """

    selected: dict[str, NDArray[np.bool_]]
    order: NDArray[np.int64]

    @property
    def units(self) -> int:
        """How many units are encrypted."""
        return len(self.order)


def choose(
    scores: Mapping[str, NDArray[np.float64]],
    layers: Sequence[Layer],
    share: float,
    *,
    scope: str = "global",
    barred: Mapping[str, NDArray[np.bool_]] | None = None,
    forced: Mapping[str, NDArray[np.bool_]] | None = None,
) -> Choice:
    """Take the best-scored units up to a share of the layers' weights.

    Args:
        scores: one number for each unit of each layer.
        layers: the layers, in graph order.
        share: at most this share of all the layers' weights, in (0, 1].
        scope: ``global``: one budget over all layers; ``layer``: floor(n * share) + 1 units of each, at most n,
            which is the published rule and may exceed the share in small layers.
        barred: units that are never taken, by layer.
        forced: units that are always taken, even beyond the share; the others get what it leaves.

    Raises:
        ConfigError: the share or the scope is not valid.
    """
    if not 0 < share <= 1 or scope not in SCOPES:
        raise ConfigError(f"share {share} or scope {scope!r} is not valid", hint="0 < share <= 1; global or layer")
    rows = _ranked(scores, layers)
    if barred is not None:
        rows = rows[~_listed(rows, layers, barred)]
    must = _listed(rows, layers, forced) if forced is not None else np.zeros(len(rows), bool)
    sizes = np.array([layer.unit_size for layer in layers])[rows[:, 0]]
    if scope == "global":
        budget = share * sum(layer.parameters for layer in layers) - sizes[must].sum()
        kept = rows[must | (np.cumsum(np.where(must, 0, sizes)) <= budget)]
    else:
        limit = np.array([min(layer.units, int(layer.units * share) + 1) for layer in layers])
        place = np.zeros(len(rows), np.int64)
        for number in range(len(layers)):
            mine = rows[:, 0] == number
            place[mine] = np.cumsum(~must[mine]) - 1 + must[mine].sum()
        kept = rows[must | (place < limit[rows[:, 0]])]
    if not len(kept):
        raise ConfigError(f"a share of {share} is less than one kernel", hint="raise --share")
    return Choice(_masks(kept, layers), kept)


def _ranked(scores: Mapping[str, NDArray[np.float64]], layers: Sequence[Layer]) -> NDArray[np.int64]:
    numbers = np.concatenate([np.full(layer.units, n) for n, layer in enumerate(layers)])
    units = np.concatenate([np.arange(layer.units) for layer in layers])
    joined = np.concatenate([scores[layer.name] for layer in layers])
    best_first = np.argsort(-joined, kind="stable")
    return np.stack([numbers, units], axis=1)[best_first]


def _listed(
    rows: NDArray[np.int64], layers: Sequence[Layer], marks: Mapping[str, NDArray[np.bool_]]
) -> NDArray[np.bool_]:
    """Which (layer number, unit) rows are marked."""
    first = np.cumsum([0, *(layer.units for layer in layers)])
    marked = np.concatenate([marks[layer.name] for layer in layers])
    return np.asarray(marked[first[rows[:, 0]] + rows[:, 1]])


def _masks(kept: NDArray[np.int64], layers: Sequence[Layer]) -> dict[str, NDArray[np.bool_]]:
    selected = {}
    for number, layer in enumerate(layers):
        mask = np.zeros(layer.units, bool)
        mask[kept[kept[:, 0] == number, 1]] = True
        selected[layer.name] = mask
    return selected


def weight_share(choice: Choice, layers: Sequence[Layer]) -> float:
    """Share of the layers' weights that is encrypted."""
    chosen = sum(int(choice.selected[layer.name].sum()) * layer.unit_size for layer in layers)
    return chosen / sum(layer.parameters for layer in layers)
