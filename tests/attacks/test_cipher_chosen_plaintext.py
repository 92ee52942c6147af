"""Chosen pictures: three of them break the toy cipher and our layers under a pinned id, and never the product.

The attacker: may have any picture encrypted and sees the ciphertexts, then gets the ciphertext of a picture that
somebody else made. An attack function takes exactly that: an oracle and a ciphertext.
"""

import math

import numpy as np
import pytest
from cipher_toys import ThreeMapToy

from edgepriv import primitives
from edgepriv.cipher import report
from edgepriv.cipher.layers import SYNTHETIC_BYTES

SHAPE = (256, 256, 1)
N = math.prod(SHAPE)
CHANCE = 1 / 256 + 3.29 * math.sqrt(1 / 256 * 255 / 256 / N)
KEY = bytes(range(32))


def recover(encrypt, target):
    """Recover a picture from its ciphertext with 1 + ceil(log256 n) chosen pictures."""
    index = np.arange(N)
    mask = encrypt(np.zeros(SHAPE, np.uint8)).reshape(-1)
    source = np.zeros(N, np.int64)
    for j in range(math.ceil(math.log(N, 256))):
        chosen = (index >> 8 * j & 255).astype(np.uint8).reshape(SHAPE)
        source |= (encrypt(chosen).reshape(-1) ^ mask).astype(np.int64) << 8 * j
    picture = np.zeros(N, np.uint8)
    picture[source % N] = target.reshape(-1) ^ mask
    return picture.reshape(SHAPE)


def secret_picture():
    from skimage import data

    return np.ascontiguousarray(data.camera()[::2, ::2, None])


def recovered_share(encrypt):
    secret = secret_picture()
    return float(np.mean(recover(encrypt, encrypt(secret)) == secret))


def with_fresh_ids(cipher):
    return lambda image: cipher.encrypt(image, KEY, primitives.random_bytes(32)).copy()


def with_one_id(cipher):
    return lambda image: cipher.encrypt(image, KEY, bytes(32)).copy()


def test_three_chosen_pictures_recover_every_byte_of_the_toy():
    assert recovered_share(with_fresh_ids(ThreeMapToy())) == 1.0


def test_the_toy_passes_the_popular_metrics_and_fails_our_report():
    measured = report.measure("secret", secret_picture(), {"whole": (ThreeMapToy(), False)}, random=report.seeded(1))
    popular = [t for t in measured.tests if t.name.startswith(("entropy", "correlation"))]
    assert popular
    document = report.document([measured], cipher="toy", pairs=200)
    failed = document["images"][0]["failed"]
    assert document["images"][0]["verdict"] == "fail"
    assert "whole fresh npcr" in failed
    assert not any("entropy" in name or "correlation" in name for name in failed)


def test_layers_without_fresh_ids_fall_to_the_same_attack():
    assert recovered_share(with_one_id(report.LayersAlone("flep3", primitives.AES_GCM))) == 1.0


@pytest.mark.parametrize("alg", [primitives.AES_GCM, primitives.CHACHA])
@pytest.mark.parametrize("profile", ["flep3", "flep3-strong", "aead"])
def test_chosen_pictures_recover_nothing_from_the_product(profile, alg):
    assert recovered_share(with_fresh_ids(report.Product(profile, alg))) <= CHANCE


def test_the_layers_alone_keep_the_picture_while_ids_are_fresh():
    for profile in ("flep3", "flep3-strong"):
        assert recovered_share(with_fresh_ids(report.LayersAlone(profile, primitives.AES_GCM))) <= CHANCE


def test_the_strong_profile_resists_even_under_one_id():
    """What its diffusion is for: the mask depends on the picture, so masks of chosen pictures say nothing."""
    assert recovered_share(with_one_id(report.LayersAlone("flep3-strong", primitives.AES_GCM))) <= CHANCE
    assert SYNTHETIC_BYTES == 32
