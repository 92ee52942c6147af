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
        weights: per feature; a feature that is missing counts as equal to the references.
        bias: log-odds of a model that looks like its references.
        threshold: above it the detector speaks.
    """

    weights: dict[str, float]
    bias: float
    threshold: float = 0.0

    def score(self, differences: dict[str, float | None]) -> float:
        """Return the log-odds that the model was made to leak."""
        parts = (weight * (differences.get(name) or 0.0) for name, weight in self.weights.items())
        return self.bias + sum(parts)


SHIPPED = Calibration(weights={"ridge": 25.0, "ridge_log_softmax": 25.0, "trained": 25.0}, bias=-4.0)
