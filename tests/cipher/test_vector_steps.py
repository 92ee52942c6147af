"""The kept steps: large payloads layer by layer, bad records, replays; product (both backends) and slow reference."""

import hashlib
import json
from pathlib import Path

import frame_reference as reference
import numpy as np
import pytest

from edgepriv import primitives
from edgepriv.cipher import cipher, layers
from edgepriv.cipher.cipher import FrameOpener, FrameSealer, open_frame
from edgepriv.cipher.opened import OpenedFrames
from edgepriv.cipher.picture import Picture
from edgepriv.errors import EdgeprivError
from edgepriv.keys import Identity
from edgepriv.wire import envelope as wire
from edgepriv.wire.epoch import read_epoch, unwrap_link
from edgepriv.wire.link import LinkSession
from edgepriv.wire.trust import TrustList

DOCUMENT = json.loads((Path(__file__).resolve().parent.parent / "vectors/cipher/steps.json").read_text())
FRAMES = DOCUMENT["frames"]
SLOW_UP_TO = 100_000  # bytes that the reference takes in a second
EACH_FRAME = pytest.mark.parametrize("frame", FRAMES, ids=lambda f: f["name"])
EACH_RECORD = pytest.mark.parametrize("case", DOCUMENT["records"], ids=lambda c: c["what"])
h = bytes.fromhex
PARTIES = [Identity(p["role"], p["name"], h(p["ed25519"]), h(p["x25519"])) for p in DOCUMENT["parties"]]
DEVICE, GATEWAY, ANN, BOB, OTHER = PARTIES
TRUST = TrustList(1, 0, 1 << 40, tuple(p.public for p in PARTIES))


def sha(data):
    return hashlib.sha256(data).hexdigest()


def payload_of(frame):
    """By the stated rule."""
    payload = hashlib.shake_256(b"edgepriv vector large %d" % frame["bytes"]).digest(frame["bytes"])
    assert sha(payload) == frame["payload_sha256"]
    return payload


def padded_of(frame):
    return payload_of(frame).ljust(frame["padded_bytes"], b"\0")


def picture_of(frame):
    payload = payload_of(frame)
    if not frame["shape"]:
        return Picture(blob=payload, codec=frame["codec"], taken=frame["taken"])
    pixels = np.frombuffer(payload, np.uint8).reshape(frame["shape"])
    return Picture(pixels=pixels, codec=frame["codec"], taken=frame["taken"])


def sealed(frame):
    epoch = read_epoch(h(frame["record"]), TRUST)
    session = LinkSession(h(frame["k_link"]), epoch.record.epoch_id, DEVICE.name, side="party")
    sealer = FrameSealer(h(frame["ck"]), epoch, session, DEVICE)
    return bytes(sealer.seal(picture_of(frame), counter=frame["counter"], mid=h(frame["mid"])))


def test_the_kept_steps_reach_every_kind_of_block():
    assert DOCUMENT["schema"] == "edgepriv.cipher-vector-steps/1"
    assert {frame["w"] for frame in FRAMES} == {64, 128, 8192}
    assert {(f["profile"], f["alg"]) for f in FRAMES} == {(p, a) for p in ("flep3", "flep3-strong") for a in wire.ALGS}
    assert {case["recipient"] for case in DOCUMENT["records"]} == {
        "ok",
        "AuthenticationError",
        "TrustError",
        "WireError",
    }
    assert {row["recipient"] for row in DOCUMENT["replay"]["arrivals"]} == {"ok", "ReplayError", "AuthenticationError"}


@EACH_FRAME
def test_the_product_takes_the_kept_steps(frame, backend):
    keys = cipher.frame_keys(h(frame["ck"]), h(frame["mid"]), h(frame["header"]), frame["profile"])
    for use, value in frame["keys"].items():
        assert getattr(keys, "commitment" if use == "commit" else use.replace("-", "_")).hex() == value, use
    x = np.frombuffer(padded_of(frame), np.uint8)
    assert layers.block_bytes(x.size) == frame["w"]
    order = layers.permutation(keys.layer1, frame["r"], frame["alg"])
    assert order[:8].tolist() == frame["p_first_8"]
    assert sha(order.astype(">u2")) == frame["p_sha256"]
    z = np.empty_like(x)
    layers.permute_into(x, keys.layer1, frame["alg"], z)
    assert sha(z) == frame["z_sha256"]
    if frame["profile"] == "flep3-strong":
        assert backend.mac(frame["alg"], keys.strong_hash, z.data).hex() == frame["mac1_of_z"]
        s = layers.synthetic(z, keys.strong_prf, keys.strong_hash, frame["alg"])
        assert (s.hex(), layers.synthetic_key(keys.layer2, s).hex()) == (frame["s"], frame["nk"])
    y = np.empty(x.size + (32 if frame["profile"] == "flep3-strong" else 0), np.uint8)
    cipher.apply_layers(x, frame["profile"], frame["alg"], keys, y)
    assert sha(y) == frame["y_sha256"]


