"""Weights of the detector: how the features add up, fitted on one set of models and judged on another.

The numbers of ``SHIPPED`` were printed by ``tests/benchmarks/vicious.py --calibrate``; the models that judge them
(``tests/benchmarks/vicious.py``) are never used to fit them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Calibration:
    """A linear detector on differences from the references, in log-odds.

    Attributes:
        weights: per feature; one that was not measured (a black box, no trained decoder) counts like the ridge's.
        bias: log-odds of a model that looks like its references.
        threshold: above it the detector speaks.
    """

    weights: dict[str, float]
    bias: float
    threshold: float = 0.0

    def score(self, differences: dict[str, float | None]) -> float:
        """Return the log-odds that the model was made to leak."""
        substitute = differences.get("ridge") or 0.0
        total = self.bias
        for name, weight in self.weights.items():
            value = differences.get(name)
            total += weight * (substitute if value is None else value)
        return total


SHIPPED = Calibration(
    weights={"ridge": 30.5, "ridge_log_softmax": 27.5, "trained": 27.0},
    bias=-5.5,
    threshold=0.14,
)
