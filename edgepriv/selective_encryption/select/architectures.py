"""Named architectures for ``--arch``, their training, and export to ONNX (torch).

``vgg-cifar``: the shape of VGG19 with BatchNorm at a quarter of its width (``vgg19-cifar``: full width). ``dncnn``:
the residual denoiser with BatchNorm in its middle layers (``dncnn17``: 17 layers of 64 channels). Any other name is
an entry point ``module:function`` that returns an ``nn.Module``.
"""

from __future__ import annotations

import importlib
import io
import warnings
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import nn

from edgepriv.errors import ConfigError, DataError, MissingFileError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VGG19 = (1, 1, 0, 2, 2, 0, 4, 4, 4, 4, 0, 8, 8, 8, 8, 0, 8, 8, 8, 8)  # widths in units; 0 = max-pooling


class Vgg(nn.Module):
    """Convolution, BatchNorm, ReLU stacks and one linear head."""

    def __init__(self, width: int = 16, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        inputs = channels
        for units in VGG19:
            if units == 0:
                parts.append(nn.MaxPool2d(2))
                continue
            parts += [nn.Conv2d(inputs, units * width, 3, padding=1), nn.BatchNorm2d(units * width), nn.ReLU()]
            inputs = units * width
        self.features = nn.Sequential(*parts)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes]."""
        out: torch.Tensor = self.head(self.features(x).mean((2, 3)))
        return out


class DnCnn(nn.Module):
    """Predicts the noise and subtracts it; pictures [n, 1, h, w] in [0, 1]."""

    def __init__(self, depth: int = 8, width: int = 24, channels: int = 1) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            parts += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*parts, nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The denoised picture."""
        out: torch.Tensor = x - self.body(x)
        return out


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "vgg-cifar": Vgg,
    "vgg19-cifar": lambda: Vgg(width=64),
    "dncnn": DnCnn,
    "dncnn17": lambda: DnCnn(depth=17, width=64),
}


def build(name: str) -> nn.Module:
    """Make a named architecture or call an entry point.

    Raises:
        ConfigError: unknown.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]()
    module, _, attribute = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"unknown architecture {name!r}", hint=f"use {known} or module:function") from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{name} does not return a torch module")
    return made


def with_weights(name: str, path: Path) -> nn.Module:
    """A named architecture with weights from a safetensors file.

    Raises:
        MissingFileError: no such file.
        DataError: the weights do not fit.
    """
    from safetensors.torch import load_file

    network = build(name)
    if not path.is_file():
        raise MissingFileError(f"no such weights: {path}")
    try:
        network.load_state_dict(load_file(str(path)))
    except Exception as error:  # safetensors and torch raise several types; each means: these weights do not fit
        raise DataError(f"{path} does not fit {name}: {str(error).splitlines()[0][:200]}") from error
    return network.eval()


def to_onnx(network: nn.Module, shape: tuple[int, ...]) -> Any:
    """Export with BatchNorm kept, a free batch size and raw initializers.

    Args:
        network: the module.
        shape: of one input, without the batch.

    Returns:
        ``onnx.ModelProto``.
    """
    network = network.cpu().eval()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(1, *shape),),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
            opset_version=17,
        )
    return onnx.load_from_string(buffer.getvalue())
