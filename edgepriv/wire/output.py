"""A released output: what the device says about one frame, and nothing more than its policy allows.

``values`` is a list of pairs: ``[class index, score in units of 10^-decimals]`` for classification (the score is 0
under argmax), ``[class index, count]`` or ``[class index, x, y, w, h]`` in grid cells for detections, ``[0, value]``
in units of the stated step for regression. Integers only, so that a release has exactly the states that its bits
are counted from.
"""

from __future__ import annotations

from typing import Any

from edgepriv.errors import WireError
from edgepriv.wire.message import message

MAX_VALUES = 1000


@message("output")
class Output:
    """One inference's release. ``at``: Unix seconds of capture; ``bits``: upper bound of what ``values`` can carry."""

    counter: int
    at: float
    model: str
    model_digest: bytes
    task: str
    policy: str
    bits: float
    decimals: int
    scene: bytes
    values: tuple[Any, ...]


def check_output(output: Output) -> None:
    """Refuse values that are not lists of small integers, or out of range (WireError)."""
    if not 0 <= output.bits <= 1e6 or not 0 <= output.decimals <= 9 or output.counter < 0:
        raise WireError("an output's bits, decimals or counter is out of range")
    if len(output.values) > MAX_VALUES:
        raise WireError("an output has too many values")
    for row in output.values:
        if not isinstance(row, list) or not 1 <= len(row) <= 6 or not all(type(v) is int for v in row):
            raise WireError("an output's value is not a short list of integers")
        if any(not -(1 << 40) < v < 1 << 40 for v in row):
            raise WireError("an output's value is out of range")
