"""The steps of a federated round: bodies of `RoundMessage`, and who may believe what.

Down: ``open`` `RoundOpen`, ``cohort`` `Cohort`, ``shares`` `SharesDown`, ``survivors`` `Survivors`, ``unmask``
`Unmask`, ``result`` `RoundResult`. Up: ``join`` `Join`, ``shares`` `SharesUp`, ``confirm`` `Confirm`, ``reveal``
`Reveal`. The update itself is an upload: `Offer` with ``what="update"``, the round's number and the meta map of
`offer_meta`; its bytes are `edgepriv.wire.update`.

A clear round has open, join, upload, result. A masked round has all steps (Bonawitz et al. 2017, section 4 of the
paper, with the consistency check): the device believes an advertisement only with a signature by an identity in the
owner's trust list over (round, cohort, base), and a survivor set only with as many signatures of cohort members.
Positions in the cohort are by sorted device name; share index = position + 1, so index 0 never exists.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from edgepriv.errors import WireError
from edgepriv.wire import cbor, message
from edgepriv.wire.message import sized

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edgepriv.keys import Identity
    from edgepriv.wire.messages import RoundMessage
    from edgepriv.wire.trust import TrustList

ADVERT_USE = "round-advert"
SURVIVORS_USE = "round-survivors"
CLEAR, MASKED = "clear", "masked"
ENCODINGS = ("float32", "float16", "int8", "topk", "randomk")
NOISES = ("none", "central", "distributed")
MAX_COHORT = 256


@message.message("round-open")
class RoundOpen:
    """The gateway asks devices to take part.

    ``tensors``: rows ``[name, [dimensions]]``, the only tensors that the round may touch, in the order in which they
    are laid out in one vector. ``base``: SHA-256 of the global weights (bytes of `wire.update`), ``base_bytes`` long;
    pull them by `Fetch`. ``clip``: L2 bound of a device's update, also the bound of each coordinate. ``keep``: share
    of coordinates that topk and randomk keep. ``seed``: public, places randomk's coordinates. ``noise_multiplier``:
    standard deviation of the sum's noise over the clip. ``survivors``: the fewest devices whose noise is counted on,
    ``colluders``: how many of them may be dishonest. ``training``: fields of `LocalRecipe`. ``participation``: how
    devices were chosen (``all``, ``fixed``, ``poisson``). ``adaptive_clip``: the sum has one more coordinate, before
    the weights: plus or minus a half by whether the device's update was within the clip; ``clip_noise``: deviation of
    the noise on its sum. ``late_rounds``: how many rounds later an update is still taken (0: it is dropped). Times are
    Unix seconds by the gateway's clock.
    """

    round: int
    cohort: str
    model: str
    base: bytes
    base_bytes: int
    tensors: tuple[Any, ...]
    privacy: str
    join_by: float
    deadline: float
    clip: float
    fraction_bits: int
    ring_bits: int
    max_weight: int
    devices: int
    quorum: int
    encoding: str
    keep: float
    seed: bytes
    noise: str
    noise_multiplier: float
    survivors: int
    colluders: int
    delta: float
    participation: str
    statistics: str
    training: dict[str, Any]
    adaptive_clip: bool = False
    clip_noise: float = 0.0
    late_rounds: int = 0


@message.message("round-join")
class Join:
    """A device's answer: takes part (``advert`` in masked rounds: see `sign_advert`) or declines with a reason."""

    accept: bool
    reason: str
    advert: bytes


@message.message("round-advert")
class Advert:
    """Two fresh X25519 public keys of one device for one round, never one for both, and what it commits to.

    ``mask_commitment``: SHA-256("edgepriv/mask-seed/v1" | 0x00 | seed) and ``self_commitment`` likewise, so a seed
    rebuilt from shares is checked before it is used; garbage from wrong shares is found here.
    """

    round: int
    cohort: str
    base: bytes
    device: str
    share_key: bytes
    mask_key: bytes
    mask_commitment: bytes
    self_commitment: bytes


@message.message("round-cohort")
class Cohort:
    """Signed advertisements of all members, by sorted device name."""

    adverts: tuple[bytes, ...]


@message.message("round-shares-up")
class SharesUp:
    """One box for each member in cohort order (its own is empty): sealed to that member, opaque to the gateway."""

    boxes: tuple[bytes, ...]


@message.message("round-shares-down")
class SharesDown:
    """Boxes for this device: ``members`` are positions of those who shared, ``boxes`` theirs in that order.

    Only these members' masks are added, and the device's own position is among them.
    """

    members: tuple[int, ...]
    boxes: tuple[bytes, ...]


