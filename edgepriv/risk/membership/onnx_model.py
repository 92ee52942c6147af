"""Scores of any classifier that is an ONNX file: logits of uint8 pictures, layout and output form found by looking."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError, MissingDependencyError, MissingFileError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["OnnxClassifier"]

CHUNK = 256


class OnnxClassifier:
    """An ONNX classifier with one float32 picture input (NCHW or NHWC, values in 0..1) and one output [n, classes].

    Probabilities are told from logits by their sum and turned into logarithms, so that margins mean the same.

    Raises:
        MissingFileError: no such file.
        DataError: not an ONNX model, or not of this form.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        if not path.is_file():
            raise MissingFileError(f"no such model: {path}")
        runtime = _runtime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own family of pybind classes
            raise DataError(f"{path} is not an ONNX model that runs: {error}") from error
        self._path, self._input = path, self._session.get_inputs()[0]
        if len(self._session.get_inputs()) != 1 or len(self._input.shape) != 4 or "float" not in self._input.type:
            raise DataError(f"{path} does not take one batch of float pictures")

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Logits [n, classes] of images uint8 [n, h, w, c], up to a constant for each row."""
        step = self._input.shape[0] if isinstance(self._input.shape[0], int) else CHUNK
        parts = [self._run(images[i : i + step], step) for i in range(0, len(images), step)]
        values: NDArray[np.float64] = np.concatenate(parts).astype(np.float64)
        if not np.isfinite(values).all():
            raise DataError(f"{self._path} gives values that are not finite")
        sums = values.sum(axis=1)
        if values.min() >= 0 and values.max() <= 1 + 1e-6 and np.allclose(sums, 1.0, atol=1e-3):
            return np.log(np.maximum(values, 1e-30))
        return values

    def labels(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The first choice for each image."""
        chosen: NDArray[np.int64] = self.logits(images).argmax(axis=1)
        return chosen

    def _run(self, images: NDArray[np.uint8], step: int) -> NDArray[np.float32]:
        count = len(images)
        if count < step and isinstance(self._input.shape[0], int):
            images = np.concatenate([images, np.repeat(images[:1], step - count, axis=0)])
        try:
            (output,) = self._session.run(None, {self._input.name: self._arrange(images)})
        except Exception as error:
            raise DataError(f"{self._path} does not run on pictures {images.shape[1:]}: {error}") from error
        result: NDArray[np.float32] = np.asarray(output)[:count]
        if result.ndim != 2 or result.shape[1] < 2:
            raise DataError(f"{self._path} gives {result.shape}, not one score for each class")
        return result

    def _arrange(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        scaled = images.astype(np.float32) / np.float32(255.0)
        channels_last = self._input.shape[3] == images.shape[3] and self._input.shape[1] != images.shape[3]
        return scaled if channels_last else np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("ONNX models need onnxruntime", hint="pip install 'edgepriv[server]'") from error
    return onnxruntime
