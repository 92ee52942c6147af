"""Stage 2, infer: one ONNX model on one frame, by the description in the ``model.toml`` beside it.

The execution providers are tried in the given order, each by a real inference, because the list that onnxruntime
reports is what it was compiled with and not what works; a fallback is logged. Threads and spinning are set explicitly.
Exactly the bytes whose SHA-256 is reported are given to the session.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgepriv.device.resize import Resizer
from edgepriv.errors import ConfigError, DataError, MissingDependencyError, MissingFileError
from edgepriv.settings import load_settings

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from edgepriv.device.capture import Frame

log = logging.getLogger(__name__)
TASKS = ("classify", "detect", "regress")
EMPTY = np.zeros(0, np.float32)
FLOATS: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The ``model.toml``: how a frame becomes the model's input and what its outputs mean.

    ``mean`` and ``scale`` are per channel of the 0..255 pixel: input = (pixel - mean) * scale. ``layout`` is NCHW or
    NHWC, ``colour`` RGB, BGR or gray. ``logits``, ``features``, ``boxes``, ``scores`` and ``classes`` name outputs.
    """

    id: str
    task: str = "classify"
    file: str = "model.onnx"
    input: str = ""
    layout: str = "NCHW"
    width: int = 224
    height: int = 224
    colour: str = "RGB"
    crop: str = "none"
    mean: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1 / 255,)
    labels: tuple[str, ...] = ()
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    logits: str = ""
    features: str = ""
    boxes: str = "boxes"
    scores: str = "scores"
    classes: str = "classes"
    score_threshold: float = 0.5
    trainable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Inference:
    """A model's outputs for one frame.

    ``logits`` float32 [classes or values]; ``features`` float32 [d], empty where the model names none; detections:
    ``boxes`` float32 [n, 4] as fractions of the frame, ``box_scores`` [n], ``box_classes`` int64 [n] below
    ``box_labels``, the number of labels, from which the release's bound is counted.
    """

    frame: Frame
    logits: NDArray[np.float32]
    features: NDArray[np.float32] = field(default_factory=lambda: EMPTY)
    boxes: NDArray[np.float32] = field(default_factory=lambda: EMPTY.reshape(0, 4))
    box_scores: NDArray[np.float32] = field(default_factory=lambda: EMPTY)
    box_classes: NDArray[np.int64] = field(default_factory=lambda: EMPTY.astype(np.int64))
    box_labels: int = 0


def load_spec(model_path: Path) -> ModelSpec:
    """Read the ``model.toml`` beside a model.

    Raises:
        MissingFileError: there is none.
        ConfigError: a value contradicts itself.
    """
    spec = load_settings(ModelSpec, model_path.with_name("model.toml"), {})
    if spec.task not in TASKS or spec.layout not in {"NCHW", "NHWC"} or spec.colour not in {"RGB", "BGR", "gray"}:
        raise ConfigError(f"{model_path.with_name('model.toml')}: task, layout or colour is not one of the known")
    if spec.task == "detect" and not spec.labels:
        raise ConfigError(
            f"{model_path.with_name('model.toml')}: a detector needs labels", hint="the bound counts its classes"
        )
    if spec.width < 1 or spec.height < 1 or spec.crop not in {"none", "center-square"}:
        raise ConfigError(f"{model_path.with_name('model.toml')}: width, height or crop is not valid")
    return spec


class OpenedModel(Protocol):
    """A protected model that was opened in memory: what it is, how long it may run, and its weights for a session."""

    digest: bytes
    level: int
    expires_s: int
    issued_s: int

    def feed(self, options: Any, ort: Any) -> bytes:
        """Hand external weights to the session options; returns the graph's bytes."""
        ...


