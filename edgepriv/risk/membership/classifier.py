"""The classifier that an audit trains: as target, as shadow, or as a measure of a release's use.

``auto`` is the pair that the measured tables use: an MLP with one hidden layer of 128 for small pictures, a CNN
16-32-128 for others. Any architecture of ``edgepriv.risk.models`` can be named. With a noise multiplier it is trained
by DP-SGD (opacus); the accounting belongs to the caller.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgepriv.errors import DataError, MissingDependencyError
from edgepriv.risk import models

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Recipe", "accuracy", "logits", "train_classifier", "use_threads"]

CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a classifier is trained; ``noise_multiplier`` above 0 means DP-SGD with per-record clipping."""

    arch: str = "auto"
    epochs: int = 60
    learning_rate: float = 1e-3
    batch_size: int = 64
    noise_multiplier: float = 0.0
    max_grad_norm: float = 1.0


def use_threads(count: int) -> None:
    """Set how many CPU threads torch uses in this process."""
    torch.set_num_threads(count)


def train_classifier(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: int,
    recipe: Recipe,
    *,
    seed: int,
    device: str = "cpu",
) -> nn.Module:
    """Train on images uint8 [n, h, w, c] with labels [n]; the same seed gives the same weights on one machine.

    Raises:
        DataError: labels out of range, or a single class.
    """
    if len(images) != len(labels) or len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"{len(images)} images with labels outside 0..{classes - 1} cannot train a classifier")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(recipe.arch, images.shape[1:], classes).to(device)
    if not recipe.noise_multiplier:  # opacus wants the usual layout; on a CPU this one is faster
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, y = _tensor(images, device), torch.tensor(labels, device=device)
    model.train()
    _fit_private(model, x, y, recipe, seed) if recipe.noise_multiplier else _fit(model, x, y, recipe, seed)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Logits [n, classes] of images uint8 [n, h, w, c]."""
    device = str(next(model.parameters()).device)
    parts = [model(_tensor(images[i : i + CHUNK], device)).cpu() for i in range(0, len(images), CHUNK)]
    result: NDArray[np.float64] = torch.cat(parts).double().numpy()
    return result


def accuracy(model: nn.Module, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """Share of images whose label is the model's first choice."""
    return float((logits(model, images).argmax(1) == labels).mean())


def _fit(model: nn.Module, x: torch.Tensor, y: torch.Tensor, recipe: Recipe, seed: int) -> None:
    optimizer = _adamw(list(model.parameters()), recipe.learning_rate)
    draw = torch.Generator().manual_seed(seed + 1)
    for _ in range(recipe.epochs):
        for batch in torch.split(torch.randperm(len(x), generator=draw).to(x.device), recipe.batch_size):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def _adamw(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW, fused where the device can: some torch versions refuse at the first step alone, so one is tried."""
    trial = nn.Parameter(torch.zeros(1, device=parameters[0].device))
    trial.grad = torch.zeros_like(trial)
    try:
        torch.optim.AdamW([trial], fused=True).step()
    except RuntimeError:
        return torch.optim.AdamW(parameters, lr=learning_rate)
    return torch.optim.AdamW(parameters, lr=learning_rate, fused=True)


def _fit_private(model: nn.Module, x: torch.Tensor, y: torch.Tensor, recipe: Recipe, seed: int) -> None:
    """DP-SGD: Poisson batches, per-record clipping, Gaussian noise."""
    grad_sample, optimizers = _opacus()
    rate = min(1.0, recipe.batch_size / len(x))
    wrapped = grad_sample.GradSampleModule(model)
    optimizer = optimizers.DPOptimizer(
        torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate),
        noise_multiplier=recipe.noise_multiplier,
        max_grad_norm=recipe.max_grad_norm,
        expected_batch_size=recipe.batch_size,
        generator=torch.Generator(x.device).manual_seed(seed + 2),
    )
    draw = torch.Generator().manual_seed(seed + 1)
    with warnings.catch_warnings():  # opacus hooks layers whose input needs no gradient; torch warns of that
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        for _ in range(recipe.epochs * max(1, round(1 / rate))):
            batch = torch.nonzero(torch.rand(len(x), generator=draw) < rate).flatten().to(x.device)
            keep = 1.0 if len(batch) else 0.0  # an empty Poisson batch still takes its noisy step
            batch = batch if len(batch) else torch.zeros(1, dtype=torch.int64, device=x.device)
            optimizer.zero_grad()
            loss = keep * nn.functional.cross_entropy(wrapped(x[batch]), y[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    wrapped.to_standard_module()


def _opacus() -> tuple[Any, Any]:
    try:
        from opacus import grad_sample, optimizers
    except ImportError as error:
        raise MissingDependencyError("DP-SGD needs opacus", hint="pip install 'edgepriv[server]'") from error
    return grad_sample, optimizers


def _build(arch: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    height, width, channels = shape
    if arch != "auto":
        if height != width:
            raise DataError(f"architecture {arch!r} takes square pictures, not {height}x{width}")
        return models.build(arch, classes, channels, height)
    pixels = height * width * channels
    if pixels <= 100:
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, classes))
    flat = 32 * (height // 4) * (width // 4)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.MaxPool2d(2),  # before the ReLU: the same values from a quarter of the work
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(flat, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def _tensor(images: NDArray[np.uint8], device: str) -> torch.Tensor:
    pictures = torch.tensor(images.transpose(0, 3, 1, 2), device=device).float() / 255.0
    return pictures.contiguous(memory_format=torch.channels_last)
