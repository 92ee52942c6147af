"""Sealing and opening: every kind of image comes back byte-identical, for every profile and algorithm."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.cipher.cipher import FrameOpener, open_frame
from edgepriv.cipher.epochs import DeviceEpoch
from edgepriv.cipher.picture import Picture
from edgepriv.errors import ConfigError, DataError, TrustError
from edgepriv.keys import Identity
from edgepriv.wire import envelope as wire
from edgepriv.wire.epoch import unwrap_link
from edgepriv.wire.link import LinkSession
from edgepriv.wire.trust import TrustList

NOW = 1_800_000_000.0
DEVICE, GATEWAY = Identity.new("device", "cam1"), Identity.new("gateway", "one")
RECIPIENTS = [Identity.new("recipient", "ann"), Identity.new("recipient", "bob")]
CASES = [(p, a) for p in wire.PROFILES for a in wire.ALGS]


def trust_for(recipients=1, policy=None):
    parties = (DEVICE, GATEWAY, *RECIPIENTS[:recipients])
    return TrustList(1, 0, 2**40, tuple(i.public for i in parties), policy=policy or {}, digest=b"1" * 32)


def open_epoch(trust, **kwargs):
    return DeviceEpoch.open(DEVICE, trust, GATEWAY.name, seq=1, now=NOW, **kwargs)


def gateway_session(epoch):
    record = epoch.signed.record
    return LinkSession(unwrap_link(record, GATEWAY), record.epoch_id, record.party, side="gateway")


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize(("profile", "alg"), CASES)
@pytest.mark.parametrize("recipients", [1, 2])
def test_a_frame_passes_the_gateway_and_opens_byte_identical(profile, alg, recipients):
    trust = trust_for(recipients)
    epoch = open_epoch(trust, profile=profile, alg=alg)
    image = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    raw = epoch.seal(Picture(pixels=image, codec="rgb", taken=12.5))
    envelope = wire.parse(raw)
    assert envelope.auth == ("link-mac" if recipients == 1 else "ed25519")
    wire.verify_for_gateway(envelope, gateway_session(epoch), epoch.signed, DEVICE.public)
    for recipient in RECIPIENTS[:recipients]:
        opened = open_frame(raw, epoch.signed.raw, recipient, trust)
        assert same(opened.pixels, image)
        assert (opened.codec, opened.taken) == ("rgb", 12.5)


SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0, 1, 3, 4]))


@settings(max_examples=120, deadline=None)
@given(
    shape=SHAPES,
    dtype=st.sampled_from(["u1", "<u2", ">u2", "<f4"]),
    case=st.sampled_from(CASES),
    seed=st.integers(0, 9),
)
def test_any_shape_and_type_comes_back(shape, dtype, case, seed):
    trust = trust_for()
    epoch = open_epoch(trust, profile=case[0], alg=case[1])
    shape = shape if shape[2] else shape[:2]
    data = np.random.default_rng(seed).integers(0, 250, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    image = data.view(dtype)[..., 0]
    opened = open_frame(epoch.seal(image), epoch.signed.raw, RECIPIENTS[0], trust)
    assert same(opened.pixels, image.astype(image.dtype.newbyteorder("<")))


@pytest.mark.parametrize("codec", ["bayer-rggb", "bayer-bggr", "bayer-grbg", "bayer-gbrg"])
def test_bayer_frames_keep_their_pattern(codec):
    trust = trust_for()
    epoch = open_epoch(trust)
    image = np.arange(35, dtype=np.uint16).reshape(5, 7)
    opened = open_frame(epoch.seal(Picture(pixels=image, codec=codec)), epoch.signed.raw, RECIPIENTS[0], trust)
    assert opened.codec == codec
    assert same(opened.pixels, image)


@pytest.mark.parametrize("profile", wire.PROFILES)
@pytest.mark.parametrize("size", [1, 15, 16, 4095, 4096, 4097, 70001])
def test_compressed_bytes_come_back_and_their_length_is_padded(profile, size):
    trust = trust_for()
    epoch = open_epoch(trust, profile=profile)
    blob = b"\xff\xd8\xff" + bytes(range(256)) * 300
    opened = open_frame(raw := epoch.seal(blob[:size]), epoch.signed.raw, RECIPIENTS[0], trust)
    assert opened.blob == blob[:size]
    assert (len(raw) - len(epoch.seal(b"x"))) % 4096 == 0


def test_non_contiguous_arrays_are_sealed_as_they_look():
    trust = trust_for()
    epoch = open_epoch(trust)
    image = np.random.default_rng(2).integers(0, 256, (60, 80, 3), dtype=np.uint8)[::2, ::-3]
    opened = open_frame(epoch.seal(image), epoch.signed.raw, RECIPIENTS[0], trust)
    assert np.array_equal(opened.pixels, image)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((0, 4), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
        np.zeros((4, 4), np.float64),
        np.zeros((4, 4), np.int8),
        np.zeros(4, np.uint8),
        np.zeros((4, 4, 17), np.uint8),
        b"",
        Picture(),
        Picture(pixels=np.zeros((2, 2), np.uint8), blob=b"x"),
        Picture(pixels=np.zeros((2, 2), np.uint8), codec="rgb"),
        Picture(pixels=np.zeros((2, 2), np.uint8), codec="jpeg"),
        Picture(blob=b"x", codec="gray"),
        Picture(blob=b"x", codec="blob", taken=float("nan")),
    ],
)
def test_what_is_no_image_is_a_clear_error_and_costs_no_counter(bad):
    epoch = open_epoch(trust_for())
    with pytest.raises(DataError):
        epoch.seal(bad)
    assert epoch.frames == 0


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (5, "a int is no picture"),
        (None, "NoneType is no picture"),
        ("text", "a str is no picture"),
        ([1, 2, 3], "a list is no picture"),
        ([[1, 2], [3, 4]], "a list is no picture"),
        (np.uint8(3), "a uint8 is no picture"),
        (np.array(5, np.uint8), "not 0: ()"),
        (np.zeros(4, np.uint8), "not 1: (4,)"),
        (np.zeros((2, 2, 2, 3), np.uint8), "not 4: (2, 2, 2, 3)"),
        (np.zeros((0, 4), np.uint8), "has no area"),
        (np.zeros((4, 4, 17), np.uint8), "17 channels: at most 16"),
        (memoryview(np.zeros((4, 4), np.uint8)), "2 axes is no file's bytes"),
        (memoryview(np.zeros(4, np.uint16)), "format 'H'"),
        (Picture(pixels=[[1, 2], [3, 4]]), "a list, not a numpy array"),
        (Picture(blob="text", codec="blob"), "a str, not bytes"),
        (Picture(blob=b"x", codec="blob", taken="noon"), "not a number"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_wrong_with_a_picture_is_named(bad, words):
    epoch = open_epoch(trust_for())
    with pytest.raises(DataError) as raised:
        epoch.seal(bad)
    assert words in str(raised.value)
    assert epoch.frames == 0


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_files_bytes_may_come_in_any_buffer(kind):
    trust = trust_for()
    epoch = open_epoch(trust)
    blob = b"\xff\xd8\xff and more"
    opened = open_frame(epoch.seal(kind(blob)), epoch.signed.raw, RECIPIENTS[0], trust)
    assert (opened.blob, opened.codec) == (blob, "jpeg")


def test_the_buffer_of_one_frame_does_not_show_in_a_smaller_next_one():
    trust = trust_for()
    epoch = open_epoch(trust)
    opener = FrameOpener(epoch.signed.raw, RECIPIENTS[0], trust)
    for size in (300, 7, 200, 1):
        image = np.full((size, size), size % 251, np.uint8)
        assert same(opener.open(epoch.seal_view(image)).pixels, image)


@pytest.mark.parametrize("has_aes", [True, False])
def test_the_algorithm_follows_the_cpu_and_every_recipient_opens_both(has_aes, monkeypatch):
    from edgepriv.primitives import cpu

    trust = trust_for()
    with monkeypatch.context() as patched:
        patched.setattr(cpu, "flags", lambda: frozenset({"aes"} if has_aes else ()))
        epoch = open_epoch(trust)
        raw = epoch.seal(np.arange(12, dtype=np.uint8).reshape(3, 4))
        forced = open_epoch(trust, alg="aes-256-gcm")
        pinned = open_epoch(trust_for(policy={"*": {"algs": ["aes-256-gcm"]}}))
    assert wire.parse(raw).alg == ("aes-256-gcm" if has_aes else "chacha20-poly1305")
    assert forced.signed.record.alg == pinned.signed.record.alg == "aes-256-gcm"
    assert open_frame(raw, epoch.signed.raw, RECIPIENTS[0], trust).pixels.tolist()[2] == [8, 9, 10, 11]


def test_the_policy_chooses_recipients_and_authentication():
    trust = trust_for(2, policy={DEVICE.name: {"recipients": [RECIPIENTS[1].name]}})
    epoch = open_epoch(trust)
    assert epoch.signed.record.auth == "link-mac"
    raw = epoch.seal(np.zeros((2, 2), np.uint8))
    assert open_frame(raw, epoch.signed.raw, RECIPIENTS[1], trust).pixels is not None
    with pytest.raises(TrustError, match="not addressed"):
        open_frame(raw, epoch.signed.raw, RECIPIENTS[0], trust)
    assert open_epoch(trust_for(policy={"*": {"auth": "ed25519"}})).signed.record.auth == "ed25519"
    with pytest.raises(ConfigError, match="profile"):
        open_epoch(trust, profile="rot13")
    with pytest.raises(ConfigError, match="max_frames"):
        open_epoch(trust, max_frames=0)
