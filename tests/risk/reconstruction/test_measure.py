"""The scores: R of the class mean is about 1, near copies score highest, SSIM agrees with scikit-image."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from edgepriv.datasets import load
from edgepriv.errors import DataError, RefusedError
from edgepriv.image_quality import ssim as numpy_ssim
from edgepriv.risk.reconstruction.measure import PixelScale, compare, explained_variance, score
from edgepriv.risk.ssim_torch import ssim


@pytest.fixture(scope="module")
def digits():
    data = load("digits", split="all")
    return data.images.reshape(len(data), -1) / 255.0, data.labels


def class_means(x, y):
    return np.stack([x[y == label].mean(0) for label in range(10)])[y]


def test_r_of_the_mean_image_is_one_and_of_the_class_mean_about_one(digits):
    x, y = digits
    scale = PixelScale(x, (8, 8, 1), "digits")
    assert scale.risk_r(x, np.broadcast_to(x.mean(0), x.shape)) == pytest.approx(1.0)
    assert 1.0 < scale.risk_r(x, class_means(x, y)) < 1.25


def test_r_rises_from_class_mean_over_principal_components_to_a_noisy_copy(digits):
    x, y = digits
    scale = PixelScale(x, (8, 8, 1), "digits")
    mean = x.mean(0)
    directions = np.linalg.svd(x - mean, full_matrices=False)[2]
    copies = [mean + (x - mean) @ directions[:k].T @ directions[:k] for k in (10, 30)]
    noisy = x + np.random.default_rng(0).normal(0, 0.05, x.shape)
    values = [scale.risk_r(x, copy) for copy in (class_means(x, y), *copies, noisy)]
    assert values == sorted(values)


def test_the_published_float32_form_depends_on_precision_where_pixels_hardly_vary(digits):
    x = np.concatenate([digits[0], np.random.default_rng(1).normal(0.5, 1e-5, (len(digits[0]), 6))], axis=1)
    scale = PixelScale(x, (7, 10, 1), "digits with dead pixels")
    noisy = np.clip(x + np.random.default_rng(0).normal(0, 0.02, x.shape), 0, 1)
    single = scale.r_as_published_code(x, noisy, dtype="float32")
    double = scale.r_as_published_code(x, noisy, dtype="float64")
    assert abs(single - double) > 0.3 * max(single, double)
    assert scale.risk_r(x, noisy) > 2


def test_explained_variance_is_zero_for_the_class_mean_and_one_for_a_copy(digits):
    x, y = digits
    means = class_means(x, y)
    assert explained_variance(x, means, means) == pytest.approx(0)
    assert explained_variance(x, x, means) == pytest.approx(1)
    with pytest.raises(DataError, match="all equal"):
        explained_variance(means, means, means)


def test_the_interval_of_the_explained_variance_holds_the_value(digits):
    x, y = digits
    scale = PixelScale(x, (8, 8, 1), "digits")
    result = score(x, x + np.random.default_rng(0).normal(0, 0.1, x.shape), class_means(x, y), scale)
    low, high = result.explained_variance_interval
    assert low < result.explained_variance < high
    assert result.record.ridge == 1e-2
    assert result.record.dtype == "float64"


def test_scores_of_other_records_are_not_compared(digits):
    x, y = digits
    copies = np.clip(x + 0.1, 0, 1)
    means = class_means(x, y)
    first = score(x, copies, means, PixelScale(x, (8, 8, 1), "digits"))
    other = score(x, copies, means, PixelScale(x, (8, 8, 1), "digits", ridge=1e-3))
    assert compare(first, first) == 0
    with pytest.raises(RefusedError, match="ridge"):
        compare(first, other)


def test_the_cholesky_distance_equals_the_plain_inverse(digits):
    x = digits[0][:200]
    scale = PixelScale(x, (8, 8, 1), "digits", ridge=1e-2)
    inverse = np.linalg.inv(np.cov(x.T) + 1e-2 * np.eye(64))
    difference = x[:5] - x.mean(0)
    slow = np.sqrt(np.einsum("ni,ij,nj->n", difference, inverse, difference))
    assert np.allclose(scale.distance(x[:5], scale.mean).numpy(), slow)


def test_torch_ssim_equals_numpy_ssim_and_scikit_image():
    generator = np.random.default_rng(0)
    a = generator.random((4, 20, 24, 3))
    b = np.clip(a + generator.normal(0, 0.2, a.shape), 0, 1)
    ours = ssim(*(torch.from_numpy(v.transpose(0, 3, 1, 2)) for v in (a, b))).numpy()
    assert np.allclose(ours, numpy_ssim(a, b, data_range=1.0))
    for i in range(4):
        whole = structural_similarity(
            a[i], b[i], data_range=1.0, channel_axis=2, gaussian_weights=True, use_sample_covariance=False, full=True
        )[1]
        assert whole[5:-5, 5:-5].mean() == pytest.approx(ours[i], abs=1e-6)


def test_torch_ssim_has_a_gradient_and_is_one_for_equal_pictures():
    a = torch.rand(2, 1, 12, 12, requires_grad=True)
    value = ssim(a, a.detach() * 0.5).mean()
    value.backward()
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()
    assert torch.allclose(ssim(a, a), torch.ones(2))
