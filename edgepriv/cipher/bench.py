"""What a sealed frame costs, beside the AEAD alone in the same run: milliseconds, ratios, memory.

Method: all measured calls take turns, round after round, eight times in a row each, so that a change of the machine's
load meets all of them and each finds its own memory in the caches; of each the fastest run counts, in CPU time, because
all are single-threaded and the turns of other processes are not theirs. ``seal_ms`` and ``open_ms`` are whole frames as
the product makes them, `DeviceEpoch.seal_view` and `FrameOpener.open`; INCLUDES says what is in each column. Memory is
what Python and numpy allocate beyond the image and the result.
"""

from __future__ import annotations

import time
import tracemalloc
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import primitives
from edgepriv.cipher import layers
from edgepriv.cipher.cipher import FrameOpener, FrameSealer, frame_keys
from edgepriv.cipher.epochs import DeviceEpoch
from edgepriv.errors import MissingDependencyError
from edgepriv.keys import Identity
from edgepriv.wire import envelope as wire
from edgepriv.wire.epoch import AUTH_SIGNATURE, SignedEpoch, unwrap_link
from edgepriv.wire.link import LinkSession
from edgepriv.wire.trust import TrustList

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

SCHEMA = "edgepriv.cipher-bench/1"
SIZES = {"VGA": (480, 640, 3), "1080p": (1080, 1920, 3), "4K": (2160, 3840, 3)}
ROUNDS = {"VGA": 20, "1080p": 15, "4K": 4}
IN_A_ROW = 8
_SEAL = (
    "DeviceEpoch.seal_view: checks of the epoch, random id, keys by HKDF, header, commitment, description, key stream, "
)
INCLUDES = {
    "aead_ms": "the fastest AEAD of both libraries and both algorithms: bare bytes into a reused buffer",
    "layers_ms": "layers 1 and 2 of flep3 on memory of their own, their key streams included",
    "mac_ms": "what the gateway does with a frame: check the record's digest and fields, and its MAC",
    "seal_ms": f"{_SEAL}both layers, AEAD; the MAC's place is filled with zeros",
    "seal_mac_ms": "seal_ms and the MAC to the gateway: what a device with one recipient does",
    "seal_signature_ms": "seal_ms and an Ed25519 signature: what a device with several recipients does",
    "open_ms": "FrameOpener.open: parse, fields of the record, keys, commitment, AEAD, layers; the picture is new",
    "copy_ms": "one copy of the frame into reused memory",
}


class WithoutMac(FrameSealer):
    """The product's sealer, but for the MAC: zeros stand in its place, so that nothing else differs."""

    def _authenticate(self, view: memoryview, end: int) -> bytes:
        return bytes(len(view) - end)


class EpochWithoutMac(DeviceEpoch):
    """The product's epoch with that sealer."""

    def __init__(
        self, identity: Identity, signed: SignedEpoch, session: LinkSession, ck: bytes, trust: TrustList
    ) -> None:
        super().__init__(identity, signed, session, ck, trust)
        self._sealer = WithoutMac(ck, signed, session, identity)


class Stand:
    """A device, its gateway and two recipients, with an epoch for each way to seal."""

    def __init__(self, alg: primitives.Alg | None) -> None:
        names = (("device", "bench"), ("gateway", "bench"), ("recipient", "one"), ("recipient", "two"))
        self.device, self.gateway, self.one, self.two = (Identity.new(role, name) for role, name in names)
        self.alg = alg

    def epoch(self, profile: str, *, recipients: int = 1, mac: bool = True) -> tuple[DeviceEpoch, FrameOpener]:
        """An open epoch as a device has it, and the recipient's opener; ``mac``: False leaves the gateway's MAC out."""
        parties = (self.device, self.gateway, *(self.one, self.two)[:recipients])
        trust = TrustList(1, 0, 1 << 40, tuple(p.public for p in parties))
        kind = DeviceEpoch if mac else EpochWithoutMac
        epoch = kind.open(
            self.device, trust, self.gateway.name, seq=0, now=0.0, profile=profile, alg=self.alg, max_frames=1 << 16
        )
        return epoch, FrameOpener(epoch.signed.raw, self.one, trust)

    def gateway_end(self, epoch: DeviceEpoch) -> LinkSession:
        """The gateway's end of an epoch's link."""
        record = epoch.signed.record
        return LinkSession(unwrap_link(record, self.gateway), record.epoch_id, record.party, side="gateway")


def run(sizes: list[str], *, alg: primitives.Alg | None = None, rounds: int = 0) -> dict[str, Any]:
    """Measure the named sizes and return the JSON document (see SCHEMA)."""
    stand = Stand(alg)
    frames = [measure(name, stand, rounds or ROUNDS[name]) for name in sizes]
    from edgepriv.primitives import cpu

    return {
        "schema": SCHEMA,
        "backend": primitives.backend().name,
        "alg": alg or cpu.choose_alg(),
        "cpu": sorted(cpu.flags()),
        "includes": INCLUDES,
        "frames": frames,
    }


def measure(name: str, stand: Stand, rounds: int) -> dict[str, Any]:
    """Measure one frame size."""
    image = np.random.default_rng(7).integers(0, 256, SIZES[name], dtype=np.uint8)
    calls = {**_bare_calls(image), **_layer_calls(image, stand), **_frame_calls(image, stand)}
    times = _take_turns(calls, rounds)
    return _summary(name, image, times, _peak_extra_bytes(image, stand))


