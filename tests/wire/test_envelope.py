"""The envelope's parser, the gateway's check and the replay rule."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.errors import WireError
from edgepriv.wire import envelope as wire
from edgepriv.wire.envelope import Envelope, judge, pack_header, parse

GOOD = pack_header(
    profile="flep3", alg="aes-256-gcm", auth="link-mac", counter=7, mid=b"m" * 32, epoch_digest=b"d" * 32
) + bytes(32 + 80 + 16)


def outcome(raw):
    try:
        return parse(raw)
    except WireError:
        return None


def test_a_parsed_envelope_views_its_bytes_without_copying():
    raw = bytearray(GOOD + bytes(1000))
    envelope = parse(raw)
    assert (envelope.profile, envelope.alg, envelope.auth, envelope.counter) == ("flep3", "aes-256-gcm", "link-mac", 7)
    assert envelope.mid == b"m" * 32
    assert envelope.epoch_digest == b"d" * 32
    raw[200] = 9
    assert envelope.ciphertext[200 - 112] == 9
    assert len(envelope.ciphertext) + 112 + 16 == len(raw) == len(envelope.raw)
    assert envelope.digest() == hashlib.sha256(raw[:112] + raw[-32:]).digest()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_give_an_envelope_or_one_documented_error(raw):
    assert outcome(raw) is None or isinstance(outcome(raw), Envelope)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.integers(0, len(GOOD)))
def test_changed_headers_and_cuts_give_an_envelope_or_one_documented_error(at, value, end):
    raw = bytearray(GOOD)
    raw[at] = value
    found = outcome(raw[:end])
    if found is not None:
        assert end == len(GOOD)
        repacked = pack_header(
            profile=found.profile,
            alg=found.alg,
            auth=found.auth,
            counter=found.counter,
            mid=found.mid,
            epoch_digest=found.epoch_digest,
        )
        assert repacked == bytes(raw[:80])


def test_limits_are_checked_first():
    with pytest.raises(WireError, match="over the limit"):
        parse(GOOD, max_bytes=len(GOOD) - 1)
    for version in (0, 2, 255):
        with pytest.raises(WireError, match="version"):
            parse(GOOD[:4] + bytes([version]) + GOOD[5:])
    with pytest.raises(WireError, match="counter"):
        parse(GOOD[:8] + b"\xff" * 8 + GOOD[16:])
    with pytest.raises(WireError, match="no such"):
        pack_header(profile="none", alg="aes-256-gcm", auth="link-mac", counter=0, mid=b"", epoch_digest=b"")
    with pytest.raises(WireError, match="counter"):
        pack_header(
            profile="aead", alg="aes-256-gcm", auth="link-mac", counter=1 << 16, mid=b"m" * 32, epoch_digest=b"d" * 32
        )


def test_the_module_holds_nothing_that_opens_frames():
    """The gateway imports this module; it names no decrypting function and no content key."""
    import inspect

    source = inspect.getsource(wire)
    for word in ("open_into", "aead_open", "unwrap_content", "edgepriv.cipher", "mask("):
        assert word not in source


def test_the_rule_over_a_lookup():
    assert judge(None, b"a" * 32) == "new"
    assert judge(b"a" * 32, b"a" * 32) == "duplicate"
    assert judge(b"a" * 32, b"b" * 32) == "conflict"
