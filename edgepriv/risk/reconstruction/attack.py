"""A red team's run: a vicious model and its honest twin, exported and scored with the supplier's own decoder.

Rules: what is exported is what gets audited; the decoder stays beside it, it is the supplier's secret. An attack
counts as successful only where that decoder beats the strongest auditor on the honest twin (:func:`succeeded`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgepriv.errors import DataError
from edgepriv.risk.reconstruction.detectors import outputs_of, pictures_of
from edgepriv.risk.reconstruction.leakage import shrink
from edgepriv.risk.reconstruction.measure import Score, score
from edgepriv.risk.reconstruction.onnx_writer import write_onnx
from edgepriv.risk.reconstruction.vicious import Recipe, TrainedPair, TrainingSet, seen_by_decoder, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from edgepriv.risk.reconstruction.leakage import Bench

SCHEMA = "edgepriv.redteam-vicious/1"
SUCCESS_DB = 1.0
SUCCESS_EXPLAINED_VARIANCE = 0.05


def digit_attributes(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return three 0/1 attributes of digits, [n, 3]: odd, above four, has a loop (0, 6, 8, 9)."""
    return np.stack([labels % 2, labels > 4, np.isin(labels, (0, 6, 8, 9))], axis=1).astype(np.int64)


def padded(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return pictures with black margins, ``side`` pixels high and wide.

    Raises:
        DataError: they are larger than that.
    """
    rows, columns = side - images.shape[1], side - images.shape[2]
    if rows < 0 or columns < 0:
        raise DataError(f"pictures of {images.shape[1]}x{images.shape[2]} do not fit into {side}x{side}")
    margins = ((0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0))
    return np.pad(images, margins)


@dataclass(frozen=True, slots=True)
class AttackResult:
    """One pair of models, judged on pictures that neither was trained on."""

    recipe: Recipe
    accuracy_honest: float
    accuracy_vicious: float
    decoder: Score
    class_mean: Score

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "schema": SCHEMA,
            "recipe": asdict(self.recipe),
            "accuracy": {"honest": self.accuracy_honest, "vicious": self.accuracy_vicious},
            "reconstruction": _scores(self.decoder),
            "class_mean": _scores(self.class_mean),
            "record": self.decoder.record.as_dict(),
        }


def _scores(found: Score) -> dict[str, float | None]:
    return {
        "explained_variance": found.explained_variance,
        "ssim": found.ssim,
        "psnr_db": found.psnr_db,
        "risk_r": found.risk_r,
    }


def rebuilt(pair: TrainedPair, bench: Bench, *, attributes: bool = False) -> NDArray[np.float64]:
    """Return what the supplier's own decoder makes of the scoring pictures, [n, d]."""
    if pair.decoder is None:
        raise DataError("an honest model has no secret decoder")
    x = pictures_of(bench.images[bench.cut :])
    pair.classifier.cpu().eval()
    decoder = pair.decoder.cpu().eval()
    with torch.no_grad():
        parts = [
            decoder(seen_by_decoder(pair.classifier(part), pair.recipe, attributes=attributes))
            for part in torch.split(x, 500)
        ]
    pictures = torch.cat(parts).permute(0, 2, 3, 1).numpy()
    if pictures.shape[1:] == bench.shape:
        return np.asarray(pictures.reshape(len(pictures), -1), np.float64)
    small = shrink(np.asarray(np.round(pictures * 255), np.uint8))
    return np.asarray(small.reshape(len(small), -1), np.float64)


def attack_scores(
    pair: TrainedPair, bench: Bench, groups: NDArray[np.int64], *, attributes: bool = False
) -> tuple[Score, Score]:
    """Score the supplier's own decoder and, beside it, the class mean."""
    truth, baseline = bench.pixels[bench.cut :], bench.baseline(groups)
    own = score(truth, rebuilt(pair, bench, attributes=attributes), baseline, bench.scale)
    return own, score(truth, baseline, baseline, bench.scale)


def accuracy_of(pair: TrainedPair, bench: Bench, targets: NDArray[np.int64]) -> float:
    """Share of right classes (or attributes, [n, a]) on all of the bench: the model was trained on none of it."""
    logits = outputs_of(pair.classifier.cpu(), pictures_of(bench.images))
    answers = logits >= 0 if targets.ndim == 2 else logits.argmax(1)
    return float((answers == targets).mean())


def succeeded(own: Score, best_honest_explained_variance: float) -> bool:
    """True where the decoder beats the strongest auditor on the honest twin by 1 dB or 0.05 explained variance."""
    gain = own.explained_variance - best_honest_explained_variance
    left, left_honest = 1 - own.explained_variance, 1 - best_honest_explained_variance
    decibels = 10 * np.log10(max(left_honest, 1e-12) / max(left, 1e-12))
    return bool(gain >= SUCCESS_EXPLAINED_VARIANCE or decibels >= SUCCESS_DB)


def run_attack(
    recipe: Recipe,
    data: TrainingSet,
    bench: Bench,
    targets: NDArray[np.int64],
    folder: Path,
    *,
    progress: Callable[[str], None] | None = None,
) -> AttackResult:
    """Train the vicious model and its honest twin, export both, and score the attack.

    Args:
        recipe: of the vicious model; the twin's differs by the reconstruction weight alone.
        data: training pictures and targets.
        bench: pictures that neither model was trained on.
        targets: the bench's classes [n] or attributes [n, a].
        folder: gets ``vicious.onnx``, ``honest.onnx``, ``decoder.safetensors``, ``attack.json`` and resumable states.
        progress: gets one line an epoch.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    pairs = {}
    for name, chosen in (("vicious", recipe), ("honest", recipe.honest())):
        say = (lambda line, name=name: progress(f"{name}: {line}")) if progress else None
        pairs[name] = train(chosen, data, state=folder / f"{name}.state.safetensors", progress=say)
        write_onnx(pairs[name].classifier.cpu(), data.shape, data.outputs, folder / f"{name}.onnx")
    vicious = pairs["vicious"]
    if vicious.decoder is not None:
        weights = {key: value.contiguous() for key, value in vicious.decoder.cpu().state_dict().items()}
        save_file(weights, str(folder / "decoder.safetensors"))
    groups = targets if targets.ndim == 1 else targets @ (2 ** np.arange(targets.shape[1]))
    own, mean = attack_scores(vicious, bench, groups, attributes=data.attributes)
    accuracies = {name: accuracy_of(pair, bench, targets) for name, pair in pairs.items()}
    result = AttackResult(recipe, accuracies["honest"], accuracies["vicious"], own, mean)
    (folder / "attack.json").write_text(json.dumps(result.as_dict(), indent=2))
    return result
