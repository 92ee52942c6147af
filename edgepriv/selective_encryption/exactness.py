"""What a decoy's last bits would say: precision, grid and exact zeros of the weights around it, measured and imitated.

Weights that were trained in float16 or bfloat16 and stored as float32 have empty low bits; weights that were quantised
and expanded again lie on a grid; pruned ones are exactly zero. A decoy with a full mantissa among them is found without
any statistics. So decoys get the precision, the values' grid and the zeros of clear rows: each takes them from a clear
row of its own output channel, its *donor*, drawn by the PRF. In a dense layer of full precision nothing is done.

Rules: numpy only; rows [units, taps] as float64, which holds every element type exactly; asks clear rows alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgepriv.selective_encryption.decoys import PrfNoise

    Rows = NDArray[np.float64]

MANTISSA = {"float16": 10, "float32": 23, "float64": 52}
SPARE_BITS = 4  # a layer is of reduced precision if nine rows in ten leave more low bits empty than this
REPEATED = 0.5  # a layer lies on a grid if more than this share of its values occur more than once
PRUNED, MANY_ZEROS = 0.01, 0.2  # more zeros are a pattern, not an accident; more, where rounding makes some too
GAP = 0.05  # of the median: a least magnitude above it is a pruning threshold
MIN_CLEAR = 8
MAX_GRID = 70_000
FILL_ROUNDS, MAX_FILL_TAPS = 3, 10
_FRACTION = np.uint64(2**52 - 1)


def used_bits(rows: Rows) -> NDArray[np.int64]:
    """Mantissa bits that each row uses [units]; 0 for a row of zeros and powers of two."""
    return 52 - _empty(np.bitwise_or.reduce(np.ascontiguousarray(rows).view(np.uint64) & _FRACTION, axis=1))


def _empty(fractions: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Empty low bits of each fraction, 52 if all are."""
    lowest = fractions & (~fractions + np.uint64(1))
    return np.where(fractions == 0, 52, np.log2(np.maximum(lowest, 1).astype(np.float64)).astype(np.int64))


def last_place(rows: Rows) -> int:
    """Exponent of the finest step that any value uses: all are multiples of two to this power."""
    values = rows[rows != 0]
    if not len(values):
        return 0
    _, exponents = np.frexp(values)
    return int((exponents - 53 + _empty(np.ascontiguousarray(values).view(np.uint64) & _FRACTION)).min())


def repeated_share(rows: Rows) -> Rows:
    """Which share of each row's values occurs more than once among all rows, zeros left out [units]."""
    _, place, count = np.unique(rows, return_inverse=True, return_counts=True)
    again = (count[place.reshape(rows.shape)] > 1) & (rows != 0)
    return np.asarray(again.mean(1), np.float64)


def features(rows: Rows) -> Rows:
    """What a detector may ask of each row: zeros, used bits, repeated values [units, 3]."""
    zeros = (rows == 0).sum(1)
    return np.stack([zeros, used_bits(rows), repeated_share(rows)], 1).astype(np.float64)


