"""Decoys: random weights for the places of the encrypted ones, so that the carrier stays an ordinary model.

Three kinds, all on rows [units, taps]:

* ``mixture`` (default): each kernel is divided by the typical norm of its output and input channel, a Gaussian
  mixture is fitted to the *unselected* ones, sampled, and multiplied back. Undoes the gain per channel that folding
  BatchNorm leaves, which gives plain noise away. Precision, grid and zeros follow the unselected (`exactness`).
* ``dprm``: distribution-preserving random mask as published (arXiv 2105.12344): ``N(mu, sd)`` element by element
  over all kernels of the layer. Kept as the reference that detectors find.
* ``zeros``: for comparison.

A decoy says nothing about the kernel that it replaces. Decoys are camouflage, not the cipher: positions count as
semi-public, and secrecy rests on the sealed segments alone. Randomness comes from a PRF of the owner's secret, so a
model has one carrier for all customers (two masks would reveal every position by a diff).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import primitives
from edgepriv.errors import ConfigError
from edgepriv.selective_encryption import exactness

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS = ("mixture", "dprm", "zeros")
COMPONENTS = 12
MAX_FIT_ROWS = 12_000
MAX_FULL_TAPS = 32  # longer rows get independent taps: a full covariance would not be estimable
EM_STEPS = 40


class PrfNoise:
    """Uniform and normal numbers from AES-256-CTR under a key derived for one model and one layer."""

    def __init__(self, secret: bytes, model_id: bytes, label: str) -> None:
        info = b"edgepriv/pss/decoy/v1\x00" + label.encode()
        self._stream = primitives.backend().keystream(
            primitives.AES_GCM, primitives.hkdf(secret, 32, salt=model_id, info=info)
        )

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """Numbers in (0, 1), never 0 or 1."""
        raw = bytearray(8 * int(np.prod(shape)))
        self._stream.xor_into(raw, raw)
        bits = np.frombuffer(raw, "<u8") >> np.uint64(12)
        return np.asarray(((bits + 0.5) / 2.0**52).reshape(shape))

    def normal(self, *shape: int) -> NDArray[np.float64]:
        """Standard normal numbers (Box-Muller)."""
        radius = np.sqrt(-2 * np.log(self.uniform(*shape)))
        return np.asarray(radius * np.cos(2 * np.pi * self.uniform(*shape)))


@dataclass(frozen=True, slots=True)
class Mixture:
    """A Gaussian mixture over rows: weights [k], means [k, taps], Cholesky factors [k, taps, taps]."""

    weights: NDArray[np.float64]
    means: NDArray[np.float64]
    factors: NDArray[np.float64]

    def sample(self, count: int, noise: PrfNoise) -> NDArray[np.float64]:
        """Draw ``count`` rows."""
        picks = np.searchsorted(np.cumsum(self.weights), noise.uniform(count)).clip(0, len(self.weights) - 1)
        z = noise.normal(count, self.means.shape[1])
        return np.asarray(self.means[picks] + np.einsum("nij,nj->ni", self.factors[picks], z))

    def log_density(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Logarithm of the density at each row, up to a constant [n]."""
        logs = _component_logs(rows, self.weights, self.means, self.factors)
        top = logs.max(1)
        return np.asarray(top + np.log(np.exp(logs - top[:, None]).sum(1)))


