"""Any bytes give a value or one documented error: the file container, the sealed description, the opener."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.cipher import container
from edgepriv.cipher.cipher import FrameOpener
from edgepriv.cipher.epochs import DeviceEpoch
from edgepriv.cipher.picture import Meta, Picture, decode_meta, encode_meta, payload_of
from edgepriv.cipher.policy import check_names, check_policy
from edgepriv.errors import AuthenticationError, ConfigError, EdgeprivError, WireError
from edgepriv.keys import Identity
from edgepriv.wire.trust import TrustList

DEVICE, GATEWAY, ANN = (Identity.new(r, "x") for r in ("device", "gateway", "recipient"))
TRUST = TrustList(1, 0, 2**40, (DEVICE.public, GATEWAY.public, ANN.public))
EPOCH = DeviceEpoch.open(DEVICE, TRUST, GATEWAY.name, seq=0, now=0)
SEALED = EPOCH.seal(np.zeros((4, 4), np.uint8))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda tail: b"EPF1\x00\x00\x00" + tail))
def test_any_bytes_are_a_container_or_one_error(raw):
    try:
        record, envelope = container.unpack(raw)
    except WireError:
        return
    assert container.pack(record, bytes(envelope)) == raw


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=64, max_size=64), st.integers(0, 5000))
def test_any_description_is_consistent_or_one_error(raw, size):
    for candidate in (raw, b"\x01" + raw[1:32] + bytes(32), b"\x01\x02\x01\x03" + raw[4:32] + bytes(32)):
        try:
            meta = decode_meta(candidate, size)
        except WireError:
            continue
        assert isinstance(meta, Meta)
        assert encode_meta(meta) == candidate
        assert meta.size <= size


@pytest.mark.parametrize("place", range(64))
def test_a_description_with_one_changed_byte_is_another_or_refused(place):
    meta, _ = payload_of(Picture(pixels=np.zeros((6, 5, 3), np.uint8), codec="rgb", taken=3.5))
    raw = bytearray(encode_meta(meta))
    raw[place] ^= 0x41
    try:
        assert decode_meta(bytes(raw), 90) != meta
    except WireError:
        return
    assert place in {1, *range(24, 32)}  # another codec of three channels, another time; all else contradicts itself


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(SEALED) - 1), st.integers(1, 255)),
        min_size=1,
        max_size=6,
        unique_by=lambda e: e[0],
    )
)
def test_changed_envelopes_never_open(edits):
    raw = bytearray(SEALED)
    for place, value in edits:
        raw[place] ^= value
    if any(place < len(SEALED) - 16 for place, _ in edits):
        with pytest.raises((WireError, AuthenticationError)):
            FrameOpener(EPOCH.signed.raw, ANN, TRUST).open(raw)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_an_envelope_are_one_error(raw):
    opener = FrameOpener(EPOCH.signed.raw, ANN, TRUST)
    for candidate in (raw, SEALED[:112] + raw, SEALED[: len(raw)] + raw):
        if candidate != SEALED:
            with pytest.raises(EdgeprivError):
                opener.open(candidate)


def test_policies_are_checked_by_name_and_type():
    check_policy({"*": {"profiles": ["flep3"], "recipients": ["op-a"], "max_frames": 5, "budget": 3}})
    for table in (
        {"profiles": []},
        {"profiles": "flep3"},
        {"auths": ["mac"]},
        {"auth": "mac"},
        {"allow_recipient_forgery": 1},
        {"max_frames": True},
        {"min_version": 300},
        {"recipient": ["op-a"]},
    ):
        with pytest.raises(ConfigError):
            check_policy({"dev-a": table})
    with pytest.raises(ConfigError, match="not a table"):
        check_policy({"profiles": ["flep3"]})


def test_a_policy_names_listed_parties_only():
    parties = (Identity.new("device", "cam1").public, Identity.new("recipient", "ann").public)
    check_names({"*": {"recipients": ["op-ann"]}, "dev-cam1": {"auth": "ed25519"}}, parties)
    with pytest.raises(ConfigError, match="no listed recipient") as slip:
        check_names({"dev-cam1": {"recipients": ["op-anm"]}}, parties)
    assert "op-ann" in slip.value.hint
    with pytest.raises(ConfigError, match="no listed device"):
        check_names({"dev-cam2": {}}, parties)
