"""Closed-form auditors: decoders from a released output to pixels that know nothing of the supplier's own decoder.

Who the attacker is: whoever receives the released outputs and has other images of the same kind. Rules: an auditor
is fitted again on exactly what is released; several *views* of the same bytes are tried (as released, logarithms,
the table of distinct messages), because a decoder that misses an invertible view would call a leak safe.
Source: random-feature ridge, float64, drawn from a fixed generator, so that every machine gets the same decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

RANDOM_FEATURES = 400
RIDGE = 10.0
GENERATOR_SEED = 7
WIDE = 2048
MAX_DISTINCT_MESSAGES = 256


class Pipeline(Protocol):
    """A release policy as the audit sees it: what the receiver gets from a model's outputs."""

    @property
    def name(self) -> str:
        """The policy's name, as in the device's configuration."""

    def bits(self, k: int) -> float:
        """Upper bound on the bits that one inference with k outputs releases."""

    def apply(self, logits: NDArray[np.float32]) -> Array:
        """Map logits [n, k] to what the receiver sees, float64 [n, m]."""


class Decoder(Protocol):
    """Anything that was fitted on released outputs and rebuilds pixels from others."""

    def rebuild(self, released: Array) -> Array:
        """Return pixels [n, d] for released outputs [n, m]; not clamped."""


class RidgeDecoder:
    """Random-feature ridge regression from outputs to pixels.

    Args:
        released: outputs of the audit images, [n, m].
        pixels: those images, [n, d].
        features: number of random ReLU features.
        ridge: penalty on every coefficient, the constant's too.
    """

    def __init__(
        self,
        released: NDArray[Any],
        pixels: NDArray[Any],
        *,
        features: int = RANDOM_FEATURES,
        ridge: float = RIDGE,
    ) -> None:
        z = np.asarray(released, np.float64)
        self._centre, self._spread = z.mean(0), z.std(0) + 1e-3
        generator = np.random.default_rng(GENERATOR_SEED)
        self._weights = generator.standard_normal((z.shape[1], features)) / np.sqrt(z.shape[1])
        self._bias = generator.standard_normal(features)
        self._solution = solved(self._features(z), np.asarray(pixels, np.float64), ridge)

    def _features(self, z: Array) -> Array:
        standard = (z - self._centre) / self._spread
        hidden = np.maximum(standard @ self._weights + self._bias, 0)
        return np.concatenate([np.ones((len(z), 1)), standard, hidden], axis=1)

    def rebuild(self, released: Array) -> Array:
        """Return pixels [n, d], not clamped."""
        return np.asarray(self._features(np.asarray(released, np.float64)) @ self._solution, np.float64)


def solved(phi: Array, pixels: Array, ridge: float) -> Array:
    """Return the ridge solution; by its dual where wide outputs give more features than pictures: the same numbers."""
    if phi.shape[1] > max(len(phi), WIDE):
        return np.asarray(phi.T @ np.linalg.solve(phi @ phi.T + ridge * np.eye(len(phi)), pixels), np.float64)
    gram = phi.T @ phi + ridge * np.eye(phi.shape[1])
    return np.asarray(np.linalg.solve(gram, phi.T @ pixels), np.float64)


class MessageTable:
    """The mean image of each distinct message: the best possible decoder where messages are few."""

    def __init__(self, released: NDArray[Any], pixels: NDArray[Any]) -> None:
        messages, rows = np.unique(released, axis=0, return_inverse=True)
        rows = rows.reshape(-1)
        self._overall = np.asarray(pixels, np.float64).mean(0)
        self._means = {
            message.tobytes(): np.asarray(pixels[rows == i], np.float64).mean(0) for i, message in enumerate(messages)
        }

    def rebuild(self, released: NDArray[Any]) -> Array:
        """Return the mean image of each message; the overall mean for a message never seen."""
        return np.stack([self._means.get(row.tobytes(), self._overall) for row in released])


def logarithms(released: Array) -> Array | None:
    """Return the centred logarithms of scores in [0, 1], or None where the outputs are no such scores.

    An unrounded softmax is its logits up to a constant: log-softmax inverts it. Zeros take half of the smallest
    positive score of the batch.
    """
    if released.min() < 0 or released.max() > 1 + 1e-6 or not np.any((released > 0) & (released < 1)):
        return None
    floor = float(released[released > 0].min()) / 2
    logs = np.log(np.maximum(released, floor))
    return np.asarray(logs - logs.mean(1, keepdims=True), np.float64)


def closed_form_decoders(released: Array, pixels: NDArray[Any]) -> Iterator[tuple[str, Decoder]]:
    """Yield (name, decoder) for every closed-form auditor that applies to these released outputs."""
    yield "ridge", RidgeDecoder(released, pixels)
    if logarithms(released) is not None:
        yield "ridge on logarithms", LogDecoder(released, pixels)
    distinct = len(np.unique(released, axis=0))
    if distinct <= min(MAX_DISTINCT_MESSAGES, len(released) // 4):
        yield "message table", MessageTable(released, pixels)


class LogDecoder:
    """Ridge on the logarithms; the floor is that of the audit images, so that new outputs map alike."""

    def __init__(self, released: Array, pixels: NDArray[Any]) -> None:
        self._floor = float(released[released > 0].min()) / 2
        self._ridge = RidgeDecoder(self.view(released), pixels)

    def view(self, released: Array) -> Array:
        """Return centred logarithms with this decoder's floor."""
        logs = np.log(np.maximum(released, self._floor))
        return np.asarray(logs - logs.mean(1, keepdims=True), np.float64)

    def rebuild(self, released: Array) -> Array:
        """Return pixels [n, d], not clamped."""
        return self._ridge.rebuild(self.view(released))
