"""The word of an audit: the worst image counts, chance does not, and what is not known is never called contained."""

import math
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgepriv.federated.local_recipe import LocalRecipe  # noqa: E402
from edgepriv.risk.gradient_leakage import audit, protections  # noqa: E402
from edgepriv.risk.gradient_leakage.bound import Bound  # noqa: E402
from edgepriv.risk.gradient_leakage.inversion import Attack  # noqa: E402
from edgepriv.risk.gradient_leakage.measures import score  # noqa: E402
from edgepriv.risk.gradient_leakage.verdict import Limits, judge  # noqa: E402

FLOOR = 11.4


def shapes(images):
    """Features in which contrast and brightness do not count."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    return flat - flat.mean(1, keepdims=True)


def scored(digits, reconstructed, truth, labels):
    """The measures with the public digits as pool and prior."""
    return scored_among(digits.public, digits.public_labels, reconstructed, truth, labels)


def scored_among(pool, pool_labels, reconstructed, truth, labels):
    turned = [np.asarray(x, np.float32).transpose(0, 2, 3, 1) for x in (reconstructed, truth, pool)]
    return score(*turned, truth_labels=labels, pool_labels=pool_labels, features=shapes)


def noise(shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def ceiling(*per_image):
    """A bound by images; its mean is that of the errors."""
    mean = -10 * math.log10(np.mean([10 ** (-v / 10) for v in per_image]))
    return Bound(mean, FLOOR, tuple(per_image), 0.1, 1, 64 * len(per_image), 0, 0.0)


def test_one_image_of_eight_that_is_rebuilt_is_a_leak_although_every_mean_is_harmless(digits):
    truth, labels = digits.private[:8], digits.private_labels[:8]
    found = noise(truth.shape)
    nothing = scored(digits, found, truth, labels)
    near = ceiling(*[FLOOR + 0.1] * 8)
    assert judge(nothing, near, Limits())[0] == "contained"
    found[3] = truth[3]
    leak = scored(digits, found, truth, labels)
    assert leak.iip == 0.125
    assert leak.ssim < leak.prior_ssim
    verdict, reason = judge(leak, near, Limits())
    assert verdict == "leaks"
    assert "1 of 8" in reason or "one image" in reason


def test_a_clear_picture_is_a_leak_even_where_another_image_of_the_pool_is_nearer(digits):
    truth, labels = digits.private[:8], digits.private_labels[:8]
    found = noise(truth.shape)
    found[3] = np.clip(truth[3] + 0.1 * (noise(truth[3].shape, 1) - 0.5), 0, 1)
    leak = replace(scored(digits, found, truth, labels), iip=0.0, identified=0, iip_chance=1.0)
    verdict, reason = judge(leak, ceiling(*[FLOOR] * 8), Limits())
    assert (verdict, reason[:9]) == ("leaks", "one image")


def test_a_bound_that_leaves_one_image_of_eight_open_is_a_risk(digits):
    nothing = scored(digits, noise(digits.private[:8].shape), digits.private[:8], digits.private_labels[:8])
    open_one = ceiling(60.0, *[FLOOR] * 7)
    assert open_one.psnr_db - FLOOR < 0.6
    verdict, reason = judge(nothing, open_one, Limits())
    assert verdict == "at risk"
    assert "one image 48.6 dB above" in reason


def test_an_attack_that_comes_much_nearer_than_the_prior_without_a_picture_is_a_risk(digits):
    leak = scored(digits, noise(digits.private[:4].shape), digits.private[:4], digits.private_labels[:4])
    nearer = replace(leak, per_image_psnr_db=(leak.per_image_prior_psnr_db[0] + 4.0, *leak.per_image_psnr_db[1:]))
    verdict, reason = judge(nearer, ceiling(*[FLOOR] * 4), Limits())
    assert verdict == "at risk"
    assert "4.0 dB nearer" in reason


def test_fifteen_of_sixty_four_identified_in_a_masked_cohort_are_a_leak(digits):
    truth, labels = digits.private[:64], digits.private_labels[:64]
    found = noise(truth.shape)
    found[:12] = 0.6 * truth[:12] + 0.4 * found[:12]
    leak = scored(digits, found, truth, labels)
    assert 12 <= leak.identified < 16
    assert judge(leak, None, Limits())[0] == "leaks"
    leak = replace(leak, ssim_chance=1.0)  # identification alone is enough
    verdict, reason = judge(leak, ceiling(*[FLOOR] * 64), Limits())
    assert verdict == "leaks"
    assert f"{leak.identified} of 64" in reason


@pytest.mark.parametrize("n", [1, 4, 16, 64])
def test_pictures_that_have_nothing_to_do_with_the_canaries_are_rarely_called_a_leak(digits, n):
    everything, labels = np.concatenate([digits.private, digits.public]), np.zeros(1797, np.int64)
    rng, called = np.random.default_rng(n), 0
    for _ in range(20):
        others, truth, pool = np.split(rng.permutation(len(everything)), [n, 2 * n])
        leak = scored_among(everything[pool], labels[pool], everything[others], everything[truth], labels[truth])
        called += leak.identified > 0 and leak.iip_chance <= Limits().max_chance
        called += leak.ssim_chance <= Limits().max_chance
    assert called <= 3  # of forty looks


@pytest.mark.parametrize("name", ["psnr_db", "ssim", "iip"])
def test_a_figure_that_is_not_finite_is_a_risk(digits, name):
    nothing = scored(digits, noise(digits.private[:2].shape), digits.private[:2], digits.private_labels[:2])
    good = ceiling(FLOOR, FLOOR)
    assert judge(nothing, good, Limits())[0] == "contained"
    for odd in (math.nan, math.inf):
        verdict, reason = judge(replace(nothing, **{name: odd}), good, Limits())
        assert verdict in {"at risk", "leaks"}, odd
    assert judge(replace(nothing, **{name: math.nan}), good, Limits())[0] == "at risk"
    verdict, reason = judge(nothing, replace(good, psnr_db=math.nan), Limits())
    assert (verdict, reason[:9]) == ("at risk", "the bound")
    assert judge(nothing, replace(good, psnr_db=math.inf), Limits())[0] == "at risk"
    assert judge(nothing, replace(good, per_image_psnr_db=(math.inf, FLOOR)), Limits())[0] == "at risk"


@pytest.mark.parametrize("n", [1, 4])
def test_without_public_pictures_a_working_attack_leaks_and_a_failing_one_is_never_contained(digits, n):
    model, recipe = digits.network(0), LocalRecipe(batch_size=n)
    alone = audit.canaries_alone(digits.private[:n], digits.private_labels[:n])
    update = audit.canary_update(model, recipe, alone)
    found = audit.judge_update(model, update, recipe, alone, attack=Attack(iterations=100))
    assert found.leakage.psnr_db >= 25
    assert found.leakage.prior_ssim < 0.1  # mid-grey: the canaries are not their own prior
    assert found.verdict == "leaks"
    assert "no public pictures" in found.reason
    protection = protections.ClippedNoise(1.0, 1.0)
    sent = protection.apply(update, np.random.default_rng(0))
    hidden = audit.judge_update(
        model, sent, recipe, alone, attack=Attack(iterations=60), sigmas=protection.sigmas(update), clip=1.0
    )
    assert hidden.ceiling.floor_db == pytest.approx(-10 * math.log10(1 / 12))
    assert hidden.ceiling.psnr_db - hidden.ceiling.floor_db < 1
    assert (hidden.verdict, "no public pictures" in hidden.reason) == ("at risk", True)
