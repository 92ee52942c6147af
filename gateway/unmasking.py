"""What the gateway may learn of a masked round: the seeds that open the sum over the frozen survivors, no more.

A survivor's self-mask seed and a dropped member's mask seed are rebuilt from the revealed shares, checked against the
signed commitments (wrong shares give garbage in silence) and turned into the key streams that are still in the sum:
each survivor's own mask, and each survivor's pair mask with each dropped member. Bonawitz et al. 2017, figure 4,
round 4. Wrong shares are found and left out; the work of one attempt is bounded.
"""

from __future__ import annotations

from functools import partial
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

from edgepriv import primitives
from edgepriv.errors import WireError
from edgepriv.federated import masking
from edgepriv.primitives import share_decoding, sharing
from edgepriv.wire import rounds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from edgepriv.wire.rounds import Advert, Reveal
    from edgepriv.wire.trust import TrustList
    from gateway.round_events import RemoveMasks
    from gateway.rounds import Round

MAX_SEARCHES = 2  # in one attempt: the work loop must turn
MAX_SETS = 1100  # of shares, in one search
MAX_LEFT_OUT = 2  # wrong shares that are searched for beyond what decoding finds


class UnfinishedError(WireError):
    """The bound on an attempt's work was reached; another attempt goes on from what this one found."""


def rebuild(
    current: Round, action: RemoveMasks, trust: TrustList, known: Seeds | None = None, *, searches: int = 1 << 30
) -> Callable[[], Callable[[NDArray[Any]], None]]:
    """Rebuild and check all seeds.

    Args:
        current: the round.
        action: members, survivors and reveals.
        trust: checks the adverts.
        known: what earlier attempts found; this one's findings are added.
        searches: for wrong shares, that this attempt may make.

    Returns:
        A maker of functions that take the masks off consecutive blocks of the sum.

    Raises:
        WireError: a seed does not fit its commitment; more or other reveals may help.
        UnfinishedError: call again.
    """
    adverts = [rounds.read_advert(current.devices[name].advert, trust) for name in current.cohort]
    found = known or Seeds()
    found.searches = searches
    keys = mask_keys(adverts, action.members, action.survivors, action.reveals, current.threshold, found)

    def start() -> Callable[[NDArray[Any]], None]:
        return masking.MaskStream(keys).apply

    return start


