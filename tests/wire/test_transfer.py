"""Transfers: any order, loss and repetition give the whole object; nothing outside it is ever asked for or taken."""

from __future__ import annotations

import contextlib
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.errors import WireError
from edgepriv.wire.transfer import Bitmap, Download, Incoming, chunk_bytes_for, chunk_count, from_ranges, to_ranges


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 20), st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_an_upload_completes_whatever_is_lost_and_repeated(size, chunk, window, seed):
    random = Random(seed)
    incoming, now, got = Incoming(size, chunk, regrant_s=1.0), 0.0, bytearray(size)
    data = bytes(i % 251 for i in range(size))
    for _ in range(20_000):
        if incoming.have.full:
            break
        now += 0.3
        for index in from_ranges(incoming.grant(window, now), chunk_count(size, chunk)):
            assert incoming.open_credits <= window
            for _ in range(random.choice([0, 1, 1, 2])):
                piece = data[index * chunk : (index + 1) * chunk]
                incoming.accept(index, len(piece))
                got[index * chunk : index * chunk + len(piece)] = piece
    assert bytes(got) == data


@given(st.sets(st.integers(0, 500), max_size=100))
def test_ranges_round_trip(indices):
    assert from_ranges(to_ranges(sorted(indices)), 501) == sorted(indices)


@pytest.mark.parametrize("flat", [(0,), (-1, 1), (0, 0), (3, 8), (0, -2), (0, 10, 0, 10)])
def test_ranges_outside_the_object_are_refused(flat):
    with pytest.raises(WireError):
        from_ranges(flat, 10, most=15)


@given(st.lists(st.integers(-(1 << 40), 1 << 40), max_size=8))
def test_any_numbers_give_ranges_or_one_error(flat):
    with contextlib.suppress(WireError):
        assert all(0 <= i < 50 for i in from_ranges(tuple(flat), 50))


@pytest.mark.parametrize(("index", "length"), [(-1, 10), (10, 10), (9, 10), (0, 9), (0, 11)])
def test_a_chunk_that_does_not_fit_is_refused(index, length):
    with pytest.raises(WireError, match="does not fit"):
        Incoming(95, 10).accept(index, length)


def test_a_restart_asks_only_for_what_is_missing():
    first = Incoming(100, 10)
    for index in (0, 3, 4, 9):
        first.accept(index, 10)
    again = Incoming(100, 10, have=first.have.to_bytes())
    assert from_ranges(again.grant(99, 0.0), 10) == [1, 2, 5, 6, 7, 8]


def test_a_download_resumes_and_asks_again_for_what_got_lost():
    download = Download(100, 10, window=4, retry_s=2.0)
    assert download.wants(0.0) == [(0, 4)]
    download.accept(0, 10)
    assert download.wants(0.5) == []
    assert download.wants(3.0) == [(1, 4)]
    have = Bitmap(10)
    for index in range(9):
        have.add(index)
    assert Download(100, 10, have=have.to_bytes()).wants(0.0) == [(9, 1)]


def test_chunks_never_pass_the_brokers_packet_limit():
    assert chunk_bytes_for(262_144) == 65_536
    assert 1024 <= chunk_bytes_for(16_184) < 16_184
    with pytest.raises(WireError, match="no room"):
        chunk_bytes_for(400)
