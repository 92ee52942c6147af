"""Typed messages: what goes out comes back, and any other bytes are one error."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.errors import WireError
from edgepriv.wire import cbor, message, messages, output, rounds  # noqa: F401 - output and rounds register kinds
from edgepriv.wire.message import KINDS, MAX_ENTRIES, from_map
from edgepriv.wire.messages import Ack, Chunk, FrameMessage, Grant, Status

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 40), 1 << 40) | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SCALARS = {
    int: st.integers(-(1 << 63), (1 << 63) - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: st.text(max_size=20),
    bytes: st.binary(max_size=32),
}


def values_of(hint):
    origin = get_origin(hint)
    if hint is Any:
        return plain
    if origin is tuple:
        return st.lists(values_of(get_args(hint)[0]), max_size=4).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(max_size=6), plain, max_size=4)
    return SCALARS[hint]


def instances(cls):
    hints = get_type_hints(cls)
    return st.builds(cls, **{f.name: values_of(hints[f.name]) for f in dataclasses.fields(cls)})


any_message = st.sampled_from(sorted(KINDS)).flatmap(lambda kind: instances(KINDS[kind]))


@settings(max_examples=200, deadline=None)
@given(any_message)
def test_every_message_comes_back_as_it_was(value):
    raw = messages.encode(value)
    assert messages.decode(raw) == value
    assert messages.encode(messages.decode(raw)) == raw


@given(st.binary(min_size=16, max_size=16), st.integers(0, (1 << 32) - 1), st.binary(max_size=300))
def test_a_chunk_comes_back_as_it_was(ref, index, data):
    raw = messages.encode(Chunk(ref, index, data))
    assert raw[0] == 1
    assert len(raw) == 21 + len(data)
    assert messages.decode(raw) == Chunk(ref, index, data)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_one_error(raw):
    try:
        value = messages.decode(raw)
    except WireError:
        return
    assert messages.encode(value) == raw


@settings(max_examples=200, deadline=None)
@given(any_message, st.data())
def test_an_altered_message_is_another_valid_one_or_one_error(value, data):
    raw = bytearray(messages.encode(value))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for bytes_ in (bytes(raw), bytes(raw[:cut])):
        try:
            again = messages.decode(bytes_)
        except WireError:
            continue
        assert messages.encode(again) == bytes_


@given(any_message, st.data())
def test_a_field_more_or_less_is_refused(value, data):
    body = cbor.decode_map(message.encode(value), max_bytes=1 << 20)
    kind = body.pop("t")
    with pytest.raises(WireError, match="unknown field"):
        from_map(KINDS[kind], {**body, "zz": 1})
    gone = data.draw(st.sampled_from(sorted(body)))
    with pytest.raises(WireError, match="missing"):
        from_map(KINDS[kind], {k: v for k, v in body.items() if k != gone})


GOOD = {"at": 1.0, "firmware": "f", "model": "m", "model_digest": b"", "level": 0, "trust_version": 1, "counters": {}}


@pytest.mark.parametrize(
    "change",
    [
        {"at": "now"}, {"at": float("nan")}, {"at": float("inf")}, {"at": True}, {"level": 1.0}, {"level": True},
        {"level": 1 << 63}, {"level": -(1 << 63) - 1}, {"firmware": b"f"}, {"model_digest": "x"}, {"counters": []},
        {"counters": {1: 2}}, {"firmware": "x" * 4097}, {"model_digest": bytes(4097)},
        {"counters": {str(i): 0 for i in range(MAX_ENTRIES + 1)}}, {"trust_version": None},
    ],
)  # fmt: skip
def test_values_of_another_type_or_over_their_limit_are_refused(change):
    assert from_map(Status, dict(GOOD)) is not None
    with pytest.raises(WireError):
        from_map(Status, {**GOOD, **change})


def test_an_integer_is_a_float_but_not_the_other_way_round():
    assert from_map(Status, {**GOOD, "at": 3}).at == 3.0
    with pytest.raises(WireError):
        from_map(Grant, {"ref": b"", "ranges": [1.5]})


def test_lists_and_whole_messages_have_limits():
    with pytest.raises(WireError):
        from_map(Grant, {"ref": b"", "ranges": [0] * (MAX_ENTRIES + 1)})
    with pytest.raises(WireError):
        from_map(Grant, {"ref": b"", "ranges": {"a": 1}})
    with pytest.raises(WireError, match="limit"):
        from_map(FrameMessage, {"envelope": bytes((1 << 20) + 1)})
    with pytest.raises(WireError, match="limit"):
        message.decode(bytes((1 << 20) + 1))


@pytest.mark.parametrize("kind", ["", "nothing", "Ack", 7, None])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(WireError, match="unknown kind"):
        message.decode(cbor.encode({"t": kind, "digest": b"", "outcome": "stored", "reason": ""}))
    with pytest.raises(WireError):
        messages.decode(b"\x02" + message.encode(Ack(b"", "stored", "")))


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="ack"):
        message.message("ack")(type("Again", (), {"__annotations__": {}}))
