"""Private AI on edge devices. The public names are loaded when first used: importing edgepriv costs nothing."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES: dict[str, str] = {}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'edgepriv' has no public name {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
