"""The measures: known answers, and guards where a ratio or a count would mislead."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgepriv.errors import DataError  # noqa: E402
from edgepriv.risk.gradient_leakage import measures, protections  # noqa: E402


@pytest.fixture(scope="module")
def scene(digits):
    images = digits.public.transpose(0, 2, 3, 1)
    phi = measures.train_features(images, digits.public_labels)
    truth = digits.private[:6].transpose(0, 2, 3, 1)

    def score(reconstructed, **more):
        return measures.score(
            reconstructed,
            truth,
            images,
            truth_labels=digits.private_labels[:6],
            pool_labels=digits.public_labels,
            features=phi,
            **more,
        )

    return truth, score


def test_the_truth_in_another_order_scores_perfectly(scene):
    truth, score = scene
    found = score(truth[::-1].copy())
    assert found.matched == (5, 4, 3, 2, 1, 0)
    assert found.psnr_db == measures.PSNR_CEILING_DB
    assert found.ssim == pytest.approx(1)
    assert found.iip == found.iip_pixel == found.iip_same_label == 1
    assert found.feature_distance == pytest.approx(0, abs=1e-9)


def test_noise_scores_at_chance_and_the_prior_scores_zero_rdlv(scene):
    truth, score = scene
    noise = np.random.default_rng(0).random(truth.shape, np.float32)
    found = score(noise)
    assert found.iip <= 1 / 6
    assert found.rdlv < 0.5 * score(truth).rdlv
    prior = truth.mean(axis=0)
    assert score(np.broadcast_to(prior, truth.shape).copy(), prior=prior).rdlv == pytest.approx(0, abs=1e-9)


def test_rdlv_is_undefined_where_the_prior_knows_nothing(scene):
    truth, _ = scene
    assert measures._rdlv(truth, truth, np.full(len(truth), 0.049)) is None
    assert measures._rdlv(truth, truth, np.full(len(truth), 0.5)) == pytest.approx(1)


def test_psnr_of_the_mean_error_is_not_the_mean_psnr(scene):
    truth, score = scene
    mixed = truth.copy()
    mixed[0] = 1 - mixed[0]
    found = score(mixed)
    assert found.psnr_db > 60 > found.mean_mse_psnr_db


def test_reconstructions_of_another_shape_are_refused(scene):
    truth, score = scene
    with pytest.raises(DataError):
        score(truth[:, :4])


def test_wilson_interval_contains_the_proportion():
    low, high = measures.wilson(9, 10)
    assert (low, high) == pytest.approx((0.5958, 0.9821), abs=1e-3)


def test_relative_noise_scales_with_the_update_and_leaves_counters_alone():
    update = {"w": np.full(1000, 2.0, np.float32), "n.num_batches_tracked": np.array(3)}
    noisy = protections.RelativeNoise(0.5).apply(update, np.random.default_rng(0))
    assert noisy["w"].std() == pytest.approx(1.0, rel=0.1)
    assert noisy["n.num_batches_tracked"] == 3


def test_clipped_noise_bounds_the_norm_and_drops_statistics():
    update = {"w": np.full(100, 3.0, np.float32), "bn.running_mean": np.ones(4, np.float32)}
    clipped = protections.ClippedNoise(1.0, 0.0).apply(update, np.random.default_rng(0))
    assert set(clipped) == {"w"}
    assert protections.update_norm(clipped) == pytest.approx(1.0)
    kept = protections.ClippedNoise(1.0, 0.0, shares_statistics=True).apply(update, np.random.default_rng(0))
    assert protections.update_norm(kept) == pytest.approx(1.0)
