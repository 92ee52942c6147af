"""Small torch architectures by name, shared by the audits.

Every built-in is a :class:`Classifier`: ``features`` (the backbone) followed by ``head`` (one linear layer), so an
audit can train, freeze or invert either part. Input is float32 ``[n, channels, size, size]`` in 0..1, output
logits. ``module:function`` names a function of your own with the signature of :data:`Builder`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgepriv.errors import ConfigError, DataError, MissingDependencyError, MissingFileError

Builder = Callable[[int, int, int], nn.Module]
if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_WEIGHTS_BYTES = 2 << 30


class Classifier(nn.Module):
    """A backbone and one linear head; the two names are what other modules rely on."""

    def __init__(self, features: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[n, classes]``."""
        logits: Tensor = self.head(self.features(images))
        return logits


class _Residual(nn.Module):
    """The basic block of He et al. 2016 with post-activation BatchNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(out)) + self.short(x))


def build_seeded(name: str, classes: int, channels: int, size: int, seed: int) -> nn.Module:
    """As :func:`build`, in evaluation mode, with the fresh weights of a seed (torch's current seed becomes it)."""
    torch.manual_seed(seed)
    return build(name, classes, channels, size).eval()


def build(name: str, classes: int, channels: int, size: int) -> nn.Module:
    """Build an architecture with fresh weights from torch's current seed.

    Args:
        name: a built-in (see :func:`names`) or ``module:function``.
        classes: number of outputs.
        channels: channels of the images.
        size: their height and width in pixels.

    Raises:
        ConfigError: no such architecture, or it cannot be built for these numbers.
    """
    builder = _BUILDERS.get(name) or _entry_point(name)
    try:
        model = builder(classes, channels, size)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"architecture {name!r} cannot be built: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name!r} returned {type(model).__name__}, not a torch module")
    return model


def prepare(*, threads: int = 1, seed: int | None = None) -> None:
    """Set torch's threads (more than the free cores make it slower, not faster) and the seed of fresh weights."""
    torch.set_num_threads(threads)
    if seed is not None:
        torch.manual_seed(seed)


def names() -> tuple[str, ...]:
    """Return the built-in architectures."""
    return tuple(_BUILDERS)


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Put a safetensors file's tensors into ``model``; never pickle.

    Raises:
        MissingFileError: no such file.
        DataError: it is not safetensors, or holds another architecture's tensors.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise MissingDependencyError("weights need safetensors", hint="pip install 'edgepriv[server]'") from error
    if not path.is_file():
        raise MissingFileError(f"no such weights file: {path}")
    if path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise DataError(f"{path} is larger than {MAX_WEIGHTS_BYTES >> 20} MB")
    try:
        state = load(path.read_bytes())
    except (SafetensorError, json.JSONDecodeError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a safetensors file: {error}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise DataError(f"{path} holds another architecture: {first[0].strip()}", hint="check --model") from error
    if not all(bool(torch.isfinite(value).all()) for value in state.values() if value.is_floating_point()):
        raise DataError(f"{path} holds NaN or infinite weights")
    return model


def classes_in(path: Path) -> int | None:
    """Return the number of outputs by a file's head; None where that cannot be told."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as archive:
            return int(archive.get_slice("head.weight").get_shape()[0])
    except (OSError, SafetensorError):
        return None


def put_weights(model: nn.Module, weights: Mapping[str, Any], name: str, *, complete: bool) -> None:
    """Put arrays by ``state_dict`` name into ``model``, as federated rounds give them.

    Args:
        model: changed in place.
        weights: arrays by name.
        name: of the architecture, for messages.
        complete: every parameter must be among them, because nothing else was loaded.

    Raises:
        DataError: they are not this architecture's, or not all.
    """
    state = model.state_dict()
    for key, value in weights.items():
        if key not in state or tuple(state[key].shape) != value.shape:
            raise DataError(
                f"the weights hold {key} {list(value.shape)}, which {name} has not", hint="an other architecture?"
            )
        state[key] = torch.tensor(value).to(state[key].dtype)
    if complete and (missing := sorted({key for key, _ in model.named_parameters()} - set(weights))):
        raise DataError(f"the weights lack {missing[0]}", hint="give the frozen part too, as safetensors")
    model.load_state_dict(state)


def as_tensors(arrays: Mapping[str, Any], device: str = "cpu") -> dict[str, Tensor]:
    """Return arrays as tensors by name."""
    return {name: torch.tensor(value).to(device) for name, value in arrays.items()}


def logits_of(model: nn.Module, images: Any) -> Any:
    """Return logits [n, classes] of float32 images [n, c, h, w], in inference mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(torch.from_numpy(images), 256)]).numpy()


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state of ``model`` as safetensors."""
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, path)


def _entry_point(name: str) -> Builder:
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise ConfigError(f"no architecture {name!r}", hint="use module:function or one of " + ", ".join(_BUILDERS))
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name!r} cannot be imported: {error}", hint="is it on PYTHONPATH?") from error
    if not callable(found):
        raise ConfigError(f"{name!r} is not a function")
    builder: Builder = found
    return builder


def _cnn_bn(classes: int, channels: int, size: int) -> nn.Module:
    half = (size + 1) // 2
    features = nn.Sequential(
        nn.Conv2d(channels, 16, 3, 1, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
    )
    return Classifier(features, 32 * half * half, classes)


def _cnn(classes: int, channels: int, size: int) -> nn.Module:
    half = (size + 1) // 2
    features = nn.Sequential(
        nn.Conv2d(channels, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()
    )
    return Classifier(features, 32 * half * half, classes)


def _lenet(classes: int, channels: int, size: int) -> nn.Module:
    side = -(-size // 4)
    features = nn.Sequential(
        nn.Conv2d(channels, 12, 5, 2, 2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, 2, 2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, 1, 2),
        nn.Sigmoid(),
        nn.Flatten(),
    )
    return Classifier(features, 12 * side * side, classes)


def _mlp(classes: int, channels: int, size: int) -> nn.Module:
    features = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 64), nn.ReLU())
    return Classifier(features, 64, classes)


def _linear(classes: int, channels: int, size: int) -> nn.Module:
    return Classifier(nn.Flatten(), channels * size * size, classes)


def _resnet(blocks: int, *, pooled: bool = True) -> Builder:
    """Build He et al.'s network for small pictures; not ``pooled``: the head reads the feature map, place by place."""

    def builder(classes: int, channels: int, size: int) -> nn.Module:
        if size < 8:
            raise ValueError(f"a ResNet needs images of at least 8 pixels, not {size}")
        layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        width = 16
        for stage, outputs in enumerate((16, 32, 64)):
            for block in range(blocks):
                layers.append(_Residual(width, outputs, 2 if stage and block == 0 else 1))
                width = outputs
        if pooled:
            return Classifier(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), width, classes)
        side = (size + 3) // 4
        return Classifier(nn.Sequential(*layers, nn.Flatten()), width * side * side, classes)

    return builder


_BUILDERS: dict[str, Builder] = {
    "cnn-bn": _cnn_bn,
    "cnn": _cnn,
    "lenet": _lenet,
    "mlp": _mlp,
    "linear": _linear,
    "resnet8": _resnet(1),
    "resnet8-map": _resnet(1, pooled=False),
    "resnet20": _resnet(3),
}
