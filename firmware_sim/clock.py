"""Clocks that are wrong: a device's idea of the time, off by a constant."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SkewedClock:
    """Unix seconds, ``offset_s`` ahead of (or, negative, behind) this machine's clock."""

    offset_s: float = 0.0

    def __call__(self) -> float:
        """The time as this device believes it."""
        return time.time() + self.offset_s
