"""Reads the arguments of a query: every value is what its name promises and fits the store, or it is a WireError."""

from __future__ import annotations

import math
from typing import Any

from edgepriv.errors import WireError

MOST = (1 << 63) - 1  # what an integer column holds
MAX_BYTES = 1 << 20


def whole(args: dict[str, Any], name: str, default: int, *, least: int = -1, most: int = MOST) -> int:
    """An integer within bounds."""
    value = args.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise WireError(f"{name!r} is not a whole number in range")
    return value


def number(args: dict[str, Any], name: str, default: float) -> float:
    """A finite number that is a time: within what an integer column holds."""
    value = args.get(name, default)
    if type(value) not in {int, float} or not -MOST < value < MOST or not math.isfinite(value):
        raise WireError(f"{name!r} is not a finite number")
    return float(value)


def raw(args: dict[str, Any], name: str) -> bytes:
    """A byte string."""
    value = args.get(name)
    if not isinstance(value, bytes) or len(value) > MAX_BYTES:
        raise WireError(f"{name!r} is not a byte string")
    return value


def text(args: dict[str, Any], name: str, *, most: int = 200) -> str:
    """A text that a database can hold."""
    value = args.get(name)
    if not isinstance(value, str) or len(value) > most or "\x00" in value:
        raise WireError(f"{name!r} is not a short text")
    return value


def table(args: dict[str, Any], name: str) -> dict[str, Any]:
    """A map with text keys."""
    value = args.get(name)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise WireError(f"{name!r} is not a map")
    return value
