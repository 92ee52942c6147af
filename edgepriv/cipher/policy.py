"""The part of the owner's device policy that concerns frames; the trust list carries it as plain CBOR.

A policy file is TOML with one table for each device name, or ``["*"]`` for all devices that have none. Keys of other
subsystems pass unread; a key that is close to one of ours but not it is taken for a slip and refused.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from edgepriv.errors import ConfigError
from edgepriv.wire.envelope import ALGS, AUTHS, MAX_FRAMES, PROFILES

if TYPE_CHECKING:
    from edgepriv.keys import PublicIdentity

_LISTS: dict[str, tuple[str, ...]] = {
    "profiles": tuple(PROFILES),
    "algs": tuple(ALGS),
    "auths": tuple(AUTHS),
    "recipients": (),
}
_INTEGERS = {"min_version": 255, "max_frames": MAX_FRAMES}
FRAME_KEYS = (*_LISTS, *_INTEGERS, "auth", "allow_recipient_forgery")


def check_policy(policy: dict[str, Any]) -> None:
    """Check the frame keys of every device's table, or raise ConfigError."""
    for device, table in policy.items():
        if not isinstance(table, dict):
            raise ConfigError(f"policy: {device!r} is not a table", hint='write ["*"] or ["dev-NAME"]')
        for key, value in table.items():
            if problem := _problem(key, value):
                raise ConfigError(f"policy for {device}: {problem}")


def check_names(policy: dict[str, dict[str, Any]], parties: tuple[PublicIdentity, ...]) -> None:
    """Refuse a table for a device, or a recipient in one, that is not listed: a slip would narrow nothing in silence.

    Raises:
        ConfigError: naming the slip and the nearest listed name.
    """
    names = {role: [party.name for party in parties if party.role == role] for role in ("device", "recipient")}
    for device, table in policy.items():
        wanted = [("device", device)] if device != "*" else []
        wanted += [("recipient", name) for name in table.get("recipients", ())]
        for role, name in wanted:
            if name not in names[role]:
                near = difflib.get_close_matches(name, names[role], n=1)
                hint = f"did you mean {near[0]}?" if near else f"list it first: edgepriv owner sign {name}.key.pub"
                raise ConfigError(f"policy for {device}: {name!r} is no listed {role}", hint=hint)


def _problem(key: str, value: Any) -> str:
    if key in _LISTS:
        known = _LISTS[key]
        good = (
            isinstance(value, list) and value and all(isinstance(v, str) and (not known or v in known) for v in value)
        )
        return "" if good else f"{key} must be a list of {', '.join(known) or 'names'}"
    if key in _INTEGERS:
        good = type(value) is int and 1 <= value <= _INTEGERS[key]
        return "" if good else f"{key} must be an integer from 1 to {_INTEGERS[key]}"
    if key == "auth":
        return "" if value in AUTHS else f"auth must be one of {', '.join(AUTHS)}"
    if key == "allow_recipient_forgery":
        return "" if isinstance(value, bool) else "allow_recipient_forgery must be true or false"
    near = difflib.get_close_matches(key, FRAME_KEYS, n=1, cutoff=0.85)
    return f"unknown key {key!r}, did you mean {near[0]!r}?" if near else ""
