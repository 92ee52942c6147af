"""The device's side of an epoch: fresh keys in memory, a signed record, frames until it is time for the next.

A new epoch is opened at process start, after ``max_frames`` frames, after an hour, and at once when the trust list
changes. The content key never leaves process memory: not to a file, a repr, a pickle or a forked child. What a stopped
device holds on disk therefore opens nothing that it sent.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NoReturn

from edgepriv import primitives
from edgepriv.cipher.cipher import FrameSealer
from edgepriv.errors import ConfigError, RefusedError, TrustError
from edgepriv.primitives import cpu
from edgepriv.wire import epoch as wire_epoch
from edgepriv.wire.allowed import Allowed
from edgepriv.wire.envelope import ALGS, AUTHS, MAX_FRAMES, PROFILES
from edgepriv.wire.epoch import AUTH_LINK_MAC, AUTH_SIGNATURE, EPOCH_ID_BYTES, EpochRecord, SignedEpoch, sign_epoch
from edgepriv.wire.link import LinkSession
from edgepriv.wire.session import check_listed, wrap_link

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from edgepriv.cipher.picture import Picture
    from edgepriv.keys import Identity, PublicIdentity
    from edgepriv.wire.trust import TrustList

MAX_AGE_S = 3600.0
DEFAULT_MAX_FRAMES = 4096


class DeviceEpoch:
    """An open epoch: ``signed`` is to be published first, ``session`` is the link to the gateway, `seal` seals."""

    def __init__(
        self, identity: Identity, signed: SignedEpoch, session: LinkSession, ck: bytes, trust: TrustList
    ) -> None:
        self.signed, self.session = signed, session
        self._sealer = FrameSealer(ck, signed, session, identity)
        self._trust_digest, self._pid, self._counter = trust.digest, os.getpid(), 0
        self._random: Callable[[int], bytes] = primitives.random_bytes

    @classmethod
    def open(
        cls,
        identity: Identity,
        trust: TrustList,
        gateway_name: str,
        *,
        seq: int,
        now: float,
        profile: str = "flep3",
        alg: primitives.Alg | None = None,
        max_frames: int = DEFAULT_MAX_FRAMES,
        random: Callable[[int], bytes] = os.urandom,
    ) -> DeviceEpoch:
        """Draw fresh keys and wrap them for the gateway and each recipient the owner permits.

        Args:
            identity: the device's keys.
            trust: the verified trust list; its policy for the device may narrow recipients and settings.
            gateway_name: which gateway; its key comes from the list.
            seq: number of this epoch, counted up by the device across restarts.
            now: Unix seconds.
            profile: ``flep3``, ``flep3-strong`` or ``aead``.
            alg: forces an algorithm; by default what the CPU does best.
            max_frames: frames until the next epoch, at most 65,536; the policy may lower it.
            random: source of keys and ids; only tests with fixed vectors pass another.

        Raises:
            TrustError: the device or gateway is not listed or revoked, or there is no recipient.
            ConfigError: a profile, algorithm or size that does not exist.
            RefusedError: the owner's policy forbids the setting.
        """
        _check_device(identity, trust)
        policy = trust.policy_for(identity.name)
        recipients = _recipients(trust, policy)
        auth = _auth(policy, len(recipients))
        chosen = alg or _alg_by_policy(policy)
        _check_settings(profile, chosen, auth, max_frames)
        allowed = Allowed.by_policy(policy)
        epoch_id, ck, k_link = random(EPOCH_ID_BYTES), random(primitives.KEY_BYTES), random(primitives.KEY_BYTES)
        record = EpochRecord(
            version=wire_epoch.VERSION,
            party=identity.name,
            gateway=gateway_name,
            epoch_id=epoch_id,
            seq=seq,
            created=int(now),
            max_frames=min(max_frames, allowed.max_frames),
            trust_version=trust.version,
            alg=chosen,
            profile=profile,
            auth=auth,
            stanzas=tuple(wire_epoch.wrap_stanza(r, ck, identity.name, epoch_id) for r in recipients),
            link=wrap_link(trust, gateway_name, k_link, identity.name, epoch_id),
            commitment=wire_epoch.commitment(ck, identity.name, epoch_id),
        )
        _check_permitted(record, allowed)
        session = LinkSession(k_link, epoch_id, identity.name, side="party")
        epoch = cls(identity, sign_epoch(record, identity), session, ck, trust)
        epoch._random = random
        return epoch

    @property
    def frames(self) -> int:
        """Frames sealed so far; the next frame's counter."""
        return self._counter

    def seal(self, frame: Picture | NDArray[Any] | bytes) -> bytes:
        """Seal one frame to an envelope of its own. See `seal_view` for the way without a copy."""
        return bytes(self.seal_view(frame))

    def seal_view(self, frame: Picture | NDArray[Any] | bytes) -> memoryview:
        """Seal one frame; the result is a view into a buffer that the next call overwrites.

        Raises:
            DataError: an image of zero area or of an unsupported kind.
            RefusedError: the epoch is used up; open the next one.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("an epoch crossed a fork; open a new one in the child")
        if self._counter >= self.signed.record.max_frames:
            raise RefusedError("this epoch has sealed all its frames", hint="open the next epoch")
        sealed = self._sealer.seal(frame, counter=self._counter, mid=self._random(32))
        self._counter += 1
        return sealed

    def needs_rotation(self, now: float, trust: TrustList) -> bool:
        """Whether the next frame belongs into a new epoch: used up, an hour old, clock set back, or a new list."""
        age = now - self.signed.record.created
        used_up = self._counter >= self.signed.record.max_frames
        return used_up or not -60.0 <= age < MAX_AGE_S or trust.digest != self._trust_digest

    def __repr__(self) -> str:
        return f"DeviceEpoch({self.signed.record.party!r}, seq {self.signed.record.seq}, keys hidden)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an epoch's keys are not pickled")


def _check_device(identity: Identity, trust: TrustList) -> None:
    check_listed(identity, trust)
    if identity.public.role != "device":
        raise TrustError(f"{identity.name} is no device: only devices seal frames", hint="give a device's key")


def _recipients(trust: TrustList, policy: dict[str, Any]) -> tuple[PublicIdentity, ...]:
    names = policy.get("recipients")
    listed = trust.with_role("recipient")
    chosen = tuple(r for r in listed if names is None or r.name in names)
    if not chosen:
        raise TrustError(
            "no recipient may open this device's frames",
            hint="the owner lists one: edgepriv owner sign NAME.key.pub --key ... --trust ...",
        )
    return chosen


def _auth(policy: dict[str, Any], recipients: int) -> str:
    """One recipient: the link MAC. Several: any of them could forge to the others, so a signature for each frame."""
    default = AUTH_LINK_MAC if recipients == 1 or policy.get("allow_recipient_forgery", False) else AUTH_SIGNATURE
    return str(policy.get("auth", default))


def _alg_by_policy(policy: dict[str, Any]) -> primitives.Alg:
    """The CPU's best among the algorithms the policy permits."""
    allowed = policy.get("algs", list(ALGS))
    best = cpu.choose_alg()
    return best if best in allowed or not allowed else allowed[0]


def _check_settings(profile: str, alg: str, auth: str, max_frames: int) -> None:
    for value, known, what in ((profile, PROFILES, "profile"), (alg, ALGS, "algorithm"), (auth, AUTHS, "auth")):
        if value not in known:
            raise ConfigError(f"unknown {what} {value!r}", hint=f"use one of {', '.join(known)}")
    if not 0 < max_frames <= MAX_FRAMES:
        raise ConfigError(f"max_frames is {max_frames}, not within 1 and {MAX_FRAMES}")


def _check_permitted(record: EpochRecord, allowed: Allowed) -> None:
    if refusal := allowed.refusal(record):
        raise RefusedError(
            f"the owner's policy for {record.party} does not permit {refusal}",
            hint="change the device's [seal], or the policy: edgepriv owner sign --policy",
        )
