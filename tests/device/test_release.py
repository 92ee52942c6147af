"""Release policies: the stated bound counts every message, and nothing but the policy's integers leaves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgepriv.device.capture import Frame
from edgepriv.device.infer import Inference
from edgepriv.device.release import MAX_BOXES, MAX_COUNT, _descending, parse_policy, release, round_to_sum, softmax
from edgepriv.errors import ConfigError, DataError

FRAME = Frame(np.zeros((4, 4, 1), np.uint8), 0.0, 0)


def logits_of(*values):
    return Inference(FRAME, np.asarray(values, np.float32))


def boxes_of(boxes, scores, classes, labels=3):
    return Inference(
        FRAME, np.zeros(0, np.float32), boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
        box_scores=np.asarray(scores, np.float32), box_classes=np.asarray(classes, np.int64), box_labels=labels,
    )  # fmt: skip


def simplex(k, steps):
    """All probability vectors of ``k`` classes in steps of 1/steps, without the zeros that logits cannot say."""
    for cut in itertools.combinations_with_replacement(range(steps + 1), k - 1):
        parts = np.diff([0, *cut, steps]) / steps
        yield np.log(np.maximum(parts, 1e-12))


@pytest.mark.parametrize(("spec", "classes"), [("argmax", 4), ("softmax:1", 3), ("topk:1", 3), ("topk:2", 3)])
def test_the_messages_never_outnumber_the_stated_bits(spec, classes):
    policy = parse_policy(spec)
    steps = 60 if classes == 3 else 12
    seen = {release(policy, logits_of(*row)).values.__repr__() for row in simplex(classes, steps)}
    assert math.log2(len(seen)) <= policy.bits(classes) + 1e-9


@pytest.mark.parametrize(("decimals", "classes"), [(1, 2), (1, 3), (1, 4)])
def test_the_bound_of_a_rounded_softmax_is_the_number_of_its_messages(decimals, classes):
    policy, total = parse_policy(f"softmax:{decimals}"), 10**decimals
    messages = [m for m in itertools.product(range(total + 1), repeat=classes) if sum(m) == total]
    assert policy.bits(classes) == pytest.approx(math.log2(len(messages)))
    reached = {
        tuple(round_to_sum(np.array([m]) / total, total)[0].tolist()) for m in messages
    }  # each message is a fixed point: the bound is tight
    assert reached == set(messages)


@pytest.mark.parametrize(("parts", "total"), [(1, 5), (2, 6), (3, 7), (4, 5)])
def test_non_increasing_sequences_are_counted_exactly(parts, total):
    found = [
        s for s in itertools.product(range(total + 1), repeat=parts)
        if sum(s) <= total and all(a >= b for a, b in itertools.pairwise(s))
    ]  # fmt: skip
    assert _descending(parts, total) == len(found)


def test_the_stated_bits_of_the_other_policies():
    assert parse_policy("argmax").bits(10) == pytest.approx(math.log2(10))
    assert parse_policy("unsafe_raw_logits").bits(10) == 320
    assert parse_policy("counts").bits(3) == pytest.approx(math.log2((MAX_COUNT + 1) ** 3))
    one = 3 * 4**4
    assert parse_policy("boxes:4").bits(3) == pytest.approx(math.log2(sum(one**n for n in range(MAX_BOXES + 1))))
    assert parse_policy("steps:0.5").bits(2) == 32


finite = st.floats(-(2.0**100), 2.0**100, width=32)
rows = hnp.arrays(np.float32, st.integers(2, 12), elements=finite)


@given(rows, st.integers(1, 6))
def test_rounded_scores_are_integers_that_sum_to_one(row, decimals):
    policy = parse_policy(f"softmax:{decimals}")
    values = release(policy, logits_of(*row)).values
    assert sum(score for _, score in values) == 10**decimals
    assert all(score > 0 and 0 <= c < len(row) for c, score in values)
    assert policy.apply(row[None]).sum() == pytest.approx(1)
    exact = softmax(row)[0]
    assert np.abs(policy.apply(row[None])[0] - exact).max() < 10.0**-decimals


@given(rows, st.integers(1, 12))
def test_topk_is_ordered_distinct_and_within_its_bound(row, k):
    values = release(parse_policy(f"topk:{k}"), logits_of(*row)).values
    classes, scores = zip(*values, strict=True)
    assert len(set(classes)) == len(classes) == min(k, len(row))
    assert list(scores) == sorted(scores, reverse=True)
    assert 0 <= sum(scores) <= 100


@given(rows)
def test_argmax_says_the_first_best_class_and_nothing_else(row):
    released = release(parse_policy("argmax"), logits_of(*row))
    assert released.values == ([int(np.argmax(row)), 0],)
    assert released.bits == pytest.approx(math.log2(len(row)))
    assert parse_policy("argmax").apply(row[None]).sum() == 1


def test_raw_logits_are_their_bit_patterns():
    values = release(parse_policy("unsafe_raw_logits"), logits_of(1.5, -2.25)).values
    back = np.array([v for _, v in values], "<i4").view("<f4")
    assert back.tolist() == [1.5, -2.25]


@pytest.mark.parametrize("spec", ["argmax", "topk:2", "softmax:2", "unsafe_raw_logits", "steps:1"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_never_released(spec, bad):
    with pytest.raises(DataError):
        release(parse_policy(spec), logits_of(0.0, bad, 1.0))


def test_counts_count_by_class_and_stop_at_their_maximum():
    many = boxes_of([[0, 0, 1, 1]] * 150, [0.9] * 150, [0] * 148 + [2, 2])
    released = release(parse_policy("counts"), many)
    assert released.values == ([0, MAX_COUNT], [2, 2])
    assert released.bits == pytest.approx(3 * math.log2(100))
    assert release(parse_policy("counts"), boxes_of([], [], [])).values == ()


corner = st.floats(-0.5, 1.5, width=32)


@given(
    st.lists(
        st.tuples(corner, corner, corner, corner, st.floats(0, 1, width=32), st.integers(0, 2)), min_size=0, max_size=30
    ),
    st.integers(2, 256),
)
def test_boxes_stay_on_their_raster_and_are_few(found, grid):
    inference = boxes_of([f[:4] for f in found], [f[4] for f in found], [f[5] for f in found])
    released = release(parse_policy(f"boxes:{grid}"), inference)
    assert len(released.values) <= MAX_BOXES
    assert list(released.values) == sorted(released.values)
    for label, x0, y0, x1, y1 in released.values:
        assert 0 <= label < 3
        assert 0 <= x0 <= x1 < grid
        assert 0 <= y0 <= y1 < grid


def test_a_box_is_rounded_outwards():
    released = release(parse_policy("boxes:10"), boxes_of([[0.11, 0.2, 0.39, 0.31]], [1], [1]))
    assert released.values == ([1, 1, 2, 3, 3],)


@given(hnp.arrays(np.float32, 3, elements=st.floats(-1e9, 1e9, width=32)), st.floats(1e-3, 1e3))
def test_regression_values_fit_sixteen_bits(values, size):
    policy = parse_policy(f"steps:{size}")
    out = [v for _, v in release(policy, logits_of(*values)).values]
    assert all(-32768 <= v <= 32767 for v in out)
    assert np.allclose(policy.apply(values)[: len(out)], np.array(out) * policy.size)


@pytest.mark.parametrize(
    "spec",
    ["", "argmax:1", "topk", "topk:0", "topk:101", "topk:x", "softmax:0", "softmax:7", "boxes:1", "boxes:300",
     "steps:0", "steps:-1", "steps:inf", "steps:nan", "logits", "unsafe_raw_logits:2"],
)  # fmt: skip
def test_a_policy_that_does_not_exist_is_refused(spec):
    with pytest.raises(ConfigError) as caught:
        parse_policy(spec)
    assert "argmax" in caught.value.hint


def test_ranks_of_many_classes_reach_the_audit_in_few_columns():
    logits = np.random.default_rng(0).normal(size=(5, 3000))
    narrow, wide = parse_policy("topk:1").apply(logits), parse_policy("topk:3").apply(logits)
    assert narrow.shape == (5, 6000)
    assert wide.shape == (5, 6000)  # one-hot would be 12,000
    order = np.argsort(-logits, axis=1)[:, :3]
    assert np.allclose(np.take_along_axis(wide[:, 3000:], order, axis=1), [[1, 2 / 3, 1 / 3]])
    assert np.count_nonzero(wide[:, 3000:]) == 15