@EACH_FRAME
def test_the_product_seals_and_opens_the_kept_envelope(frame, backend):
    raw = sealed(frame)
    assert (len(raw), sha(raw)) == (frame["envelope_bytes"], frame["envelope_sha256"])
    envelope = wire.parse(raw)
    assert envelope.header.hex() == frame["header"]
    assert envelope.aead_tag.hex() == frame["aead_tag"]
    assert envelope.tag.hex() == frame["mac_or_signature"]
    epoch = read_epoch(h(frame["record"]), TRUST)
    session = LinkSession(unwrap_link(epoch.record, GATEWAY), epoch.record.epoch_id, DEVICE.name, side="gateway")
    wire.verify_for_gateway(envelope, session, epoch, DEVICE.public)
    for recipient in (ANN, BOB)[: len(epoch.record.stanzas)]:
        opened = open_frame(raw, h(frame["record"]), recipient, TRUST)
        assert (opened.blob or opened.pixels.tobytes()) == payload_of(frame)


@EACH_FRAME
def test_the_slow_reference_takes_the_kept_steps(frame):
    short = "gcm" if frame["alg"] == primitives.AES_GCM else "chacha"
    ck, hdr, x = h(frame["ck"]), h(frame["header"]), padded_of(frame)
    for use, value in frame["keys"].items():
        assert reference.frame_key(ck, hdr, use).hex() == value, use
    width, order = reference.block_order(short, h(frame["keys"]["layer1"]), len(x))
    assert (width, len(order), order[:8]) == (frame["w"], frame["r"], frame["p_first_8"])
    assert sha(b"".join(j.to_bytes(2, "big") for j in order)) == frame["p_sha256"]
    z = b"".join(x[width * j : width * (j + 1)] for j in order) + x[width * len(order) :]
    assert sha(z) == frame["z_sha256"]
    if frame["bytes"] > SLOW_UP_TO:
        return
    if frame["profile"] == "flep3-strong":
        assert reference.mac1(short, h(frame["keys"]["strong-hash"]), z).hex() == frame["mac1_of_z"]
        s = reference.mac256(h(frame["keys"]["strong-prf"]), b"edgepriv/strong-s/v1" + h(frame["mac1_of_z"]))
        nk = reference.mac256(h(frame["keys"]["layer2"]), b"edgepriv/strong-nk/v1" + s)
        assert (s.hex(), nk.hex()) == (frame["s"], frame["nk"])
    assert sha(reference.layers(frame["profile"], short, ck, hdr, x)) == frame["y_sha256"]
    fields = reference.open_record(h(frame["record"]), DEVICE.public.ed25519)
    raw = reference.seal(
        hdr,
        ck,
        h(frame["description"]),
        x,
        k_link=h(frame["k_link"]),
        epoch_id=fields["epoch_id"],
        device_ed25519=DEVICE._ed25519,
    )
    assert sha(raw) == frame["envelope_sha256"]


def outcome(function):
    """Failure class or "ok"."""
    try:
        function()
    except EdgeprivError as error:
        return type(error).__name__
    return "ok"


@EACH_RECORD
def test_every_record_ends_in_its_failure_class(case, backend):
    raw = h(case["record"])
    assert outcome(lambda: unwrap_link(read_epoch(raw, TRUST).record, GATEWAY)) == case["gateway"]
    assert outcome(lambda: FrameOpener(raw, ANN, TRUST)) == case["recipient"]


@EACH_RECORD
def test_the_slow_reference_refuses_forged_records_too(case):
    """What is cryptography: signatures, stanzas, commitments. It leaves forms and names to the product."""
    if case["recipient"] == "WireError" or "not listed" in case["what"]:
        return
    raw = h(case["record"])

    def opens(unwrap, identity):
        try:
            unwrap(reference.open_record(raw, DEVICE.public.ed25519), identity._x25519)
        except reference.RefusedError:
            return False
        return True

    assert opens(reference.content_key, ANN) is (case["recipient"] == "ok")
    if case["what"] != "another gateway":
        assert opens(reference.link_key, GATEWAY) is (case["gateway"] == "ok")


def test_replays_end_in_their_failure_class(tmp_path, backend):
    record = h(DOCUMENT["replay"]["record"])
    epoch = read_epoch(record, TRUST)
    session = LinkSession(unwrap_link(epoch.record, GATEWAY), epoch.record.epoch_id, DEVICE.name, side="gateway")
    opener = FrameOpener(record, ANN, TRUST, opened=OpenedFrames(tmp_path / "opened.db"))
    stored = {}
    for row in DOCUMENT["replay"]["arrivals"]:
        raw = h(row["envelope"])
        envelope = wire.parse(raw)
        assert outcome(lambda raw=raw: opener.open(raw)) == row["recipient"]
        assert wire.judge(stored.get(envelope.counter), envelope.digest()) == row["outcome"]
        checked = outcome(lambda e=envelope: wire.verify_for_gateway(e, session, epoch, DEVICE.public))
        assert checked == ("ok" if row["recipient"] != "AuthenticationError" else "AuthenticationError")
        if checked == "ok" and row["outcome"] == "new":
            stored[envelope.counter] = envelope.digest()
