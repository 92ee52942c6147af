"""What local training takes and gives: the one interface between a round and whoever trains.

A trainer is a callable ``train(weights, settings) -> LocalUpdate``. `HeadTrainer` (numpy) is one; a device with torch
wraps its own model in another. Both can serve the same round: a tensor that a device did not train is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from edgepriv.federated.local_recipe import LocalRecipe


@dataclass(frozen=True, slots=True)
class RoundSettings:
    """What the round asks of local training; ``seed`` orders the batches and is the device's own choice.

    ``masked``: nobody but this device sees its single update. ``encoding``: of a clear round's uploads, which rounds.
    """

    recipe: LocalRecipe
    round: int
    seed: int
    masked: bool = False
    encoding: str = "float32"


@dataclass(frozen=True, slots=True)
class LocalUpdate:
    """After minus before, float32, by tensor name; a subset of the weights that were given.

    ``examples`` is the number of labelled frames that were trained on; 0 means the device has nothing to say.
    """

    tensors: dict[str, np.ndarray[Any, Any]]
    examples: int


Trainer = Callable[[Mapping[str, "np.ndarray[Any, Any]"], RoundSettings], LocalUpdate]
