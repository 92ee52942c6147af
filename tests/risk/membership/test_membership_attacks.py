"""Each attack against a slow reference, on arrays where leakage was planted, and on arrays where there is none."""

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from edgepriv.errors import ConfigError, DataError
from edgepriv.risk.membership import attacks, audit, evaluate, released_set, scores


@pytest.fixture
def planted():
    """Scores of 16 models on 600 records; members score higher by half a standard deviation of the noise."""
    rng = np.random.default_rng(0)
    masks = scores.draw_masks(16, 600, rng)
    hardness = rng.normal(0, 3, 600)
    values = hardness + 0.7 * masks + rng.normal(0, 0.5, masks.shape)
    return values, masks


def split(planted, k=0):
    values, masks = planted
    return values[k], np.delete(values, k, 0), np.delete(masks, k, 0), masks[k]


def test_lira_equals_the_formula_written_out(planted):
    target, shadow, masks, _ = split(planted)
    good = scores.calibrated_records(masks)
    inside = [np.median(shadow[masks[:, i], i]) for i in np.nonzero(good)[0]]
    outside = [np.median(shadow[~masks[:, i], i]) for i in np.nonzero(good)[0]]
    columns = np.nonzero(good)[0]
    in_residuals = np.concatenate([shadow[masks[:, i], i] - m for i, m in zip(columns, inside, strict=True)])
    out_residuals = np.concatenate([shadow[~masks[:, i], i] - m for i, m in zip(columns, outside, strict=True)])
    s1, s0 = (in_residuals**2).mean(), (out_residuals**2).mean()
    for column, m1, m0 in zip(columns, inside, outside, strict=True):
        expected = -((target[column] - m1) ** 2) / (2 * s1) + (target[column] - m0) ** 2 / (2 * s0)
        assert attacks.lira(target, shadow, masks)[column] == pytest.approx(expected)
        break
    found = attacks.lira(target, shadow, masks)
    expected = -((target[good] - inside) ** 2) / (2 * s1) + (target[good] - outside) ** 2 / (2 * s0)
    assert np.allclose(found[good], expected)
    assert np.isnan(found[~good]).all()


def test_rmia_equals_the_formula_written_out(planted):
    target, shadow, masks, _ = split(planted)
    target, shadow = target - 20, shadow - 20  # log-probabilities
    everyone = target - np.log(np.exp(shadow).mean(axis=0))
    assert np.allclose(attacks.rmia_all(target, shadow, masks), everyone)
    out = [target[i] - math.log(np.exp(shadow[~masks[:, i], i]).mean()) for i in range(len(target))]
    assert np.allclose(attacks.rmia_out(target, shadow, masks), out)
    difference = [target[i] - shadow[~masks[:, i], i].mean() for i in range(len(target))]
    assert np.allclose(attacks.calibrated_difference(target, shadow, masks), difference)


def test_blocks_change_nothing(planted, monkeypatch):
    target, shadow, masks, _ = split(planted)
    whole = [a(target, shadow, masks) for a in (attacks.lira, attacks.rmia_all, attacks.rmia_out)]
    monkeypatch.setattr(attacks, "BLOCK", 7)
    parts = [a(target, shadow, masks) for a in (attacks.lira, attacks.rmia_all, attacks.rmia_out)]
    assert all(np.allclose(w, p, equal_nan=True) for w, p in zip(whole, parts, strict=True))


def test_calibration_finds_what_a_threshold_misses(planted):
    target, shadow, masks, members = split(planted)
    weak = evaluate.auc(attacks.threshold(target), members)
    assert weak < 0.62
    for attack in (attacks.lira, attacks.calibrated_difference):
        assert evaluate.auc(attack(target, shadow, masks), members) > 0.8


def test_agreement_is_the_share_of_noisy_copies_that_keep_their_label():
    images = np.zeros((40, 6, 6, 1), np.uint8)
    images[20:] = 128  # on the edge of the rule below: noise flips these, never the black ones
    labels = np.array([0] * 20 + [1] * 20)
    votes = attacks.agreement(lambda x: (x.mean(axis=(1, 2, 3)) > 127).astype(np.int64), images, labels)
    assert (votes[:20] == 1.0).all()
    assert 0.2 < votes[20:].mean() < 0.8


