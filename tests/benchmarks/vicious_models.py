"""The sets of honest and vicious models that calibrate and judge the detector, trained once and kept as numbers.

MNIST at 14x14 pixels. Three disjoint parts of the training pictures: one for the models that calibrate, one for those
that judge, one for the references; the bench is the test part. Every model has its own seed.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from edgepriv.datasets import load
from edgepriv.risk.reconstruction.adaptive import BatchAuditor, detector_loss, honest_level
from edgepriv.risk.reconstruction.attack import accuracy_of, attack_scores, succeeded
from edgepriv.risk.reconstruction.calibration import SHIPPED
from edgepriv.risk.reconstruction.decoders import DecoderSettings
from edgepriv.risk.reconstruction.detectors import DetectorSettings, features, outputs_of, pictures_of
from edgepriv.risk.reconstruction.leakage import AuditSettings, Bench, Probe, shrink
from edgepriv.risk.reconstruction.networks import classifier
from edgepriv.risk.reconstruction.references import named, train_references
from edgepriv.risk.reconstruction.vicious import Recipe, TrainingSet, train

if TYPE_CHECKING:
    from pathlib import Path

    import torch

SIDE = 14
DETECTOR = DetectorSettings(trained=DecoderSettings(form="mlp", epochs=15))
REFERENCE_ARCHITECTURES = {"cnn-dropout": "cnn"}  # dropout is not in the file: the graph is that of cnn


@dataclass(frozen=True)
class Entry:
    """One model of a set."""

    stratum: str
    recipe: Recipe
    adapted: float = 0.0

    @property
    def key(self) -> str:
        r = self.recipe
        parts = (r.architecture, r.outputs, r.epochs, r.batch, r.reconstruction_weight, r.label_smoothing)
        return "-".join(str(p) for p in (self.stratum, *parts, r.weight_decay, self.adapted, r.seed))


@dataclass
class Data:
    """Bench and the three training parts."""

    bench: Bench
    parts: dict[str, TrainingSet] = field(default_factory=dict)


def small(images: np.ndarray) -> np.ndarray:
    """Bring pictures to 14x14, uint8."""
    return np.round(shrink(images, SIDE) * 255).astype(np.uint8)


def open_data(folder: Path, *, per_part: int = 3000, bench_images: int = 2000) -> Data:
    train_set, test = load(folder, split="train"), load(folder, split="test")
    bench = Bench(Probe("mnist-14", small(test.images), test.labels), AuditSettings(bench_images, None))
    order = np.random.RandomState(1).permutation(len(train_set))
    data = Data(bench)
    for at, name in enumerate(("calibrate", "judge", "references")):
        rows = order[at * per_part : (at + 1) * per_part]
        data.parts[name] = TrainingSet.of(small(train_set.images[rows]), train_set.labels[rows], classes=10)
    return data


def honest_entries(first_seed: int, *, many: bool) -> list[Entry]:
    plain = Recipe(reconstruction_weight=0.0)
    kinds = [
        ("linear", replace(plain, architecture="linear"), 4 if many else 2),
        ("mlp", replace(plain, architecture="mlp"), 4 if many else 3),
        ("label smoothing", replace(plain, label_smoothing=0.1), 3 if many else 2),
        ("weight decay", replace(plain, weight_decay=1e-3), 3 if many else 2),
        ("few epochs", replace(plain, epochs=3), 3),
        ("many epochs", replace(plain, epochs=20), 2),
        ("plain", plain, 3 if many else 2),
        ("wide", replace(plain, architecture="cnn-wide", epochs=5), 1),
        ("dropout", replace(plain, architecture="cnn-dropout"), 1),
    ]
    entries = [Entry(f"honest {name}", recipe) for name, recipe, count in kinds for _ in range(count)]
    return [replace(e, recipe=replace(e.recipe, seed=first_seed + i)) for i, e in enumerate(entries)]


def vicious_entries(first_seed: int, *, adapted: bool) -> list[Entry]:
    base = Recipe(epochs=12)
    strong = [base, base, base, replace(base, reconstruction_weight=5.0), replace(base, architecture="mlp")]
    weak = [replace(base, reconstruction_weight=w) for w in (1.5, 1.2, 1.0, 0.8, 0.6)]
    softmax = [replace(base, outputs="softmax", reconstruction_weight=w) for w in (3.0, 3.0, 6.0, 6.0, 10.0)]
    entries = [Entry("strong", r) for r in strong] + [Entry("weak", r) for r in weak]
    if adapted:
        entries += [Entry("softmax", r) for r in softmax]
        slow = replace(base, batch=500, epochs=24, learning_rate=2e-3)
        entries += [Entry("adapted", slow, weight) for weight in (0.2, 0.5, 1.0, 2.0, 5.0)]
    return [replace(e, recipe=replace(e.recipe, seed=first_seed + i)) for i, e in enumerate(entries)]


def measured(entry: Entry, part: str, data: Data) -> dict:
    """Train one model and return its features, its accuracy and, for an attack, how well it worked."""
    training, bench = data.parts[part], data.bench
    extra = adapted_loss(entry, training) if entry.adapted else None
    pair = train(entry.recipe, training, extra_loss=extra)
    x = pictures_of(bench.images)
    network = exported(pair.classifier, entry.recipe.architecture, training)
    logits = outputs_of(network, x)
    found = {
        "stratum": entry.stratum,
        "architecture": REFERENCE_ARCHITECTURES.get(entry.recipe.architecture, entry.recipe.architecture),
        "accuracy": accuracy_of(pair, bench, bench.labels),
        "features": features(bench, logits, network, DETECTOR),
        "logits": np.round(logits, 3).tolist(),
    }
    if pair.decoder is not None and part == "judge":
        twin = train(replace(entry.recipe.honest(), outputs="raw"), training)
        honest = features(bench, outputs_of(twin.classifier, x), None, DETECTOR)
        own, _ = attack_scores(pair, bench, bench.labels)
        best = max(honest["ridge"], honest["ridge_log_softmax"], honest["trained"])
        found |= {
            "own_explained_variance": own.explained_variance,
            "own_psnr_db": own.psnr_db,
            "own_ssim": own.ssim,
            "twin_best_explained_variance": best,
            "twin_accuracy": accuracy_of(twin, bench, bench.labels),
            "succeeded": succeeded(own, best),
        }
    return found


def adapted_loss(entry: Entry, training: TrainingSet):
    """The detector as this attacker knows it, against an honest model of his own."""
    own = train(replace(entry.recipe.honest(), epochs=16, seed=entry.recipe.seed + 50), training).classifier
    level = honest_level(BatchAuditor(10), own, training.pictures, training.targets, entry.recipe.batch)
    return detector_loss(SHIPPED, level, 10, entry.adapted)


def exported(network: torch.nn.Module, architecture: str, data: TrainingSet) -> torch.nn.Module:
    """What is in the file: a model trained with dropout has none at inference."""
    if architecture not in REFERENCE_ARCHITECTURES:
        return network
    plain = classifier(REFERENCE_ARCHITECTURES[architecture], data.shape, data.outputs)
    values = list(network.state_dict().values())
    plain.load_state_dict(dict(zip(plain.state_dict(), values, strict=True)))
    return plain.eval()


def cached(path: Path, make) -> dict:
    """Return what is in a JSON file, or make it and keep it."""
    if path.is_file():
        return json.loads(path.read_text())
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return value


def references(data: Data, cache: Path, count: int = 5) -> dict[str, list[dict]]:
    found = {}
    for name in ("cnn", "mlp", "linear", "cnn-wide"):
        found[name] = cached(
            cache / f"references-{name}-{count}.json",
            lambda name=name: train_references(
                named(name, (SIDE, SIDE, 1), 10), data.parts["references"], data.bench, count, settings=DETECTOR
            ),
        )
    return found


def measure_set(entries: list[Entry], part: str, data: Data, cache: Path) -> list[dict]:
    """Measure every entry, from the cache where it is there."""
    results = []
    for at, entry in enumerate(entries):
        started = time.monotonic()
        against = zlib.crc32(json.dumps(SHIPPED.weights, sort_keys=True).encode())
        name = f"{part}-{entry.key}" + (f"-{against:08x}" if entry.adapted else "")
        results.append(cached(cache / f"{name}.json", lambda entry=entry: measured(entry, part, data)))
        took = time.monotonic() - started
        print(f"{part} {at + 1}/{len(entries)} {entry.key} {took:.0f} s", file=sys.stderr, flush=True)
    return results
