"""The head's bound equals brute force; recovery is exact for one image; the self-check acts as its policy says."""

import time

import numpy as np
import pytest

from edgepriv.errors import ConfigError, DataError, RefusedError
from edgepriv.federated import compression, head_leakage
from edgepriv.federated import self_check as self_check_module
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


def test_derivatives_far_above_the_noise_give_everything_away_and_break_nothing():
    block = np.zeros((3, 2))
    block[:2] = 1e9  # two features of which only the sum is seen, and one that is not: I is lost beside 1e36
    jacobian = head_leakage.HeadJacobian((block,), np.ones(3), joint=False, seconds=0.0)
    found = head_leakage.feature_bound(jacobian, 1e-9)
    assert 1 / 3 - 1e-6 <= found.explained_variance <= 2 / 3 + 1e-6, "it errs on the side of more known"


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
    assert (checked.action, checked.within_limits) == ("drop_bn", None)  # no bound was computed: nothing is claimed
    assert set(checked.update) == {"head.weight", "head.bias"}
    assert not self_check(_update(), RECIPE, CheckPolicy("drop_bn"), n_images=20).record()["sigma"]


def test_policy_refuse_lets_nothing_out_and_a_harmless_update_passes():
    with pytest.raises(RefusedError, match="BatchNorm"):
        self_check(_update(), RECIPE, CheckPolicy("refuse"), n_images=20)
    passed = self_check(_update(statistics=False), RECIPE, CheckPolicy("refuse"), n_images=20)
    assert (passed.action, passed.within_limits) == ("send", None)


def _one_image(n=1, d=32, classes=10):
    """A head-only update of one image, and how far the best row of dW/db is from its features."""
    head, x, y = _case(n=n, d=d, classes=classes)
    recipe = LocalRecipe(0.1, batch_size=n)
    update = train_head(head, x, y, recipe, seed=0)

    def error(sent):
        rows, _ = head_leakage.recover_features(sent)
        return min((np.linalg.norm(r - f) / np.linalg.norm(f) for r in rows for f in x), default=np.inf)

    return update, recipe, error, {"n_images": n, "head": head, "features": x, "labels": y}


def test_by_default_the_recovery_that_works_on_a_head_only_update_is_stopped():
    update, recipe, error, known = _one_image()
    checked = self_check(update, recipe, CheckPolicy(), rng=np.random.default_rng(0), **known)
    assert error(update) < 0.01
    assert checked.action == "add_noise"
    assert checked.explained_variance <= CheckPolicy().max_explained_variance
    assert error(checked.update) > 0.5
    assert checked.within_limits is False  # one image is still one image
    assert self_check(update, recipe, CheckPolicy(min_images=1), **known).within_limits is True


def test_dropping_statistics_alone_is_no_protection_of_a_head_and_is_not_called_one():
    update, recipe, error, known = _one_image()
    checked = self_check(update, recipe, CheckPolicy("drop_bn", min_images=1), **known)
    assert (checked.action, checked.within_limits) == ("send", False)
    assert error(checked.update) < 0.01


def test_what_float32_rounds_away_hides_nothing_so_refuse_refuses():
    update, recipe, _, known = _one_image(n=12)
    with pytest.raises(RefusedError, match="worst example"):
        self_check(update, recipe, CheckPolicy("refuse"), **known)
    sent = self_check(update, recipe, CheckPolicy("send"), **known)
    assert sent.explained_variance > 0.9
    assert sent.within_limits is False


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8", "topk", "randomk"])
def test_what_an_encoding_rounds_away_is_what_it_does_round_away(encoding):
    from types import SimpleNamespace

    update, _, _, known = _one_image(n=12)
    said = self_check_module.rounding(update, known["head"], encoding)
    flat = np.concatenate([update[name].ravel() for name in ("head.weight", "head.bias")]).astype(float)
    arrays, scales = compression.compress(
        update, SimpleNamespace(encoding=encoding, keep=1.0, clip=1e9, seed=b""), feedback={}
    )
    if encoding in {"topk", "randomk", "float32"}:
        assert said.max() < 1e-6
        return
    back = np.concatenate([arrays[n].ravel().astype(float) * scales.get(n, 1.0) for n in update])
    assert 0.5 < np.sqrt(np.mean((back - flat) ** 2) / np.mean(said**2)) < 1.5


def test_noise_is_never_less_than_was_there_and_never_raises_what_is_given_away():
    update, recipe, _, known = _one_image(n=3)
    policy = CheckPolicy("add_noise", noise_sigma=10.0)  # more than enough, added elsewhere
    checked = self_check(update, recipe, policy, **known)
    before = next(f.value for f in checked.findings if f.code == "features")
    assert before < policy.max_explained_variance
    assert checked.explained_variance == before
    assert (checked.action, checked.sigma) == ("send", 0.0)
    assert checked.within_limits is False  # three images are few, and noise does not change that
    assert all(np.array_equal(checked.update[name], update[name]) for name in update)


def test_the_bound_of_a_head_says_nothing_of_an_update_that_trains_more():
    update, recipe, _, known = _one_image(n=12)
    checked = self_check({**update, "conv.weight": np.ones((2, 2), np.float32)}, recipe, CheckPolicy(), **known)
    assert (checked.explained_variance, checked.within_limits) == (None, None)


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
    with pytest.raises(ConfigError, match="encoding"):
        CheckPolicy(encoding="float8")
