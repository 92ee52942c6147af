"""The sets of honest and vicious models that calibrate and judge the detector, trained once and kept as numbers.

MNIST at 14x14 pixels. Disjoint parts of the training pictures: for the models that calibrate, for those that judge, and
for the references of each; the bench is the test part. Every model has its own seed.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgepriv.datasets import load
from edgepriv.risk.reconstruction.adaptive import BatchAuditor, detector_loss, honest_level
from edgepriv.risk.reconstruction.attack import accuracy_of, attack_scores, succeeded
from edgepriv.risk.reconstruction.calibration import SHIPPED
from edgepriv.risk.reconstruction.decoders import DecoderSettings
from edgepriv.risk.reconstruction.detectors import (
    DetectorSettings,
    Evidence,
    evidence,
    features,
    outputs_of,
    pictures_of,
)
from edgepriv.risk.reconstruction.leakage import AuditSettings, Bench, Probe, shrink
from edgepriv.risk.reconstruction.networks import classifier
from edgepriv.risk.reconstruction.onnx_writer import write_onnx
from edgepriv.risk.reconstruction.references import named, train_references
from edgepriv.risk.reconstruction.verdict import least_margin
from edgepriv.risk.reconstruction.vicious import Recipe, TrainingSet, train

if TYPE_CHECKING:
    from pathlib import Path

SIDE = 14
ROWS = {
    "calibrate": (0, 3000),
    "calibrate references": (6000, 9000),
    "judge": (30_000, 35_000),
    "references": (36_000, 41_000),
}
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
        parts = (r.architecture, r.outputs, r.decoder_view, r.schedule, r.epochs, r.batch, r.reconstruction_weight)
        parts += (r.label_smoothing,)
        return "-".join(str(p) for p in (self.stratum, *parts, r.weight_decay, self.adapted, r.seed))


@dataclass
class Data:
    """Bench and the training parts, as tensors and as pictures."""

    bench: Bench
    parts: dict[str, TrainingSet] = field(default_factory=dict)
    images: dict[str, Probe] = field(default_factory=dict)


def small(images: np.ndarray) -> np.ndarray:
    """Bring pictures to 14x14, uint8."""
    return np.round(shrink(images, SIDE) * 255).astype(np.uint8)


def open_data(folder: Path, *, bench_images: int = 2000) -> Data:
    train_set, test = load(folder, split="train"), load(folder, split="test")
    bench = Bench(Probe("mnist-14", small(test.images), test.labels), AuditSettings(bench_images, None))
    order = np.random.RandomState(1).permutation(len(train_set))
    data = Data(bench)
    for name, (first, end) in ROWS.items():
        rows = order[first:end]
        images = small(train_set.images[rows])
        data.images[name] = Probe(name, images, train_set.labels[rows])
        data.parts[name] = TrainingSet.of(images, train_set.labels[rows], classes=10)
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


def calibrating_entries(first_seed: int) -> list[Entry]:
    """The vicious models that calibrate: five strong and five weak."""
    base = Recipe(epochs=12)
    return seeded(first_seed, strong_entries(base) + weak_entries(base))


def strong_entries(base: Recipe) -> list[Entry]:
    wide = [base, base, base, replace(base, reconstruction_weight=5.0), replace(base, architecture="mlp")]
    return [Entry("strong", recipe) for recipe in wide]


def weak_entries(base: Recipe) -> list[Entry]:
    return [Entry("weak", replace(base, reconstruction_weight=w)) for w in (1.5, 1.2, 1.0, 0.8, 0.6)]


def seeded(first_seed: int, entries: list[Entry]) -> list[Entry]:
    return [replace(e, recipe=replace(e.recipe, seed=first_seed + i)) for i, e in enumerate(entries)]


def judging_entries(first_seed: int, epochs: int = 24) -> list[Entry]:
    """The vicious models that judge: strong, weak, behind a softmax, adapted to the detector."""
    base = Recipe(epochs=epochs, schedule="cosine")
    # a decoder that reads logarithms, as an auditor would; the published form, which sees the scores, comes after it
    logs = replace(base, outputs="softmax", decoder_view="logarithms")
    softmax = [logs, replace(logs, reconstruction_weight=5.0), replace(logs, label_smoothing=0.1)]
    softmax += [replace(logs, label_smoothing=0.1, reconstruction_weight=w) for w in (2.0, 5.0)]
    softmax += [replace(base, outputs="softmax", reconstruction_weight=w) for w in (3.0, 10.0)]
    slow = replace(base, batch=500, epochs=2 * epochs, learning_rate=2e-3)  # large batches, for the auditor inside
    entries = strong_entries(base) + weak_entries(base) + [Entry("softmax", recipe) for recipe in softmax]
    entries += [Entry("adapted", slow, weight) for weight in (0.03, 0.05, 0.1, 0.2, 0.3, 0.5)]
    return seeded(first_seed, entries)


def measured(entry: Entry, part: str, data: Data, found: dict[str, list[Evidence]], cache: Path) -> dict:
    """Train one model and return its features, its accuracy and, for an attack, how well it worked."""
    training, bench = data.parts[part], data.bench
    extra = adapted_loss(entry, training) if entry.adapted else None
    pair = train(entry.recipe, training, extra_loss=extra)
    x = pictures_of(bench.images)
    network = exported(pair.classifier, entry.recipe.architecture, training)
    logits = outputs_of(network, x)
    architecture = REFERENCE_ARCHITECTURES.get(entry.recipe.architecture, entry.recipe.architecture)
    seen = evidence(bench, logits, network, DETECTOR)
    write_onnx(network, data.parts[part].shape, data.parts[part].outputs, file_of(entry, part, cache))
    result = {
        "stratum": entry.stratum,
        "file": file_of(entry, part, cache).name,
        "attack": attack_words(entry),
        "architecture": architecture,
        "accuracy": accuracy_of(pair, bench, bench.labels),
        "features": seen.values,
        "margin": least_margin(seen, found[architecture], known=True),
        "logits": np.round(logits, 3).tolist(),
    }
    if pair.decoder is not None and part == "judge":
        own, _ = attack_scores(pair, bench, bench.labels)
        twin = twin_of(entry.recipe, training, bench, cache)
        result |= {
            "own_explained_variance": own.explained_variance,
            "own_psnr_db": own.psnr_db,
            "own_ssim": own.ssim,
            **twin,
            "succeeded": succeeded(own, twin["twin_best_explained_variance"]),
        }
    return result


def file_of(entry: Entry, part: str, cache: Path) -> Path:
    """The model as a file, for the audit of files."""
    return cache / f"{part}-{entry.key}.onnx".replace(" ", "-")


def twin_of(recipe: Recipe, training: TrainingSet, bench: Bench, cache: Path) -> dict:
    """The honest twin of a recipe and what the strongest auditor rebuilds from it; one twin a recipe, not a seed."""
    honest = replace(recipe.honest(), seed=600)

    def made() -> dict:
        pair = train(honest, training)
        found = features(bench, outputs_of(pair.classifier, pictures_of(bench.images)), None, DETECTOR)
        return {
            "twin_best_explained_variance": max(found["ridge"], found["ridge_log_softmax"], found["trained"]),
            "twin_accuracy": accuracy_of(pair, bench, bench.labels),
        }

    return cached(cache / f"twin-{Entry('twin', honest).key}.json", made)


def attack_words(entry: Entry) -> str:
    r = entry.recipe
    if not r.reconstruction_weight:
        return ""
    words = [r.architecture, f"weight {r.reconstruction_weight:g}"]
    if r.outputs == "softmax":
        words.append(f"softmax, decoder sees {'logarithms' if r.decoder_view == 'logarithms' else 'the scores'}")
    words += [f"label smoothing {r.label_smoothing:g}"] if r.label_smoothing else []
    words += [f"detector's weight {entry.adapted:g}"] if entry.adapted else []
    return ", ".join(words)


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


def as_values(one: Evidence) -> dict:
    lost = {name: np.round(values, 5).tolist() for name, values in one.lost.items()}
    outputs = np.round(one.outputs, 3).tolist()
    return {"values": one.values, "lost": lost, "available": np.round(one.available, 5).tolist(), "outputs": outputs}


def as_evidence(content: dict) -> Evidence:
    lost = {name: np.array(values) for name, values in content["lost"].items()}
    return Evidence(content["values"], lost, np.array(content["available"]), np.array(content["outputs"], np.float32))


@dataclass(frozen=True)
class Work:
    """Where a set is measured: the data set's folder, what keeps results, and how many processes share the work."""

    folder: Path
    cache: Path
    workers: int = 1

    def pool(self) -> ProcessPoolExecutor:
        """Processes of one thread each."""
        return ProcessPoolExecutor(self.workers, get_context("spawn"), torch.set_num_threads, (1,))


