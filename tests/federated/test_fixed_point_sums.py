"""The ring: exact, order-free, and refused where it could overflow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.errors import ConfigError, WireError
from edgepriv.federated.fixed_point import Ring, choose_ring, clip_steps, decode_sum, quantise, signed

values = st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20)


@given(st.lists(st.tuples(values, st.integers(1, 50)), min_size=1, max_size=6), st.randoms())
@settings(max_examples=60, deadline=None)
def test_a_sum_is_exact_and_free_of_order(parts, random):
    ring, size = Ring(32, 12, 2.0, 50, 6), max(len(v) for v, _ in parts)
    padded = [(np.array(v + [0.0] * (size - len(v)), np.float32), w) for v, w in parts]
    exact = sum(np.rint(v.astype(np.float64) * w * 4096) for v, w in padded) / 4096
    random.shuffle(padded)
    total = np.zeros(size, ring.dtype)
    for v, w in padded:
        total += quantise(v, w, ring)
    assert np.array_equal(decode_sum(total, ring), exact)


def test_the_narrowest_ring_is_chosen_and_an_overflow_refused():
    assert choose_ring(fraction_bits=16, bound=1.0, max_weight=1, devices=64).bits == 32
    assert choose_ring(fraction_bits=16, bound=10.0, max_weight=1000, devices=64).bits == 64
    with pytest.raises(ConfigError, match="overflow"):
        choose_ring(fraction_bits=40, bound=1e6, max_weight=1 << 20, devices=1 << 20)


@given(st.integers(1, 1000), st.integers(1, 500), st.floats(0.01, 100), st.integers(0, 24))
@settings(max_examples=100, deadline=None)
def test_the_largest_possible_sum_never_wraps(devices, weight, bound, fraction):
    ring = choose_ring(fraction_bits=fraction, bound=bound, max_weight=weight, devices=devices)
    worst = quantise(np.array([bound, -bound], np.float64), weight, ring)
    total = (worst.astype(object) * devices) % (1 << ring.bits)
    plain = signed(np.array(total, ring.dtype), ring)
    assert plain[0] >= 0 >= plain[1]
    assert plain[0] == -plain[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.1, -3.0])
def test_values_outside_the_bound_are_refused(bad):
    with pytest.raises(WireError):
        quantise(np.array([0.0, bad], np.float32), 1, Ring(32, 10, 2.0, 5, 5))


def test_a_weight_outside_its_range_is_refused():
    with pytest.raises(WireError):
        quantise(np.zeros(2, np.float32), 6, Ring(32, 10, 2.0, 5, 5))


def test_the_integer_norm_is_clipped_after_rounding():
    ring = Ring(32, 4, 1.0, 1, 4)
    vector = quantise(np.full(400, 0.05, np.float32), 1, ring)  # norm 1 before rounding, 1.25 after
    steps = clip_steps(vector, 16.0, ring)
    assert np.linalg.norm(signed(vector, ring)) > 16
    assert np.linalg.norm(steps) <= 16
