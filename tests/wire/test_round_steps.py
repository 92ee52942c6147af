"""Round steps: any bytes give a step or one error; an announcement that contradicts itself is refused."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepriv.errors import AuthenticationError, TrustError, WireError
from edgepriv.keys import Identity
from edgepriv.wire import message, rounds
from edgepriv.wire.messages import RoundMessage
from edgepriv.wire.rounds import Advert, Cohort, Join, RoundResult, Survivors
from edgepriv.wire.trust import TrustList
from gateway.round_plan import RoundPlan, announcement

PLAN = RoundPlan(round=3, model="m", base=b"b" * 32, base_bytes=9, tensors=(["w", [4]],))
OPENED = announcement(PLAN, 5, 100.0)


@pytest.mark.parametrize("body", [OPENED, Cohort((b"x",)), Survivors((0, 2)), RoundResult("done", "", b"d" * 32, 5)])
def test_steps_round_trip(body):
    name = next(n for n, kind in rounds.STEPS_DOWN.items() if kind is type(body))
    assert rounds.read_step(rounds.step_message(3, name, body), up=False) == body


@given(st.sampled_from([*rounds.STEPS_DOWN, *rounds.STEPS_UP, "x"]), st.binary(max_size=80), st.booleans())
def test_any_bytes_give_a_step_or_one_error(step, raw, up):
    with contextlib.suppress(WireError):
        rounds.read_step(RoundMessage(1, step, raw), up=up)


def test_a_step_in_the_wrong_direction_is_refused():
    with pytest.raises(WireError, match="do not fit"):
        rounds.read_step(rounds.step_message(3, "join", Join(True, "", b"")), up=False)


@pytest.mark.parametrize(
    "change",
    [
        {"round": 4}, {"base": b"short"}, {"tensors": ()}, {"tensors": (["w", [0]],)},
        {"tensors": (["w", [4]], ["w", [4]])},
        {"privacy": "secret"}, {"encoding": "zip"}, {"keep": 0.0}, {"noise": "some"}, {"noise_multiplier": -1.0},
    ],
)  # fmt: skip
def test_an_announcement_that_contradicts_itself_is_refused(change):
    with pytest.raises(WireError):
        rounds.read_step(rounds.step_message(3, "open", dataclasses.replace(OPENED, **change)), up=False)


def test_an_advertisement_needs_the_signature_of_a_listed_device():
    one, other = Identity.new("device", "one"), Identity.new("device", "other")
    trust = TrustList(1, 0, 1 << 40, (one.public,))
    advert = Advert(3, "0", b"b" * 32, "dev-one", b"s" * 32, b"m" * 32, b"c" * 32, b"d" * 32)
    assert rounds.read_advert(rounds.sign_advert(advert, one), trust) == advert
    with pytest.raises(AuthenticationError):
        rounds.read_advert(rounds.sign_advert(advert, other), trust)
    with pytest.raises(TrustError):
        rounds.read_advert(rounds.sign_advert(dataclasses.replace(advert, device="dev-other"), other), trust)


def test_the_survivors_digest_binds_round_cohort_base_and_set():
    digests = {
        rounds.survivors_digest(*args)
        for args in [
            (1, "0", b"b", ["a", "b"]), (2, "0", b"b", ["a", "b"]), (1, "1", b"b", ["a", "b"]),
            (1, "0", b"c", ["a", "b"]), (1, "0", b"b", ["a"]),
        ]
    }  # fmt: skip
    assert len(digests) == 5
    assert rounds.survivors_digest(1, "0", b"b", ["b", "a"]) == rounds.survivors_digest(1, "0", b"b", ["a", "b"])


def test_an_announcement_says_the_ring_that_fits_or_is_not_made():
    from edgepriv.errors import ConfigError

    assert OPENED.ring_bits == 64
    assert announcement(dataclasses.replace(PLAN, max_weight=1), 64, 0.0).ring_bits == 32
    with pytest.raises(ConfigError, match="overflow"):
        announcement(dataclasses.replace(PLAN, fraction_bits=40, clip=1e6, max_weight=1 << 20), 1000, 0.0)
    assert message.encode(OPENED)