def mask_keys(
    adverts: list[Advert],
    members: tuple[int, ...],
    survivors: tuple[int, ...],
    reveals: Mapping[int, Reveal],
    threshold: int,
    known: Seeds | None = None,
) -> list[tuple[bytes, int]]:
    """Stream keys that are still in the sum, with the sign that takes them off."""
    keys: list[tuple[bytes, int]] = []
    # devices may share by the higher threshold, which is for a gateway that lies: their policy, not ours
    thresholds = sorted({threshold, 2 * len(adverts) // 3 + 1})
    seeds = known or Seeds()
    for column, position in enumerate(members):
        advert = adverts[position]
        kind, commitment = (
            ("self", advert.self_commitment) if position in survivors else ("mask", advert.mask_commitment)
        )
        shares = {p: reveal.shares[column] for p, reveal in reveals.items() if column < len(reveal.shares)}
        seed = seeds.seed(position, shares, thresholds, partial(_fits, kind, commitment))
        if kind == "self":
            keys.append((masking.self_key(seed, advert.round, advert.cohort, advert.device), -1))
        else:
            keys += _pair_keys(seed, advert, [adverts[i] for i in survivors])
    return keys


def _fits(kind: str, commitment: bytes, seed: bytes) -> bool:
    return primitives.equal(masking.commit(kind, seed), commitment)


def _pair_keys(seed: bytes, dropped: Advert, survivors: list[Advert]) -> Iterator[tuple[bytes, int]]:
    backend = primitives.backend()
    private = masking.mask_private_key(seed, dropped.round)
    if backend.x25519_public(private) != dropped.mask_key:
        raise WireError("a rebuilt mask key is not the one that was signed")
    for peer in survivors:
        shared = backend.x25519(private, peer.mask_key)
        key = masking.pair_key(shared, dropped.round, dropped.cohort, dropped.device, peer.device)
        yield key, -masking.sign_of(peer.device, dropped.device)


class Seeds:
    """The seeds of one cohort as far as they are known, and the positions of those who revealed a wrong share.

    Whoever revealed one wrong share is believed in nothing: it is found once, by decoding, and left out of all other
    seeds. Of m reveals, max((m - t) / 2, min(2, m - t)) may be wrong.
    """

    def __init__(self) -> None:
        self.wrong: set[int] = set()
        self.searches = 1 << 30
        self._seeds: dict[int, bytes] = {}
        self._weights: dict[tuple[int, ...], list[int]] = {}

    def seed(
        self, position: int, shares: Mapping[int, bytes], thresholds: list[int], fits: Callable[[bytes], bool]
    ) -> bytes:
        """The seed of a member from its shares by position.

        Raises:
            WireError: the shares do not give what the member has committed to.
            UnfinishedError: the attempt's searches are used up.
        """
        if position not in self._seeds:
            self.wrong |= {p for p, share in shares.items() if len(share) != sharing.SECRET_BYTES}
            self._seeds[position] = self._plainly(shares, thresholds, fits) or self._search(shares, thresholds, fits)
        return self._seeds[position]

    def _believed(self, shares: Mapping[int, bytes]) -> dict[int, bytes]:
        """Shares by index (position + 1, so that index 0 never exists) of those who were not caught lying."""
        return {p + 1: shares[p] for p in sorted(shares) if p not in self.wrong}

    def _plainly(
        self, shares: Mapping[int, bytes], thresholds: list[int], fits: Callable[[bytes], bool]
    ) -> bytes | None:
        believed = self._believed(shares)
        for threshold in thresholds:
            chosen = tuple(believed)[:threshold]
            if len(chosen) == threshold:
                seed = share_decoding.secret_of(self._weights_of(chosen), [believed[i] for i in chosen])
                if fits(seed):
                    return seed
        return None

    def _weights_of(self, indices: tuple[int, ...]) -> list[int]:
        if indices not in self._weights:
            self._weights[indices] = share_decoding.weights_at_zero(indices)
        return self._weights[indices]

    def _search(self, shares: Mapping[int, bytes], thresholds: list[int], fits: Callable[[bytes], bool]) -> bytes:
        believed = self._believed(shares)
        if self.searches < 1:
            raise UnfinishedError("shares are still being searched for wrong ones")
        self.searches -= 1
        for threshold in thresholds:
            found = share_decoding.decode(believed, threshold)
            if found is None or not fits(found[0]):
                found = self._leave_out(believed, threshold, fits)
            if found is not None:
                self.wrong |= {index - 1 for index in found[1]}
                return found[0]
        raise WireError("revealed shares do not fit the signed commitment")

    def _leave_out(
        self, believed: dict[int, bytes], threshold: int, fits: Callable[[bytes], bool]
    ) -> tuple[bytes, frozenset[int]] | None:
        """Where decoding has too few shares to spare: try all sets without one or two of them."""
        spare = len(believed) - threshold
        if not 0 < spare < 2 * MAX_LEFT_OUT:
            return None
        everyone = tuple(believed)
        weights = self._weights_of(everyone)
        for count in range(1, min(spare, MAX_LEFT_OUT) + 1):
            for left_out in combinations(everyone, count) if comb(len(everyone), count) <= MAX_SETS else ():
                indices, lagrange = list(everyone), weights
                for index in left_out:
                    indices, lagrange = share_decoding.without(indices, lagrange, index)
                seed = share_decoding.secret_of(lagrange, [believed[i] for i in indices])
                if fits(seed):
                    return seed, frozenset(left_out)
        return None