def test_nearness_equals_brute_force_and_respects_classes():
    rng = np.random.default_rng(3)
    images, made = (rng.integers(0, 256, (n, 5, 5, 3), dtype=np.uint8) for n in (50, 70))
    labels, made_labels = rng.integers(0, 3, 50), rng.integers(0, 2, 70)
    found = released_set.nearness(images, labels, made, made_labels)
    for i in range(50):
        same = made[made_labels == labels[i]].reshape(-1, 75) / 255.0
        away = np.sqrt(((images[i].reshape(75) / 255.0 - same) ** 2).sum(1)).min() if len(same) else math.sqrt(75)
        assert found[i] == pytest.approx(-away, abs=1e-4)
    with pytest.raises(DataError, match="records are"):
        released_set.nearness(images, labels, made[:, :4], made_labels)


def test_features_do_not_depend_on_which_gram_matrix_is_used():
    from edgepriv.risk.membership.shadows import _principal_axes

    rows = np.random.default_rng(7).normal(size=(40, 40)).astype(np.float32) * np.arange(1, 41)
    tall = _principal_axes(np.vstack([rows, np.zeros((1, 40), np.float32)]), 3)
    wide = _principal_axes(np.hstack([rows, np.zeros((40, 1), np.float32)]), 3)
    assert np.allclose(np.abs((tall * wide[:40]).sum(axis=0)), 1.0, atol=1e-3)


def test_margins_and_log_probabilities_come_from_logits():
    rng = np.random.default_rng(4)
    logits, labels = rng.normal(size=(3, 20, 5)), rng.integers(0, 5, 20)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    own = p[:, np.arange(20), labels]
    assert np.allclose(scores.log_probability(logits, labels), np.log(own))
    assert np.allclose(scores.margin(logits, labels), np.log(own / (1 - own)))
    assert scores.margin(1000 * logits, labels).max() <= 30
    with pytest.raises(DataError, match="do not fit"):
        scores.margin(logits, labels + 5)


def test_auc_and_rates_equal_the_reference_with_ties():
    rng = np.random.default_rng(5)
    values, members = rng.integers(0, 20, 500).astype(float), rng.random(500) < 0.4
    assert evaluate.auc(values, members) == pytest.approx(roc_auc_score(members, values))
    values[3] = np.nan
    keep = np.isfinite(values)
    assert evaluate.auc(values, members) == pytest.approx(roc_auc_score(members[keep], values[keep]))


def test_a_tied_block_that_does_not_fit_the_budget_gives_nothing():
    values = np.array([1.0] * 100 + [1.0] * 100)
    members = np.arange(200) < 100
    assert evaluate.true_positive_rate(values, members, 0.5) == 0.0
    values[:30] = 2.0
    assert evaluate.true_positive_rate(values, members, 0.01) == pytest.approx(0.3)
    assert evaluate.true_positive_rate(values, members, 0.001) is None


def test_the_bootstrap_interval_holds_the_truth_at_about_its_rate():
    truth, held = 0.7602, 0  # AUC of two unit Gaussians one apart is Phi(1 / sqrt 2)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        members = rng.random(400) < 0.5
        low, high = evaluate.bootstrap_interval([rng.normal(size=400) + members], [members], rng, draws=150)
        held += low <= truth <= high
    assert held >= 51


def all_attacks_on_noise(masks, rng):
    """AUC of every calibrated attack on random scores, leave-one-out."""
    noise = rng.standard_normal(masks.shape)
    aucs: dict[str, list[float]] = {}
    for k in range(len(masks)):
        view = audit.TargetView(
            margins=noise[k], log_probabilities=noise[k] - 5, nearness=noise[k], agreements=noise[k],
            shadow_masks=np.delete(masks, k, 0), shadow_margins=np.delete(noise, k, 0),
            shadow_log_probabilities=np.delete(noise, k, 0) - 5, shadow_nearness=np.delete(noise, k, 0),
            shadow_agreements=np.delete(noise, k, 0),
        )  # fmt: skip
        for name, values in audit.attack_target(view).items():
            aucs.setdefault(name, []).append(evaluate.auc(values, masks[k]))
    return {name: float(np.mean(values)) for name, values in aucs.items()}


