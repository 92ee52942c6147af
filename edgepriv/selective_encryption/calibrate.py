"""Judge a model on the owner's data and find level shares by bisection against target qualities.

Quality is accuracy in [0, 1] for ``classify`` and PSNR in dB for ``denoise``; higher is better. Everything that is
judged runs in ONNX Runtime at its default optimisation, as a device will run it. Fixed shares are not used: below a
share of about 0.4 a level is worth nothing, and where the useful part begins differs from model to model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import ConfigError, DataError, MissingDependencyError
from edgepriv.image_quality import psnr

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgepriv.selective_encryption.restore import Restored

TASKS = ("classify", "denoise")
BATCH = 200
NEIGHBOURS = 6


@dataclass(frozen=True, slots=True)
class Samples:
    """The owner's data as the model wants it.

    ``x`` float32 [n, channels, height, width]; ``y`` int64 [n] labels, or float32 clean pictures for ``denoise``.
    """

    task: str
    x: NDArray[np.float32]
    y: NDArray[Any]

    def __post_init__(self) -> None:
        """Check task and lengths."""
        if self.task not in TASKS:
            raise ConfigError(f"unknown task {self.task!r}", hint=f"use one of {', '.join(TASKS)}")
        if len(self.x) != len(self.y) or not len(self.x):
            raise DataError("the data set has no samples, or not one target for each")

    def head(self, count: int) -> Samples:
        """The first samples."""
        return Samples(self.task, self.x[:count], self.y[:count])

    @property
    def floor(self) -> float:
        """What needs no model: the most frequent class, or the PSNR of the noisy input."""
        if self.task == "classify":
            return float(np.bincount(self.y).max() / len(self.y))
        return mean_psnr(self.x, self.y)

    def quality(self, outputs: NDArray[Any]) -> float:
        """Accuracy of logits [n, classes], or mean PSNR of pictures in [0, 1]."""
        if self.task == "classify":
            return float(np.mean(np.argmax(outputs.reshape(len(outputs), -1), 1) == self.y))
        return mean_psnr(outputs, self.y)


def mean_psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Mean PSNR over pictures in [0, 1]; not-a-number and overflow count as the worst."""
    a = np.nan_to_num(np.asarray(a, np.float64), nan=1e3, posinf=1e3, neginf=-1e3).clip(0, 1)
    return float(np.mean([psnr(one, other, data_range=1.0) for one, other in zip(a, b, strict=True)]))


def runtime() -> Any:
    """The onnxruntime module.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        hint = "pip install 'edgepriv[server]'"
        raise MissingDependencyError("judging a model needs onnxruntime", hint=hint) from error
    return ort


def options(ort: Any, threads: int = 1) -> Any:
    """Session options: stated threads, no spinning, warnings off, default optimisation."""
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.log_severity_level = 3
    chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return chosen


def outputs(model: Restored | bytes, x: NDArray[np.float32], *, threads: int = 1) -> NDArray[Any]:
    """First output of a model for all inputs, in batches (one by one if the model's batch is fixed).

    Raises:
        DataError: the model does not run on inputs of this shape.
    """
    ort = runtime()
    chosen = options(ort, threads)
    try:
        session = ort.InferenceSession(model if isinstance(model, bytes) else model.feed(chosen, ort), chosen)
        first = session.get_inputs()[0]
        fixed = isinstance(first.shape[0], int)
        step = first.shape[0] if fixed else BATCH
        x = x[: len(x) // step * step] if fixed else x
        kind = np.float16 if first.type == "tensor(float16)" else np.float32
        parts = [session.run(None, {first.name: x[at : at + step].astype(kind)})[0] for at in range(0, len(x), step)]
    except Exception as error:  # onnxruntime raises many types; each means: not this model with this data
        raise DataError(f"the model does not run on this data: {str(error).splitlines()[0][:200]}") from error
    return np.concatenate(parts)


def quality(model: Restored | bytes, samples: Samples, *, threads: int = 1) -> float:
    """Judge one model."""
    result = outputs(model, samples.x, threads=threads)
    return samples.head(len(result)).quality(result)


def bisect_counts(
    measure: Callable[[int], float], total: int, targets: Sequence[float], log: Callable[[str], None]
) -> list[tuple[int, float]]:
    """Find for each rising target how many units must be given back.

    Args:
        measure: quality with the first ``count`` units of the order restored.
        total: number of encrypted units; the last level gives all of them.
        targets: rising target qualities below that of the whole model.
        log: progress.

    Returns:
        (count, quality) for each target; counts rise strictly.

    Raises:
        ConfigError: a target cannot be met between its neighbours.
    """
    seen: dict[int, float] = {}

    def at(count: int) -> float:
        if count not in seen:
            seen[count] = measure(count)
        return seen[count]

    found: list[tuple[int, float]] = []
    low = 0
    for target in targets:
        count = _bisect(at, low, total, target)
        best = _closest(at, count, low, total, target)
        log(f"target {target:g}: {best} of {total} units give {at(best):.4g}")
        found.append((best, at(best)))
        low = best
    _check_rising(found, targets)
    return found


def _bisect(at: Callable[[int], float], low: int, high: int, target: float) -> int:
    if at(high) < target:
        raise ConfigError(f"target {target:g} is above the whole model's {at(high):.4g}", hint="lower --levels")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < target else (low, middle)
    return high


def _closest(at: Callable[[int], float], count: int, low: int, total: int, target: float) -> int:
    """Quality is not monotone from kernel to kernel: look around the crossing for the closest count."""
    around = range(max(low + 1, count - NEIGHBOURS), min(total - 1, count + NEIGHBOURS) + 1)
    tolerance = 0.002 * max(1.0, abs(target))
    if abs(at(count) - target) <= tolerance:
        return count
    return min(around, key=lambda c: abs(at(c) - target), default=count)


def _check_rising(found: Sequence[tuple[int, float]], targets: Sequence[float]) -> None:
    for (count, value), (after, value_after), target in zip(found, found[1:], targets[1:], strict=False):
        if after <= count or value_after <= value:
            raise ConfigError(
                f"target {target:g} cannot be told from the level below it", hint="space the --levels further apart"
            )
