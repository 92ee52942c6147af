"""The sealed link: bound to topic, party, direction and process; the party's side refuses replays."""

import os
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.errors import AuthenticationError, EdgeprivError, ReplayError, WireError
from edgepriv.wire.link import MAX_SALTS, WINDOW, LinkSession, ReplayWindow, epoch_of

KEY, EPOCH, UP, DOWN = b"k" * 32, b"e" * 16, "edgepriv/v1/dev-a/up/0/msg", "edgepriv/v1/dev-a/down/msg"


def ends(epoch=EPOCH, party="dev-a"):
    return LinkSession(KEY, epoch, party, side="party"), LinkSession(KEY, epoch, party, side="gateway")


def test_both_directions_carry_messages_in_any_order():
    party, gateway = ends()
    up = [party.seal(UP, bytes([i])) for i in range(5)]
    down = [gateway.seal(DOWN, bytes([i])) for i in range(5)]
    assert [gateway.open(UP, raw) for raw in reversed(up)] == [bytes([i]) for i in reversed(range(5))]
    assert [party.open(DOWN, raw) for raw in reversed(down)] == [bytes([i]) for i in reversed(range(5))]


def test_a_message_is_bound_to_topic_party_direction_and_epoch():
    party, gateway = ends()
    raw = party.seal(UP, b"x")
    with pytest.raises(AuthenticationError):
        gateway.open(DOWN, raw)
    with pytest.raises(AuthenticationError):
        ends(party="dev-b")[1].open(UP, raw)
    with pytest.raises(AuthenticationError):
        ends()[0].open(UP, raw)  # reflected to its sender's side
    with pytest.raises(WireError):
        ends(epoch=b"f" * 16)[1].open(UP, raw)
    assert epoch_of(raw) == EPOCH


def test_every_bit_flip_is_refused():
    party, gateway = ends()
    raw = bytearray(party.seal(UP, b"body"))
    for bit in range(8 * len(raw)):
        raw[bit // 8] ^= 1 << bit % 8
        with pytest.raises((AuthenticationError, WireError)):
            gateway.open(UP, bytes(raw))
        raw[bit // 8] ^= 1 << bit % 8
    assert gateway.open(UP, bytes(raw)) == b"body"


def test_the_party_refuses_replays_and_the_gateway_leaves_them_to_its_store():
    party, gateway = ends()
    down, up = gateway.seal(DOWN, b"x"), party.seal(UP, b"y")
    party.open(DOWN, down)
    with pytest.raises(ReplayError):
        party.open(DOWN, down)
    assert gateway.open(UP, up) == gateway.open(UP, up) == b"y"


def test_a_restarted_gateway_never_repeats_a_nonce_and_may_restart_only_so_often():
    party = ends()[0]
    seen = set()
    for _ in range(MAX_SALTS):
        raw = ends()[1].seal(DOWN, b"same")
        seen.add(raw)
        party.open(DOWN, raw)
    assert len(seen) == MAX_SALTS
    with pytest.raises(ReplayError, match="new epoch"):
        party.open(DOWN, ends()[1].seal(DOWN, b"same"))


def test_single_use_mac_keys_differ_with_every_part():
    party, gateway = ends()
    assert party.mac_key(b"a", b"b") == gateway.mac_key(b"a", b"b")
    keys = {party.mac_key(b"h" * 80, com, tag) for com in (b"c" * 32, b"d" * 32) for tag in (b"t" * 16, b"u" * 16)}
    assert len(keys) == 4


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3 * WINDOW), max_size=40))
def test_the_window_accepts_each_number_once(numbers):
    window, seen, top = ReplayWindow(), set(), -1
    for number in numbers:
        fresh = number not in seen and number > top - WINDOW
        try:
            window.accept(number)
            accepted = True
        except ReplayError:
            accepted = False
        assert accepted is fresh
        seen.add(number)
        top = max(top, number)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120))
def test_any_bytes_are_one_documented_error(raw):
    gateway = ends()[1]
    for candidate in (raw, b"EPL1" + EPOCH + raw):
        with pytest.raises(EdgeprivError):
            gateway.open(UP, candidate)


def test_keys_cross_neither_fork_nor_pickle():
    party = ends()[0]
    with pytest.raises(TypeError):
        pickle.dumps(party)
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            party.seal(UP, b"x")
            os.write(write, b"sealed")
        except RuntimeError:
            os.write(write, b"refused")
        finally:
            os._exit(0)
    os.wait()
    os.close(write)
    assert os.read(read, 10) == b"refused"
    os.close(read)
