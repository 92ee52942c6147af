"""Typed messages: a frozen dataclass is its own schema.

Rules: any bytes give a message or one WireError. A field that is missing, unknown or of another type is refused;
byte strings and texts have limits (``limit`` in the field's metadata, default 4,096); lists and maps have at most
10,000 entries. The kind stands under ``t``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from edgepriv.errors import WireError
from edgepriv.wire import cbor

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import dataclass_transform
else:

    def dataclass_transform(**_kwargs: Any) -> Any:
        """Python 3.10 lacks it; type checkers read the real one."""
        return lambda decorated: decorated


M = TypeVar("M")
KINDS: dict[str, type[Any]] = {}
MAX_MESSAGE_BYTES = 1 << 20
MAX_ENTRIES = 10_000
DEFAULT_LIMIT = 4096


def sized(limit: int, **kwargs: Any) -> Any:
    """A field with its own length limit in bytes or characters."""
    return dataclasses.field(metadata={"limit": limit}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(sized,))
def message(kind: str) -> Callable[[type[M]], type[M]]:
    """Register a frozen dataclass as the message ``kind``."""

    def register(cls: type[M]) -> type[M]:
        made = dataclasses.dataclass(frozen=True, slots=True)(cls)
        if kind in KINDS:
            raise ValueError(f"two messages are called {kind}")
        KINDS[kind] = made
        made.kind = kind  # type: ignore[attr-defined]
        return made

    return register


def encode(value: Any) -> bytes:
    """Encode a registered message."""
    body = {name: _out(getattr(value, name)) for name in type(value).__slots__}
    body["t"] = type(value).kind
    return cbor.encode(body)


def decode(raw: bytes, *, max_bytes: int = MAX_MESSAGE_BYTES) -> Any:
    """Decode any registered message, or raise WireError."""
    body = cbor.decode_map(raw, max_bytes=max_bytes)
    kind = body.pop("t", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise WireError("unknown kind of message")
    return from_map(KINDS[kind], body)


def from_map(cls: type[M], body: dict[str, Any]) -> M:
    """Check a decoded map against a dataclass and build it, or raise WireError."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := body.keys() - fields.keys():
        raise WireError(f"{cls.__name__}: unknown field {min(unknown)!r}"[:120])
    if missing := fields.keys() - body.keys():
        raise WireError(f"{cls.__name__}: field {min(missing)!r} is missing")
    hints = _hints(cls)
    values = {
        name: _checked(body[name], hints[name], fields[name].metadata.get("limit", DEFAULT_LIMIT), name)
        for name in fields
    }
    return cls(**values)


_HINTS: dict[type[Any], dict[str, Any]] = {}


def _hints(cls: type[Any]) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = get_type_hints(cls)
    return _HINTS[cls]


def _out(value: Any) -> Any:
    return [_out(item) for item in value] if isinstance(value, (tuple, list)) else value


def _checked(value: Any, hint: Any, limit: int, name: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is tuple:
        if not isinstance(value, list) or len(value) > MAX_ENTRIES:
            raise WireError(f"field {name!r} is not a list within its limit")
        (inner, *_) = get_args(hint)
        return tuple(_checked(item, inner, limit, name) for item in value)
    if origin is dict:
        if not isinstance(value, dict) or len(value) > MAX_ENTRIES or not all(isinstance(k, str) for k in value):
            raise WireError(f"field {name!r} is not a map within its limit")
        return value
    return _scalar(value, hint, limit, name)


def _scalar(value: Any, hint: Any, limit: int, name: str) -> Any:
    if hint is float and type(value) in {int, float}:
        number = float(value)
        if not math.isfinite(number):
            raise WireError(f"field {name!r} is not a finite number")
        return number
    if type(value) is not hint:
        raise WireError(f"field {name!r} is of the wrong type")
    if hint is int and not -(1 << 63) <= value < 1 << 63:
        raise WireError(f"field {name!r} is out of range")
    if hint in {bytes, str} and len(value) > limit:
        raise WireError(f"field {name!r} is over its limit of {limit}")
    return value
