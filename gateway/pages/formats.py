"""Numbers for people: every figure with its unit."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

from gateway.judged import AT_RISK, CONTAINED

if TYPE_CHECKING:
    from collections.abc import Callable

NONE = "–"


def size(value: Any) -> str:
    """Bytes as kB, MB, GB (powers of ten)."""
    if value is None:
        return NONE
    number = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return NONE


def duration(value: Any) -> str:
    """Seconds as s, min, h, d."""
    if value is None:
        return NONE
    number = float(value)
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if number < limit:
            return f"{number / divisor:.0f} {unit}"
    return f"{number / 86_400:.0f} d"


def moment(value: Any) -> str:
    """Unix seconds as UTC."""
    if not value:
        return NONE
    return dt.datetime.fromtimestamp(float(value), dt.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def number(value: Any, digits: int = 0, unit: str = "") -> str:
    """A number with digits and unit, or a dash."""
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return NONE
    return f"{value:,.{digits}f}{' ' + unit if unit else ''}"


def percent(value: Any) -> str:
    """A share as per cent."""
    return NONE if not isinstance(value, (int, float)) else f"{100 * value:.1f} %"


def verdict(value: Any) -> str:
    """The style of an audit's word: red, green, or neither where it is unsure."""
    if value in {None, "", AT_RISK}:
        return "unsure"
    return "good" if value == CONTAINED else "bad"


def state(daemon: Any) -> tuple[str, str]:
    """How the daemon is, as style and words; without an age, so that an open page says it once."""
    if daemon.get("stale"):
        wrote = (
            f"the gateway last wrote its status at {moment(daemon['at'])}" if daemon.get("at") else "it has not run yet"
        )
        return "bad", f"Stale: {wrote}. What you see may be old."
    if failed := daemon.get("failed"):
        return "bad", "Not ready: " + "; ".join(f"{name}: {why}" for name, why in failed.items())
    if not daemon.get("connected"):
        return "bad", "The gateway runs, but the broker is not connected."
    return "good", "The gateway runs and the broker is connected."


FILTERS: dict[str, Callable[..., Any]] = {
    "size": size, "duration": duration, "moment": moment, "number": number, "percent": percent,
    "verdict": verdict, "state": state,
}  # fmt: skip
