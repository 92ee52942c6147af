"""What the conductor of rounds asks of its surroundings: a store, and three things to do.

Store: ``save(round, bytes, part)`` must be durable when it returns (empty bytes forget a part); ``load()`` gives the
saved bytes of rounds that have not been ``close``d, and of their parts; ``close(record)`` stores the record for ever
and may forget the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from edgepriv.wire.messages import Ack, RoundMessage
    from gateway.round_record import RoundRecord


class RoundStore(Protocol):
    """What rounds need stored; see the module."""

    def save(self, round_number: int, raw: bytes, part: str = "") -> None:
        """Replace the bytes of a round, or of a part of it, durably."""
        ...

    def load(self) -> list[bytes]:
        """Bytes of all rounds that are not closed, by number, and of their parts."""
        ...

    def close(self, record: RoundRecord) -> None:
        """Store the record; a second call with the same round changes nothing."""
        ...

    def records(self) -> list[dict[str, Any]]:
        """Closed rounds, oldest first: the fields of `RoundRecord` by name."""
        ...

    def record(self, number: int) -> dict[str, Any]:
        """One of `records` by its number, without reading the others; empty where there is none."""
        ...

    def last(self) -> dict[str, Any]:
        """The last of `records`, without reading the others; empty where there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Tell:
    """Seal this `RoundMessage` or `Ack` and send it to the device."""

    device: str
    message: RoundMessage | Ack


@dataclass(frozen=True, slots=True)
class OpenUpload:
    """Make (or keep) a staging file for this offer and grant credits for it."""

    device: str
    digest: bytes
    size: int


@dataclass(frozen=True, slots=True)
class DropUpload:
    """Delete what is staged under this digest; no more credits."""

    device: str
    digest: bytes


Outgoing = Tell | OpenUpload | DropUpload
