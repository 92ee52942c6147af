"""Sealing and opening one frame: the key schedule, the three layers, the commitment and the order of checks.

Rules: every key below is derived for one frame, from the epoch's content key and the frame's random id, so constant
nonces are safe. Nothing is decrypted before the commitment and, in signed epochs, the signature were checked; no
plaintext byte leaves before the AEAD accepted the whole frame. One error for every failed authentication.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgepriv import primitives
from edgepriv.cipher import layers
from edgepriv.cipher.picture import Picture, decode_meta, encode_meta, payload_of, picture_of
from edgepriv.errors import RefusedError, ReplayError, TrustError, WireError
from edgepriv.wire import envelope as wire
from edgepriv.wire.allowed import Allowed
from edgepriv.wire.envelope import AUTH_BYTES, BODY_OFFSET, META_BYTES, Envelope
from edgepriv.wire.epoch import AUTH_SIGNATURE, SignedEpoch, read_epoch, unwrap_content

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgepriv.cipher.opened import OpenedFrames
    from edgepriv.keys import Identity
    from edgepriv.wire.link import LinkSession
    from edgepriv.wire.trust import TrustList

BLOB_PAD_BYTES = 4096


USES = {
    "aead": ("commit", "aead"),
    "flep3": ("commit", "aead", "layer1", "layer2"),
    "flep3-strong": ("commit", "aead", "layer1", "layer2", "strong-hash", "strong-prf"),
}


@dataclass(frozen=True, slots=True)
class FrameKeys:
    """The keys of one frame, one HKDF label for each use; empty where the profile has no such use."""

    commitment: bytes
    aead: bytes
    layer1: bytes = b""
    layer2: bytes = b""
    strong_hash: bytes = b""
    strong_prf: bytes = b""

    def __repr__(self) -> str:
        return "FrameKeys(hidden)"


def frame_keys(ck: bytes, mid: bytes, header: bytes, profile: str) -> FrameKeys:
    """Derive a frame's keys: HKDF-SHA256, extracted once with the message id as salt, expanded by label | header."""
    prk = primitives.hkdf_extract(ck, mid)
    expand = primitives.hkdf_expand
    return FrameKeys(*[expand(prk, b"edgepriv/frame/%b/v1\x00%b" % (use.encode(), header)) for use in USES[profile]])


def overhead_bytes(profile: str, auth: str) -> int:
    """How much longer an envelope is than its (padded) payload."""
    strong = layers.SYNTHETIC_BYTES if profile == "flep3-strong" else 0
    return BODY_OFFSET + META_BYTES + strong + primitives.TAG_BYTES + AUTH_BYTES[auth]


