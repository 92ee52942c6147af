"""Deliveries and shipments: what was written is found again, and any other bytes are a clear error."""

import contextlib
import io

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepriv.errors import AuthenticationError, EdgeprivError, WireError
from edgepriv.keys import Identity
from edgepriv.wire import cbor, delivery

NAMES = st.text(st.characters(codec="ascii", exclude_characters="/\\.\x00"), min_size=1, max_size=40)
FILES = st.dictionaries(NAMES | st.tuples(NAMES, NAMES).map("/".join), st.binary(max_size=300), max_size=12)
ISSUER = Identity.new("owner", "root")


def written(files, schema=delivery.DELIVERY):
    stream = io.BytesIO()
    delivery.write(stream, schema, files)
    return stream


def manifest(issuer=ISSUER, **changes):
    body = {"name": "eye", "version": 3, "levels": [{"digest": bytes([n]) * 32} for n in (1, 2)], **changes}
    raw = cbor.encode(body)
    return cbor.encode([raw, issuer.public.ed25519, issuer.sign(delivery.MANIFEST_USE, raw)])


@given(FILES)
def test_files_are_found_again_and_the_bytes_are_plain_cbor(files):
    stream = written(files)
    found = delivery.spans(stream, delivery.DELIVERY)
    assert {name: span.read(stream, 1000) for name, span in found.items()} == files
    assert cbor2.loads(stream.getvalue()) == {"schema": delivery.DELIVERY, "files": files}


@given(FILES, st.integers(0, 2**32), st.integers(1, 255))
def test_damaged_bytes_are_one_kind_of_error_or_another_content(files, at, flip):
    raw = bytearray(written(files).getvalue())
    raw[at % len(raw)] ^= flip
    stream = io.BytesIO(bytes(raw))
    try:
        found = delivery.spans(stream, delivery.DELIVERY)
    except WireError:
        return
    assert all(span.start + span.size <= len(raw) for span in found.values())


@given(st.binary(max_size=200))
def test_any_bytes_give_a_label_or_an_error_or_are_neither(raw):
    stream = io.BytesIO(raw)
    with contextlib.suppress(EdgeprivError):
        assert delivery.read_label(stream, [ISSUER.public.ed25519]) is None


@pytest.mark.parametrize("name", ["../x", "/x", "a/b/c", ".hidden", "a/.b", "a\\b", "", "x" * 201])
def test_names_that_leave_the_folder_are_refused_on_both_ways(name):
    with pytest.raises(WireError):
        written({name: b""})
    raw = cbor2.dumps({"schema": delivery.DELIVERY, "files": {name: b"x"}})
    with pytest.raises(WireError):
        delivery.spans(io.BytesIO(raw), delivery.DELIVERY)


def test_cut_and_longer_files_are_refused():
    raw = written({"a": b"1" * 100}).getvalue()
    for bad in (raw[:-1], raw + b"\x00", raw[:20]):
        with pytest.raises(WireError):
            delivery.spans(io.BytesIO(bad), delivery.DELIVERY)
    huge = cbor2.dumps({"schema": delivery.DELIVERY, "files": {"a": b""}})[:-1] + b"\x5b" + b"\xff" * 8
    with pytest.raises(WireError):
        delivery.spans(io.BytesIO(huge), delivery.DELIVERY)


@pytest.mark.parametrize("shipped", [False, True])
def test_a_label_is_read_from_a_delivery_and_from_a_shipment(shipped):
    stream = written({"manifest.cbor": manifest(), "verdict-2.cbor": b"v2", "verdict-x.cbor": b"no", "w": b"0" * 999})
    if shipped:
        stream = written({"metadata/1.root.json": b"{}", "targets/ab.eye": stream.getvalue()}, delivery.SHIPMENT)
    label = delivery.read_label(stream, [ISSUER.public.ed25519])
    assert (label.name, label.version, label.issuer) == ("eye", 3, ISSUER.public.ed25519)
    assert label.digests == (b"\x01" * 32, b"\x02" * 32)
    assert label.verdicts == (b"v2",)


def test_a_label_that_nobody_trusted_signed_is_refused():
    pinned = [ISSUER.public.ed25519]
    with pytest.raises(AuthenticationError, match="not a trusted model issuer"):
        delivery.read_label(written({"manifest.cbor": manifest(Identity.new("owner", "x"))}), pinned)
    body, key, _ = cbor2.loads(manifest())
    forged = cbor.encode([body.replace(b"eye", b"ear"), key, bytes(64)])
    with pytest.raises(AuthenticationError):
        delivery.read_label(written({"manifest.cbor": forged}), pinned)
    for bad in ({"levels": [1]}, {"levels": "x"}, {"version": "1"}):
        with pytest.raises(WireError, match="malformed"):
            delivery.read_label(written({"manifest.cbor": manifest(**bad)}), pinned)
    with pytest.raises(WireError, match="lacks its manifest"):
        delivery.read_label(written({"x": b""}), pinned)
    assert delivery.read_label(io.BytesIO(b"\x08\x07onnx"), pinned) is None
