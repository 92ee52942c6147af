"""Find the decoys: the detectors of the reference, trained as an attacker would (scikit-learn).

Who the attacker is: has the published layer and knows the method, but not the positions. Makes training data from
the layer itself: encrypts random kernels of it in the same way, and learns to tell those decoys from the rest.
Detectors: ``A`` moments, smoothness, exact zeros, precision and repeated values of a kernel, and its likelihood ratio
(a mixture fitted to the layer against the published N(mu, sd)); ``A+NN`` also distances to its nearest neighbours;
``B`` also its norm and direction relative to its output and input channel, and the ratio for kernels normalised by
both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.selective_encryption import carrier, decoys, exactness

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgepriv.selective_encryption.carrier import Layer
    from edgepriv.selective_encryption.decoys import Mixture

DETECTORS = ("A", "A+NN", "B")
MIN_EACH = 40
MAX_ROWS = 8000
COPIES = 5
CLEAR_SHARE = 0.3  # of each copy's true kernels; all of its decoys are learned from


class Features:
    """The features of one detector on one published layer; the densities are fitted once, to what was published."""

    def __init__(self, published: NDArray[np.float64], inputs: int, detector: str) -> None:
        self._inputs, self._detector = inputs, detector
        self._spread = published.std() + 1e-12
        k = published / self._spread
        self._centre, self._width = k.mean(0), k.std(0) + 1e-12
        self._density = _density(k)
        self._scaled = _density(k / self._scales(k)[:, None]) if detector == "B" else None

    def of(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Features of each kernel [units, features]."""
        k = rows / self._spread
        parts = [
            np.stack([k.mean(1), k.std(1), np.abs(k).mean(1), k.max(1), k.min(1), np.linalg.norm(k, axis=1)], 1),
            _smoothness(k),
            exactness.features(rows),
            np.sort(np.abs(k), 1),
            k,
            self._likelihoods(self._density, k, np.ones(len(k))),
        ]
        if self._detector != "A":
            parts.append(_neighbours(k))
        if self._detector == "B":
            parts.append(_relative(k, self._inputs))
            parts.append(self._likelihoods(self._scaled, k, self._scales(k)))
        return np.concatenate(parts, 1)

    def _scales(self, k: NDArray[np.float64]) -> NDArray[np.float64]:
        """Typical norm of each kernel by its output and input channel."""
        out, into = decoys.channel_scales(k, self._inputs, np.ones(len(k), bool))
        return (out[:, None] * into[None, :]).reshape(-1)

    def _likelihoods(
        self, density: Mixture | None, k: NDArray[np.float64], scale: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Log density under the layer's mixture and under the published N(mu, sd), and their difference."""
        if density is None:
            return np.zeros((len(k), 1))
        ours = density.log_density(k / scale[:, None]) - k.shape[1] * np.log(scale)
        z = (k - self._centre) / self._width
        published = -0.5 * (z**2).sum(1) - np.log(self._width).sum()
        return np.stack([ours, published, ours - published], 1)


def _density(unit: NDArray[np.float64]) -> Mixture | None:
    if unit.shape[1] > decoys.MAX_FULL_TAPS:
        return None
    return decoys.fit_mixture(unit, decoys.PrfNoise(b"attacker" * 4, bytes(16), "fit"), components=8)


def _smoothness(k: NDArray[np.float64]) -> NDArray[np.float64]:
    side = round(float(np.sqrt(k.shape[1])))
    if side * side != k.shape[1] or side < 2:
        return np.abs(np.diff(k, axis=1)).mean(1, keepdims=True) if k.shape[1] > 1 else np.zeros((len(k), 1))
    square = k.reshape(-1, side, side)
    down = np.abs(np.diff(square, axis=1)).mean((1, 2))
    across = np.abs(np.diff(square, axis=2)).mean((1, 2))
    centre = square[:, side // 2, side // 2]
    return np.stack([down, across, centre, square[:, 0].mean(1), square[:, -1].mean(1)], 1)


def _neighbours(k: NDArray[np.float64]) -> NDArray[np.float64]:
    from sklearn.neighbors import NearestNeighbors

    norms = np.linalg.norm(k, axis=1, keepdims=True) + 1e-12
    parts = []
    for space in (k, k / norms):
        distances, _ = NearestNeighbors(n_neighbors=min(6, len(k))).fit(space).kneighbors(space)
        parts.append(distances[:, 1:])
        parts.append(distances[:, 1:] / norms)
    return np.concatenate(parts, 1)


def _relative(k: NDArray[np.float64], inputs: int) -> NDArray[np.float64]:
    """Norm relative to both channels' medians, and cosine to both channels' mean kernels."""
    grid = k.reshape(-1, inputs, k.shape[1])
    norms = np.linalg.norm(grid, axis=2) + 1e-12
    by_out = norms / np.median(norms, axis=1, keepdims=True)
    by_in = norms / np.median(norms, axis=0, keepdims=True)
    both = by_out / np.median(by_out, axis=0, keepdims=True)
    unit = grid / norms[..., None]
    cosines = [(unit * _directions(unit, axis)).sum(2) for axis in (0, 1)]
    return np.stack([by_out, by_in, both, np.log(both), *cosines], 2).reshape(len(k), -1)


def _directions(unit: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    mean = unit.mean(axis, keepdims=True)
    return np.asarray(mean / (np.linalg.norm(mean, axis=2, keepdims=True) + 1e-12))


def layer_auc(
    published: NDArray[Any], inputs: int, selected: NDArray[np.bool_], detector: str, *, kind: str, seed: int
) -> float:
    """AUC with which the attacker ranks the true decoys of one published layer.

    Args:
        published: the layer's rows with decoys.
        inputs: input channels.
        selected: the truth, for scoring only.
        detector: one of ``DETECTORS``.
        kind: of decoys, known to the attacker.
        seed: of the attacker's own choices.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    rng = np.random.default_rng(seed)
    clear = published.astype(np.float64)
    of = Features(clear, inputs, detector).of
    features, labels = [], []
    for copy in range(COPIES):
        fake = np.zeros(len(published), bool)
        fake[rng.choice(len(published), int(selected.sum()), replace=False)] = True
        noise = decoys.PrfNoise(rng.bytes(32), bytes(16), f"attacker-{copy}")
        made = decoys.decoy_rows(published, inputs, fake, noise, kind=kind)
        kept = fake | (rng.random(len(fake)) < CLEAR_SHARE)
        features.append(of(made.astype(np.float64))[kept])
        labels.append(fake[kept])
    model = HistGradientBoostingClassifier(
        max_iter=120, learning_rate=0.06, min_samples_leaf=20, class_weight="balanced", random_state=seed
    )
    with threadpool_limits(1):  # its threads wait for each other by spinning, which a busy host punishes
        model.fit(np.concatenate(features), np.concatenate(labels))
    return float(roc_auc_score(selected, model.predict_proba(of(clear))[:, 1]))


def mixed_layers(layers: Sequence[Layer], selected: Mapping[str, NDArray[np.bool_]]) -> list[Layer]:
    """Layers with enough encrypted and enough clear kernels for a detector to be trained and judged."""
    return [
        layer
        for layer in layers
        if layer.unit_size >= 4 and min(selected[layer.name].sum(), (~selected[layer.name]).sum()) >= MIN_EACH
    ]


def detect(
    masked: Any,
    layers: Sequence[Layer],
    selected: Mapping[str, NDArray[np.bool_]],
    detector: str,
    *,
    kind: str,
    seed: int = 0,
) -> tuple[float | None, int]:
    """How well the decoys are found, and in how many layers that could be tested at all.

    Each layer's max(AUC, 1 - AUC), because a detector may be read either way, weighted by the layer's decoys; None
    where no layer is neither whole nor empty. In a wholly encrypted layer there is nothing to find: its positions
    are public anyway.
    """
    total, weight, tested = 0.0, 0, 0
    for layer in mixed_layers(layers, selected):
        rows = carrier.weight_rows(masked, layer)[: MAX_ROWS // layer.inputs * layer.inputs]
        part = selected[layer.name][: len(rows)]
        if min(part.sum(), (~part).sum()) < MIN_EACH:
            continue
        count = int(min(selected[layer.name].sum(), (~selected[layer.name]).sum()))
        auc = layer_auc(rows, layer.inputs, part, detector, kind=kind, seed=seed)
        total, weight, tested = total + count * max(auc, 1 - auc), weight + count, tested + 1
    return (total / weight if weight else None), tested
