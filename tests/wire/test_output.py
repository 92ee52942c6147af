"""What an output may say: small integers in short rows, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepriv.errors import WireError
from edgepriv.wire import messages
from edgepriv.wire.output import MAX_VALUES, Output, check_output

GOOD = Output(
    counter=0, at=1.0, model="m", model_digest=bytes(32), task="classify", policy="argmax", bits=3.3, decimals=0,
    scene=b"", values=([3, 0],),
)  # fmt: skip
small = st.integers(-(1 << 40) + 1, (1 << 40) - 1)


def changed(**values):
    return dataclasses.replace(GOOD, **values)


@given(st.lists(st.lists(small, min_size=1, max_size=6), max_size=20), st.floats(0, 1e6), st.integers(0, 9))
def test_rows_of_small_integers_pass_and_come_back(rows, bits, decimals):
    output = changed(values=tuple(rows), bits=bits, decimals=decimals)
    check_output(output)
    assert messages.decode(messages.encode(output)) == output


@pytest.mark.parametrize(
    "values",
    [
        ([],), ([1] * 7,), (3,), ("ab",), ([1.5],), ([True],), ([None],), ([[1]],), ({"a": 1},), ([1 << 40],),
        ([-(1 << 40)],), tuple([0, 0] for _ in range(MAX_VALUES + 1)),
    ],
)  # fmt: skip
def test_other_rows_are_refused(values):
    with pytest.raises(WireError):
        check_output(changed(values=values))


@pytest.mark.parametrize("change", [{"bits": -1.0}, {"bits": 1e7}, {"decimals": -1}, {"decimals": 10}, {"counter": -1}])
def test_numbers_out_of_range_are_refused(change):
    with pytest.raises(WireError):
        check_output(changed(**change))
