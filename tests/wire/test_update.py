"""Updates: what goes in comes out; any bytes give an update or one documented error; a size cannot lie."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.errors import WireError
from edgepriv.wire import cbor
from edgepriv.wire.update import MAGIC, decode_update, encode_update

LIMIT = 1 << 20
shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
dtypes = st.sampled_from(["float32", "float16", "int8", "int32", "uint32", "uint64"])


@given(st.dictionaries(st.text(max_size=12), st.tuples(shapes, dtypes), max_size=5), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_arrays_round_trip(spec, seed):
    rng = np.random.default_rng(seed)
    tensors = {n: rng.integers(0, 100, shape).astype(dtype) for n, (shape, dtype) in spec.items()}
    update = decode_update(encode_update(tensors, {"a": 1}), max_bytes=LIMIT)
    assert update.meta == {"a": 1}
    assert list(update.tensors) == list(tensors)
    assert all(np.array_equal(update.tensors[n], tensors[n]) for n in tensors)


def test_int8_comes_back_scaled():
    raw = encode_update({"w": np.array([-127, 0, 64], np.int8)}, scales={"w": 0.5})
    assert decode_update(raw, max_bytes=LIMIT).tensors["w"].tolist() == [-63.5, 0, 32]


@given(st.binary(max_size=200))
def test_any_bytes_give_an_update_or_one_error(raw):
    for one in (raw, MAGIC + raw, MAGIC + struct.pack(">I", len(raw)) + raw):
        with contextlib.suppress(WireError):
            decode_update(one, max_bytes=LIMIT)


@given(st.integers(0, 10_000), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_an_altered_byte_gives_an_update_or_one_error(position, value):
    raw = bytearray(encode_update({"w": np.ones((3, 4), np.float32), "b": np.ones(2, np.float16)}, {"round": 3}))
    raw[position % len(raw)] = value
    with contextlib.suppress(WireError):
        decode_update(bytes(raw), max_bytes=LIMIT)


def _with_rows(rows, data=b""):
    header = cbor.encode({"meta": {}, "tensors": rows})
    return MAGIC + struct.pack(">I", len(header)) + header + data


LIES = {
    "larger than its data": [["w", "float32", [1000], 0, 1.0]],
    "a product that overflows": [["w", "float32", [1 << 30, 1 << 30, 1 << 30], 0, 1.0]],
    "overlapping": [["w", "float32", [1], 0, 1.0], ["v", "float32", [1], 0, 1.0]],
    "negative": [["w", "float32", [-1], 0, 1.0]],
    "an unknown dtype": [["w", "object", [1], 0, 1.0]],
    "twice the same name": [["w", "float32", [1], 0, 1.0], ["w", "float32", [1], 4, 1.0]],
    "an infinite scale": [["w", "int8", [4], 0, float("inf")]],
    "a bool as a size": [["w", "float32", [True], 0, 1.0]],
}


@pytest.mark.parametrize("kind", LIES)
def test_a_header_that_lies_is_refused(kind):
    with pytest.raises(WireError):
        decode_update(_with_rows(LIES[kind], b"\0" * 4), max_bytes=LIMIT)


def test_more_than_the_limit_is_refused_before_it_is_read():
    with pytest.raises(WireError, match="over the limit"):
        decode_update(memoryview(bytes(100)), max_bytes=50)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(bad):
    with pytest.raises(WireError, match="NaN or infinity"):
        decode_update(encode_update({"w": np.array([bad], np.float32)}), max_bytes=LIMIT)
