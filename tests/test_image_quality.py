"""SSIM and PSNR against scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from edgepriv.errors import DataError
from edgepriv.image_quality import psnr, ssim


def reference(a, b, data_range):
    """scikit-image's mean over the positions where the whole window fits, averaged over channels."""
    _, full = structural_similarity(
        a, b, data_range=data_range, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2,
        full=True,
    )  # fmt: skip
    return full[5:-5, 5:-5].mean()


@pytest.mark.parametrize("noise", [0, 5, 40])
@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_equals_scikit_images(noise, channels):
    picture = data.astronaut()[100:180, 120:190, :channels].astype(float)
    other = picture + np.random.default_rng(1).normal(0, noise, picture.shape)
    got = ssim(picture[None], other[None], data_range=255)
    assert got.shape == (1,)
    assert got[0] == pytest.approx(reference(picture, other, 255), abs=1e-9)


def test_pairs_are_scored_one_by_one():
    rng = np.random.default_rng(2)
    a, b = rng.random((4, 20, 20, 1)), rng.random((4, 20, 20, 1))
    together = ssim(a, b, data_range=1)
    assert np.allclose(together, [ssim(a[i : i + 1], b[i : i + 1], data_range=1)[0] for i in range(4)])
    assert np.allclose(together, ssim(b, a, data_range=1))


def test_equal_pictures_score_one_and_tiny_ones_shrink_the_window():
    picture = np.random.default_rng(3).random((1, 8, 8, 1))
    assert ssim(picture, picture, data_range=1)[0] == pytest.approx(1)
    assert ssim(picture, 1 - picture, data_range=1)[0] < 0.2


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8)])
def test_arrays_of_another_rank_are_refused(shape):
    with pytest.raises(DataError):
        ssim(np.zeros(shape), np.zeros(shape), data_range=1)
    with pytest.raises(DataError):
        ssim(np.zeros((1, 8, 8, 1)), np.zeros((1, 8, 9, 1)), data_range=1)


def test_psnr_equals_scikit_images_and_is_infinite_for_equal_pictures():
    a = data.camera()[:64, :64].astype(float)
    b = a + np.random.default_rng(4).normal(0, 9, a.shape)
    assert psnr(a, b, data_range=255) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255))
    assert psnr(a, a, data_range=255) == math.inf