@message.message("round-survivors")
class Survivors:
    """The frozen set of members whose uploads are in the sum (positions, ascending)."""

    members: tuple[int, ...]


@message.message("round-confirm")
class Confirm:
    """A device's signature over the survivor set; it signs one set in a round."""

    signature: bytes


@message.message("round-unmask")
class Unmask:
    """Proof that others saw the same set: positions and their signatures."""

    members: tuple[int, ...]
    signatures: tuple[bytes, ...]


@message.message("round-reveal")
class Reveal:
    """Shares: of survivors' self-mask seeds, and of the mask keys of those who dropped out; never both of one.

    ``members`` are positions, ``shares`` 16 bytes each; which kind a share is follows from the survivor set.
    """

    members: tuple[int, ...]
    shares: tuple[bytes, ...]


@message.message("round-result")
class RoundResult:
    """How a round ended: ``done`` with the new global weights, or ``aborted`` with a reason."""

    outcome: str
    reason: str
    model: bytes = sized(32)
    model_bytes: int = 0
    participants: int = 0
    privacy: str = CLEAR
    epsilon: float = 0.0
    delta: float = 0.0


STEPS_DOWN = {
    "open": RoundOpen,
    "cohort": Cohort,
    "shares": SharesDown,
    "survivors": Survivors,
    "unmask": Unmask,
    "result": RoundResult,
}
STEPS_UP = {"join": Join, "shares": SharesUp, "confirm": Confirm, "reveal": Reveal}


def step_message(round_number: int, step: str, body: Any) -> RoundMessage:
    """Wrap a body for the link."""
    from edgepriv.wire.messages import RoundMessage

    return RoundMessage(round_number, step, message.encode(body))


def read_step(outer: RoundMessage, *, up: bool) -> Any:
    """The checked body of a step, or WireError."""
    expected = (STEPS_UP if up else STEPS_DOWN).get(outer.step)
    body = message.decode(outer.body)
    if expected is None or type(body) is not expected:
        raise WireError("a round's step and its body do not fit")
    if isinstance(body, RoundOpen):
        _check_open(body, outer.round)
    return body


def _check_open(opened: RoundOpen, number: int) -> None:
    for row in opened.tensors:
        match row:
            case [str(), list() as shape] if len(shape) <= 8 and all(type(n) is int and 0 < n < 1 << 31 for n in shape):
                continue
        raise WireError("a round's tensor row is malformed")
    names = [row[0] for row in opened.tensors]
    if opened.round != number or not names or len(set(names)) != len(names) or len(opened.base) != 32:
        raise WireError("a round's announcement contradicts itself")
    if opened.privacy not in {CLEAR, MASKED} or opened.encoding not in ENCODINGS or opened.noise not in NOISES:
        raise WireError("a round's announcement asks for something unknown")
    if not 0 < opened.keep <= 1 or opened.base_bytes < 1 or opened.late_rounds < 0:
        raise WireError("a round's announcement has a number out of range")
    if not (opened.noise_multiplier >= 0 and opened.clip_noise >= 0 and opened.clip > 0):
        raise WireError("a round's announcement has a number out of range")


def offer_meta(examples: int) -> dict[str, Any]:
    """Meta map of an update's offer: what the gateway may know of it. Masked rounds give 0 examples."""
    return {"examples": examples}


def sign_advert(advert: Advert, identity: Identity) -> bytes:
    """Encode and sign an advertisement: CBOR ``[body, signature]``."""
    body = message.encode(advert)
    return cbor.encode([body, identity.sign(ADVERT_USE, body)])


def read_advert(raw: bytes, trust: TrustList) -> Advert:
    """Check an advertisement's signature against the trust list.

    Raises:
        WireError: malformed.
        TrustError: the device is not listed or is revoked.
        AuthenticationError: it did not sign this.
    """
    match cbor.decode(raw, max_bytes=4096):
        case [bytes() as body, bytes() as signature]:
            advert = message.decode(body)
        case _:
            raise WireError("not an advertisement")
    if not isinstance(advert, Advert) or not len(advert.share_key) == len(advert.mask_key) == 32:
        raise WireError("not an advertisement")
    if advert.share_key == advert.mask_key or not len(advert.mask_commitment) == len(advert.self_commitment) == 32:
        raise WireError("an advertisement uses one key for both purposes")
    trust.party(advert.device, "device").verify(ADVERT_USE, body, signature)
    return advert


def survivors_digest(round_number: int, cohort: str, base: bytes, devices: Iterable[str]) -> bytes:
    """What members sign: SHA-256 over round, cohort, base and the sorted names of the survivors."""
    return hashlib.sha256(cbor.encode([round_number, cohort, base, sorted(devices)])).digest()
