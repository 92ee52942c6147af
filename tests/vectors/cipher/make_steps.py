"""Makes steps.json: large payloads step by step, bad records, replays. Run once for a version, then kept for ever.

    python tests/vectors/cipher/make_steps.py

Large payloads are made by a stated rule and appear as digests, so that the file stays small.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import cbor2
import numpy as np
from make import ANN, BOB, DEVICE, GATEWAY, fixed, identity

from edgepriv import primitives
from edgepriv.cipher import cipher, layers
from edgepriv.cipher.cipher import FrameSealer
from edgepriv.cipher.epochs import DeviceEpoch
from edgepriv.cipher.picture import Picture, encode_meta, payload_of
from edgepriv.wire import envelope as wire
from edgepriv.wire import epoch as wire_epoch
from edgepriv.wire.link import LinkSession
from edgepriv.wire.trust import TrustList

HERE = Path(__file__).resolve().parent
OTHER, EVE = identity("device", "dev-other"), identity("recipient", "op-eve")
PARTIES = (DEVICE, GATEWAY, ANN, BOB, OTHER)
RULE = "the first n bytes of SHAKE-256('edgepriv vector large n'), n in decimal digits"


def payload(n):
    return hashlib.shake_256(b"edgepriv vector large %d" % n).digest(n)


def sha(data):
    return hashlib.sha256(data).hexdigest()


def pictures():
    """Name, picture, recipients; the last one is too long for the slow reference but for layer 1."""
    yield "gray8-200x200", Picture(pixels=np.frombuffer(payload(40_000), np.uint8).reshape(200, 200), codec="gray"), 1
    yield "blob-70001", Picture(blob=payload(70_001), codec="blob"), 2
    full = np.frombuffer(payload(1080 * 1920 * 3), np.uint8).reshape(1080, 1920, 3)
    yield "rgb8-1080x1920", Picture(pixels=full, codec="rgb", taken=1800000000.25), 1


def open_epoch(name, profile, alg, recipients):
    drawn = iter([fixed(name + " epoch", 16), fixed(name + " ck"), fixed(name + " link")])
    trust = TrustList(1, 0, 1 << 40, tuple(p.public for p in (DEVICE, GATEWAY, *(ANN, BOB)[:recipients])))
    return DeviceEpoch.open(
        DEVICE, trust, GATEWAY.name, seq=1, now=1_800_000_000, profile=profile, alg=alg, max_frames=16,
        random=lambda n: next(drawn),
    )  # fmt: skip


def sealer_of(name, epoch):
    session = LinkSession(fixed(name + " link"), epoch.signed.record.epoch_id, DEVICE.name, side="party")
    return FrameSealer(fixed(name + " ck"), epoch.signed, session, DEVICE)


def frame(what, picture, recipients, profile, alg):
    name = f"{profile} {alg} {what}"
    epoch = open_epoch(name, profile, alg, recipients)
    raw = bytes(sealer_of(name, epoch).seal(picture, counter=5, mid=fixed(name + " mid")))
    envelope = wire.parse(raw)
    meta, flat = payload_of(picture)
    padded = np.zeros(cipher.padded_bytes(picture, flat.size), np.uint8)
    padded[: flat.size] = flat
    keys = cipher.frame_keys(fixed(name + " ck"), envelope.mid, envelope.header, profile)
    said = {"name": name, "profile": profile, "alg": alg, "bytes": flat.size, "padded_bytes": padded.size}
    said |= {"shape": list(meta.shape), "codec": meta.codec, "taken": meta.taken, "payload_sha256": sha(flat)}
    said |= {"ck": fixed(name + " ck").hex(), "k_link": fixed(name + " link").hex(), "counter": 5}
    said |= {"mid": envelope.mid.hex(), "record": epoch.signed.raw.hex(), "header": envelope.header.hex()}
    said["keys"] = {
        use: getattr(keys, "commitment" if use == "commit" else use.replace("-", "_")).hex()
        for use in cipher.USES[profile]
    }
    return (
        said
        | steps(padded, profile, alg, keys)
        | {
            "description": encode_meta(meta).hex(),
            "aead_tag": envelope.aead_tag.hex(),
            "mac_or_signature": envelope.tag.hex(),
            "envelope_bytes": len(raw),
            "envelope_sha256": sha(raw),
        }
    )


def steps(padded, profile, alg, keys):
    """Layers 1 and 2 one by one."""
    width = layers.block_bytes(padded.size)
    order = layers.permutation(keys.layer1, padded.size // width, alg)
    z = np.empty_like(padded)
    layers.permute_into(padded, keys.layer1, alg, z)
    found = {"w": width, "r": len(order), "p_first_8": order[:8].tolist(), "p_sha256": sha(order.astype(">u2"))}
    found["z_sha256"] = sha(z)
    if profile == "flep3-strong":
        s = layers.synthetic(z, keys.strong_prf, keys.strong_hash, alg)
        found["mac1_of_z"] = primitives.backend().mac(alg, keys.strong_hash, z.data).hex()
        found |= {"s": s.hex(), "nk": layers.synthetic_key(keys.layer2, s).hex()}
    y = np.empty(padded.size + (32 if profile == "flep3-strong" else 0), np.uint8)
    cipher.apply_layers(padded, profile, alg, keys, y)
    return found | {"y_sha256": sha(y)}


def records():
    """Records with the class in which each ends at the gateway (record, link key) and at a recipient, ann."""
    name = "records"
    epoch = open_epoch(name, "flep3", primitives.AES_GCM, 1)
    record, raw = epoch.signed.record, epoch.signed.raw
    body = cbor2.loads(cbor2.loads(raw)[0])
    refused = "AuthenticationError"

    def resigned(by=DEVICE, **changes):
        return wire_epoch.sign_epoch(dataclasses.replace(record, **changes), by).raw

    def rebuilt(fields, *, canonical=True):
        packed = cbor2.dumps(fields, canonical=canonical)
        return cbor2.dumps([packed, DEVICE.sign(wire_epoch.USE, packed)], canonical=True)

    stanza = record.stanzas[0]
    to_eve = wire_epoch.wrap_stanza(EVE.public, fixed(name + " ck"), record.party, record.epoch_id)
    other_key = wire_epoch.wrap_stanza(ANN.public, bytes(32), record.party, record.epoch_id)
    bent = stanza[:-1] + bytes([stanza[-1] ^ 1])
    link = record.link[:-1] + bytes([record.link[-1] ^ 1])
    backwards = dict(reversed(list(cbor2.loads(cbor2.dumps(body, canonical=True)).items())))
    yield "as signed", raw, "ok", "ok"
    yield "last bit of the signature", raw[:-1] + bytes([raw[-1] ^ 1]), refused, refused
    yield "signed by another listed device", resigned(by=OTHER), refused, refused
    yield "a party that is not listed", resigned(party="dev-nobody"), "TrustError", "TrustError"
    yield "commitment to another key", resigned(commitment=bytes(32)), "ok", refused
    yield "stanza with one bit changed", resigned(stanzas=(bent,)), "ok", refused
    yield "stanza with another key than committed to", resigned(stanzas=(other_key,)), "ok", refused
    yield "stanza for another recipient only", resigned(stanzas=(to_eve,)), "ok", "TrustError"
    yield "stanza that is cut", resigned(stanzas=(stanza[:-1],)), "WireError", "WireError"
    yield "link key with one bit changed", resigned(link=link), refused, "ok"
    yield "another gateway", resigned(gateway="gateway-other"), refused, "ok"
    yield "version 2", resigned(version=2), "WireError", "WireError"
    yield "version 0", resigned(version=0), "WireError", "WireError"
    yield "epoch id of 15 bytes", resigned(epoch_id=record.epoch_id[1:]), "WireError", "WireError"
    yield "a field too many", rebuilt({**body, "note": 1}), "WireError", "WireError"
    yield "a field missing", rebuilt({k: v for k, v in body.items() if k != "auth"}), "WireError", "WireError"
    yield "a field of another type", rebuilt({**body, "seq": "1"}), "WireError", "WireError"
    yield "keys in another order", rebuilt(backwards, canonical=False), "WireError", "WireError"
    yield "cut by one byte", raw[:-1], "WireError", "WireError"
    yield "one byte too many", raw + b"\x00", "WireError", "WireError"


def replay():
    """Frames of one epoch in an order of arrival, with what each is to a receiver that remembers."""
    name = "replay"
    epoch = open_epoch(name, "flep3", primitives.AES_GCM, 1)
    sealer = sealer_of(name, epoch)
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)

    def sealed(counter, which):
        return bytes(sealer.seal(image, counter=counter, mid=fixed(f"{name} mid {which}")))

    a, b, c, d = sealed(3, "a"), sealed(4, "b"), sealed(3, "c"), sealed(5, "d")
    forged = d[:-33] + bytes([d[-33] ^ 1]) + d[-32:]
    arrivals = [
        (b, "new", "ok"), (a, "new", "ok"), (b, "duplicate", "ReplayError"), (a, "duplicate", "ReplayError"),
        (c, "conflict", "ReplayError"), (forged, "new", "AuthenticationError"), (d, "new", "ok"),
        (d, "duplicate", "ReplayError"),
    ]  # fmt: skip
    rows = [{"envelope": raw.hex(), "outcome": outcome, "recipient": found} for raw, outcome, found in arrivals]
    return {"record": epoch.signed.raw.hex(), "arrivals": rows}


def main():
    wanted = [("flep3", a) for a in wire.ALGS] + [("flep3-strong", a) for a in wire.ALGS]
    document = {
        "schema": "edgepriv.cipher-vector-steps/1",
        "payload_rule": RULE,
        "p_sha256": "of p_0, p_1, ... as 16-bit big-endian integers",
        "parties": [
            {"role": p.public.role, "name": p.name, "ed25519": p._ed25519.hex(), "x25519": p._x25519.hex()}
            for p in PARTIES
        ],
        "frames": [frame(*each, profile, alg) for profile, alg in wanted for each in pictures()],
        "records": [
            {"what": what, "record": raw.hex(), "gateway": gateway, "recipient": recipient}
            for what, raw, gateway, recipient in records()
        ],
        "replay": replay(),
    }
    (HERE / "steps.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
