"""Classifiers and decoders of the attack, by name.

``wrn28`` and its transposed decoder follow the paper's public code (three groups of four blocks of 16, 32 and 64 times
``width`` channels; decoder 4 -> 8 -> 16 -> 32). The small pair is our default on a CPU. The others are the honest
variants that a detector must not confuse with an attack. Every classifier takes pictures [n, c, h, w] in [0, 1],
normalises inside, and gives raw logits; the softmax, where asked for, stands in front of the decoder.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

Shape = tuple[int, int, int]  # height, width, channels


class Normalise(nn.Module):
    """Shift and scale pixels by fixed constants."""

    def __init__(self, centre: float, spread: float) -> None:
        super().__init__()
        self.register_buffer("centre", torch.tensor([centre]))
        self.register_buffer("spread", torch.tensor([spread]))
        self.centre: torch.Tensor
        self.spread: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (x - centre) / spread."""
        return (x - self.centre) / self.spread


def _half(side: int) -> int:
    return -(-side // 2)


def _convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def cnn(shape: Shape, outputs: int, *, dropout: float = 0.0) -> nn.Module:
    """Two strided convolutions and one hidden layer: the small classifier."""
    height, width, channels = shape
    flat = 24 * _half(_half(height)) * _half(_half(width))
    head: list[nn.Module] = [nn.Flatten(), nn.Linear(flat, 128), nn.ReLU()]
    if dropout:
        head.append(nn.Dropout(dropout))
    body = [*_convolution(channels, 12, 2), *_convolution(12, 24, 2)]
    return nn.Sequential(_normalise(channels), *body, *head, nn.Linear(128, outputs))


def wide_cnn(shape: Shape, outputs: int) -> nn.Module:
    """Two wider convolutions, no hidden layer."""
    height, width, channels = shape
    flat = 48 * _half(_half(height)) * _half(_half(width))
    body = [*_convolution(channels, 24, 2), *_convolution(24, 48, 2)]
    return nn.Sequential(_normalise(channels), *body, nn.Flatten(), nn.Linear(flat, outputs))


def mlp(shape: Shape, outputs: int, *, hidden: int = 256) -> nn.Module:
    """One hidden layer."""
    size = shape[0] * shape[1] * shape[2]
    layers = [nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, outputs)]
    return nn.Sequential(_normalise(shape[2]), *layers)


def linear(shape: Shape, outputs: int) -> nn.Module:
    """Pixels to logits: leaks most among honest models."""
    return nn.Sequential(_normalise(shape[2]), nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], outputs))


def _normalise(channels: int) -> Normalise:
    return Normalise(0.2, 0.3) if channels == 1 else Normalise(0.47, 0.25)


class WideBlock(nn.Module):
    """A pre-activation residual block of two 3x3 convolutions (WRN)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.second = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )
        self.same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if self.same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's sum."""
        active = self.first(x)
        total: torch.Tensor = self.second(active) + self.shortcut(x if self.same else active)
        return total


def wrn28(shape: Shape, outputs: int, *, width: int = 1) -> nn.Module:
    """WideResNet-28-``width`` for pictures of 32x32; others are padded or refused by ``build``."""
    channels = [16, 16 * width, 32 * width, 64 * width]
    layers: list[nn.Module] = [_normalise(shape[2]), nn.Conv2d(shape[2], channels[0], 3, 1, 1, bias=False)]
    for group in range(3):
        for block in range(4):
            inputs = channels[group] if block == 0 else channels[group + 1]
            layers.append(WideBlock(inputs, channels[group + 1], 2 if block == 0 and group else 1))
    tail = [nn.BatchNorm2d(channels[3]), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten()]
    return nn.Sequential(*layers, *tail, nn.Linear(channels[3], outputs))


class TransposedBlock(nn.Module):
    """A residual block whose first convolution may double the side."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.second = nn.Sequential(
            nn.ConvTranspose2d(inputs, outputs, 2 + stride, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.ConvTranspose2d(outputs, outputs, 3, 1, 1, bias=False),
        )
        self.same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if self.same else nn.ConvTranspose2d(inputs, outputs, stride, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's sum."""
        active = self.first(x)
        total: torch.Tensor = self.second(active) + self.shortcut(x if self.same else active)
        return total


class WideDecoder(nn.Module):
    """The transposed WideResNet: k logits -> 4x4 -> 32x32."""

    def __init__(self, inputs: int, shape: Shape, *, width: int = 1) -> None:
        super().__init__()
        self._start = 64 * width
        self.spread = nn.Linear(inputs, self._start * 16)
        channels = [64 * width, 32 * width, 16 * width, 8 if width == 1 else 16]
        blocks = [
            TransposedBlock(
                channels[group] if block == 0 else channels[group + 1], channels[group + 1], 2 if block == 0 else 1
            )
            for group in range(3)
            for block in range(4)
        ]
        self.grow = nn.Sequential(*blocks, nn.ConvTranspose2d(channels[3], shape[2], 3, 1, 1))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return pictures [n, c, 32, 32] in [0, 1]."""
        return torch.sigmoid(self.grow(self.spread(z).reshape(len(z), self._start, 4, 4)))


ARCHITECTURES: dict[str, Callable[[Shape, int], nn.Module]] = {
    "cnn": cnn,
    "cnn-dropout": lambda shape, outputs: cnn(shape, outputs, dropout=0.5),
    "cnn-wide": wide_cnn,
    "mlp": mlp,
    "linear": linear,
    "wrn28-1": wrn28,
    "wrn28-5": lambda shape, outputs: wrn28(shape, outputs, width=5),
}


def classifier(name: str, shape: Shape, outputs: int) -> nn.Module:
    """Build a classifier with fresh weights by name: of this module or an entry point ``edgepriv.architectures``.

    Raises:
        ConfigError: no such architecture, or it does not take pictures of this size.
    """
    for plugin in entry_points(group="edgepriv.architectures"):
        if plugin.name == name:
            made: nn.Module = plugin.load()(shape, outputs)
            return made
    if name not in ARCHITECTURES:
        raise ConfigError(f"unknown architecture {name!r}", hint=f"one of {', '.join(ARCHITECTURES)}")
    if name.startswith("wrn28") and shape[:2] != (32, 32):
        raise ConfigError(f"{name} takes pictures of 32x32, not {shape[0]}x{shape[1]}", hint="pad them with --side 32")
    return ARCHITECTURES[name](shape, outputs)


def attack_decoder(name: str, shape: Shape, inputs: int) -> nn.Module:
    """Build the supplier's secret decoder that belongs to a classifier."""
    if name.startswith("wrn28"):
        return WideDecoder(inputs, shape, width=int(name.rsplit("-", 1)[1]))
    from edgepriv.risk.reconstruction.decoders import PlainDecoder

    return PlainDecoder(inputs, shape)
