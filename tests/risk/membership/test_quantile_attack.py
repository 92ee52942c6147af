"""Quantile regression: right coverage, and more found than by one threshold where records differ in hardness."""

import numpy as np
import pytest
import torch

from edgepriv import datasets
from edgepriv.errors import DataError
from edgepriv.risk.membership import audit, evaluate, scores, shadows
from edgepriv.risk.membership.classifier import Recipe, logits, train_classifier
from edgepriv.risk.membership.quantile import LEVELS, MIN_REFERENCES, quantile, quantile_curves


def hardness(features):
    """How a record scores for reasons of its own: bent and crossed, so that no straight line follows it."""
    return 4 * np.abs(features[:, 0]) + 3 * (features[:, 1] * features[:, 2] > 0)


def straight_line(target, features, reference, reference_features):
    """Residual of a least-squares line: what a linear regressor can take off."""
    design, asked = (np.hstack([np.ones((len(f), 1)), f]) for f in (reference_features, features))
    return target - asked @ np.linalg.lstsq(design, reference, rcond=None)[0]


def test_it_finds_members_that_neither_a_threshold_nor_a_line_can_tell():
    rng = np.random.default_rng(1)
    features, known = rng.normal(size=(2000, 3)), rng.normal(size=(1500, 3))
    members = rng.random(2000) < 0.5
    target = hardness(features) + 1.5 * members + rng.normal(0, 0.7, 2000)
    reference = hardness(known) + rng.normal(0, 0.7, 1500)
    found = quantile(target, features, reference, known)
    assert evaluate.auc(target, members) < 0.66
    assert evaluate.auc(straight_line(target, features, reference, known), members) < 0.66
    assert evaluate.auc(found, members) > 0.85
    assert evaluate.true_positive_rate(found, members, 0.01) > 2 * evaluate.true_positive_rate(target, members, 0.01)


def test_on_a_trained_model_it_beats_the_threshold_where_half_of_the_pictures_are_bad():
    """Dim and grainy pictures score low, members or not; what is seen of a picture takes that off again."""
    torch.set_num_threads(1)
    data = datasets.load("digits", split="all")
    gains = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        order, bad = rng.permutation(len(data)), rng.random(len(data)) < 0.5
        images, labels = data.images[order].astype(np.float64), data.labels[order]
        images[bad] = images[bad] * 0.25 + rng.normal(0, 60, images[bad].shape)
        images = np.clip(images, 0, 255).astype(np.uint8)
        model = train_classifier(images[:500], labels[:500], 10, Recipe(epochs=40), seed=seed)
        phi = scores.margin(logits(model, images), labels)
        members = np.arange(1000) < 500
        own, known = shadows.features_of(images[:1000], labels[:1000], images[1000:], labels[1000:])
        found = quantile(phi[:1000], own, phi[1000:], known)
        gains.append(evaluate.auc(found, members) - evaluate.auc(phi[:1000], members))
    assert min(gains) > 0.015, gains
    assert np.mean(gains) > 0.025, gains


def test_each_curve_leaves_the_asked_share_of_fresh_scores_below():
    rng = np.random.default_rng(2)
    known, fresh = rng.normal(size=(3000, 2)), rng.normal(size=(4000, 2))
    spread = [np.exp(part[:, 0]) for part in (known, fresh)]
    reference, values = (s * rng.exponential(1.0, len(s)) for s in spread)
    for level, curve in zip(LEVELS, quantile_curves(fresh, reference, known), strict=True):
        assert (values < curve).mean() == pytest.approx(level, abs=0.04)


def test_without_a_leak_it_reads_one_half():
    rng = np.random.default_rng(3)
    aucs = []
    for _ in range(4):
        features, known = rng.normal(size=(1000, 3)), rng.normal(size=(400, 3))
        target, reference = (hardness(f) + rng.normal(0, 0.7, len(f)) for f in (features, known))
        aucs.append(evaluate.auc(quantile(target, features, reference, known), rng.random(1000) < 0.5))
    assert np.mean(aucs) == pytest.approx(0.5, abs=0.03)


def test_with_too_few_known_non_members_it_refuses_and_a_report_says_that_it_did_not_run():
    rng = np.random.default_rng(4)
    few = MIN_REFERENCES - 1
    with pytest.raises(DataError, match="too few for quantile regression"):
        quantile(rng.normal(size=300), rng.normal(size=(300, 2)), rng.normal(size=few), rng.normal(size=(few, 2)))
    view = audit.TargetView(
        margins=rng.normal(size=300), features=rng.normal(size=(300, 2)), reference_margins=rng.normal(size=few),
        reference_features=rng.normal(size=(few, 2)),
    )  # fmt: skip
    found = audit.report([audit.attack_target(view)], [rng.random(300) < 0.5], rng)
    assert [result.attack for result in found.attacks] == ["threshold"]
    assert "the quantile attack did not run" in " ".join(found.warnings)