class Inferer:
    """One model, one session, one thread pool for the life of the process."""

    def __init__(self, model: bytes | OpenedModel, spec: ModelSpec, *, threads: int = 1, optimise: bool = True) -> None:
        self.spec = spec
        self.digest = hashlib.sha256(model).digest() if isinstance(model, bytes) else model.digest
        self.level = 0 if isinstance(model, bytes) else model.level
        self.expires_s, self.issued_s = (0, 0) if isinstance(model, bytes) else (model.expires_s, model.issued_s)
        self.closed = False
        channels = 1 if spec.colour == "gray" else 3
        self._mean = _per_channel(spec.mean, channels, "mean")
        self._scale = _per_channel(spec.scale, channels, "scale")
        self._resize: Resizer | None = None
        self._session = self._open(model, threads, optimise)
        inputs, outputs = self._session.get_inputs(), [o.name for o in self._session.get_outputs()]
        self._input: Any = next((one for one in inputs if one.name == (spec.input or inputs[0].name)), None)
        if self._input is None:
            raise ConfigError(f"model {spec.id} has no input {spec.input!r}", hint=f"it has {inputs[0].name!r}")
        self._outputs = self._wanted(outputs)

    @classmethod
    def from_file(cls, path: Path, *, threads: int = 1) -> Inferer:
        """Load a plain model file and its ``model.toml``."""
        if not path.is_file():
            raise MissingFileError(f"no such model: {path}", hint="set [model] path")
        if path.with_name("manifest.cbor").is_file():
            raise DataError(f"{path} is the carrier of a protected model", hint="set [model] permission")
        return cls(path.read_bytes(), load_spec(path), threads=threads)

    def close(self) -> None:
        """Let go of the session and its weights; this model runs no more."""
        self.closed, self._session = True, None

    @property
    def classes(self) -> int:
        """Number of classes (labels), or 0 when the model description lists none."""
        return len(self.spec.labels)

    def _wanted(self, outputs: list[str]) -> list[str]:
        spec = self.spec
        if spec.task == "detect":
            names = [spec.boxes, spec.scores, spec.classes]
        else:
            names = [spec.logits or outputs[0], *([spec.features] if spec.features else [])]
        for name in names:
            if name not in outputs:
                raise ConfigError(f"model {spec.id} has no output {name!r}", hint=f"it has {', '.join(outputs)}")
        return names

    def _open(self, model: bytes | OpenedModel, threads: int, optimise: bool) -> Any:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MissingDependencyError(
                "inference needs onnxruntime", hint="pip install 'edgepriv[device]'"
            ) from error
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = max(1, threads), 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        content = model if isinstance(model, bytes) else model.feed(options, ort)
        failures = []
        for provider in self.spec.providers:
            try:
                session = ort.InferenceSession(content, options, providers=[provider])
                self._probe(session)
            except Exception as error:  # onnxruntime raises many types; each means: not this provider
                failures.append(f"{provider}: {str(error).splitlines()[0][:200]}")
                log.warning("provider %s does not run model %s: %s", provider, self.spec.id, failures[-1])
            else:
                return session
        raise DataError(f"model {self.spec.id} does not run: {'; '.join(failures)}", hint="is it an ONNX model?")

    def _probe(self, session: Any) -> None:
        spec = self.spec
        channels = 1 if spec.colour == "gray" else 3
        shape = (
            (1, channels, spec.height, spec.width) if spec.layout == "NCHW" else (1, spec.height, spec.width, channels)
        )
        inputs = session.get_inputs()
        wanted = next((one for one in inputs if one.name == spec.input), inputs[0])
        session.run(None, {spec.input or wanted.name: as_taken(wanted, np.zeros(shape, np.float32))})

    def prepare(self, frame: Frame) -> NDArray[np.float32]:
        """Crop, resize, colour and scale: the model's input of one frame, float32 with a batch axis."""
        pixels, spec = frame.pixels, self.spec
        if self._resize is None or self._resize.source != pixels.shape[:2]:
            self._resize = Resizer(pixels.shape[:2], (spec.height, spec.width), square=spec.crop == "center-square")
        small = self._resize(pixels)
        if spec.colour == "gray" and small.shape[2] != 1:
            small = (small[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
        elif spec.colour != "gray" and small.shape[2] == 1:
            small = np.repeat(small, 3, axis=2)
        elif spec.colour == "BGR":
            small = small[..., 2::-1]
        x = (small[..., :3] - self._mean) * self._scale
        return np.ascontiguousarray((x.transpose(2, 0, 1) if spec.layout == "NCHW" else x)[None], np.float32)

    def __call__(self, frame: Frame) -> Inference:
        """Run the model on one frame."""
        results = self._run(self.prepare(frame))
        if self.spec.task == "detect":
            return self._detections(frame, *results)
        logits = np.asarray(results[0], np.float32).reshape(-1)
        features = np.asarray(results[1], np.float32).reshape(-1) if len(results) > 1 else EMPTY
        return Inference(frame, logits, features)

    def run(self, inputs: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Outputs for inputs that are prepared already, with a batch axis: logits, then features where named."""
        outputs = [np.asarray(out) for out in self._run(inputs)]
        return [out.astype(np.float32, copy=False) if out.dtype.kind == "f" else out for out in outputs]

    def _run(self, inputs: NDArray[np.float32]) -> list[Any]:
        results: list[Any] = self._session.run(self._outputs, {self._input.name: as_taken(self._input, inputs)})
        return results

    def _detections(self, frame: Frame, boxes: Any, scores: Any, classes: Any) -> Inference:
        if not all(np.isfinite(np.asarray(part, np.float64)).all() for part in (boxes, scores, classes)):
            raise DataError("the model's output holds NaN or infinity", hint="the model or its input is broken")
        scores = np.asarray(scores, np.float32).reshape(-1)
        keep = scores >= self.spec.score_threshold
        found = np.asarray(boxes, np.float32).reshape(-1, 4)[keep]
        kinds = np.asarray(classes).reshape(-1)[keep].astype(np.int64)
        labels = len(self.spec.labels)
        if len(kinds) and not 0 <= kinds.min() <= kinds.max() < labels:
            raise DataError(f"the model found a class outside its {labels} labels", hint="complete model.toml's labels")
        return Inference(frame, EMPTY, boxes=found, box_scores=scores[keep], box_classes=kinds, box_labels=labels)


def as_taken(wanted: Any, inputs: NDArray[Any]) -> NDArray[Any]:
    """Inputs in the floating-point type that a session's input ``wanted`` takes; others are left to the session."""
    kind = FLOATS.get(wanted.type)
    return inputs if kind is None else inputs.astype(kind, copy=False)


def _per_channel(values: tuple[float, ...], channels: int, name: str) -> NDArray[np.float32]:
    if len(values) not in {1, channels}:
        raise ConfigError(f"model.toml: {name} needs 1 or {channels} values, not {len(values)}")
    return np.asarray(values, np.float32)
