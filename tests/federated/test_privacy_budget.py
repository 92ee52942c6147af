"""The privacy that rounds spend: the device's exact ledger, the gateway's accountant, budgets that stop a round."""

from __future__ import annotations

import math

import numpy as np
import pytest
from round_fleet import Fleet, fixed_trainer

from edgepriv.errors import ConfigError, RefusedError
from edgepriv.federated.ledger import Ledger, delta_of, epsilon_of
from edgepriv.federated.noise import NoiseStream, device_deviation
from edgepriv.federated.participant import RoundPolicy
from edgepriv.federated.privacy import clip_update, update_norm
from gateway.accounting import spent_epsilon

ZERO = {"w": np.zeros(3000, np.float32)}


def _rounds(count, **kwargs):
    base = {"noise": "distributed", "noise_multiplier": 1.0, "participation": "all", "invited": 10}
    base |= {"population": 100, "sample_share": 0.1}
    return [{**base, **kwargs}] * count


def test_the_ledger_is_exact_and_the_accountant_bounds_it_closely():
    pytest.importorskip("dp_accounting")
    ledger = Ledger()
    for number in range(20):
        ledger.charge(number, 4.0)
    exact, bound = ledger.epsilon(1e-5), spent_epsilon(_rounds(20, noise_multiplier=4.0), 1e-5)
    assert exact <= bound <= 1.15 * exact
    assert epsilon_of(math.sqrt(20) / 4, 1e-5) == exact
    assert delta_of(exact, math.sqrt(20) / 4) == pytest.approx(1e-5, rel=1e-6)


def test_the_gaussian_delta_matches_the_published_value():
    # Balle & Wang 2018: at mu = 1 and epsilon = 1, delta = Phi(-1/2) - e Phi(-3/2)
    assert delta_of(1.0, 1.0) == pytest.approx(0.1269367, abs=1e-6)


def test_only_independent_coin_flips_are_amplified_as_poisson():
    pytest.importorskip("dp_accounting")
    plain = spent_epsilon(_rounds(100), 1e-5)
    poisson = spent_epsilon(_rounds(100, noise="central", participation="poisson"), 1e-5)
    fixed = spent_epsilon(_rounds(100, noise="central", participation="fixed"), 1e-5)
    distributed = spent_epsilon(_rounds(100, noise="distributed", participation="poisson"), 1e-5)
    assert poisson < plain / 5
    assert poisson < fixed
    assert distributed == plain


def test_no_noise_is_no_promise_and_no_charge():
    assert spent_epsilon(_rounds(3, noise="none"), 1e-5) == 0


def test_distributed_noise_gives_the_sum_its_deviation_and_the_records_its_epsilon(tmp_path):
    pytest.importorskip("dp_accounting")
    n, clip, z = 8, 1.0, 0.5
    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.zeros(3000)}, 5) for _ in range(n)])
    options = {"privacy": "masked", "noise": "distributed", "noise_multiplier": z, "max_weight": 1, "clip": clip}
    fleet.open(fleet.plan(ZERO, min_cohort=n, colluders=2, **options))
    record = fleet.run()
    assert record.outcome == "done", record.reason
    total = fleet.weights(record)["w"].astype(np.float64) * n
    assert total.std() == pytest.approx(z * clip * math.sqrt(n / (n - 2)), rel=0.06)
    assert record.epsilon == pytest.approx(spent_epsilon(_rounds(1, noise_multiplier=z), 1e-5))
    assert all(p.ledger.epsilon(1e-5) > 0 for p in fleet.devices.values())


def test_central_noise_has_its_deviation(tmp_path):
    pytest.importorskip("dp_accounting")
    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.zeros(3000)}, 5) for _ in range(4)])
    options = {"noise": "central", "noise_multiplier": 2.0, "max_weight": 1, "clip": 1.0, "quorum": 4}
    fleet.open(fleet.plan(ZERO, **options))
    record = fleet.run()
    assert (fleet.weights(record)["w"] * 4).std() == pytest.approx(2.0, rel=0.06)
    assert record.epsilon > 0


