"""The demo's model: a small backbone trained on one third of the data, exported with its features (torch).

Three disjoint thirds: backbone | devices | held-out. Two classes are left out of the backbone's third, so that the
devices have something to teach. Pictures go through the same rendering and the same resizing as on the devices.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgepriv.device.capture import open_source
from edgepriv.device.infer import ModelSpec
from edgepriv.device.resize import Resizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgepriv.datasets import Dataset

SIZE = 32
FEATURES = 64
HIDDEN_CLASSES = 2
EPOCHS = 12


@dataclass(frozen=True, slots=True)
class Thirds:
    """Row numbers of the three disjoint parts."""

    backbone: np.ndarray[Any, np.dtype[np.int64]]
    devices: np.ndarray[Any, np.dtype[np.int64]]
    held_out: np.ndarray[Any, np.dtype[np.int64]]


class Backbone(nn.Module):
    """Three convolutions to 64 features, and a linear head; the input is [n, channels, 32, 32]."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((channels, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and features."""
        features = self.body(x)
        return self.head(features), features


def split_thirds(data: Dataset, seed: int, limit: int) -> Thirds:
    """Shuffle by seed, keep at most ``limit`` rows, cut in three."""
    order = np.random.default_rng([seed, 7]).permutation(len(data))[:limit]
    third = len(order) // 3
    return Thirds(order[:third], order[third : 2 * third], order[2 * third : 3 * third])


def non_iid(
    rows: np.ndarray[Any, np.dtype[np.int64]], labels: np.ndarray[Any, np.dtype[np.int64]], devices: int, seed: int
) -> list[list[int]]:
    """Deal rows to devices unevenly: class shares by a Dirichlet distribution with concentration 1."""
    rng = np.random.default_rng([seed, 11])
    parts: list[list[int]] = [[] for _ in range(devices)]
    for label in np.unique(labels[rows]):
        members = rng.permutation(rows[labels[rows] == label])
        cuts = (np.cumsum(rng.dirichlet(np.ones(devices)))[:-1] * len(members)).astype(int)
        for part, chunk in zip(parts, np.split(members, cuts), strict=True):
            part.extend(int(row) for row in chunk)
    return [[int(row) for row in rng.permutation(part)] for part in parts]


def scene_inputs(
    data_spec: str, rows: list[int], *, folder: Path, seed: int, gray: bool
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows as the devices' cameras see them, resized as the devices do: float32 [n, channels, 32, 32] in 0..1."""
    options = {"data": data_spec, "rows": rows, "seed": seed}
    source = open_source("simulated", options, folder=folder, clock=time.time)
    out: list[np.ndarray[Any, Any]] = []
    resize: Resizer | None = None
    while (frame := source.read()) is not None:
        resize = resize or Resizer(frame.pixels.shape[:2], (SIZE, SIZE), square=True)
        small = resize(frame.pixels)
        out.append((small @ np.array([0.299, 0.587, 0.114], np.float32))[None] if gray else small.transpose(2, 0, 1))
    return np.asarray(np.stack(out) / 255, np.float32)


def train_backbone(
    inputs: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
    *,
    classes: int,
    seed: int,
    progress: Callable[[str], None],
) -> Backbone:
    """Train backbone and head on the labelled inputs that are given."""
    torch.manual_seed(seed)
    model = Backbone(inputs.shape[1], classes)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-4)
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels.astype(np.int64))
    for epoch in range(EPOCHS):
        model.train()
        for batch in torch.randperm(len(x)).split(32):  # type: ignore[no-untyped-call]
            shifted = torch.roll(x[batch], tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
            loss = nn.functional.cross_entropy(model(shifted)[0], y[batch])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        progress(f"training the backbone: epoch {epoch + 1} of {EPOCHS}")
    return model.eval()


def export(model: Backbone, folder: Path, *, model_id: str, gray: bool, names: tuple[str, ...]) -> Path:
    """Write ``model.onnx`` and the ``model.toml`` beside it."""
    import warnings

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    channels = 1 if gray else 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            model,
            (torch.zeros(2, channels, SIZE, SIZE),),
            str(path),
            input_names=["image"],
            output_names=["logits", "features"],
            dynamic_axes={"image": {0: "n"}, "logits": {0: "n"}, "features": {0: "n"}},
            opset_version=17,
            dynamo=False,
        )
    spec = ModelSpec(id=model_id)
    labels = ", ".join(f'"{name}"' for name in names)
    (folder / "model.toml").write_text(
        f'id = "{spec.id}"\ntask = "classify"\ninput = "image"\nlayout = "NCHW"\nwidth = {SIZE}\nheight = {SIZE}\n'
        f'colour = "{"gray" if gray else "RGB"}"\ncrop = "center-square"\nmean = [0.0]\nscale = [{1 / 255!r}]\n'
        f'logits = "logits"\nfeatures = "features"\nlabels = [{labels}]\n'
        'providers = ["CPUExecutionProvider"]\ntrainable = ["head.weight", "head.bias"]\n'
    )
    return path
