"""What the gateway may learn of a masked round: the seeds that open the sum over the frozen survivors, no more.

A survivor's self-mask seed and a dropped member's mask seed are rebuilt from the revealed shares, checked against the
signed commitments (wrong shares give garbage in silence) and turned into the key streams that are still in the sum:
each survivor's own mask, and each survivor's pair mask with each dropped member. Bonawitz et al. 2017, figure 4,
round 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgepriv import primitives
from edgepriv.errors import WireError
from edgepriv.federated import masking
from edgepriv.primitives import sharing
from edgepriv.wire import rounds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from edgepriv.wire.rounds import Advert, Reveal
    from edgepriv.wire.trust import TrustList
    from gateway.round_events import RemoveMasks
    from gateway.rounds import Round

Unmasker = "Callable[[], Callable[[NDArray[Any]], None]]"


def rebuild(current: Round, action: RemoveMasks, trust: TrustList) -> Callable[[], Callable[[NDArray[Any]], None]]:
    """Rebuild and check all seeds.

    Returns:
        A maker of functions that take the masks off consecutive blocks of the sum.

    Raises:
        WireError: a seed does not fit its commitment; more or other reveals may help.
    """
    adverts = [rounds.read_advert(current.devices[name].advert, trust) for name in current.cohort]
    keys = mask_keys(adverts, action.members, action.survivors, action.reveals, current.threshold)

    def start() -> Callable[[NDArray[Any]], None]:
        return masking.MaskStream(keys).apply

    return start


def mask_keys(
    adverts: list[Advert],
    members: tuple[int, ...],
    survivors: tuple[int, ...],
    reveals: Mapping[int, Reveal],
    threshold: int,
) -> list[tuple[bytes, int]]:
    """Stream keys that are still in the sum, with the sign that takes them off."""
    keys: list[tuple[bytes, int]] = []
    for position in members:
        advert = adverts[position]
        if position in survivors:
            seed = _rebuild(members.index(position), reveals, len(adverts), threshold, "self", advert.self_commitment)
            keys.append((masking.self_key(seed, advert.round, advert.cohort, advert.device), -1))
        else:
            seed = _rebuild(members.index(position), reveals, len(adverts), threshold, "mask", advert.mask_commitment)
            keys += _pair_keys(seed, advert, [adverts[i] for i in survivors])
    return keys


def _pair_keys(seed: bytes, dropped: Advert, survivors: list[Advert]) -> Iterator[tuple[bytes, int]]:
    backend = primitives.backend()
    private = masking.mask_private_key(seed, dropped.round)
    if backend.x25519_public(private) != dropped.mask_key:
        raise WireError("a rebuilt mask key is not the one that was signed")
    for peer in survivors:
        shared = backend.x25519(private, peer.mask_key)
        key = masking.pair_key(shared, dropped.round, dropped.cohort, dropped.device, peer.device)
        yield key, -masking.sign_of(peer.device, dropped.device)


def _rebuild(
    column: int, reveals: Mapping[int, Reveal], count: int, threshold: int, kind: str, commitment: bytes
) -> bytes:
    """One seed from its shares; all of them first, then threshold-sized runs, so one wrong share spoils little."""
    shares = {
        position + 1: reveal.shares[column] for position, reveal in reveals.items() if column < len(reveal.shares)
    }
    for chosen in _choices(sorted(shares), threshold):
        seed = sharing.combine({index: shares[index] for index in chosen}, count)
        if primitives.equal(masking.commit(kind, seed), commitment):
            return seed
    raise WireError("revealed shares do not fit the signed commitment")


def _choices(indices: list[int], threshold: int) -> Iterator[list[int]]:
    yield indices[:threshold]
    yield indices
    for first in range(1, len(indices)):
        rotated = indices[first:] + indices[:first]
        yield rotated[:threshold]
