"""Judge a model on the owner's data.

Quality is accuracy in [0, 1] for ``classify`` and PSNR in dB for ``denoise``; higher is better. Everything that is
judged runs in ONNX Runtime at its default optimisation, as a device will run it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import ConfigError, DataError, MissingDependencyError
from edgepriv.image_quality import psnr

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgepriv.selective_encryption.restore import Restored

TASKS = ("classify", "denoise")
BATCH = 200
FLOATS: dict[str, Any] = {"tensor(float16)": np.float16, "tensor(double)": np.float64}  # else float32


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
        kind = FLOATS.get(first.type, np.float32)
        parts = [session.run(None, {first.name: x[at : at + step].astype(kind)})[0] for at in range(0, len(x), step)]
    except Exception as error:  # onnxruntime raises many types; each means: not this model with this data
        raise DataError(f"the model does not run on this data: {' '.join(str(error).split())[:260]}") from error
    return np.concatenate(parts)


def quality(model: Restored | bytes, samples: Samples, *, threads: int = 1) -> float:
    """Judge one model."""
    result = outputs(model, samples.x, threads=threads)
    return samples.head(len(result)).quality(result)