def like(
    made: Rows,
    at: NDArray[np.int64],
    rows: Rows,
    inputs: int,
    clear: NDArray[np.bool_],
    noise: PrfNoise,
    *,
    mantissa: int,
    zeros: bool = True,
) -> Rows:
    """Give decoys the zeros, the grid and the precision of clear rows.

    Args:
        made: decoys [n, taps].
        at: their units.
        rows: all rows of the layer.
        inputs: input channels; the output channel of unit u is u // inputs.
        clear: which rows may be asked, bool [units].
        noise: draws the donors.
        mantissa: bits of the element type's mantissa; 0 for integers.
        zeros: whether to imitate the zeros too.
    """
    seen = rows[clear]
    if len(seen) < MIN_CLEAR or not len(made):
        return made
    coarse = np.mean(used_bits(seen) >= mantissa - SPARE_BITS) < 0.9 if mantissa else False
    grid = not coarse and mantissa > 0 and float(np.mean(repeated_share(seen))) > REPEATED
    pruned = zeros and _pruned(seen, stepped=grid or mantissa == 0)
    if not (pruned or coarse or grid):
        return made
    donors = _donors(at, clear, inputs, noise)
    if pruned:
        made = _with_zeros(made, rows[donors], seen)
    if grid:
        made = _snapped(made, at // inputs, rows, inputs, clear)
    elif coarse:
        made = _rounded(made, used_bits(rows[donors]).max(initial=0), last_place(seen))
    return made


def _pruned(seen: Rows, *, stepped: bool) -> bool:
    """Whether zeros must be imitated; on a grid some are zero by rounding."""
    return bool(np.mean(seen == 0) > (MANY_ZEROS if stepped else 0))


def _donors(at: NDArray[np.int64], clear: NDArray[np.bool_], inputs: int, noise: PrfNoise) -> NDArray[np.int64]:
    """A clear unit for each decoy, of the same output channel where it has at least three."""
    draws, everywhere = noise.uniform(len(at)), np.flatnonzero(clear)
    found = everywhere[(draws * len(everywhere)).astype(np.int64)]
    for channel in np.unique(at // inputs):
        near = channel * inputs + np.flatnonzero(clear[channel * inputs : (channel + 1) * inputs])
        if len(near) >= 3:
            mine = at // inputs == channel
            found[mine] = near[(draws[mine] * len(near)).astype(np.int64)]
    return found


def _with_zeros(made: Rows, donors: Rows, seen: Rows) -> Rows:
    """Zeros below the threshold that pruned by magnitude; else those of the donors."""
    threshold = _threshold(seen)
    return np.where(np.abs(made) < threshold if threshold else donors == 0, 0.0, made)


def _threshold(seen: Rows) -> float:
    """The least magnitude among many zeros, if it is a gap, as pruning by magnitude leaves it; else 0."""
    sizes = np.abs(seen[seen != 0])
    gap = float(sizes.min()) if len(sizes) else 0.0
    return gap if np.mean(seen == 0) > PRUNED and gap > GAP * float(np.median(sizes)) else 0.0


def filled(rows: Rows, scale: Rows, noise: PrfNoise) -> Rows:
    """Rows as they may have been before pruning, so that a density can be fitted to them; unchanged without zeros.

    Args:
        rows: clear rows [n, taps], none of them all zero.
        scale: what they are divided by for the fit [n, 1].
        noise: draws what is missing.
    """
    missing, out = rows == 0, rows / scale
    least = MANY_ZEROS if np.all(rows == np.round(rows)) else PRUNED
    if len(rows) < MIN_CLEAR or np.mean(missing) <= least:
        return np.asarray(out)
    threshold = _threshold(rows)
    if threshold:
        return np.where(missing, threshold * (2 * noise.uniform(*rows.shape) - 1) / scale, out)
    for tap in range(rows.shape[1]):
        known = out[~missing[:, tap], tap]
        if len(known):
            draws = noise.uniform(int(missing[:, tap].sum()))
            out[missing[:, tap], tap] = known[(draws * len(known)).astype(np.int64)]
    for _ in range(FILL_ROUNDS if rows.shape[1] <= MAX_FILL_TAPS else 0):
        _refill(out, missing, noise)
    return np.asarray(out)


def _refill(out: Rows, missing: NDArray[np.bool_], noise: PrfNoise) -> None:
    """Draw the missing taps again, given the row's others, as one normal distribution of all rows has them."""
    mean, covariance = out.mean(0), np.cov(out.T) + 1e-9 * np.eye(out.shape[1])
    draws = noise.normal(*out.shape)
    patterns, place = np.unique(missing, axis=0, return_inverse=True)
    for number, gone in enumerate(patterns):
        if not gone.any() or gone.all():
            continue
        mine = np.flatnonzero(place.reshape(-1) == number)
        slope = np.linalg.solve(covariance[np.ix_(~gone, ~gone)], covariance[np.ix_(~gone, gone)])
        rest = covariance[np.ix_(gone, gone)] - covariance[np.ix_(gone, ~gone)] @ slope
        factor = np.linalg.cholesky(rest + 1e-9 * np.eye(int(gone.sum())))
        drawn = draws[np.ix_(mine, gone)] @ factor.T
        out[np.ix_(mine, gone)] = mean[gone] + (out[np.ix_(mine, ~gone)] - mean[~gone]) @ slope + drawn


def _snapped(made: Rows, channels: NDArray[np.int64], rows: Rows, inputs: int, clear: NDArray[np.bool_]) -> Rows:
    """The nearest point of the grid of clear rows in the output channel, or in the layer where those are few."""
    out, everything = made.copy(), np.unique(rows[clear])
    for channel in np.unique(channels):
        units = slice(channel * inputs, (channel + 1) * inputs)
        near = np.unique(rows[units][clear[units]])
        mine = channels == channel
        out[mine] = _nearest(made[mine], near if clear[units].sum() >= 3 else everything)
    return out


def _nearest(made: Rows, values: Rows) -> Rows:
    """Values that occur; between them also points of an even grid, if they lie on one."""
    if len(values) < 2:
        return np.asarray(np.full(made.shape, values[0]))
    far = values[np.argmax(np.abs(values))]
    steps = np.round(values / np.diff(values).min())
    step = far / steps[np.argmax(np.abs(values))]
    if np.abs(steps).max() < MAX_GRID and np.allclose(values, steps * step, rtol=0, atol=1e-3 * abs(step)):
        values = np.unique(np.concatenate([values, _gaps(steps, step)]))
    after = np.searchsorted(values, made).clip(1, len(values) - 1)
    low, high = values[after - 1], values[after]
    return np.asarray(np.where(made - low < high - made, low, high))


def _gaps(steps: Rows, step: float) -> Rows:
    """Points of the grid within its range that no value takes yet, as float32 has them."""
    free = np.setdiff1d(np.arange(steps.min(), steps.max() + 1), steps)
    return np.asarray(free.astype(np.float32) * np.float32(step), np.float64)


def _rounded(made: Rows, bits: int, place: int) -> Rows:
    """At most ``bits`` of mantissa, and nothing below two to the power ``place``."""
    fraction, exponent = np.frexp(made)
    coarse = np.ldexp(np.round(np.ldexp(fraction, bits + 1)), exponent - bits - 1)
    return np.asarray(np.ldexp(np.round(np.ldexp(coarse, -place)), place))
