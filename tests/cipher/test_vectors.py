"""The kept vectors: both backends and the slow reference give the same bytes and the same failure classes."""

import hashlib
import json
from pathlib import Path

import frame_reference as reference
import numpy as np
import pytest

from edgepriv import primitives
from edgepriv.cipher import cipher, layers
from edgepriv.cipher.cipher import FrameSealer, open_frame
from edgepriv.cipher.picture import Picture, encode_meta, payload_of
from edgepriv.errors import EdgeprivError
from edgepriv.keys import Identity
from edgepriv.wire import envelope as wire
from edgepriv.wire.epoch import read_epoch, unwrap_content, unwrap_link
from edgepriv.wire.link import LinkSession
from edgepriv.wire.trust import TrustList

FILES = sorted((Path(__file__).resolve().parent.parent / "vectors" / "cipher").glob("*-*.json"))
VECTORS = [vector for path in FILES for vector in json.loads(path.read_text())]
EACH = pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])


def parties_of(vector):
    h = bytes.fromhex
    found = [Identity(p["role"], p["name"], h(p["ed25519"]), h(p["x25519"])) for p in vector["parties"]]
    trust = TrustList(1, 0, 1 << 40, tuple(p.public for p in found))
    return found[0], found[1], found[2:], trust


def picture_of(vector):
    said, payload = vector["picture"], bytes.fromhex(vector["picture"]["payload"])
    if not said["shape"]:
        return Picture(blob=payload, codec=said["codec"], taken=said["taken"])
    pixels = np.frombuffer(payload, np.dtype(said["dtype"]).newbyteorder("<")).reshape(said["shape"])
    return Picture(pixels=pixels, codec=said["codec"], taken=said["taken"])


def edited(vector, case):
    raw = bytearray.fromhex(vector["envelope"])
    for offset, value in case.get("xor", []):
        raw[offset] ^= value
    return bytes(raw[: case.get("cut", len(raw))])


def outcome(function):
    """Failure class or "ok", and what was returned."""
    try:
        return "ok", function()
    except EdgeprivError as error:
        return type(error).__name__, None


def test_there_is_a_file_for_every_profile_and_algorithm():
    assert {path.stem for path in FILES} == {f"{p}-{a}" for p in wire.PROFILES for a in wire.ALGS}
    assert len(VECTORS) == 36


@EACH
def test_sealing_gives_the_kept_bytes(vector, backend):
    device, gateway, _, trust = parties_of(vector)
    epoch = read_epoch(bytes.fromhex(vector["record"]), trust)
    k_link = unwrap_link(epoch.record, gateway)
    assert k_link.hex() == vector["k_link"]
    session = LinkSession(k_link, epoch.record.epoch_id, device.name, side="party")
    sealer = FrameSealer(bytes.fromhex(vector["ck"]), epoch, session, device)
    raw = sealer.seal(picture_of(vector), counter=vector["counter"], mid=bytes.fromhex(vector["mid"]))
    assert raw.hex() == vector["envelope"]


@EACH
def test_every_case_ends_in_its_failure_class(vector, backend):
    device, gateway, recipients, trust = parties_of(vector)
    record = bytes.fromhex(vector["record"])
    epoch = read_epoch(record, trust)
    session = LinkSession(unwrap_link(epoch.record, gateway), epoch.record.epoch_id, device.name, side="gateway")
    for case in vector["cases"]:
        raw = edited(vector, case)
        opened = []
        for recipient in [gateway] if case.get("recipient_key") == "gateway" else recipients:
            found, picture = outcome(lambda r=recipient, raw=raw: open_frame(raw, record, r, trust))
            assert found == case["recipient"], case["what"]
            opened += [picture] if picture else []
        found, _ = outcome(lambda raw=raw: wire.verify_for_gateway(wire.parse(raw), session, epoch, device.public))
        assert found == case["gateway"], case["what"]
        for picture in opened:
            payload = picture.blob if picture.blob is not None else picture.pixels.tobytes()
            assert payload.hex() == vector["picture"]["payload"]
            assert (picture.codec, picture.taken) == (vector["picture"]["codec"], vector["picture"]["taken"])


