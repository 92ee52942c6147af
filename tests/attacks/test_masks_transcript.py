"""What the gateway has of a masked round (all uploads, all reveals) says nothing but the sum.

The attacker is the gateway with its complete transcript. Positive control: the same attack on a scheme with pair
masks only (no self masks), where a "dropped" device's late upload is laid open.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_masks_refusals import Cohorts, N, _read

from edgepriv.federated.masking import MaskStream
from edgepriv.wire import rounds
from edgepriv.wire.update import decode_update
from gateway.unmasking import mask_keys

SIZE = 20_000


def _chi_square_is_uniform(values: np.ndarray) -> bool:
    """Top byte of 32-bit residuals against 256 equal bins; 5 deviations of chi-square."""
    counts = np.bincount((values >> 24).astype(np.int64), minlength=256)
    expected = len(values) / 256
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return abs(statistic - 255) < 5 * math.sqrt(2 * 255)


@pytest.fixture(scope="module")
def transcript():
    cohort = Cohorts(size=SIZE).shared()
    values = {"w": np.linspace(-1, 1, SIZE).astype(np.float32)}
    payloads = [m.masked_payload(values, 1) for m in cohort.members]
    vectors = [decode_update(raw, max_bytes=1 << 30).tensors["masked"] for raw in payloads]
    survivors = (0, 1, 2, 3, 5)  # member 4 uploaded everything, then was counted as dropped
    proof = cohort.confirmed(survivors)
    reveals = {i: _read(cohort.members[i].receive(proof)) for i in survivors}
    adverts = [rounds.read_advert(raw, cohort.trust) for raw in cohort.adverts]
    keys = mask_keys(adverts, tuple(range(N)), survivors, reveals, cohort.members[0].threshold)
    return cohort, vectors, survivors, keys, values, adverts, reveals


def test_the_sum_opens_exactly(transcript):
    cohort, vectors, survivors, keys, values, *_ = transcript
    total = sum((vectors[i].astype(np.uint32) for i in survivors), np.zeros(SIZE + 1, np.uint32))
    MaskStream(keys).apply(total)
    plain = cohort.members[0].plain_vector(values, 1)
    assert np.array_equal(total, (plain * np.uint32(len(survivors))).astype(np.uint32))


def test_a_single_survivors_upload_stays_uniform(transcript):
    cohort, vectors, _, keys, values, *_ = transcript
    own = [(key, sign) for key, sign in keys[:1]]
    residual = vectors[0].astype(np.uint32).copy()
    MaskStream(own).apply(residual)  # its self mask is known, its pair masks are not
    assert _chi_square_is_uniform(residual)
    assert _chi_square_is_uniform((residual - cohort.members[0].plain_vector(values, 1)).astype(np.uint32))


def test_a_dropped_devices_complete_upload_stays_uniform_with_all_its_pair_masks_taken_off(transcript):
    cohort, vectors, _survivors, _keys, values, *_ = transcript
    pairs = _pair_masks_of_four(transcript)
    residual = vectors[4].astype(np.uint32).copy()
    MaskStream(pairs).apply(residual)
    assert _chi_square_is_uniform(residual)
    # control: with its self mask known as well (what shares of both kinds would give) the update lies open
    own = cohort.members[4]._mask_keys()[:1]
    MaskStream([(own[0][0], -1)]).apply(residual)
    assert np.array_equal(residual, own_plain := cohort.members[4].plain_vector(values, 1)), own_plain[:3]


def _pair_masks_of_four(transcript):
    """The attack: shares of the dropped member's mask key rebuild every pair mask in its upload."""
    from edgepriv import primitives
    from edgepriv.federated import masking
    from edgepriv.primitives import sharing

    _, _, survivors, _, _, adverts, reveals = transcript
    seed = sharing.combine({i + 1: reveals[i].shares[4] for i in survivors}, N)
    private = masking.mask_private_key(seed, adverts[4].round)
    pairs = []
    for i in range(N):
        if i != 4:
            shared = primitives.backend().x25519(private, adverts[i].mask_key)
            key = masking.pair_key(shared, adverts[4].round, adverts[4].cohort, adverts[4].device, adverts[i].device)
            pairs.append((key, -masking.sign_of(adverts[4].device, adverts[i].device)))
    return pairs


def test_control_plain_updates_are_not_uniform(transcript):
    cohort, _, _, _, values, *_ = transcript
    assert not _chi_square_is_uniform(cohort.members[0].plain_vector(values, 1))
