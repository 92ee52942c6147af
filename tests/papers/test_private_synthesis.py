"""arXiv 2202.05469 on scikit-learn's digits: what the release costs, what the attacks find, and that they can find it.

Set-up: 599 public, 399 test and 799 private images, 16 targets on random halves of the private ones, ten attacks. The
positive controls stand beside the defence: an audit that finds nothing anywhere proves nothing.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgepriv import datasets
from edgepriv.cli import synthesis_study as studies
from edgepriv.risk.membership.audit import audit_shadows
from edgepriv.risk.membership.shadows import no_defence
from edgepriv.synthesis import card as cards

pytestmark = pytest.mark.timeout(300)  # sixteen pipelines in a fixture; half a minute on an idle core

ATTACKS = {
    "threshold", "quantile", "lira", "rmia_all", "rmia_out", "label_only", "label_only_calibrated", "nearest",
    "nearest_lira", "nearest_difference",
}  # fmt: skip
KEYS = {
    "schema", "latent_dim", "clip_radius", "epsilon_metric", "kappa", "epsilon", "delta", "advantage_bound",
    "vae_trained_on", "labels", "accuracy_real", "accuracy_synthetic", "accuracy_public_only",
    "accuracy_prior_samples", "recommendation", "audit",
}  # fmt: skip


@pytest.fixture(scope="module")
def lab():
    """Parts, the default settings of the command, and a release."""
    torch.set_num_threads(1)
    parts = studies.take_parts(datasets.load("digits", split="all"), None, 0)
    base = studies.Settings(extra=3)
    return parts, base, studies.make_release(parts, base)


def scores_of(lab, **changes):
    """Shadow scores of the pipeline with other settings."""
    parts, base, release = lab
    settings = replace(base, **changes)
    return studies.shadows_of(parts, settings, studies.pipeline_of(parts, settings, release), "row")


def judged(scores):
    return audit_shadows(scores, np.random.default_rng(0))


def auc_of(audit, name):
    return next(a.auc for a in audit.attacks if a.attack == name)


@pytest.fixture(scope="module")
def real(lab):
    return studies.shadows_of(lab[0], lab[1], no_defence, "real", released=False)


@pytest.fixture(scope="module")
def public_only(lab):
    return studies.shadows_of(lab[0], lab[1], studies.public_only(lab[0], lab[1]), "public", released=False)


@pytest.fixture(scope="module")
def default(lab):
    return scores_of(lab)


@pytest.fixture(scope="module")
def default_audit(default):
    return judged(default)


@pytest.fixture(scope="module")
def bare_audit(lab):
    return judged(scores_of(lab, mode="unsafe_no_noise", extra=0))


@pytest.fixture(scope="module")
def member(lab):
    return scores_of(lab, vae_from="private", extra=0)


def test_the_default_release_costs_at_most_two_and_a_half_points(real, default):
    loss = 100 * (real.accuracies - default.accuracies)
    half = 1.96 * loss.std(ddof=1) / np.sqrt(len(loss))
    assert len(loss) == 16
    assert loss.mean() + half <= 2.5, (loss.mean(), half)


def test_every_attack_on_the_default_release_stays_at_or_below_0_57_and_the_nulls_hold(default_audit):
    assert {a.attack for a in default_audit.attacks} == ATTACKS
    assert max(a.auc for a in default_audit.attacks) <= 0.57
    assert max(a.tpr_at_1pct for a in default_audit.attacks) <= 0.03
    assert default_audit.null_interval[0] <= default_audit.null_auc <= default_audit.null_interval[1]
    assert default_audit.noise_null == pytest.approx(0.5, abs=0.04)


def test_the_attacks_have_power_on_the_undefended_classifier(real):
    audit = judged(real)
    assert auc_of(audit, "rmia_out") >= 0.60
    assert auc_of(audit, "lira") >= 0.57


def test_without_noise_the_released_set_attack_succeeds(bare_audit):
    assert bare_audit.strongest.surface == "release"
    assert bare_audit.strongest.auc >= 0.85
    assert bare_audit.strongest.tpr_at_1pct >= 0.30


@pytest.fixture(scope="module")
def half_audit(lab):
    return judged(scores_of(lab, noise_ratio=0.5, extra=0))


def test_noise_orders_the_leak(bare_audit, half_audit, default_audit):
    near = [auc_of(audit, "nearest_lira") for audit in (bare_audit, half_audit, default_audit)]
    assert near[0] > near[1] > near[2]


def test_a_caught_release_is_told_the_smallest_tried_noise_that_holds(lab, half_audit, default_audit):
    parts, base, release = lab
    settings = replace(base, noise_ratio=0.5, extra=0)
    release = replace(release, mechanism=studies.mechanism_of(release.vae, parts, settings))
    found = studies.suggest_ratio(parts, settings, release, half_audit)
    assert 1.0 <= found.noise_ratio <= 4.0
    assert found.auc <= 0.57
    assert studies.suggest_ratio(parts, base, lab[2], default_audit) is None
    card = studies.fill_card(parts, settings, release, studies.Study(half_audit, np.ones(16), None, found))
    assert f"--noise-ratio {found.noise_ratio:g}" in cards.recommend(card)


def test_a_vae_of_the_members_leaks_more_than_one_of_public_images(member, default_audit):
    leak = judged(member)
    assert auc_of(leak, "rmia_out") - auc_of(default_audit, "rmia_out") >= 0.03
    assert leak.strongest.auc > 0.60


def test_the_public_only_control_reads_one_half(public_only):
    assert judged(public_only).strongest.auc <= 0.53


def cards_of(lab, scores, settings, real, public_only):
    parts, base, release = lab
    prior = scores_of(lab, mode="prior", extra=0)  # one sample a record: the command draws as many as it releases
    controls = studies.Controls(real.accuracies, public_only.accuracies, prior.accuracies)
    found = studies.Study(judged(scores), scores.accuracies, controls)
    return studies.fill_card(parts, replace(base, **settings), release, found).as_json()


def test_the_card_has_every_key_and_says_what_is_as_good_and_what_leaks(lab, default, member, real, public_only):
    card = cards_of(lab, default, {}, real, public_only)
    assert set(card) >= KEYS
    assert card["schema"] == "edgepriv.release-card/1"
    assert set(card["audit"]) >= {"strongest", "auc", "auc_interval", "tpr_at_1pct", "null_auc"}
    assert card["noise_ratio"] == pytest.approx(2.0)
    assert card["audit"]["outcome"] == "none"
    assert "16 fresh runs of this pipeline, each on a random half of 799 private records" in card["measured_on"]
    as_good = max(card["accuracy_public_only"], card["accuracy_prior_samples"]) >= card["accuracy_synthetic"] - 0.005
    assert as_good != card["recommendation"].startswith("Release:")
    private = cards_of(lab, member, {"vae_from": "private"}, real, public_only)
    assert private["vae_trained_on"] == "private"
    assert (private["epsilon"], private["delta"], private["advantage_bound"]) == (None, None, None)
    assert "saw the private records" in private["recommendation"]
    assert "differentially" not in json.dumps(private).lower()