def _take_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Best CPU time of each call in milliseconds; every call has its turn in every round."""
    best = dict.fromkeys(calls, 1 << 62)
    for _ in range(rounds):
        for key, call in calls.items():
            for _ in range(IN_A_ROW):
                start = time.process_time_ns()
                call()
                best[key] = min(best[key], time.process_time_ns() - start)
    return {key: nanoseconds / 1e6 for key, nanoseconds in best.items()}


def _bare_calls(image: NDArray[np.uint8]) -> dict[str, Callable[[], object]]:
    """AEAD alone in both libraries and algorithms, and a plain copy, all into reused memory."""
    flat = image.reshape(-1)
    out = np.empty(flat.size + primitives.TAG_BYTES, np.uint8).data
    copy = np.empty_like(flat)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: np.copyto(copy, flat)}
    for backend in _backends():
        for alg in wire.ALGS:
            calls[f"aead {backend.name} {alg}"] = partial(
                backend.seal_into, alg, b"k" * 32, primitives.ZERO_NONCE, flat.data, b"", out
            )
    return calls


def _backends() -> list[primitives.Backend]:
    found = [primitives.backend("portable")]
    try:
        found.append(primitives.backend("openssl"))
    except MissingDependencyError:
        return found
    return found


def _layer_calls(image: NDArray[np.uint8], stand: Stand) -> dict[str, Callable[[], object]]:
    """The layers one by one, on memory of their own."""
    flat = image.reshape(-1)
    first, second = np.empty_like(flat), np.empty_like(flat)
    alg = stand.epoch("flep3")[0].signed.record.alg
    a: primitives.Alg = primitives.AES_GCM if alg == primitives.AES_GCM else primitives.CHACHA
    key, header = b"k" * 32, bytes(wire.HEADER_BYTES)
    return {
        "keys": lambda: frame_keys(key, key, header, "flep3"),
        "layer1": lambda: layers.permute_into(flat, key, a, first),
        "layer1 inverse": lambda: layers.unpermute_into(flat, key, a, first),
        "layer2": lambda: layers.mask_into(second, key, a, second),
        "layer2 strong": lambda: layers.synthetic(flat, key, key, a),
        "layer3": lambda: primitives.backend().seal_into(
            a, key, primitives.ZERO_NONCE, second.data[:-16], b"", second.data
        ),
    }


def _frame_calls(image: NDArray[np.uint8], stand: Stand) -> dict[str, Callable[[], object]]:
    """Whole frames: seal without and with the MAC, open, and what the gateway does."""
    calls: dict[str, Callable[[], object]] = {}
    for profile in wire.PROFILES:
        bare, _ = stand.epoch(profile, mac=False)
        epoch, opener = stand.epoch(profile)
        raw = epoch.seal(image)
        calls[f"seal {profile}"] = partial(bare.seal_view, image)
        calls[f"seal+mac {profile}"] = partial(epoch.seal_view, image)
        calls[f"open {profile}"] = partial(opener.open, raw)
        if profile == "flep3":
            far = stand.gateway_end(epoch)
            calls["mac"] = partial(wire.verify_for_gateway, wire.parse(raw), far, epoch.signed, stand.device.public)
    signing, opener2 = stand.epoch("flep3", recipients=2)
    signed = signing.seal(image)
    calls["seal+signature flep3"] = partial(signing.seal_view, image)
    calls["open+signature flep3"] = partial(opener2.open, signed)
    view = memoryview(signed)[: -wire.AUTH_BYTES[AUTH_SIGNATURE]]
    calls["signature"] = partial(stand.device.sign, wire.SIGNATURE_USE, view)
    return calls


def _peak_extra_bytes(image: NDArray[np.uint8], stand: Stand) -> int:
    """The larger of sealing and opening from cold: peak of what is allocated, less the result itself."""
    epoch, opener = stand.epoch("flep3")
    tracemalloc.start()
    try:
        sealed = epoch.seal_view(image)
        seal_extra = tracemalloc.get_traced_memory()[1] - len(sealed)
        raw = bytes(sealed)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        opened = opener.open(raw)
        assert opened.pixels is not None  # noqa: S101 - it was sealed from pixels; tells the type checker
        open_extra = tracemalloc.get_traced_memory()[1] - before - opened.pixels.nbytes
    finally:
        tracemalloc.stop()
    return max(seal_extra, open_extra)


def _summary(name: str, image: NDArray[np.uint8], times: dict[str, float], extra: int) -> dict[str, Any]:
    aead = {key[5:]: ms for key, ms in times.items() if key.startswith("aead ")}
    bare = min(aead.values())
    profiles = {
        profile: {
            "seal_ms": times[f"seal {profile}"],
            "seal_mac_ms": times[f"seal+mac {profile}"],
            "open_ms": times[f"open {profile}"],
            "seal_ratio": times[f"seal {profile}"] / bare,
            "seal_mac_ratio": times[f"seal+mac {profile}"] / bare,
            "open_ratio": times[f"open {profile}"] / bare,
        }
        for profile in wire.PROFILES
    }
    return {
        "name": name,
        "bytes": image.size,
        "aead_ms": bare,
        "aead_by_library_ms": aead,
        "copy_ms": times["copy"],
        "layers_ms": times["layer1"] + times["layer2"],
        "layer_ms": {
            key: times[key] for key in ("keys", "layer1", "layer1 inverse", "layer2", "layer2 strong", "layer3")
        },
        "mac_ms": times["mac"],
        "signature_ms": times["signature"],
        **profiles["flep3"],
        "seal_mb_s": image.size / times["seal flep3"] / 1e3,
        "open_mb_s": image.size / times["open flep3"] / 1e3,
        "seal_signature_ms": times["seal+signature flep3"],
        "open_signature_ms": times["open+signature flep3"],
        "profiles": profiles,
        "peak_extra_bytes": extra,
        "peak_extra_frames": extra / image.size,
    }
