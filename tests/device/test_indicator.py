"""The output indicator: the device's numpy evaluator agrees with the fit, and any bytes give it or one error."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepriv.device.indicator import OutputIndicator
from edgepriv.errors import DataError, MissingFileError
from edgepriv.risk.reconstruction.indicator_fit import _class_gaussians, distances, fit_indicator


def outputs(seed, *, spread=1.0, n=600, k=5):
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, spread, (n, k))
    logits[np.arange(n), generator.integers(0, k, n)] += 6
    return logits.astype(np.float32)


@pytest.fixture(scope="module")
def honest():
    return [outputs(seed) for seed in range(4)]


def test_device_and_fit_give_the_same_distances(honest):
    indicator = OutputIndicator.from_bytes(fit_indicator(honest))
    found = indicator.distances(outputs(9))
    assert np.allclose(found, distances(outputs(9), *_class_gaussians(honest)), atol=1e-3)


def test_outputs_that_scatter_more_than_honest_ones_raise_the_flag_and_honest_ones_do_not(honest):
    raw = fit_indicator(honest, window=50)
    for spread, expected in ((1.0, False), (2.5, True)):
        indicator = OutputIndicator.from_bytes(raw)
        for row in outputs(77, spread=spread)[:50]:
            indicator.observe(row)
        assert indicator.suspicious is expected


def test_before_a_window_is_full_nothing_is_said(honest):
    indicator = OutputIndicator.from_bytes(fit_indicator(honest, window=50))
    for row in outputs(77, spread=9.0)[:49]:
        indicator.observe(row)
    assert not indicator.suspicious


def test_one_reference_is_not_enough(honest):
    with pytest.raises(DataError, match="at least two"):
        fit_indicator(honest[:1])


def test_outputs_of_another_form_are_refused(honest):
    indicator = OutputIndicator.from_bytes(fit_indicator(honest))
    for bad in (np.zeros((3, 4)), np.full((3, 5), np.nan), np.zeros(5)):
        with pytest.raises(DataError):
            indicator.distances(bad)


@given(
    st.binary(max_size=300)
    | st.recursive(
        st.none() | st.floats() | st.text(max_size=5),
        lambda c: (
            st.lists(c, max_size=3)
            | st.dictionaries(st.sampled_from(["schema", "centres", "whitening", "threshold", "window"]), c)
        ),
        max_leaves=9,
    ).map(lambda v: json.dumps(v).encode())
)
def test_any_bytes_give_an_indicator_or_one_error(raw):
    with contextlib.suppress(DataError):
        OutputIndicator.from_bytes(raw)


def test_a_missing_file_says_where_it_comes_from(tmp_path):
    with pytest.raises(MissingFileError):
        OutputIndicator.load(tmp_path / "absent.json")
