"""The envelope's parser, the gateway's check and the replay rule."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.errors import WireError
from edgepriv.wire import envelope as wire
from edgepriv.wire.envelope import Envelope, ReplayGuard, judge, pack_header, parse

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


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 2)), max_size=60), st.integers(0, 60))
def test_the_guard_equals_a_dictionary_also_across_a_restart(frames, restart_at):
    guard, model = ReplayGuard(30), {}
    for i, (counter, content) in enumerate(frames):
        if i == restart_at:
            guard = ReplayGuard(30, guard.to_bytes())
        digest = hashlib.sha256(bytes([counter, content])).digest()
        expected = "new" if counter not in model else "duplicate" if model[counter] == digest else "conflict"
        assert guard.judge(counter, digest) == guard.record(counter, digest) == expected
        model.setdefault(counter, digest)


def test_a_damaged_guard_is_refused():
    guard = ReplayGuard(10)
    guard.record(3, b"x" * 32)
    raw = guard.to_bytes()
    for bad in (raw[:-1], raw + b"\x00", raw[:1]):
        with pytest.raises(WireError, match="damaged"):
            ReplayGuard(10, bad)
    for size in (0, -1, (1 << 16) + 1):
        with pytest.raises(WireError, match="limit"):
            ReplayGuard(size)
    with pytest.raises(WireError, match="beyond"):
        guard.judge(10, b"x" * 32)
