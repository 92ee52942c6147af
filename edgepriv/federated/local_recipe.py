"""What a device does between the global model it receives and the update it sends, as one value.

The recipe is public: the gateway announces it, the device follows it, an auditor (and an attacker) knows it.
No torch and no numpy here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

from edgepriv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LocalRecipe:
    """Local training of one round: FedAvg, or FedProx where ``proximal_mu`` is above 0.

    Attributes:
        learning_rate: of plain SGD.
        batch_size: images in a step; the last batch of an epoch may be smaller.
        epochs: passes over the device's images.
        momentum: SGD momentum; its buffer starts at zero each round unless ``carries_momentum``.
        weight_decay: added to the gradient as ``weight_decay * w``.
        proximal_mu: FedProx's pull towards the global model.
        trainable: prefixes of the trained parameters; empty means all of them.
        batch_normalisation: ``batch`` (statistics of the batch, the usual training mode) or ``frozen``.
        shares_statistics: whether BatchNorm's running statistics leave the device with the update.
        carries_momentum: whether the momentum buffer survives from round to round.
    """

    learning_rate: float = 0.01
    batch_size: int = 8
    epochs: int = 1
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal_mu: float = 0.0
    trainable: tuple[str, ...] = ()
    batch_normalisation: str = "batch"
    shares_statistics: bool = True
    carries_momentum: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs"):
            if not isinstance(getattr(self, name), Integral) or isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be a whole number, not {getattr(self, name)!r}")
        for name in ("learning_rate", "momentum", "weight_decay", "proximal_mu"):
            if not isinstance(getattr(self, name), Real) or not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} must be a finite number, not {getattr(self, name)!r}")
        for name in ("shares_statistics", "carries_momentum"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate must be positive, not {self.learning_rate}")
        if self.batch_size < 1 or self.epochs < 1:
            raise ConfigError("batch_size and epochs must be at least 1")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must be in [0, 1), not {self.momentum}")
        if self.weight_decay < 0 or self.proximal_mu < 0:
            raise ConfigError("weight_decay and proximal_mu must not be negative")
        if self.batch_normalisation not in ("batch", "frozen"):
            raise ConfigError(f"batch_normalisation must be batch or frozen, not {self.batch_normalisation!r}")

    def steps(self, n_images: int) -> int:
        """Return the number of SGD steps K for ``n_images`` images."""
        return self.epochs * -(-n_images // self.batch_size)

    def trains(self, name: str) -> bool:
        """Return whether the parameter of this name is trained."""
        return not self.trainable or name.startswith(self.trainable)


def head_recipe(**changes: float) -> LocalRecipe:
    """Return the recipe of a device that trains only the last layer on a frozen backbone."""
    values = {"trainable": ("head.",), "batch_normalisation": "frozen", "shares_statistics": False, **changes}
    return LocalRecipe(**values)  # type: ignore[arg-type]
