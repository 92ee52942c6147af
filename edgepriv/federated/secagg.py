"""The device's end of double-masked secure aggregation: believes signatures and its owner's policy, nothing else.

Bonawitz et al. 2017, figure 4, with the consistency check (round 3). Rules, each enforced here on the device:

1. Two fresh X25519 pairs for each round: one seals shares, the other makes masks. Adverts are believed only with a
   signature, over this round, cohort and base, by a device of the owner's trust list.
2. Smallest cohort and threshold are the owner's policy: floor(n/2)+1 shares against an honest but curious gateway,
   floor(2n/3)+1 against one that lies.
3. The masked vector is computed once.
4. Noise: what the announcement counts on is held against who is there. A device adds its share of the noise only
   where the ``survivors`` that the share is computed from are members, and reveals nothing of a smaller set.
5. One survivor set is signed. Shares are revealed once, after as many valid signatures over that very set as the
   threshold says: of a survivor the self-mask's share, of the others the mask key's, never both of one device.
6. Everything secret lives in this object.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import primitives
from edgepriv.errors import AuthenticationError, EdgeprivError, RefusedError, WireError
from edgepriv.federated import masking
from edgepriv.federated.compression import random_coordinates
from edgepriv.federated.fixed_point import add_into, clip_steps, count_steps, quantise, ring_of
from edgepriv.federated.noise import NoiseStream, device_deviation
from edgepriv.primitives import sharing
from edgepriv.wire import cbor, rounds
from edgepriv.wire.rounds import Advert, Cohort, Confirm, Reveal, SharesDown, SharesUp, Survivors, Unmask
from edgepriv.wire.update import encode_update

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgepriv.federated.fixed_point import Ring
    from edgepriv.federated.layout import Layout
    from edgepriv.federated.participant import RoundPolicy
    from edgepriv.keys import Identity
    from edgepriv.wire.messages import RoundMessage
    from edgepriv.wire.rounds import RoundOpen
    from edgepriv.wire.trust import TrustList


def threshold_of(members: int, *, active: bool) -> int:
    """Shares that rebuild a seed."""
    return (2 * members) // 3 + 1 if active else members // 2 + 1


def box_context(opened: RoundOpen, sender: str, receiver: str) -> bytes:
    """Associated data of a box of shares."""
    return cbor.encode([opened.round, opened.cohort, sender, receiver])


class Member:
    """One device in one masked round. ``ready`` once masks can be made."""

    def __init__(
        self, opened: RoundOpen, layout: Layout, identity: Identity, trust: TrustList, policy: RoundPolicy
    ) -> None:
        self.opened, self.layout, self.identity, self.trust, self.policy = opened, layout, identity, trust, policy
        self.me = identity.name
        self._self_seed = primitives.random_bytes(masking.SEED_BYTES)
        self._mask_seed = primitives.random_bytes(masking.SEED_BYTES)
        self._mask_private = masking.mask_private_key(self._mask_seed, opened.round)
        self._box_private = primitives.random_bytes(32)
        self.advert = self._make_advert()
        self.ready = False
        self.noise_seed = b""  # simulations only
        self._adverts: list[Advert] = []
        self._raw_adverts: list[bytes] = []
        self._shares_up: SharesUp | None = None
        self._own: tuple[bytes, bytes] = (b"", b"")
        self._members: tuple[int, ...] = ()
        self._held: dict[int, tuple[bytes, bytes]] = {}
        self._masked = False
        self._survivors: tuple[int, ...] = ()
        self._reveal: Reveal | None = None

    def _make_advert(self) -> bytes:
        backend = primitives.backend()
        advert = Advert(
            self.opened.round,
            self.opened.cohort,
            self.opened.base,
            self.me,
            backend.x25519_public(self._box_private),
            backend.x25519_public(self._mask_private),
            masking.commit("mask", self._mask_seed),
            masking.commit("self", self._self_seed),
        )
        return rounds.sign_advert(advert, self.identity)

    # --- steps --------------------------------------------------------------------------------------------

    def receive(self, body: Any) -> list[RoundMessage]:
        """Answer a step; a repeated step gets the same answer.

        Raises:
            WireError: the step contradicts what came before.
            RefusedError: the owner's policy forbids to go on.
        """
        match body:
            case Cohort():
                answer: Any = self._share(body)
            case SharesDown():
                self._take_shares(body)
                return []
            case Survivors():
                answer = self._confirm(body)
            case Unmask():
                answer = self._unmask(body)
            case _:
                raise WireError("not a step of a masked round")
        step = {SharesUp: "shares", Confirm: "confirm", Reveal: "reveal"}[type(answer)]
        return [rounds.step_message(self.opened.round, step, answer)]

    def _share(self, body: Cohort) -> SharesUp:
        if self._shares_up is not None:
            if list(body.adverts) != self._raw_adverts:
                raise WireError("a second cohort for one round")
            return self._shares_up
        adverts = [self._believe(raw) for raw in body.adverts]
        names = [advert.device for advert in adverts]
        if names != sorted(set(names)) or len(names) > rounds.MAX_COHORT:
            raise WireError("a cohort's members are not sorted or not unique")
        if self.me not in names or body.adverts[names.index(self.me)] != self.advert:
            raise WireError("a cohort without this device's own advertisement")
        if len(names) < max(self.policy.min_cohort, 2):
            raise RefusedError(f"a cohort of {len(names)} is below the policy's {self.policy.min_cohort}")
        self._adverts, self._raw_adverts = adverts, list(body.adverts)
        self._shares_up = self._make_boxes()
        return self._shares_up

    def _believe(self, raw: bytes) -> Advert:
        try:
            advert = rounds.read_advert(raw, self.trust)
        except (EdgeprivError, AuthenticationError) as error:
            raise RefusedError(f"the cohort has a member that the owner did not list: {error}") from error
        if (advert.round, advert.cohort, advert.base) != (self.opened.round, self.opened.cohort, self.opened.base):
            raise RefusedError("the cohort has an advertisement of another round")
        return advert

    @property
    def threshold(self) -> int:
        """By the owner's policy, never by the announcement."""
        return threshold_of(len(self._adverts), active=self.policy.active)

    def _make_boxes(self) -> SharesUp:
        n = len(self._adverts)
        of_mask = sharing.split(self._mask_seed, self.threshold, n)
        of_self = sharing.split(self._self_seed, self.threshold, n)
        boxes = []
        for advert, mask_share, self_share in zip(self._adverts, of_mask, of_self, strict=True):
            if advert.device == self.me:
                self._own = (mask_share, self_share)
                boxes.append(b"")
                continue
            key = self._box_key(advert, self.me, advert.device)
            context = box_context(self.opened, self.me, advert.device)
            # a constant nonce is safe: the key is fresh in each round and seals one box
            boxes.append(primitives.aead_seal(key, primitives.ZERO_NONCE, mask_share + self_share, context))
        return SharesUp(tuple(boxes))

    def _box_key(self, peer: Advert, sender: str, receiver: str) -> bytes:
        shared = primitives.backend().x25519(self._box_private, peer.share_key)
        return masking.share_key(shared, self.opened.round, self.opened.cohort, sender, receiver)

    def _take_shares(self, body: SharesDown) -> None:
        if self._members:
            if body.members != self._members:
                raise WireError("a second set of members for one round")
            return
        n = len(self._adverts)
        if list(body.members) != sorted(set(body.members)) or len(body.boxes) != len(body.members):
            raise WireError("members are not sorted or not unique")
        if not body.members or not 0 <= body.members[0] <= body.members[-1] < n:
            raise WireError("a member outside the cohort")
        if self._position not in body.members:
            raise RefusedError("this device's shares did not arrive in time")
        if len(body.members) < max(self.policy.min_cohort, self.threshold):
            raise RefusedError(f"only {len(body.members)} members shared, the policy says {self.policy.min_cohort}")
        if not 0 < self._counted_on <= len(body.members):
            raise RefusedError(f"the noise counts on {self._counted_on} devices, {len(body.members)} take part")
        for position, box in zip(body.members, body.boxes, strict=True):
            self._held[position] = self._open_box(position, box)
        self._members, self.ready = body.members, True

    @property
    def _counted_on(self) -> int:
        """How many devices' noise the announcement counts on: fewer than that are never unmasked."""
        return self.opened.survivors if self.opened.noise == "distributed" else 1

    @property
    def _position(self) -> int:
        return next(i for i, advert in enumerate(self._adverts) if advert.device == self.me)

    def _open_box(self, position: int, box: bytes) -> tuple[bytes, bytes]:
        if position == self._position:
            return self._own
        peer = self._adverts[position]
        key = self._box_key(peer, peer.device, self.me)
        try:
            plain = primitives.aead_open(
                key, primitives.ZERO_NONCE, box, box_context(self.opened, peer.device, self.me)
            )
        except AuthenticationError as error:
            raise RefusedError(f"the shares of {peer.device} do not open") from error
        if len(plain) != 2 * sharing.SECRET_BYTES:
            raise RefusedError(f"the shares of {peer.device} are malformed")
        return plain[: sharing.SECRET_BYTES], plain[sharing.SECRET_BYTES :]

    # --- the upload ---------------------------------------------------------------------------------------

    def masked_payload(
        self, tensors: Mapping[str, NDArray[np.float32]], examples: int, *, within: bool = True
    ) -> bytes:
        """The upload's bytes. Once: a second masked view of this device would cost its privacy.

        Args:
            tensors: the clipped update.
            examples: labelled examples; clamped to the round's largest weight.
            within: whether the update was within the clip before it was clipped (adaptive clipping counts it).

        Raises:
            RefusedError: called again, or before the members are known.
        """
        if self._masked or not self.ready:
            raise RefusedError("a masked update is made once in a round")
        self._masked = True
        vector = self.plain_vector(tensors, examples, within=within)
        masking.MaskStream(self._mask_keys()).apply(vector)
        return encode_update({"masked": vector}, {"round": self.opened.round})

    def plain_vector(
        self, tensors: Mapping[str, NDArray[np.float32]], examples: int, *, within: bool = True
    ) -> NDArray[Any]:
        """Quantised values, noise where this round adds it on devices, the count's half, and the clamped weights."""
        opened, ring = self.opened, ring_of(self.opened)
        values, present = self.layout.flatten(tensors)
        if opened.encoding == "randomk":
            values = self._kept(values)
        weight = min(max(examples, 1), opened.max_weight)
        vector = quantise(values, weight, ring)
        if opened.noise == "distributed":
            steps = clip_steps(vector, opened.clip * ring.scale, ring)
            deviation = device_deviation(
                opened.noise_multiplier, opened.clip * ring.scale, opened.survivors, opened.colluders
            )
            noise = NoiseStream(self.noise_seed).integers(len(steps), deviation)
            vector = (steps + noise).astype(ring.dtype)
        count = self._count(ring, within=within) if opened.adaptive_clip else []
        return np.concatenate(
            [vector, np.array(count, np.int64).astype(ring.dtype), (present * weight).astype(ring.dtype)]
        )

    def _count(self, ring: Ring, *, within: bool) -> list[int]:
        """This device's half in the count of devices within the clip, with its share of the count's noise."""
        opened, steps = self.opened, count_steps(ring, within=within)
        if opened.noise != "distributed":
            return [steps]
        deviation = device_deviation(opened.clip_noise, ring.scale, opened.survivors, opened.colluders)
        seed = self.noise_seed and self.noise_seed + b"count"
        return [steps + int(NoiseStream(seed).integers(1, deviation)[0])]

    def _kept(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        views = self.layout.unflatten(values)
        return np.concatenate(
            [view.ravel()[random_coordinates(self.opened, name, view.size)] for name, view in views.items()]
        )

    def _mask_keys(self) -> list[tuple[bytes, int]]:
        opened = self.opened
        keys = [(masking.self_key(self._self_seed, opened.round, opened.cohort, self.me), 1)]
        for position in self._members:
            peer = self._adverts[position]
            if peer.device != self.me:
                shared = primitives.backend().x25519(self._mask_private, peer.mask_key)
                key = masking.pair_key(shared, opened.round, opened.cohort, self.me, peer.device)
                keys.append((key, masking.sign_of(self.me, peer.device)))
        return keys

    # --- unmasking ----------------------------------------------------------------------------------------

    def _confirm(self, body: Survivors) -> Confirm:
        chosen = body.members
        if self._survivors and chosen != self._survivors:
            raise RefusedError("a second survivor set for one round")
        if list(chosen) != sorted(set(chosen)) or not set(chosen) <= set(self._members):
            raise RefusedError("survivors that are not members")
        if self._position not in chosen or not self._masked:
            raise RefusedError("this device is not among the survivors")
        if len(chosen) < max(self.policy.min_cohort, self.threshold):
            raise RefusedError(f"{len(chosen)} survivors are below the policy's {self.policy.min_cohort}")
        if len(chosen) < self._counted_on:
            raise RefusedError(f"the noise counts on {self._counted_on} devices, {len(chosen)} survived")
        self._survivors = chosen
        return Confirm(self.identity.sign(rounds.SURVIVORS_USE, self._survivors_digest()))

    def _survivors_digest(self) -> bytes:
        names = [self._adverts[i].device for i in self._survivors]
        return rounds.survivors_digest(self.opened.round, self.opened.cohort, self.opened.base, names)

    def _unmask(self, body: Unmask) -> Reveal:
        if not self._survivors:
            raise RefusedError("asked for shares before this device confirmed the survivors")
        if self._reveal is not None:
            return self._reveal  # the same bytes: still one unmasking
        digest, valid = self._survivors_digest(), set()
        for position, signature in zip(body.members, body.signatures, strict=False):
            if position in self._survivors and self._signed(position, digest, signature):
                valid.add(position)
        if len(valid) < self.threshold:
            raise RefusedError(f"{len(valid)} valid signatures on the survivors, {self.threshold} are needed")
        survived = set(self._survivors)
        shares = tuple(self._held[i][1 if i in survived else 0] for i in self._members)
        self._reveal = Reveal(self._members, shares)
        return self._reveal

    def _signed(self, position: int, digest: bytes, signature: bytes) -> bool:
        try:
            party = self.trust.party(self._adverts[position].device, "device")
            party.verify(rounds.SURVIVORS_USE, digest, signature)
        except EdgeprivError:
            return False
        return True


def add_plain(total: NDArray[Any], member: Member, tensors: Mapping[str, NDArray[np.float32]], examples: int) -> None:
    """Add what a member would send without masks: the reference that tests compare masked sums with."""
    add_into(total, member.plain_vector(tensors, examples))
