"""The main job on one machine: broker, gateway, risk service and devices as processes, then the report.

Each stage below is a function of its own, in the order in which they run. What is reported is read from the product's
own commands and stores: frames are fetched and opened through the recipient's client, outputs and rounds come from
the gateway, the leakage from the audit. Nothing is counted by the demo itself but the frames it opened.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import datasets
from edgepriv.demo import processes, site
from edgepriv.device.capture import open_source
from edgepriv.errors import ConfigError, EdgeprivError, TemporaryError, UnavailableError
from edgepriv.federated import head
from edgepriv.federated.local_recipe import LocalRecipe
from edgepriv.keys import load_identity
from edgepriv.trust_file import TrustFile
from edgepriv.wire.update import decode_update, encode_update

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgepriv.demo.train import Thirds

SCHEMA = "edgepriv.demo/1"
MAX_ROWS = 4500
POLL_S = 0.3
HEAD_RECIPE = LocalRecipe(learning_rate=0.05, batch_size=32, epochs=60, momentum=0.9)


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command line asks for."""

    devices: int
    frames: int
    rounds: int
    data: str
    out: Path
    seed: int
    broker: str = "auto"


@dataclass(slots=True)
class Prepared:
    """Data and model before anything runs."""

    data: datasets.Dataset
    spec: str
    gray: bool
    thirds: Thirds
    parts: list[list[int]]
    model: Path
    probe: Path
    weights: Path
    held_features: np.ndarray[Any, Any]
    held_labels: np.ndarray[Any, Any]
    accuracy_before: float


@dataclass(slots=True)
class Outcome:
    """What the run showed; the report is made from this."""

    options: DemoOptions
    broker: str = ""
    captured: int = 0
    stored: int = 0
    opened_identical: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    accuracies: list[float] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    audits: list[dict[str, Any]] = field(default_factory=list)
    updates: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def run_demo(options: DemoOptions, progress: Callable[[str], None]) -> Outcome:
    """Run everything and return what was seen.

    Raises:
        EdgeprivError: a part did not come up or did not finish in time; all processes are stopped.
    """
    started = time.monotonic()
    outcome = Outcome(options)
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.out / "site"
    if folder.exists():
        import shutil

        shutil.rmtree(folder)
    folder.mkdir(mode=0o700)
    prepared = prepare(options, folder, progress)
    outcome.accuracies.append(prepared.accuracy_before)
    place = site.make_site(folder, options.devices)
    logs = options.out / "logs"
    logs.mkdir(exist_ok=True)
    with processes.Children(logs) as children:
        url, outcome.broker = processes.start_broker(children, options.broker)
        progress(f"broker: {outcome.broker}")
        start_services(children, place, prepared, url, options)
        progress(f"{options.devices} devices capture {options.frames} frames each")
        collect_frames(children, place, options, outcome, progress)
        fetch_frames(place, prepared, options, outcome, progress)
        collect_outputs(place, outcome)
        run_rounds(children, place, prepared, options, outcome, progress)
        progress("stopping")
    audit_models(prepared, options, outcome, progress)
    outcome.seconds = time.monotonic() - started
    return outcome


# --- before ------------------------------------------------------------------------------------------------


def prepare(options: DemoOptions, folder: Path, progress: Callable[[str], None]) -> Prepared:
    """Split the data in three, train the backbone and its first head, write the model and the probe data."""
    from edgepriv.demo import train

    spec = options.data if options.data == "digits" else str(_absolute(options.data))
    data = datasets.load(spec, split="all")
    gray = data.images.shape[-1] == 1
    thirds = train.split_thirds(data, options.seed, min(MAX_ROWS, len(data)))
    parts = train.non_iid(thirds.devices, data.labels, options.devices, options.seed)
    short = min(len(part) for part in parts)
    if short < 1:
        raise ConfigError(f"{options.data}: too few pictures for {options.devices} devices")
    progress(f"data: {data.name}, {len(data)} pictures; training the backbone on {len(thirds.backbone)}")

    def inputs(rows: Any, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return train.scene_inputs(spec, [int(r) for r in rows], folder=folder, seed=seed, gray=gray)

    seen, labels = inputs(thirds.backbone, options.seed + 1), data.labels[thirds.backbone]
    classes = len(data.class_names)
    model = train.train_backbone(seen, labels, classes=classes, seed=options.seed, progress=progress)
    path = train.export(model, folder / "model", model_id="backbone", gray=gray, names=data.class_names)
    probe = folder / "probe" / "release.npz"
    probe.parent.mkdir()
    pictures = np.round(seen * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    np.savez(probe, images=pictures, labels=labels)
    held = inputs(thirds.held_out, options.seed + 2)
    features = {"backbone": _features(path, seen), "held": _features(path, held)}
    known = labels < classes - train.HIDDEN_CLASSES
    zero = head.new_head(classes, features["backbone"].shape[1])
    delta = head.train_head(zero, features["backbone"][known], labels[known], HEAD_RECIPE, seed=options.seed)
    first = {name: zero[name] + delta[name] for name in zero}
    weights = folder / "weights.epu"
    weights.write_bytes(encode_update(first))
    held_labels = data.labels[thirds.held_out]
    before = head.accuracy(first, features["held"], held_labels)
    return Prepared(data, spec, gray, thirds, parts, path, probe, weights, features["held"], held_labels, before)


def _absolute(data: str) -> Path:
    from pathlib import Path

    return Path(data).resolve()


def _features(model: Path, inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Features of prepared inputs by the exported file, as the devices run it."""
    import torch

    from edgepriv.risk.reconstruction import onnx_reader  # noqa: F401 - the server extra is there where this runs

    del torch
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.read_bytes(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["features"], {"image": inputs})[0])
