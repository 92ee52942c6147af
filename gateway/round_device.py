"""Where one device stands in a round, and its row in storage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

SETTLED = {"declined", "folded", "rejected"}


def plain(value: Any) -> Any:
    """Tuples as lists, for storage."""
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


@dataclass
class Device:
    """Where a device stands: ``invited joined declined shared offered open complete folded rejected``."""

    state: str = "invited"
    reason: str = ""
    advert: bytes = b""
    boxes: tuple[bytes, ...] = ()
    signature: bytes = b""
    digest: bytes = b""
    size: int = 0
    examples: int = 0
    stale: int = 0
    at: float = 0.0

    def to_row(self) -> list[Any]:
        """Plain values, in the order of the fields."""
        return [plain(getattr(self, f.name)) for f in dataclasses.fields(self)]

    @classmethod
    def from_row(cls, row: list[Any]) -> Device:
        """Restore what `to_row` gave."""
        device = cls(*row)
        device.boxes = tuple(device.boxes)
        return device