def test_every_attack_reads_one_half_on_noise_with_independent_masks_and_lira_does_not_with_balanced_ones():
    rng = np.random.default_rng(6)
    independent = [all_attacks_on_noise(scores.draw_masks(16, 2000, rng), rng) for _ in range(6)]
    for name in independent[0]:
        assert np.mean([run[name] for run in independent]) == pytest.approx(0.5, abs=0.01), name
    balanced = []
    for _ in range(3):
        masks = np.argsort(rng.random((8, 2000)), axis=0) < 4
        balanced.append(all_attacks_on_noise(masks, rng)["lira"])
    assert np.mean(balanced) < 0.475  # the design itself pushes LiRA below one half


def shadow_scores(planted, **changes):
    from edgepriv.risk.membership.shadows import ShadowScores

    values, masks = planted
    rng = np.random.default_rng(8)
    fields = {
        "masks": masks, "margins": values, "log_probabilities": values - 20, "agreements": np.round(values),
        "nearness": None, "reference_margins": rng.normal(size=(16, 200)), "features": rng.normal(size=(600, 3)),
        "reference_features": rng.normal(size=(200, 3)), "accuracies": np.full(16, 0.9),
    }  # fmt: skip
    return ShadowScores(**{**fields, **changes})


def test_a_report_names_the_strongest_attack_and_carries_its_nulls(planted):
    found = audit.audit_shadows(shadow_scores(planted), np.random.default_rng(0))
    assert found.strongest.attack in {"lira", "rmia_out", "rmia_all"}
    assert found.strongest.auc == max(a.auc for a in found.attacks)
    low, high = found.strongest.auc_interval
    assert low < found.strongest.auc < high
    assert found.null_holds
    assert found.noise_null == pytest.approx(0.5, abs=0.04)
    assert found.exceeds(audit.Limits(0.6, 1.0))
    assert found.outcome() == "leak"
    assert found.as_json()["max_tpr_at_1pct"]["tpr"] == max(round(a.tpr_at_1pct, 4) for a in found.attacks)
    assert not found.weak
    assert found.one_run_epsilon > 0
    assert found.verdict().startswith("Leak")
    keys = {"strongest", "auc", "auc_interval", "tpr_at_1pct", "null_auc"}
    assert keys <= set(found.as_json())
    assert found.strongest.tpr_at_01pct is None  # fewer than 5000 non-members


def test_a_balanced_design_and_few_shadows_are_warned_of(planted):
    rng = np.random.default_rng(9)
    masks = np.argsort(rng.random((8, 600)), axis=0) < 4
    values = rng.normal(size=(8, 600))
    balanced = shadow_scores((values, masks), reference_margins=rng.normal(size=(8, 200)), accuracies=np.full(8, 0.9))
    warnings = " ".join(audit._warnings(balanced.masks))
    assert "balanced" in warnings
    assert "fewer than 15" in warnings


def test_without_shadows_the_verdict_says_that_it_is_weak(planted):
    _, _, _, members = split(planted)
    rng = np.random.default_rng(0)
    view = audit.TargetView(margins=np.random.default_rng(1).normal(size=600))
    found = audit.report([audit.attack_target(view)], [members], rng)
    assert found.weak
    assert "does not show safety" in found.verdict()
    with pytest.raises(DataError, match="no attack"):
        audit.report([audit.attack_target(audit.TargetView())], [members], rng)


def test_a_wrong_evaluation_is_called_void(planted):
    found = audit.audit_shadows(shadow_scores(planted), np.random.default_rng(0), targets=2)
    object.__setattr__(found, "null_auc", 0.7)
    assert found.verdict().startswith("Void")


@pytest.mark.parametrize(
    ("count", "rate", "ok"), [(11, 0.01, False), (12, 0.01, True), (14, 0.001, False), (15, 0.001, True)]
)
def test_too_few_shadows_for_a_rate_are_refused(count, rate, ok):
    if ok:
        scores.check_shadow_count(count, rate)
    else:
        with pytest.raises(ConfigError, match="too few for a false-positive rate"):
            scores.check_shadow_count(count, rate)


def test_arrays_that_do_not_belong_together_are_refused(planted):
    target, shadow, masks, members = split(planted)
    with pytest.raises(DataError, match="do not fit"):
        attacks.lira(target[:-1], shadow, masks)
    with pytest.raises(DataError, match="booleans"):
        attacks.lira(target, shadow, masks.astype(float))
    with pytest.raises(DataError, match="finite"):
        attacks.rmia_all(np.full_like(target, np.nan), shadow, masks)
    with pytest.raises(DataError, match="one of them is missing"):
        evaluate.auc(target, np.ones_like(members))
