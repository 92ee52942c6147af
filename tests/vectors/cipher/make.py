"""Makes the vectors of this folder; run once for a version, then the files are kept for ever.

    python tests/vectors/cipher/make.py

HPKE stanzas are randomised, so a second run gives other records; everything after the record is determined by it.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from edgepriv.cipher.cipher import FrameSealer
from edgepriv.cipher.epochs import DeviceEpoch
from edgepriv.cipher.picture import Picture
from edgepriv.keys import Identity
from edgepriv.wire.envelope import ALGS, PROFILES
from edgepriv.wire.link import LinkSession
from edgepriv.wire.trust import TrustList

HERE = Path(__file__).resolve().parent


def fixed(label, n=32):
    return hashlib.shake_256(b"edgepriv vector " + label.encode()).digest(n)


def identity(role, name):
    return Identity(role, name, fixed(name + " ed25519"), fixed(name + " x25519"))


DEVICE, GATEWAY = identity("device", "dev-vector"), identity("gateway", "gateway-vector")
ANN, BOB = identity("recipient", "op-ann"), identity("recipient", "op-bob")


def pictures():
    ramp = np.frombuffer(fixed("pixels", 6000), np.uint8)
    yield "gray8-1x1", Picture(pixels=ramp[:1].reshape(1, 1), codec="gray")
    yield "rgb8-9x7", Picture(pixels=ramp[:189].reshape(9, 7, 3), codec="rgb", taken=1800000000.25)
    yield "rgba8-16x16", Picture(pixels=ramp[:1024].reshape(16, 16, 4), codec="rgba")
    yield "bayer16-10x12", Picture(pixels=ramp[:240].view("<u2").reshape(10, 12), codec="bayer-rggb")
    yield "float32-5x6", Picture(pixels=(ramp[:30].astype("<f4") / 7).reshape(5, 6), codec="raw")
    yield "jpeg-700", Picture(blob=b"\xff\xd8\xff" + bytes(ramp[:697]), codec="jpeg")


def cases(size, auth):
    """Edits of the envelope with the expected class at the gateway and at the recipient."""
    refused, end = "AuthenticationError", size - (64 if auth == "ed25519" else 16)
    outer = refused if auth == "ed25519" else "ok"
    yield {"what": "as sealed", "gateway": "ok", "recipient": "ok"}
    yield {"what": "magic", "xor": [[0, 1]], "gateway": "WireError", "recipient": "WireError"}
    yield {"what": "version", "xor": [[4, 3]], "gateway": "WireError", "recipient": "WireError"}
    yield {"what": "unknown profile", "xor": [[5, 128]], "gateway": "WireError", "recipient": "WireError"}
    yield {"what": "unknown alg", "xor": [[6, 128]], "gateway": "WireError", "recipient": "WireError"}
    yield {"what": "other known alg", "xor": [[6, 3]], "gateway": refused, "recipient": refused}
    yield {"what": "counter of another frame", "xor": [[15, 1]], "gateway": refused, "recipient": refused}
    yield {"what": "counter beyond the epoch", "xor": [[14, 255]], "gateway": "WireError", "recipient": "WireError"}
    yield {"what": "message id", "xor": [[16, 1]], "gateway": refused, "recipient": refused}
    yield {"what": "record digest", "xor": [[79, 128]], "gateway": refused, "recipient": refused}
    yield {"what": "commitment", "xor": [[80, 1]], "gateway": refused, "recipient": refused}
    yield {"what": "description", "xor": [[112, 1]], "gateway": refused, "recipient": refused}
    yield {"what": "last byte of the payload", "xor": [[end - 17, 1]], "gateway": refused, "recipient": refused}
    yield {"what": "AEAD tag", "xor": [[end - 1, 1]], "gateway": refused, "recipient": refused}
    yield {"what": "MAC or signature", "xor": [[size - 1, 1]], "gateway": refused, "recipient": outer}
    yield {"what": "cut by one byte", "cut": size - 1, "gateway": refused, "recipient": refused}
    yield {"what": "header only", "cut": 112, "gateway": "WireError", "recipient": "WireError"}
    yield {"what": "for another recipient", "recipient_key": "gateway", "gateway": "ok", "recipient": "TrustError"}


def vector(name, picture, profile, alg, recipients):
    parties = (DEVICE, GATEWAY, *recipients)
    trust = TrustList(1, 0, 1 << 40, tuple(p.public for p in parties))
    keys = iter([fixed(name + " epoch", 16), fixed(name + " ck"), fixed(name + " link")])
    epoch = DeviceEpoch.open(
        DEVICE,
        trust,
        GATEWAY.name,
        seq=1,
        now=1_800_000_000,
        profile=profile,
        alg=alg,
        max_frames=16,
        random=lambda n: next(keys),
    )
    k_link, ck = fixed(name + " link"), fixed(name + " ck")
    session = LinkSession(k_link, epoch.signed.record.epoch_id, DEVICE.name, side="party")
    mid = fixed(name + " mid")
    raw = bytes(FrameSealer(ck, epoch.signed, session, DEVICE).seal(picture, counter=3, mid=mid))
    payload = picture.blob if picture.blob is not None else picture.pixels.tobytes()
    return {
        "schema": "edgepriv.cipher-vector/1",
        "name": name,
        "parties": [
            {"role": p.public.role, "name": p.name, "ed25519": p._ed25519.hex(), "x25519": p._x25519.hex()}
            for p in parties
        ],
        "ck": ck.hex(),
        "k_link": k_link.hex(),
        "mid": mid.hex(),
        "counter": 3,
        "record": epoch.signed.raw.hex(),
        "picture": {
            "codec": picture.codec,
            "dtype": "" if picture.pixels is None else picture.pixels.dtype.name,
            "shape": [] if picture.pixels is None else list(picture.pixels.shape),
            "taken": picture.taken,
            "payload": payload.hex(),
        },
        "envelope": raw.hex(),
        "cases": list(cases(len(raw), epoch.signed.record.auth)),
    }


def main():
    for profile in PROFILES:
        for alg in ALGS:
            vectors = []
            for i, (name, picture) in enumerate(pictures()):
                recipients = (ANN, BOB) if i % 2 else (ANN,)
                vectors.append(vector(f"{profile} {alg} {name}", picture, profile, alg, recipients))
            (HERE / f"{profile}-{alg}.json").write_text(json.dumps(vectors, indent=1) + "\n")


if __name__ == "__main__":
    main()
