"""Layer 3 replaced by the identity: what it alone gives is gone, and the checks of this folder notice.

The attacker holds the sealed bytes and may change them. Layers 1 and 2 are replaced in test_cipher_tampering.py.
"""

import numpy as np
import pytest

from edgepriv import primitives
from edgepriv.cipher import report
from edgepriv.cipher.cipher import FrameOpener
from edgepriv.cipher.epochs import DeviceEpoch
from edgepriv.errors import AuthenticationError, WireError
from edgepriv.keys import Identity
from edgepriv.wire import envelope as wire
from edgepriv.wire.trust import TrustList

DEVICE, GATEWAY, ANN = (Identity.new(role, "x") for role in ("device", "gateway", "recipient"))
TRUST = TrustList(1, 0, 2**40, (DEVICE.public, GATEWAY.public, ANN.public))
IMAGE = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
PICTURE = np.add.outer(np.arange(64, dtype=np.uint8), np.arange(64, dtype=np.uint8))


def seal_by_copy(alg, key, nonce, data, aad, out):
    """The identity in place of the AEAD, with a tag of zeros."""
    view = memoryview(out).cast("B")
    view[: len(data)] = bytes(data)
    view[len(data) :] = bytes(primitives.TAG_BYTES)


def open_by_copy(alg, key, nonce, sealed, aad, out):
    memoryview(out).cast("B")[:] = bytes(sealed[: -primitives.TAG_BYTES])


@pytest.fixture
def without_layer_3(monkeypatch):
    """A switch: call it, and from there on the AEAD is the identity."""

    def switch():
        monkeypatch.setattr(primitives.backend(), "seal_into", seal_by_copy, raising=False)
        monkeypatch.setattr(primitives.backend(), "open_into", open_by_copy, raising=False)

    return switch


def flips_that_open(profile, alg):
    """For every bit of the ciphertext and its tag: does the frame with that bit flipped open, and to other pixels?"""
    epoch = DeviceEpoch.open(DEVICE, TRUST, GATEWAY.name, seq=1, now=0, profile=profile, alg=alg)
    opener = FrameOpener(epoch.signed.raw, ANN, TRUST)
    raw = bytearray(epoch.seal(IMAGE))
    opened, altered, bits = 0, 0, range(8 * wire.BODY_OFFSET, 8 * (len(raw) - 16))
    for bit in bits:
        raw[bit // 8] ^= 1 << bit % 8
        try:
            pixels = opener.open(raw).pixels
        except (WireError, AuthenticationError):
            pass
        else:
            opened += 1
            altered += not np.array_equal(pixels, IMAGE)
        raw[bit // 8] ^= 1 << bit % 8
    return opened, altered


@pytest.mark.parametrize("alg", list(wire.ALGS))
@pytest.mark.parametrize("profile", wire.PROFILES)
def test_without_layer_3_flipped_bits_open_and_with_it_none_does(profile, alg, without_layer_3):
    assert flips_that_open(profile, alg) == (0, 0)
    without_layer_3()
    opened, altered = flips_that_open(profile, alg)
    if profile != "flep3-strong":  # there the synthetic value depends on the pixels and is compared
        assert altered == 8 * IMAGE.size  # every bit of every pixel can be changed
    assert opened >= 8 * primitives.TAG_BYTES  # the tag says nothing


def judge(profile):
    whole = {"whole": report.subjects_of(profile, primitives.AES_GCM)["whole"]}
    measured = report.measure("ramp", PICTURE, whole, random=report.seeded(5))
    return report.document([measured], cipher=profile, pairs=200)["images"][0]


def test_without_layer_3_the_report_on_the_aead_profile_fails_in_every_column(without_layer_3):
    assert judge("aead")["verdict"] == "pass"
    without_layer_3()
    entry = judge("aead")
    assert entry["verdict"] == "fail"
    for column in ("fresh", "key"):
        assert {f"whole {column} npcr pooled", f"whole {column} uaci pooled"} <= set(entry["failed"])
    assert {"whole fresh entropy", "whole fresh chi-square", "whole fresh correlation h"} <= set(entry["failed"])
    pinned = [test for test in entry["metrics"] if test["column"] == "pinned"]
    assert pinned
    assert not any(test["pass"] for test in pinned)


def test_without_layer_3_the_ciphertext_of_the_aead_profile_is_the_picture(without_layer_3):
    cipher = report.Product("aead", primitives.AES_GCM)
    assert not np.array_equal(cipher.encrypt(PICTURE, bytes(32), bytes(32)), PICTURE)
    without_layer_3()
    assert np.array_equal(cipher.encrypt(PICTURE, bytes(32), bytes(32)), PICTURE)


def test_metrics_do_not_see_that_the_strong_profile_lost_its_layer_3(without_layer_3):
    """Why passing proves nothing: layers 1 and 2 satisfy every column, pinned too, while the tag is zeros."""
    without_layer_3()
    assert judge("flep3-strong")["verdict"] == "pass"