@EACH
def test_the_slow_reference_agrees(vector):
    device, gateway, recipients, _ = parties_of(vector)
    record, raw = bytes.fromhex(vector["record"]), bytes.fromhex(vector["envelope"])
    for recipient in recipients:
        description, payload = reference.open_envelope(raw, record, recipient._x25519, device.public.ed25519)
        assert payload.hex() == vector["picture"]["payload"]
    fields = reference.open_record(record, device.public.ed25519)
    assert reference.content_key(fields, recipients[0]._x25519).hex() == vector["ck"]
    k_link = reference.link_key(fields, gateway._x25519)
    assert k_link.hex() == vector["k_link"]
    size = len(payload) if vector["picture"]["shape"] else -(-len(payload) // 4096) * 4096
    again = reference.seal(
        raw[:80],
        bytes.fromhex(vector["ck"]),
        description,
        payload + bytes(size - len(payload)),
        k_link=k_link,
        epoch_id=fields["epoch_id"],
        device_ed25519=device._ed25519,
    )
    assert again == raw
    with pytest.raises(reference.RefusedError):
        reference.open_envelope(raw[:-40] + b"\x00" + raw[-39:], record, recipients[0]._x25519, device.public.ed25519)


@pytest.mark.parametrize("alg", list(wire.ALGS))
@pytest.mark.parametrize("profile", ["flep3", "flep3-strong"])
@pytest.mark.parametrize("size", [15, 16, 16399, 16400, 33000])
def test_layers_equal_the_reference_across_block_sizes(profile, alg, size, backend):
    payload = np.frombuffer(hashlib.shake_256(b"x").digest(size), np.uint8)
    ck, hdr = hashlib.sha256(b"ck").digest(), hashlib.shake_256(b"hdr").digest(80)
    out = np.empty(size + (32 if profile == "flep3-strong" else 0), np.uint8)
    keys = cipher.frame_keys(ck, hdr[16:48], hdr, profile)
    cipher.apply_layers(payload, profile, alg, keys, out)
    short = "gcm" if alg == primitives.AES_GCM else "chacha"
    assert out.tobytes() == reference.layers(profile, short, ck, hdr, payload.tobytes())
    back = np.empty_like(payload)
    cipher.remove_layers(out.copy(), profile, alg, keys, back)
    assert np.array_equal(back, payload)


@pytest.mark.parametrize("size", [1, 2, 15, 17, 255, 1024, 16383, 16384, 100_003, 6_220_800])
def test_the_permutation_is_a_bijection_of_at_most_1024_blocks(size):
    width = layers.block_bytes(size)
    blocks = size // width
    assert blocks <= 1024
    assert width == 16 or size // (width // 2) > 1024
    order = layers.permutation(bytes(32), blocks, primitives.AES_GCM)
    assert sorted(order.tolist()) == list(range(blocks))


def test_the_reference_opens_the_hpke_vector_of_rfc_9180():
    """Appendix A.1.1 (AES-128-GCM), first message: the reference's own HPKE is right."""
    h = bytes.fromhex
    plain = reference.hpke_open(
        h("4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8"),
        h("37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431")
        + h("f938558b5d72f1a23810b4be2ab4f84331acc02fc97babc53a52ae8218a355a96d8770ac83d07bea87e13c512a"),
        h("4f6465206f6e2061204772656369616e2055726e"),
        aad=h("436f756e742d30"),
        aead_id=1,
        key_bytes=16,
    )
    assert plain == b"Beauty is truth, truth beauty"


@pytest.mark.parametrize("chosen", [(a, b) for a in ("openssl", "portable") for b in ("openssl", "portable")])
@pytest.mark.parametrize("alg", list(wire.ALGS))
def test_records_and_frames_cross_between_backends(chosen, alg, monkeypatch):
    from edgepriv.cipher.epochs import DeviceEpoch

    device, gateway = Identity.new("device", "a"), Identity.new("gateway", "g")
    recipients = [Identity.new("recipient", "r"), Identity.new("recipient", "s")]
    trust = TrustList(1, 0, 1 << 40, tuple(p.public for p in (device, gateway, *recipients)))
    monkeypatch.setattr(primitives, "_default_backend", lambda: primitives.backend(chosen[0]))
    epoch = DeviceEpoch.open(device, trust, gateway.name, seq=0, now=0, alg=alg)
    image = np.arange(300, dtype=np.uint8 if alg == primitives.AES_GCM else np.uint16).reshape(10, 30) % 251
    raw = epoch.seal(image)
    monkeypatch.setattr(primitives, "_default_backend", lambda: primitives.backend(chosen[1]))
    assert np.array_equal(open_frame(raw, epoch.signed.raw, recipients[1], trust).pixels, image)
    assert unwrap_content(epoch.signed.record, recipients[0]) == unwrap_content(epoch.signed.record, recipients[1])


def test_the_description_is_64_bytes_for_the_largest_picture():
    meta, _ = payload_of(Picture(pixels=np.zeros((1, 1, 16), np.float32), codec="raw", taken=1e12))
    assert len(encode_meta(meta)) == wire.META_BYTES == 64
