"""What happens to a round (events), what is to be done about it (actions), and how it ended (the record)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgepriv.wire.rounds import Reveal
    from gateway.round_record import RoundRecord

# --- events -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went on."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """A device sent a step (`Join`, `SharesUp`, `Confirm`, `Reveal`), authenticated; adverts and signatures checked."""

    device: str
    body: Any


@dataclass(frozen=True, slots=True)
class Offered:
    """A device offers its update; ``stale`` is how many rounds it is behind."""

    device: str
    digest: bytes
    size: int
    examples: int
    stale: int = 0


@dataclass(frozen=True, slots=True)
class Progressed:
    """A chunk of an open upload arrived."""

    device: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class UploadComplete:
    """An upload is durable in its staging file and its SHA-256 is right."""

    device: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class Folded:
    """The aggregator put an update into the durable sum (``reason`` empty), or refused it for good."""

    device: str
    digest: bytes
    reason: str = ""


@dataclass(frozen=True, slots=True)
class UnmaskFailed:
    """Shares were wrong: wait for more reveals, or (``again``) the search for them goes on at the next tick."""

    again: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """The new global weights are durable (``reason`` empty), or the sum was not publishable.

    ``within``, ``clip_after``: share of the devices within the clip, and the next round's clip (adaptive clipping).
    """

    model: bytes = b""
    model_bytes: int = 0
    epsilon: float = 0.0
    reason: str = ""
    within: float = 0.0
    clip_after: float = 0.0


def not_finished(error: Exception) -> Finished:
    """The sum was not published because of this; where a file failed, its path stays here."""
    if isinstance(error, OSError):
        return Finished(reason=f"the sum could not be finished: {error.strerror}")
    return Finished(reason=str(error))


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The operator stops the round."""

    reason: str


Event = Tick | Stepped | Offered | Progressed | UploadComplete | Folded | UnmaskFailed | Finished | Cancelled

# --- actions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Send a step to a device."""

    device: str
    step: str
    body: Any


@dataclass(frozen=True, slots=True)
class GrantUpload:
    """Open a staging file for this offer and grant credits."""

    device: str
    digest: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Reject:
    """Acknowledge the item as rejected, delete what is staged of it."""

    device: str
    digest: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class PutOff:
    """Delete what is staged of an offer and say nothing: its device offers it again, to the next round."""

    device: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class Fold:
    """Verify the staged update and add it to the sum with this weight, then say `Folded`."""

    device: str
    digest: bytes
    weight: int
    stale: int


@dataclass(frozen=True, slots=True)
class Accept:
    """Acknowledge the item as stored: it is in the durable sum."""

    device: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class RemoveMasks:
    """Rebuild seeds from the reveals (position in the cohort -> body), then `Finish` or say `UnmaskFailed`."""

    members: tuple[int, ...]
    survivors: tuple[int, ...]
    reveals: dict[int, Reveal]


@dataclass(frozen=True, slots=True)
class Finish:
    """Write the new global weights from the sum, then say `Finished`."""


@dataclass(frozen=True, slots=True)
class Close:
    """The round has ended: store the record, tell the devices (``Send`` actions precede), delete staged files."""

    record: RoundRecord


Action = Send | GrantUpload | Reject | PutOff | Fold | Accept | RemoveMasks | Finish | Close