def test_a_device_refuses_a_round_past_its_budget_and_says_why(tmp_path):
    policy = RoundPolicy(trainable=("*",), min_cohort=2, max_epsilon=1.0)
    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.zeros(3000)}, 5) for _ in range(3)], policy=policy)
    fleet.open(fleet.plan(ZERO, noise="central", noise_multiplier=0.5, max_weight=1, clip=1.0, deadline_s=10))
    record = fleet.run()
    assert record.outcome == "aborted"
    assert "budget would be passed" in record.rejected[0][1]


def test_a_device_with_a_budget_refuses_rounds_without_noise(tmp_path):
    policy = RoundPolicy(trainable=("*",), min_cohort=2, max_epsilon=1.0)
    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.zeros(3000)}, 5) for _ in range(2)], policy=policy)
    fleet.open(fleet.plan(ZERO, deadline_s=10))
    assert "adds no noise" in fleet.run().rejected[0][1]


def test_the_gateway_starts_no_round_past_its_budget(tmp_path):
    pytest.importorskip("dp_accounting")
    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.zeros(3000)}, 5) for _ in range(2)])
    options = {"noise": "central", "noise_multiplier": 1.0, "max_weight": 1, "clip": 1.0, "max_epsilon": 6.0}
    fleet.open(fleet.plan(ZERO, **options))
    assert fleet.run().outcome == "done"
    with pytest.raises(RefusedError, match="budget"):
        fleet.open(fleet.plan(ZERO, round=2, **options))


def test_an_aborted_round_counts_in_the_ledger(tmp_path):
    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.zeros(3000)}, 5) for _ in range(2)])
    fleet.hold = {"dev-000", "dev-001"}
    fleet.open(fleet.plan(ZERO, noise="central", noise_multiplier=1.0, max_weight=1, clip=1.0, deadline_s=20))
    assert fleet.run().outcome == "aborted"
    assert fleet.devices["dev-000"].ledger.epsilon(1e-5) > 0


def test_batchnorm_statistics_stay_at_home_unless_the_round_covers_them(tmp_path):
    trainer = fixed_trainer({"bn.running_mean": np.ones(3), "w": np.ones(2)}, 5)
    base = {"w": np.zeros(2, np.float32), "bn.running_mean": np.zeros(3, np.float32)}
    with pytest.raises(ConfigError, match="stay at home"):
        Fleet(tmp_path / "1", [trainer]).plan(base)
    fleet = Fleet(tmp_path / "2", [trainer])
    fleet.open(fleet.plan(base, statistics="shared"))
    assert fleet.weights(fleet.run())["bn.running_mean"] == pytest.approx(1.0, abs=1e-3)


def test_clipping_covers_all_tensors_together():
    clipped = clip_update({"a": np.full(4, 3.0, np.float32), "b": np.full(4, 4.0, np.float32)}, 1.0)
    assert update_norm(clipped) == pytest.approx(1.0, abs=1e-5)
    assert update_norm(clipped) <= 1.0


def test_noise_is_normal_and_repeats_only_by_seed():
    samples = NoiseStream(b"seed").normal(200_001)
    assert abs(samples.mean()) < 0.01
    assert samples.std() == pytest.approx(1, abs=0.01)
    assert (np.abs(samples) < 1.96).mean() == pytest.approx(0.95, abs=0.005)
    assert np.array_equal(NoiseStream(b"seed").normal(10), NoiseStream(b"seed").normal(10))
    assert not np.array_equal(NoiseStream().normal(10), NoiseStream().normal(10))


def test_noise_assumes_colluders_leave_theirs_out():
    assert device_deviation(1.0, 100.0, 32, 7) == pytest.approx(20.0)
    with pytest.raises(ValueError, match="outnumber"):
        device_deviation(1.0, 100.0, 5, 5)
