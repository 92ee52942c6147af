"""Wrong shares are found, whoever chose them, up to the bound that the code sets; beyond it nothing is said."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.primitives import share_decoding, sharing

elements = st.integers(0, (1 << 128) - 1)


def _shared(threshold, count):
    secret = os.urandom(16)
    return secret, dict(enumerate(sharing.split(secret, threshold, count), 1))


@given(elements, elements, elements)
def test_the_field_is_the_librarys(a, b, c):
    from Crypto.Protocol.SecretSharing import _Element

    product = share_decoding.multiply(a, b)
    assert product == int.from_bytes((_Element(a) * _Element(b)).encode(), "big")
    assert share_decoding.multiply(a, b ^ c) == product ^ share_decoding.multiply(a, c)
    if a:
        assert share_decoding.multiply(share_decoding.inverse(a), product) == b


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_shares_of_which_not_too_many_are_wrong_give_the_secret_and_the_wrong_ones(data):
    count = data.draw(st.integers(2, 24))
    threshold = data.draw(st.integers(2, count))
    secret, shares = _shared(threshold, count)
    kept = data.draw(st.lists(st.sampled_from(sorted(shares)), min_size=threshold, max_size=count, unique=True))
    wrong = data.draw(st.lists(st.sampled_from(kept), max_size=(len(kept) - threshold) // 2, unique=True))
    revealed = {i: os.urandom(16) if i in wrong else shares[i] for i in kept}
    assert share_decoding.decode(revealed, threshold) == (secret, frozenset(wrong))


@pytest.mark.parametrize(("threshold", "most"), [(33, 15), (43, 10)])
def test_of_sixty_four_shares_half_of_the_spare_ones_may_be_wrong(threshold, most):
    secret, shares = _shared(threshold, 64)
    for count in (1, 2, most, most + 1):
        wrong = random.sample(range(1, 65), count)
        found = share_decoding.decode({i: os.urandom(16) if i in wrong else s for i, s in shares.items()}, threshold)
        assert found == ((secret, frozenset(wrong)) if count <= most else None)


def test_too_few_shares_give_nothing():
    _, shares = _shared(5, 9)
    assert share_decoding.decode({i: shares[i] for i in range(1, 5)}, 5) is None


def test_coefficients_for_one_set_of_indices_give_every_secret_shared_among_them():
    indices = [2, 5, 6, 9]
    weights = share_decoding.weights_at_zero(indices)
    for _ in range(3):
        secret, shares = _shared(4, 9)
        assert share_decoding.secret_of(weights, [shares[i] for i in indices]) == secret
        assert sharing.combine({i: shares[i] for i in indices}, 9) == secret
    fewer = share_decoding.without(indices, weights, 5)
    assert fewer == ([2, 6, 9], share_decoding.weights_at_zero([2, 6, 9]))
