"""The head's bound equals brute force; recovery is exact for one image; the self-check acts as its policy says."""

import time

import numpy as np
import pytest

from edgepriv.errors import ConfigError, DataError, RefusedError
from edgepriv.federated import head_leakage
from edgepriv.federated.head import train_head
from edgepriv.federated.local_recipe import LocalRecipe
from edgepriv.federated.self_check import CheckPolicy, self_check


def _case(n=6, d=5, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    head = {
        "head.weight": rng.normal(size=(classes, d)).astype(np.float32),
        "head.bias": rng.normal(size=classes).astype(np.float32),
    }
    return head, np.abs(rng.normal(size=(n, d))), rng.integers(0, classes, n)


def _train_in_order(head, features, labels, recipe):
    """The same steps as the trainer, in float64 and without shuffling: the brute-force reference."""
    from edgepriv.federated.head import head_gradient

    start = [head["head.weight"].astype(float), head["head.bias"].astype(float)]
    now, velocity = [v.copy() for v in start], [np.zeros_like(v) for v in start]
    for _ in range(recipe.epochs):
        for first in range(0, len(labels), recipe.batch_size):
            rows = slice(first, first + recipe.batch_size)
            for i, g in enumerate(head_gradient(*now, features[rows], labels[rows])):
                change = g + recipe.weight_decay * now[i] + recipe.proximal_mu * (now[i] - start[i])
                velocity[i] = recipe.momentum * velocity[i] + change
            for i in (0, 1):
                now[i] = now[i] - recipe.learning_rate * velocity[i]
    return np.concatenate([(a - b).ravel() for a, b in zip(now, start, strict=True)])


@pytest.mark.parametrize(
    "recipe",
    [LocalRecipe(0.1, batch_size=6), LocalRecipe(0.1, 2, 2, momentum=0.9, weight_decay=0.01, proximal_mu=0.3)],
)
def test_tangents_equal_finite_differences(recipe):
    head, x, y = _case()
    jacobian = head_leakage.head_jacobian(head, x, y, recipe)
    for example, feature in ((0, 0), (5, 3)):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[example, feature] += sign * 1e-5
            ends.append(_train_in_order(head, moved, y, recipe))
        numeric = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(jacobian.blocks[example][feature], numeric, atol=1e-8)


def test_the_bound_equals_the_plain_matrix_formula():
    head, x, y = _case()
    jacobian = head_leakage.head_jacobian(head, x, y, LocalRecipe(0.1, batch_size=3))
    j = np.concatenate(jacobian.blocks).T
    prior = np.tile(jacobian.prior_variance, 6)
    v = np.linalg.inv(j.T @ j / 0.01**2 + np.diag(1 / prior))
    found = head_leakage.feature_bound(jacobian, 0.01)
    assert found.joint
    assert found.explained_variance == pytest.approx(1 - np.trace(v) / prior.sum(), abs=1e-9)


def test_one_image_gives_its_features_exactly_and_more_images_do_not():
    head, x, y = _case(n=1)
    update = train_head(head, x, y, LocalRecipe(0.1), seed=0)
    rows, classes = head_leakage.recover_features(update)
    assert classes.tolist() == y.tolist()
    np.testing.assert_allclose(rows[0], x[0], rtol=1e-3, atol=1e-4)
    head, x, y = _case(n=6)
    rows, _ = head_leakage.recover_features(train_head(head, x, y, LocalRecipe(0.1), seed=0))
    assert min(np.abs(row - f).max() for row in rows for f in x) > 0.05


def test_noise_lowers_the_bound_and_the_least_noise_meets_the_limit():
    head, x, y = _case()
    jacobian = head_leakage.head_jacobian(head, x, y, LocalRecipe(0.1))
    known = [head_leakage.feature_bound(jacobian, s).explained_variance for s in (1e-5, 1e-3, 1e-1, 10)]
    assert known == sorted(known, reverse=True)
    assert known[0] > 0.5
    assert known[-1] < 0.01
    sigma = head_leakage.noise_for(jacobian, 0.2)
    assert max(head_leakage.feature_bound(jacobian, sigma).per_example) <= 0.2
    assert max(head_leakage.feature_bound(jacobian, sigma / 1.2).per_example) > 0.2


def test_too_many_unknowns_fall_back_to_a_higher_ceiling(monkeypatch):
    head, x, y = _case()
    recipe = LocalRecipe(0.1)
    joint = head_leakage.feature_bound(head_leakage.head_jacobian(head, x, y, recipe), 1e-2)
    monkeypatch.setattr(head_leakage, "MAX_JOINT_UNKNOWNS", 3)
    alone = head_leakage.feature_bound(head_leakage.head_jacobian(head, x, y, recipe), 1e-2)
    assert not alone.joint
    assert all(a >= j - 1e-9 for a, j in zip(alone.per_example, joint.per_example, strict=True))


def test_a_demo_sized_head_is_checked_within_seconds():
    head, x, y = _case(n=24, d=64, classes=10)
    began = time.process_time()
    head_leakage.feature_bound(head_leakage.head_jacobian(head, x, y, LocalRecipe(0.1, 8, 2)), 1e-3)
    assert time.process_time() - began < 10


def test_bad_features_are_clear_errors():
    head, x, y = _case()
    with pytest.raises(DataError, match="do not fit"):
        head_leakage.head_jacobian(head, x[:, :3], y, LocalRecipe())
    with pytest.raises(DataError, match="more than 512"):
        head_leakage.head_jacobian(head, np.ones((513, 5)), np.zeros(513, int), LocalRecipe())
    with pytest.raises(DataError, match="above zero"):
        head_leakage.feature_bound(head_leakage.head_jacobian(head, x, y, LocalRecipe()), 0.0)


def _update(statistics=True):
    update = {"head.weight": np.ones((4, 5), np.float32), "head.bias": np.ones(4, np.float32)}
    if statistics:
        update |= {"bn.running_mean": np.ones(3, np.float32), "bn.num_batches_tracked": np.array(2, np.int32)}
    return update


RECIPE = LocalRecipe(0.1, batch_size=10)


def test_policy_send_reports_and_changes_nothing():
    checked = self_check(_update(), RECIPE, CheckPolicy("send"), n_images=20)
    assert checked.action == "send"
    assert not checked.within_limits
    assert "statistics" in {f.code for f in checked.findings}
    assert set(checked.update) == set(_update())


def test_policy_drop_bn_keeps_statistics_at_home():
    checked = self_check(_update(), RECIPE, CheckPolicy("drop_bn"), n_images=20)
    assert (checked.action, checked.within_limits) == ("drop_bn", True)
    assert set(checked.update) == {"head.weight", "head.bias"}
    assert not self_check(_update(), RECIPE, CheckPolicy("drop_bn"), n_images=20).record()["sigma"]


def test_policy_refuse_lets_nothing_out_and_a_harmless_update_passes():
    with pytest.raises(RefusedError, match="BatchNorm"):
        self_check(_update(), RECIPE, CheckPolicy("refuse"), n_images=20)
    assert self_check(_update(statistics=False), RECIPE, CheckPolicy("refuse"), n_images=20).within_limits


def test_policy_add_noise_stops_the_recovery_that_works_without_it():
    head, x, y = _case(n=1, d=32, classes=10)
    recipe = LocalRecipe(0.1)
    update = train_head(head, x, y, recipe, seed=0)

    def error(sent):
        rows, _ = head_leakage.recover_features(sent)
        return min((np.linalg.norm(r - x[0]) / np.linalg.norm(x[0]) for r in rows), default=np.inf)

    policy = CheckPolicy("add_noise")
    checked = self_check(
        update, recipe, policy, n_images=1, rng=np.random.default_rng(0), head=head, features=x, labels=y
    )
    assert error(update) < 0.01
    assert checked.action == "add_noise"
    assert checked.explained_variance <= policy.max_explained_variance
    assert error(checked.update) > 0.5


def test_masked_rounds_are_reported_and_left_alone():
    checked = self_check(_update(), RECIPE, CheckPolicy("refuse", masked=True), n_images=20)
    assert checked.action == "send"
    assert checked.within_limits


def test_contradicting_counters_nan_and_unknown_policies_are_clear_errors():
    with pytest.raises(DataError, match="counted 2 batches"):
        self_check(_update(), LocalRecipe(0.1, batch_size=4), CheckPolicy(), n_images=20)
    with pytest.raises(DataError, match="NaN"):
        self_check({"w": np.array([np.nan])}, RECIPE, CheckPolicy(), n_images=20)
    with pytest.raises(DataError, match="empty"):
        self_check({}, RECIPE, CheckPolicy(), n_images=20)
    with pytest.raises(ConfigError, match="unknown"):
        CheckPolicy("hope")