def fit_mixture(rows: NDArray[np.float64], noise: PrfNoise, *, components: int = COMPONENTS) -> Mixture:
    """Fit a full-covariance mixture by expectation-maximisation; fewer components where rows are few."""
    if len(rows) > MAX_FIT_ROWS:
        rows = rows[np.argsort(noise.uniform(len(rows)))[:MAX_FIT_ROWS]]
    count, taps = rows.shape
    k = int(np.clip(count // (6 * taps), 1, components))
    floor = np.eye(taps) * (1e-4 * float(rows.var()) + 1e-12)
    means = rows[np.argsort(noise.uniform(count))[:k]]
    covariances = np.repeat((np.cov(rows.T).reshape(taps, taps) + floor)[None], k, axis=0)
    weights = np.full(k, 1 / k)
    for _ in range(EM_STEPS if k > 1 else 1):
        duty = _duties(rows, weights, means, covariances)
        mass = duty.sum(0) + 1e-9
        weights, means = mass / mass.sum(), (duty.T @ rows) / mass[:, None]
        for j in range(k):
            centred = rows - means[j]
            covariances[j] = (centred * duty[:, j : j + 1]).T @ centred / mass[j] + floor
    factors = np.asarray(np.linalg.cholesky(covariances), np.float64)
    return Mixture(np.asarray(weights, np.float64), np.asarray(means, np.float64), factors)


def _duties(
    rows: NDArray[np.float64],
    weights: NDArray[np.float64],
    means: NDArray[np.float64],
    covariances: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Posterior of each component for each row [n, k]."""
    logs = _component_logs(rows, weights, means, np.asarray(np.linalg.cholesky(covariances)))
    logs -= logs.max(1, keepdims=True)
    duty = np.exp(logs)
    return np.asarray(duty / duty.sum(1, keepdims=True))


def _component_logs(
    rows: NDArray[np.float64],
    weights: NDArray[np.float64],
    means: NDArray[np.float64],
    factors: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Log of weight times density for each row and component [n, k], up to one constant."""
    logs = np.empty((len(rows), len(weights)))
    for j, (mean, factor) in enumerate(zip(means, factors, strict=True)):
        z = np.linalg.solve(factor, (rows - mean).T)
        logs[:, j] = np.log(weights[j] + 1e-300) - np.log(np.diag(factor)).sum() - 0.5 * (z**2).sum(0)
    return logs


def channel_scales(
    rows: NDArray[np.float64], inputs: int, clear: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Typical norm for each output channel f and each input channel c, from the clear kernels.

    Returns:
        ``a_f`` [outputs] = median norm in f, and ``b_c`` [inputs] = median of norm / a_f in c.
    """
    norms = np.linalg.norm(rows, axis=1).reshape(-1, inputs)
    seen = clear.reshape(-1, inputs)
    overall = float(np.median(norms[seen])) if seen.any() else float(np.median(norms))
    a = np.array([_median(n[s], overall) for n, s in zip(norms, seen, strict=True)])
    relative = norms / a[:, None]
    b = np.array([_median(relative[seen[:, c], c], 1.0) for c in range(inputs)])
    return a, b


def _median(values: NDArray[np.float64], default: float) -> float:
    middle = float(np.median(values)) if len(values) >= 3 else 0.0
    return middle if middle > 0 else max(default, 1e-12)


def decoy_rows(
    rows: NDArray[Any],
    inputs: int,
    selected: NDArray[np.bool_],
    noise: PrfNoise,
    *,
    kind: str = "mixture",
) -> NDArray[Any]:
    """Replace the selected rows by decoys.

    Args:
        rows: weights [units, taps] in the file's element type; row = f * inputs + c.
        inputs: input channels per output channel (1 for rows of a matrix).
        selected: which rows are encrypted, bool [units].
        noise: PRF randomness for this layer.
        kind: ``mixture``, ``dprm`` or ``zeros``.

    Returns:
        A new array of the same element type; integer types stay within the range that the layer already uses.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown decoys {kind!r}", hint=f"use one of {', '.join(KINDS)}")
    values = rows.astype(np.float64)
    out = rows.copy()
    if selected.any():
        made = {"mixture": mixture_rows, "dprm": _dprm, "zeros": _zeros}[kind](values, inputs, selected, noise)
        plain = kind != "mixture"  # as published: the low bits give these away
        at = np.flatnonzero(selected)
        out[selected] = _cast(made, rows) if plain else fitted(made, rows, inputs, at, ~selected, noise)
    return out


def _dprm(
    values: NDArray[np.float64], inputs: int, selected: NDArray[np.bool_], noise: PrfNoise
) -> NDArray[np.float64]:
    """C_e = mu + sd * zeta: what the published W_e + r_e, r_e ~ N(mu - W_e, sd), comes to."""
    del inputs
    return np.asarray(values.mean(0) + values.std(0) * noise.normal(int(selected.sum()), values.shape[1]))


def _zeros(
    values: NDArray[np.float64], inputs: int, selected: NDArray[np.bool_], noise: PrfNoise
) -> NDArray[np.float64]:
    del inputs, noise
    return np.zeros((int(selected.sum()), values.shape[1]))


def mixture_rows(
    values: NDArray[np.float64], inputs: int, selected: NDArray[np.bool_], noise: PrfNoise
) -> NDArray[np.float64]:
    """Rows for the selected places from a mixture of the others, each normalised by its channels' typical norms."""
    count, taps = int(selected.sum()), values.shape[1]
    clear = ~selected & np.any(values != 0, axis=1)
    if clear.sum() < 2 * min(taps, MAX_FULL_TAPS):
        # (almost) the whole layer is encrypted: there is nothing to blend in with; only its scale is kept
        return np.asarray(values.std() * noise.normal(count, taps))
    a, b = channel_scales(values, inputs, clear)
    scale = (a[:, None] * b[None, :]).reshape(-1, 1)
    unit = exactness.filled(values[clear], scale[clear], noise)
    if taps > MAX_FULL_TAPS:
        flat = fit_mixture(unit.reshape(-1, 1), noise, components=4)
        return np.asarray(flat.sample(count * taps, noise).reshape(count, taps) * scale[selected])
    return np.asarray(fit_mixture(unit, noise).sample(count, noise) * scale[selected])


def fitted(
    made: NDArray[np.float64],
    rows: NDArray[Any],
    inputs: int,
    at: NDArray[np.int64],
    clear: NDArray[np.bool_],
    noise: PrfNoise,
    *,
    zeros: bool = True,
) -> NDArray[Any]:
    """Decoys for the units ``at`` as values of the file's element type, as precise and as often zero as clear ones."""
    mantissa = exactness.MANTISSA.get(rows.dtype.name, 0)
    values = rows.astype(np.float64)
    return _cast(exactness.like(made, at, values, inputs, clear, noise, mantissa=mantissa, zeros=zeros), rows)


def _cast(made: NDArray[np.float64], rows: NDArray[Any]) -> NDArray[Any]:
    if rows.dtype.kind in "iu":
        made = np.clip(np.round(made), rows.min(), rows.max())
    elif rows.dtype == np.float16:
        made = np.clip(made, -65_000, 65_000)
    return made.astype(rows.dtype)
