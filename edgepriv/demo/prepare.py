"""Before the demo runs: data in three thirds, a backbone trained on the first, its head without two classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import datasets
from edgepriv.demo import train
from edgepriv.device.infer import Inferer
from edgepriv.errors import ConfigError
from edgepriv.federated import head
from edgepriv.federated.local_recipe import LocalRecipe
from edgepriv.wire.update import encode_update

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_ROWS = 4500
HEAD_RECIPE = LocalRecipe(learning_rate=0.05, batch_size=32, epochs=60, momentum=0.9)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Data and model before anything runs.

    ``parts``: rows of each device; ``held_*``: features and labels; ``seen`` and ``held``: the model's inputs of the
    backbone's third and of the held-out third, float32 [n, c, 32, 32].
    """

    data: datasets.Dataset
    spec: str
    gray: bool
    thirds: train.Thirds
    parts: list[list[int]]
    model: Path
    probe: Path
    weights: Path
    held_features: np.ndarray[Any, Any]
    held_labels: np.ndarray[Any, Any]
    accuracy_before: float
    backbone: train.Backbone
    seen: np.ndarray[Any, np.dtype[np.float32]]
    held: np.ndarray[Any, np.dtype[np.float32]]


def prepare(data_spec: str, devices: int, seed: int, folder: Path, progress: Callable[[str], None]) -> Prepared:
    """Split the data, train the backbone and its first head, write the model, the weights and the probe data."""
    spec = data_spec if data_spec == "digits" else str(Path(data_spec).resolve())
    data = datasets.load(spec, split="all")
    gray = data.images.shape[-1] == 1
    thirds = train.split_thirds(data, seed, min(MAX_ROWS, len(data)))
    parts = train.non_iid(thirds.devices, data.labels, devices, seed)
    if min(len(part) for part in parts) < 1:
        raise ConfigError(f"{data_spec}: too few pictures for {devices} devices")
    progress(f"data: {data.name}, {len(data)} pictures; training the backbone on {len(thirds.backbone)}")
    seen = train.scene_inputs(spec, thirds.backbone.tolist(), folder=folder, seed=seed + 1, gray=gray)
    held = train.scene_inputs(spec, thirds.held_out.tolist(), folder=folder, seed=seed + 2, gray=gray)
    labels, held_labels = data.labels[thirds.backbone], data.labels[thirds.held_out]
    classes = len(data.class_names)
    model = train.train_backbone(seen, labels, classes=classes, seed=seed, progress=progress)
    path = train.export(model, folder / "model", model_id="backbone", gray=gray, names=data.class_names)
    inferer = Inferer.from_file(path)
    held_features = inferer.run(held)[1]
    first = _first_head(inferer.run(seen)[1], labels, classes, seed)
    weights = folder / "weights.epu"
    weights.write_bytes(encode_update(first))
    return Prepared(
        data,
        spec,
        gray,
        thirds,
        parts,
        path,
        _write_probe(folder, data, thirds),
        weights,
        held_features,
        held_labels,
        head.accuracy(first, held_features, held_labels),
        model,
        seen,
        held,
    )


def _first_head(features: Any, labels: Any, classes: int, seed: int) -> dict[str, Any]:
    """The head before the rounds: trained on the backbone's third without its last two classes."""
    known = labels < classes - train.HIDDEN_CLASSES
    zero = head.new_head(classes, features.shape[1])
    delta = head.train_head(zero, features[known], labels[known], HEAD_RECIPE, seed=seed)
    return {name: zero[name] + delta[name] for name in zero}


def _write_probe(folder: Path, data: datasets.Dataset, thirds: train.Thirds) -> Path:
    """Public pictures for the auditor and the suppliers: the two thirds that no device holds."""
    probe = folder / "probe" / "release.npz"
    probe.parent.mkdir(exist_ok=True)
    rows = np.concatenate([thirds.backbone, thirds.held_out])
    np.savez(probe, images=data.images[rows], labels=data.labels[rows])
    return probe