def padded_bytes(picture: Picture, size: int) -> int:
    """Payload length after padding: compressed lengths are rounded up to 4 KiB, because they tell of the content."""
    return size if picture.blob is None else -(-size // BLOB_PAD_BYTES) * BLOB_PAD_BYTES


class FrameSealer:
    """Seals the frames of one epoch into buffers that are reused. `edgepriv.cipher.epochs.DeviceEpoch` owns one."""

    def __init__(self, ck: bytes, epoch: SignedEpoch, session: LinkSession, identity: Identity) -> None:
        self._ck, self._session, self._identity = ck, session, identity
        self._epoch, self._buffer = epoch, np.empty(0, np.uint8)
        self._alg = cast("primitives.Alg", epoch.record.alg)

    def seal(self, value: Picture | NDArray[Any] | bytes, *, counter: int, mid: bytes) -> memoryview:
        """Seal one frame; the result is a view into a buffer that the next call overwrites."""
        view, end = self.encrypt(value, counter=counter, mid=mid)
        view[end:] = self._authenticate(view, end)
        return view

    def encrypt(self, value: Picture | NDArray[Any] | bytes, *, counter: int, mid: bytes) -> tuple[memoryview, int]:
        """All of `seal` but the MAC or signature: the whole view, and the offset at which that begins."""
        picture = Picture.of(value)
        meta, payload = payload_of(picture)
        record = self._epoch.record
        header = wire.pack_header(
            profile=record.profile,
            alg=record.alg,
            auth=record.auth,
            counter=counter,
            mid=mid,
            epoch_digest=self._epoch.digest,
        )
        size = padded_bytes(picture, payload.size)
        view = self._view(size + overhead_bytes(record.profile, record.auth))
        end = len(view) - AUTH_BYTES[record.auth]
        keys = frame_keys(self._ck, mid, header, record.profile)
        view[:BODY_OFFSET] = header + keys.commitment
        plain = view[BODY_OFFSET : end - primitives.TAG_BYTES]
        plain[:META_BYTES] = encode_meta(meta)
        if size != payload.size:
            payload = np.concatenate([payload, np.zeros(size - payload.size, np.uint8)])
        apply_layers(payload, record.profile, self._alg, keys, np.frombuffer(plain[META_BYTES:], np.uint8))
        # The constant nonce is safe because keys.aead seals this frame only. Encrypts in place.
        primitives.backend().seal_into(
            self._alg, keys.aead, primitives.ZERO_NONCE, plain, view[:BODY_OFFSET], view[BODY_OFFSET:end]
        )
        return view, end

    def _view(self, size: int) -> memoryview:
        if size > wire.MAX_BYTES:
            raise RefusedError(f"an image of {size} bytes is over the limit of {wire.MAX_BYTES}")
        if self._buffer.size < size:
            self._buffer = np.empty(size, np.uint8)  # numpy asks for huge pages, a bytearray does not
        return self._buffer.data[:size]

    def _authenticate(self, view: memoryview, end: int) -> bytes:
        record = self._epoch.record
        if record.auth == AUTH_SIGNATURE:
            return self._identity.sign(wire.SIGNATURE_USE, view[:end])
        header, com = bytes(view[: wire.HEADER_BYTES]), bytes(view[wire.HEADER_BYTES : BODY_OFFSET])
        tag = bytes(view[end - primitives.TAG_BYTES : end])
        return wire.link_mac(self._alg, self._session, header, com, tag, view[:end])


def apply_layers(
    payload: NDArray[np.uint8], profile: str, alg: primitives.Alg, keys: FrameKeys, out: NDArray[np.uint8]
) -> None:
    """Layers 1 and 2 of a profile; ``out`` is as long as the payload, 32 bytes longer for ``flep3-strong``."""
    if profile == "aead":
        out[:] = payload
        return
    strong = profile == "flep3-strong"
    masked = out[layers.SYNTHETIC_BYTES :] if strong else out
    layers.permute_into(payload, keys.layer1, alg, masked)
    key = keys.layer2
    if strong:
        s = layers.synthetic(masked, keys.strong_prf, keys.strong_hash, alg)
        out[: layers.SYNTHETIC_BYTES] = np.frombuffer(s, np.uint8)
        key = layers.synthetic_key(keys.layer2, s)
    layers.mask_into(masked, key, alg, masked)


def remove_layers(
    data: NDArray[np.uint8], profile: str, alg: primitives.Alg, keys: FrameKeys, out: NDArray[np.uint8]
) -> None:
    """Inverse of `apply_layers`; ``data`` is overwritten. Raises AuthenticationError where s does not fit."""
    if profile == "aead":
        out[:] = data
        return
    strong = profile == "flep3-strong"
    masked = data[layers.SYNTHETIC_BYTES :] if strong else data
    s = data[: layers.SYNTHETIC_BYTES].tobytes() if strong else b""
    key = layers.synthetic_key(keys.layer2, s) if strong else keys.layer2
    layers.mask_into(masked, key, alg, masked)
    if strong and not primitives.equal(s, layers.synthetic(masked, keys.strong_prf, keys.strong_hash, alg)):
        raise primitives.not_authentic()
    layers.unpermute_into(masked, keys.layer1, alg, out)


class FrameOpener:
    """A recipient's end of one epoch: checks its record once, then opens its frames."""

    def __init__(
        self,
        record: bytes,
        recipient: Identity,
        trust: TrustList,
        *,
        allowed: Allowed | None = None,
        opened: OpenedFrames | None = None,
    ) -> None:
        """Verify the record and unwrap the content key.

        Raises:
            WireError, TrustError, AuthenticationError: as `read_epoch` and `unwrap_content`.
            TrustError: the record is outside what the owner's policy permits.
        """
        self.epoch = read_epoch(record, trust)
        self._device = trust.party(self.epoch.record.party, "device")
        permitted = allowed or Allowed.by_policy(trust.policy_for(self._device.name))
        if refusal := permitted.refusal(self.epoch.record):
            raise TrustError(f"the owner's policy for {self._device.name} does not permit {refusal}")
        self._ck = unwrap_content(self.epoch.record, recipient)
        self._opened, self._scratch = opened, np.empty(0, np.uint8)

    def open(self, raw: bytes | bytearray | memoryview) -> Picture:
        """Verify and open one envelope.

        Raises:
            WireError: not an envelope; ReplayError: opened before, or its counter was used by another frame.
            AuthenticationError: anything that does not verify, with one wording.
        """
        envelope = wire.parse(raw)
        wire.check_record(envelope, self.epoch)
        if envelope.auth == AUTH_SIGNATURE:
            self._device.verify(wire.SIGNATURE_USE, envelope.authenticated, envelope.tag)
        if self._opened is None:
            return self._open_authentic(envelope)
        digest = envelope.content_digest()
        outcome = self._opened.judge(self.epoch.digest, envelope.counter, digest)
        if outcome == "conflict" or (outcome == "duplicate" and not self._opened.again):
            raise ReplayError(f"this frame is a {outcome}: its counter was opened before")
        picture = self._open_authentic(envelope)
        self._opened.record(self.epoch.digest, envelope.counter, digest)  # only after success
        return picture

    def _open_authentic(self, envelope: Envelope) -> Picture:
        keys = frame_keys(self._ck, envelope.mid, envelope.header, envelope.profile)
        if not primitives.equal(keys.commitment, envelope.commitment):
            raise primitives.not_authentic()
        size = len(envelope.ciphertext) - primitives.TAG_BYTES
        if self._scratch.size < size:
            self._scratch = np.empty(size, np.uint8)
        plain = self._scratch[:size]
        primitives.backend().open_into(
            envelope.alg,
            keys.aead,
            primitives.ZERO_NONCE,
            envelope.ciphertext,
            envelope.header + envelope.commitment,
            plain.data,
        )
        return _unlayer(plain, envelope, keys)


def _unlayer(plain: NDArray[np.uint8], envelope: Envelope, keys: FrameKeys) -> Picture:
    start = META_BYTES + (layers.SYNTHETIC_BYTES if envelope.profile == "flep3-strong" else 0)
    if plain.size <= start:
        raise WireError("a sealed frame is empty")
    meta = decode_meta(plain[:META_BYTES].tobytes(), plain.size - start)
    payload = np.empty(plain.size - start, np.uint8)
    remove_layers(plain[META_BYTES:], envelope.profile, envelope.alg, keys, payload)
    if payload[meta.size :].any():
        raise WireError("the padding of a sealed frame is not zero")
    return picture_of(meta, payload)


def open_frame(
    envelope: bytes,
    record: bytes,
    recipient: Identity,
    trust: TrustList,
    *,
    allowed: Allowed | None = None,
    opened: OpenedFrames | None = None,
) -> Picture:
    """Open one frame with its epoch record; for many frames of an epoch keep a `FrameOpener`."""
    return FrameOpener(record, recipient, trust, allowed=allowed, opened=opened).open(envelope)
