"""Deterministic CBOR: one value, one encoding; everything else is a WireError."""

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.errors import WireError
from edgepriv.wire import cbor

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.binary(max_size=20)
    | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_what_is_encoded_comes_back(value):
    raw = cbor.encode(value)
    assert cbor.decode(raw, max_bytes=1 << 20) == value
    assert cbor.encode(cbor.decode(raw, max_bytes=1 << 20)) == raw


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_give_a_value_or_one_error_and_accepted_bytes_are_canonical(raw):
    try:
        value = cbor.decode(raw, max_bytes=64)
    except WireError:
        return
    assert cbor.encode(value) == raw


@pytest.mark.parametrize(
    "raw",
    [
        b"\x18\x01",  # 1 in two bytes
        b"\x9f\x01\xff",  # indefinite list
        b"\x5f\x41a\xff",  # indefinite byte string
        b"\xa2\x61b\x01\x61a\x02",  # keys out of order
        b"\xa2\x61a\x01\x61a\x02",  # a key twice
        b"\xc1\x00",  # a tag
        b"\xfb\x3f\xf0\x00\x00\x00\x00\x00\x00",  # 1.0 as a double
        b"\x01\x01",  # trailing bytes
        b"\x81" * 20 + b"\x01",  # nested too deeply
        b"",
        b"\xf7",  # undefined
        b"\xd8\x1c\x81\xd8\x1d\x00",  # a list that contains itself
    ],
)
def test_other_encodings_are_refused(raw):
    with pytest.raises(WireError):
        cbor.decode(raw, max_bytes=100)


def test_limits_and_maps():
    with pytest.raises(WireError, match="over the limit"):
        cbor.decode(cbor2.dumps(bytes(100)), max_bytes=50)
    with pytest.raises(WireError, match="text keys"):
        cbor.decode_map(cbor.encode({1: 2}), max_bytes=50)
    with pytest.raises(WireError, match="text keys"):
        cbor.decode_map(cbor.encode([1]), max_bytes=50)
