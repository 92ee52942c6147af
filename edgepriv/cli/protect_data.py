"""The owner's data for `edgepriv protect`: from a data-set spec to what the model takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from edgepriv.selective_encryption.calibrate import Samples


@dataclass(frozen=True, slots=True)
class InputForm:
    """How pixels become inputs: ``(pixel - mean) * scale`` with pixels 0..255; for ``denoise`` pixel / 255 + noise."""

    task: str
    mean: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1 / 255,)
    sigma: float = 25.0

    def fields(self) -> dict[str, Any]:
        """For the manifest, so that an audit judges the same way."""
        return {"task": self.task, "mean": list(self.mean), "scale": list(self.scale), "sigma": self.sigma}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> InputForm:
        """Read what `fields` wrote."""
        return cls(
            str(fields.get("task", "classify")),
            tuple(float(v) for v in fields.get("mean", [0.0])),
            tuple(float(v) for v in fields.get("scale", [1 / 255])),
            float(fields.get("sigma", 25.0)),
        )


def numbers(text: str, flag: str) -> tuple[float, ...]:
    """Read ``0.1,0.2`` or ``1/255``.

    Raises:
        ConfigError: not numbers.
    """
    try:
        return tuple(_number(word) for word in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{flag} {text!r} is not a list of numbers", hint="for example 127.5 or 1/255") from None


def _number(word: str) -> float:
    top, _, bottom = word.partition("/")
    return float(top) / float(bottom) if bottom else float(top)


def input_form(model: Path | None, task: str, mean: str | None, scale: str | None, sigma: float) -> InputForm:
    """Input form from the flags, else from the ``model.toml`` beside the model, else pixels / 255."""
    if mean is None and scale is None and model is not None and model.with_name("model.toml").is_file():
        from edgepriv.device.infer import load_spec

        spec = load_spec(model)
        return InputForm(task, tuple(spec.mean), tuple(spec.scale), sigma)
    return InputForm(task, numbers(mean or "0", "--mean"), numbers(scale or "1/255", "--scale"), sigma)


def load_samples(spec: str, form: InputForm, *, split: str, limit: int | None) -> Samples:
    """Load one part of a data set as model inputs."""
    import numpy as np

    from edgepriv import datasets
    from edgepriv.selective_encryption.calibrate import Samples

    data = datasets.load(spec, split=split, limit=limit)
    if form.task == "denoise":
        clean = data.images.astype(np.float32).mean(3, keepdims=True) / 255
        noise = np.random.default_rng(0 if split == "train" else 1).standard_normal(clean.shape)
        noisy = (clean + form.sigma / 255 * noise).astype(np.float32)
        return Samples("denoise", _channels_first(noisy), _channels_first(clean))
    x = (data.images.astype(np.float32) - np.asarray(form.mean)) * np.asarray(form.scale)
    return Samples("classify", _channels_first(x.astype(np.float32)), data.labels)


def _channels_first(x: Any) -> Any:
    import numpy as np

    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