def references(work: Work, count: int = 5, part: str = "references") -> dict[str, list[Evidence]]:
    """What honest references of every architecture show, trained in parallel where they are not kept."""
    names = ("cnn", "mlp", "linear", "cnn-wide")
    with work.pool() as pool:
        found = pool.map(_references_of, *zip(*[(work, name, count, part) for name in names], strict=True))
        return {name: [as_evidence(one) for one in kept] for name, kept in zip(names, found, strict=True)}


def _references_of(work: Work, name: str, count: int, part: str) -> list[dict]:
    def trained() -> list[dict]:
        data, architecture = opened(work.folder), named(name, (SIDE, SIDE, 1), 10)
        found = train_references(architecture, data.parts[part], data.bench, count, settings=DETECTOR)
        return [as_values(one) for one in found]

    return cached(work.cache / f"{part}-{name}-{count}.json".replace(" ", "-"), trained)


def measure_set(entries: list[Entry], part: str, work: Work, found: dict[str, list[Evidence]]) -> list[dict]:
    """Measure every entry, from the cache where it is there; honest twins first, since several attacks share one."""
    attacked = [entry.recipe for entry in entries if entry.recipe.reconstruction_weight] if part == "judge" else []
    twins = list(dict.fromkeys(replace(recipe.honest(), seed=600) for recipe in attacked))
    with work.pool() as pool:
        list(pool.map(_twin, twins, [part] * len(twins), [work] * len(twins)))
        waiting = [pool.submit(_measured, entry, part, work, found) for entry in entries]
        return [one.result() for one in waiting]


def _twin(honest: Recipe, part: str, work: Work) -> None:
    data = opened(work.folder)
    twin_of(honest, data.parts[part], data.bench, work.cache)


def _measured(entry: Entry, part: str, work: Work, found: dict[str, list[Evidence]]) -> dict:
    started = time.monotonic()
    against = zlib.crc32(json.dumps(SHIPPED.weights, sort_keys=True).encode())
    name = f"{part}-{entry.key}" + (f"-{against:08x}" if entry.adapted else "")
    result = cached(work.cache / f"{name}.json", lambda: measured(entry, part, opened(work.folder), found, work.cache))
    print(f"{part} {entry.key} {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return result


@lru_cache(maxsize=1)
def opened(folder: Path) -> Data:
    return open_data(folder)
