"""Adaptive clipping: the count of devices within the clip, its noise and its price, in clear and in masked rounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from round_fleet import Fleet, fixed_trainer

from edgepriv.errors import ConfigError
from edgepriv.federated.participant import RoundPolicy
from edgepriv.federated.privacy import joint_multiplier, next_clip
from gateway.accounting import spent_epsilon

SIZE = 400
BASE = {"w": np.zeros(SIZE, np.float32)}
NOISY = {"noise_multiplier": 1.0, "max_weight": 1, "clip_noise": 0.4}


def _fleet(folder, norms, **kwargs):
    direction = np.full(SIZE, 1 / math.sqrt(SIZE))
    return Fleet(folder, [fixed_trainer({"w": direction * n}, 5) for n in norms], **kwargs)


def _plan(fleet, **kwargs):
    options = {"adaptive_clip": True, "clip": 1.0, "fraction_bits": 16, "min_cohort": 3}
    return fleet.plan(BASE, **{**options, **kwargs})


@pytest.mark.parametrize("options", [{}, {"privacy": "masked"}, {"privacy": "masked", "max_cohort": 4}])
def test_the_count_is_exact_without_noise_and_moves_the_clip_towards_the_quantile(tmp_path, options):
    fleet = _fleet(tmp_path, [0.5, 0.9, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    fleet.open(_plan(fleet, **options))
    record = fleet.run()
    assert record.outcome == "done", record.reason
    assert record.within == pytest.approx(2 / 8)
    assert record.clip_after == pytest.approx(math.exp(-0.2 * (0.25 - 0.5)))
    assert fleet.weights(record)["w"].sum() == pytest.approx(math.sqrt(SIZE) * (0.5 + 0.9 + 6) / 8, rel=1e-3)


@pytest.mark.parametrize("privacy", ["clear", "masked"])
def test_over_rounds_the_clip_comes_to_the_quantile_of_the_norms(tmp_path, privacy):
    fleet, clip = _fleet(tmp_path, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]), 0.5
    for number in range(1, 13):
        fleet.open(_plan(fleet, round=number, clip=clip, clip_rate=1.0, clip_quantile=0.75, privacy=privacy))
        clip = fleet.run().clip_after
    assert 5 <= clip <= 8


@pytest.mark.parametrize(("privacy", "noise"), [("clear", "central"), ("masked", "distributed")])
def test_the_count_is_noised_and_charged_at_the_gateway_and_on_the_device(tmp_path, privacy, noise):
    pytest.importorskip("dp_accounting")
    fleet, shares = _fleet(tmp_path, [0.5] * 4 + [2.0] * 4), []
    for number in range(1, 21):
        options = {**NOISY, "clip_noise": 0.8, "privacy": privacy, "noise": noise, "min_cohort": 8, "quorum": 8}
        fleet.open(_plan(fleet, round=number, **options))
        record = fleet.run()
        assert record.outcome == "done", record.reason
        shares.append(record.within)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.09)
    assert np.std(shares) == pytest.approx(0.8 / 8, rel=0.5)
    joint = joint_multiplier(1.0, 0.8, adaptive=True)
    assert joint == pytest.approx((1 + 1 / 1.6**2) ** -0.5)
    row = {"noise": noise, "noise_multiplier": joint, "participation": "all", "invited": 8, "population": 8}
    assert record.epsilon == pytest.approx(spent_epsilon([{**row, "sample_share": 1.0}] * 20, 1e-5))
    device = next(iter(fleet.devices.values()))
    assert {z for _, z in device.ledger.rows()} == {joint}


def test_the_count_costs_and_less_noise_on_it_costs_more():
    pytest.importorskip("dp_accounting")
    row = {"noise": "distributed", "noise_multiplier": 1.0, "participation": "all", "invited": 9, "population": 9}
    row |= {"sample_share": 1.0}
    plain = spent_epsilon([row], 1e-5)
    dear = spent_epsilon([{**row, "adaptive_clip": True, "clip_noise": 0.3}], 1e-5)
    cheap = spent_epsilon([{**row, "adaptive_clip": True, "clip_noise": 10.0}], 1e-5)
    assert plain < cheap < dear
    assert cheap == pytest.approx(plain, rel=0.01)


def test_a_device_with_a_budget_counts_the_count(tmp_path):
    policy = RoundPolicy(trainable=("*",), min_cohort=3, max_epsilon=6.0)
    fleet = _fleet(tmp_path, [1.0] * 4, policy=policy)
    options = {**NOISY, "privacy": "masked", "noise": "distributed", "deadline_s": 10, "clip_noise": 20.0}
    fleet.open(_plan(fleet, **options))
    assert fleet.run().outcome == "done"
    fleet = _fleet(tmp_path / "2", [1.0] * 4, policy=policy)
    fleet.open(_plan(fleet, **{**options, "clip_noise": 0.4}))
    assert "budget would be passed" in fleet.run().rejected[0][1]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rule": "trimmed"}, "nobody can be counted"),
        ({"rule": "fltrust", "reference": b"r" * 32}, "nobody can be counted"),
        ({"late": "next"}, "devices of this round"),
        ({"noise": "central", "noise_multiplier": 1.0, "max_weight": 1}, "clip_noise"),
        ({"clip_noise": 1.0}, "clip_noise"),
        ({"clip_quantile": 1.0}, "clip_quantile"),
    ],
)
def test_where_it_cannot_work_it_is_refused_with_the_reason(tmp_path, options, why):
    with pytest.raises(ConfigError, match=why):
        _plan(_fleet(tmp_path, []), **options)


def test_an_update_that_does_not_say_whether_it_was_within_the_clip_is_refused(tmp_path):
    fleet = _fleet(tmp_path, [0.5, 2.0, 2.0])
    fleet.tamper = {"dev-000": lambda raw: raw.replace(b"fwithin\xf5", b"fwithin\xf6")}
    fleet.open(_plan(fleet, deadline_s=10))
    record = fleet.run()
    assert record.participants == ("dev-001", "dev-002")
    assert "within the clip" in dict(record.rejected)["dev-000"]


def test_the_next_clip_is_bounded_however_noisy_the_count_is():
    for share in (-50.0, 0.0, 1.0, 50.0):
        assert math.exp(-0.1) <= next_clip(1.0, share, quantile=0.5, rate=0.2) <= math.exp(0.1)
