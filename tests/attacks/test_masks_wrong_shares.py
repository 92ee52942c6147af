"""Members that reveal wrong shares: found once and left out, whatever their places, in bounded work per tick."""

from __future__ import annotations

import dataclasses
import os
import time

import numpy as np
import pytest
from round_fleet import Fleet, fixed_trainer

from edgepriv.errors import WireError
from edgepriv.federated import masking
from edgepriv.primitives import sharing
from edgepriv.wire import message, rounds
from edgepriv.wire.rounds import Reveal
from gateway.unmasking import MAX_SEARCHES, Seeds, UnfinishedError

N, T = 64, 33


def _column():
    secret = os.urandom(16)
    commitment = masking.commit("self", secret)
    return secret, dict(enumerate(sharing.split(secret, T, N))), lambda s: masking.commit("self", s) == commitment


def _lie(shares, liars):
    return {p: os.urandom(16) if p in liars else share for p, share in shares.items()}


@pytest.mark.parametrize("liars", [{0}, {20}, {0, 31}, {0, 31, 63}, set(range(15)), set(range(0, 60, 4))])
def test_sixty_four_members_and_up_to_fifteen_wrong_shares_anywhere(liars):
    seeds = Seeds()
    for position in range(6):
        secret, shares, fits = _column()
        assert seeds.seed(position, _lie(shares, liars), [T, 43], fits) == secret
    assert seeds.wrong == liars
    assert seeds.searches == (1 << 30) - 1, "they were searched for once"


def test_more_wrong_shares_than_can_be_told_apart_give_no_seed():
    _, shares, fits = _column()
    seeds, liars = Seeds(), set(range(16))
    with pytest.raises(WireError, match="do not fit"):
        seeds.seed(0, _lie(shares, liars), [T], fits)
    assert seeds.wrong == set()


@pytest.mark.parametrize(("revealed", "liars"), [(34, {5}), (35, {0, 31}), (36, {2, 30})])
def test_where_hardly_more_than_the_threshold_reveal_one_or_two_wrong_shares_are_found_by_trying(revealed, liars):
    secret, shares, fits = _column()
    few = {p: s for p, s in _lie(shares, liars).items() if p < revealed}
    seeds = Seeds()
    assert seeds.seed(0, few, [T, 43], fits) == secret
    assert seeds.wrong == liars


def test_shares_of_another_length_are_wrong_and_nothing_else_happens():
    secret, shares, fits = _column()
    seeds = Seeds()
    assert seeds.seed(0, {**shares, 7: b"short", 8: b""}, [T], fits) == secret
    assert seeds.wrong == {7, 8}


def test_an_attempt_is_bounded_and_the_next_one_goes_on_from_it():
    columns = [_column() for _ in range(4)]
    lies = [_lie(shares, {2 * k, 2 * k + 1}) for k, (_, shares, _) in enumerate(columns)]
    seeds, attempts = Seeds(), 0
    for _ in range(10):
        seeds.searches, attempts = MAX_SEARCHES, attempts + 1
        try:
            found = [seeds.seed(k, lies[k], [T], fits) for k, (_, _, fits) in enumerate(columns)]
            break
        except UnfinishedError:
            continue
    assert found == [secret for secret, _, _ in columns]
    assert attempts == 2
    assert seeds.wrong == set(range(8))


def _round(tmp_path, n, liars, **options):
    """A masked round in which these members' reveals are altered on the way; the fleet and its record."""
    deltas = [np.full(8, i / 64, np.float32) for i in range(n)]
    fleet = Fleet(tmp_path, [fixed_trainer({"w": d}, 1) for d in deltas])
    take, spent = fleet.conductor.on_message, []

    def lying(device, outer, now):
        if outer.step == "reveal" and device in liars:
            body = message.decode(outer.body)
            outer = dataclasses.replace(
                outer, body=message.encode(Reveal(body.members, tuple(os.urandom(16) for _ in body.shares)))
            )
        return take(device, outer, now)

    fleet.conductor.on_message = lying
    plan = fleet.plan({"w": np.zeros(8, np.float32)}, privacy="masked", max_weight=1, min_cohort=3, **options)
    fleet.open(plan)
    tick = fleet.conductor.tick

    def timed(now):
        began = time.process_time()
        out = tick(now)
        spent.append(time.process_time() - began)
        return out

    fleet.conductor.tick = timed
    return fleet, fleet.run(), max(spent)


def test_a_round_over_sixty_four_devices_ends_though_two_of_them_reveal_wrong_shares(tmp_path):
    fleet, record, longest = _round(tmp_path, 64, {"dev-000", "dev-031"})
    assert record.outcome == "done", record.reason
    assert len(record.participants) == 64
    assert np.allclose(fleet.weights(record)["w"], sum(range(64)) / 64 / 64, atol=1e-3)
    assert fleet.conductor.counters["shares_wrong"] == 2
    assert longest < 10, "a tick is far shorter than the watchdog's 30 s"


def test_too_many_wrong_shares_end_the_round_with_that_reason(tmp_path):
    _, record, _ = _round(tmp_path, 6, {"dev-000", "dev-001", "dev-002"})
    assert record.outcome == "aborted"
    assert "too many of them are wrong" in record.reason


def test_members_who_share_by_the_higher_threshold_are_understood(tmp_path):
    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.ones(8)}, 1) for _ in range(9)])
    for participant in list(fleet.devices.values())[:4]:
        participant.policy = dataclasses.replace(participant.policy, active=True)
    fleet.open(fleet.plan({"w": np.zeros(8, np.float32)}, privacy="masked", max_weight=1, min_cohort=3))
    record = fleet.run()
    assert record.outcome == "done", record.reason
    assert np.allclose(fleet.weights(record)["w"], 1.0, atol=1e-3)


@pytest.mark.parametrize("key", ["share_key", "mask_key"])
def test_a_member_whose_key_agrees_on_nothing_does_not_get_into_the_cohort(tmp_path, key):
    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.ones(8)}, 1) for _ in range(5)])
    take = fleet.conductor.on_message

    def poisoned(device, outer, now):
        if outer.step == "join" and device == "dev-000":
            body = message.decode(outer.body)
            advert = dataclasses.replace(rounds.read_advert(body.advert, fleet.trust), **{key: bytes(32)})
            signed = rounds.sign_advert(advert, fleet.devices[device].identity)
            outer = dataclasses.replace(outer, body=message.encode(dataclasses.replace(body, advert=signed)))
            with pytest.raises(WireError):
                take(device, outer, now)
            return []
        return take(device, outer, now)

    fleet.conductor.on_message = poisoned
    plan = {"privacy": "masked", "max_weight": 1, "min_cohort": 3}
    fleet.open(fleet.plan({"w": np.zeros(8, np.float32)}, **plan))
    record = fleet.run()
    assert record.outcome == "done", record.reason
    assert record.participants == ("dev-001", "dev-002", "dev-003", "dev-004")
