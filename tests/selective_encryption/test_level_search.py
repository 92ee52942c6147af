"""Levels meet their targets although quality jumps and is not monotone from unit to unit."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.errors import ConfigError
from edgepriv.selective_encryption.level_search import CLOSE, LevelSearch


def silent(_):
    pass


def units(count):
    return np.stack([np.zeros(count, np.int64), np.arange(count)], axis=1)


def measured_by(worth):
    """Quality as a sum over the restored units, whatever their order."""
    return lambda rows: math.fsum(worth[rows[:, 1]])  # the exact sum, rounded once: numpy's depends on the order


def test_a_jump_over_the_target_is_filled_by_a_later_unit():
    worth = np.concatenate([np.full(10, 0.04), [0.3], np.linspace(0.11, 0.001, 60)])
    worth /= worth.sum()
    search = LevelSearch(measured_by(worth), units(len(worth)), silent)
    (count, quality), (count_after, quality_after) = search.find([0.15, 0.5])
    assert abs(quality - 0.15) <= CLOSE
    assert abs(quality_after - 0.5) <= CLOSE
    assert count < count_after
    assert sorted(search.order[:, 1]) == list(range(len(worth)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(30, 200))
def test_what_is_reported_is_what_the_final_order_gives_and_levels_are_nested(seed, count):
    rng = np.random.default_rng(seed)
    worth = rng.exponential(size=count)
    bumps = rng.normal(scale=0.01, size=count + 1)
    bumps[[0, -1]] = 0

    def measure(rows):
        return math.fsum(worth[rows[:, 1]]) / math.fsum(worth) + float(bumps[len(rows)])

    search = LevelSearch(measure, units(count), silent)
    try:
        found = search.find([0.3, 0.6, 0.8])
    except ConfigError:
        return
    for (level, quality), target in zip(found, [0.3, 0.6, 0.8], strict=True):
        assert measure(search.order[:level]) == quality
        assert abs(quality - target) < 0.2
    assert [level for level, _ in found] == sorted({level for level, _ in found})


def test_a_target_that_cannot_be_met_is_refused():
    with pytest.raises(ConfigError, match="above the whole model"):
        LevelSearch(measured_by(np.full(10, 0.05)), units(10), silent).find([0.9])
    with pytest.raises(ConfigError, match="cannot be told"):
        LevelSearch(measured_by(np.array([0.1, 0.9])), units(2), silent).find([0.05, 0.06, 0.07])
