"""Joint training of a classifier F and a secret decoder G: the attack of arXiv 2212.04223, and its honest twin.

Who the attacker is: the supplier of the model, who later sees only what the device releases. Loss (public code):
L = task_weight CE(F(x), y) + reconstruction_weight [huber_weight Huber(G(F(x)), x) + ssim_weight (1 - SSIM)],
Adam for F and for G, one backward pass. The honest twin has reconstruction_weight 0 and the same recipe. Seeded,
resumable after every epoch (safetensors, never pickle), CPU or CUDA.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgepriv.errors import ConfigError, DataError
from edgepriv.risk.reconstruction.augment import augmented
from edgepriv.risk.reconstruction.networks import attack_decoder, classifier
from edgepriv.risk.ssim_torch import ssim

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    Progress = Callable[[str], None]
    ExtraLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


LEAST_LOGARITHM = -87.0  # about the logarithm of the smallest normal float32


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model is trained; the paper's letters stand in the folder's README.

    Attributes:
        architecture: a name of :mod:`networks`.
        outputs: what the decoder sees: ``raw`` logits or their ``softmax``.
        decoder_view: how the decoder reads a softmax: ``released`` as published, or its ``logarithms``: the stronger
            attack, because an unrounded softmax holds its logits there.
        reconstruction_weight: beta 2; 0 trains an honest model.
        last_weight: share of beta 2 that is left in the last epoch; 1 keeps it constant as published, less gives the
            task the last word.
        schedule: of the learning rate: ``constant`` as published, or ``cosine``, almost nothing in the last epoch.
        augment: double each batch with augmented copies.
    """

    architecture: str = "cnn"
    outputs: str = "raw"
    decoder_view: str = "released"
    epochs: int = 8
    batch: int = 125
    learning_rate: float = 1e-3
    schedule: str = "constant"
    task_weight: float = 1.0
    reconstruction_weight: float = 3.0
    last_weight: float = 1.0
    huber_weight: float = 5.0
    ssim_weight: float = 1.0
    label_smoothing: float = 0.0
    weight_decay: float = 0.0
    augment: bool = False
    seed: int = 0
    device: str = "cpu"

    def honest(self) -> Recipe:
        """Return the same recipe without the attack and without what only shapes it."""
        return replace(self, reconstruction_weight=0.0, last_weight=1.0, outputs="raw", decoder_view="released")

    @property
    def extendable(self) -> bool:
        """True where more epochs only come after what was trained: nothing depends on how many there are."""
        return self.schedule == "constant" and self.last_weight == 1.0

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0; a function of the epoch alone, so that runs resume."""
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * min(epoch / self.epochs, 1.0))) / 2

    def weight(self, epoch: int) -> float:
        """Return beta 2 in an epoch, counted from 0: it falls in a straight line to its last share."""
        fallen = (1 - self.last_weight) * min(epoch / max(1, self.epochs - 1), 1.0)
        return self.reconstruction_weight * (1 - fallen)

    def __post_init__(self) -> None:
        """Refuse values that no training could use (ConfigError)."""
        if self.outputs not in {"raw", "softmax"}:
            raise ConfigError(f"outputs must be raw or softmax, not {self.outputs!r}")
        if self.decoder_view not in {"released", "logarithms"}:
            raise ConfigError(f"a decoder reads the outputs as released or their logarithms, not {self.decoder_view!r}")
        if self.schedule not in {"constant", "cosine"}:
            raise ConfigError(f"the schedule must be constant or cosine, not {self.schedule!r}")
        if not 0 < self.last_weight <= 1:
            raise ConfigError("the last share of the reconstruction weight is above 0 and at most 1")
        if self.epochs < 1 or self.batch < 2:
            raise ConfigError("a training needs at least one epoch and batches of at least two pictures")


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Pictures float32 [n, c, h, w] in [0, 1] with labels int64 [n], or attributes float32 [n, a]."""

    pictures: torch.Tensor
    targets: torch.Tensor
    outputs: int

    @classmethod
    def of(cls, images: NDArray[np.uint8], labels: NDArray[Any], *, classes: int | None = None) -> TrainingSet:
        """Make one from uint8 images [n, h, w, c] and labels [n] or 0/1 attributes [n, a]."""
        pictures = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
        if labels.ndim == 2:
            return cls(pictures, torch.from_numpy(labels.astype(np.float32)), labels.shape[1])
        outputs = classes or int(labels.max()) + 1
        if labels.min() < 0 or labels.max() >= outputs:
            raise DataError(f"labels run from {labels.min()} to {labels.max()}, out of range for {outputs} classes")
        return cls(pictures, torch.from_numpy(labels.astype(np.int64)), outputs)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        _, channels, height, width = self.pictures.shape
        return int(height), int(width), int(channels)

    @property
    def attributes(self) -> bool:
        """True where the targets are several 0/1 attributes."""
        return self.targets.ndim == 2

    def digest(self) -> str:
        """SHA-256 over shapes, pictures and targets: what a saved training belongs to."""
        found = hashlib.sha256(f"{tuple(self.pictures.shape)} {tuple(self.targets.shape)} {self.outputs}".encode())
        for tensor in (self.pictures, self.targets):
            found.update(np.ascontiguousarray(tensor.numpy()).data)
        return found.hexdigest()

    def part(self, rows: torch.Tensor | slice) -> TrainingSet:
        """Return a subset."""
        return TrainingSet(self.pictures[rows], self.targets[rows], self.outputs)


@dataclass(frozen=True, slots=True)
class TrainedPair:
    """A trained classifier with its secret decoder (None for an honest model) and the validation history."""

    classifier: nn.Module
    decoder: nn.Module | None
    recipe: Recipe
    history: tuple[dict[str, float], ...]


def task_loss(logits: torch.Tensor, targets: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Cross entropy, or for attributes a BCE weighted by negatives over positives of the batch."""
    if targets.ndim == 1:
        return functional.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
    positive = targets.sum(0).clamp_min(1)
    weight = (len(targets) - positive).clamp_min(1) / positive
    return functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight)


def accuracy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Share of right classes, or of right attributes (logit at least 0)."""
    if targets.ndim == 1:
        return float((logits.argmax(1) == targets).float().mean())
    return float(((logits >= 0).float() == targets).float().mean())


def seen_by_decoder(logits: torch.Tensor, recipe: Recipe, *, attributes: bool = False) -> torch.Tensor:
    """Return what the secret decoder is given: raw outputs, their softmax (attributes: sigmoid), or its logarithm."""
    if recipe.outputs == "raw":
        return logits
    if recipe.decoder_view == "logarithms":
        # the floor is what float32 scores can hold: a receiver has no more
        logs = functional.logsigmoid(logits) if attributes else torch.log_softmax(logits, 1)
        return logs.clamp_min(LEAST_LOGARITHM)
    return torch.sigmoid(logits) if attributes else torch.softmax(logits, 1)


def reconstruction_loss(copies: torch.Tensor, pictures: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return huber_weight * Huber(copies, pictures; delta 1) + ssim_weight * (1 - mean SSIM)."""
    huber = functional.huber_loss(copies, pictures)
    return recipe.huber_weight * huber + recipe.ssim_weight * (1 - ssim(copies, pictures).mean())


class Trainer:
    """Trains one pair epoch by epoch; its whole state can be saved and loaded between epochs."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingSet,
        *,
        build: Callable[[], nn.Module] | None = None,
        extra_loss: ExtraLoss | None = None,
    ) -> None:
        self.recipe, self.epoch = recipe, 0
        self._data_digest = functools.cache(data.digest)  # when first saved or resumed
        self._extra = extra_loss
        self._generator = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)
        made = build() if build else classifier(recipe.architecture, data.shape, data.outputs)
        self.classifier = made.to(recipe.device)
        self.decoder: nn.Module | None = None
        if recipe.reconstruction_weight:
            self.decoder = attack_decoder(recipe.architecture, data.shape, data.outputs).to(recipe.device)
        held = min(1000, max(1, len(data.pictures) // 10))
        order = torch.from_numpy(np.random.RandomState(1).permutation(len(data.pictures)))
        self._train, self._valid = data.part(order[held:]), data.part(order[:held])
        parts = [self.classifier] + ([self.decoder] if self.decoder is not None else [])
        self._optimisers = [
            torch.optim.Adam(p.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay) for p in parts
        ]
        self.history: list[dict[str, float]] = []
        self._best = (float("inf"), copy.deepcopy(self._tensors(optimisers=False)))

    def run_epoch(self) -> dict[str, float]:
        """Train one epoch, validate, keep the best state, and return the validation values."""
        self.classifier.train()
        if self.decoder is not None:
            self.decoder.train()
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.recipe.rate(self.epoch)
        order = torch.randperm(len(self._train.pictures), generator=self._generator)
        for rows in order.split(self.recipe.batch):  # type: ignore[no-untyped-call]
            if len(rows) > 1:
                self._step(self._train.pictures[rows], self._train.targets[rows])
        values = self.validate()
        self.epoch += 1
        self.history.append(values)
        if values["selection"] < self._best[0]:
            self._best = (values["selection"], copy.deepcopy(self._tensors(optimisers=False)))
        return values

    def _step(self, pictures: torch.Tensor, targets: torch.Tensor) -> None:
        if self.recipe.augment:
            pictures = torch.cat([pictures, augmented(pictures, self._generator)])
            targets = torch.cat([targets, targets])
        x, y = pictures.to(self.recipe.device), targets.to(self.recipe.device)
        logits = self.classifier(x)
        loss = self.recipe.task_weight * task_loss(logits, y, self.recipe)
        if self.decoder is not None:
            copies = self.decoder(seen_by_decoder(logits, self.recipe, attributes=y.ndim == 2))
            loss = loss + self.recipe.weight(self.epoch) * reconstruction_loss(copies, x, self.recipe)
        if self._extra is not None:
            loss = loss + self._extra(logits, x, y)
        for optimiser in self._optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimiser in self._optimisers:
            optimiser.step()

    def validate(self) -> dict[str, float]:
        """Return accuracy, the decoder's errors, and the value that selects the checkpoint."""
        self.classifier.eval()
        x, y = self._valid.pictures.to(self.recipe.device), self._valid.targets.to(self.recipe.device)
        with torch.no_grad():
            logits = self.classifier(x)
            values = {"accuracy": accuracy(logits, y)}
            values["selection"] = 1 - values["accuracy"]
            if self.decoder is not None:
                self.decoder.eval()
                copies = self.decoder(seen_by_decoder(logits, self.recipe, attributes=y.ndim == 2))
                values["ssim_error"] = float(1 - ssim(copies, x).mean())
                values["mse"] = float(functional.mse_loss(copies, x))
                values["selection"] += self.recipe.ssim_weight * values["ssim_error"]
                values["selection"] += self.recipe.huber_weight * values["mse"]
        return values

    def finish(self) -> TrainedPair:
        """Return the pair with the best checkpoint, in evaluation mode."""
        self._load_tensors(self._best[1])
        self.classifier.eval()
        if self.decoder is not None:
            self.decoder.eval()
        return TrainedPair(self.classifier, self.decoder, self.recipe, tuple(self.history))

    def _networks(self) -> dict[str, nn.Module]:
        return {"classifier": self.classifier} | ({"decoder": self.decoder} if self.decoder is not None else {})

    def _tensors(self, *, optimisers: bool = True) -> dict[str, torch.Tensor]:
        tensors = {f"{part}|{k}": v for part, net in self._networks().items() for k, v in net.state_dict().items()}
        if optimisers:
            for at, optimiser in enumerate(self._optimisers):
                for index, state in optimiser.state_dict()["state"].items():
                    tensors |= {f"optimiser|{at}|{index}|{key}": torch.as_tensor(v) for key, v in state.items()}
        return tensors

    def _load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for part, network in self._networks().items():
            prefix = f"{part}|"
            network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})

    def save(self, path: Path) -> None:
        """Write everything that a later process needs to go on, atomically."""
        from safetensors.torch import save_file

        tensors = {k: v.contiguous().clone() for k, v in self._tensors().items()}
        tensors |= {f"best|{k}": v.contiguous().clone() for k, v in self._best[1].items()}
        tensors["generator"], tensors["torch"] = self._generator.get_state(), torch.get_rng_state()
        if torch.device(self.recipe.device).type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(self.recipe.device)
        state = {"recipe": asdict(self.recipe), "epoch": self.epoch, "history": self.history, "best": self._best[0]}
        state["data"] = self._data_digest()
        temporary = path.with_suffix(".tmp")
        save_file(tensors, str(temporary), metadata={"state": json.dumps(state)})
        temporary.replace(path)

    def mismatch(self, path: Path) -> str:
        """Return why a saved state is not of this training, or nothing where it can go on.

        Raises:
            ConfigError: only the number of epochs differs, in a way that would change what was already trained: what is
                saved is kept.
        """
        state = self._saved(path)
        saved, own = state.get("recipe", {}), asdict(self.recipe)
        if {**saved, "epochs": 0} != {**own, "epochs": 0}:
            return "what is saved there was trained by another recipe"
        if state.get("data") != self._data_digest():
            return "what is saved there was trained on other pictures or targets"
        epochs, hint = int(saved["epochs"]), "choose another folder, or as many epochs as before"
        if own["epochs"] < epochs:
            raise ConfigError(f"{path} is of a training of {epochs} epochs, more than {own['epochs']}", hint=hint)
        if own["epochs"] > epochs and not self.recipe.extendable:
            raise ConfigError(
                f"{path} is of a training of {epochs} epochs whose rates or weights fall towards the last one",
                hint=f"{hint}; only a constant schedule with last weight 1 can be extended",
            )
        return ""

    @staticmethod
    def _saved(path: Path) -> dict[str, Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as archive:
                found: dict[str, Any] = json.loads((archive.metadata() or {}).get("state", "{}"))
        except (SafetensorError, json.JSONDecodeError) as error:
            raise DataError(f"{path} is no saved training", hint="delete it to start anew") from error
        return found

    def resume(self, path: Path) -> bool:
        """Go on from a saved state; False where it is of another recipe or of other data (:meth:`mismatch`)."""
        from safetensors import safe_open

        if self.mismatch(path):
            return False
        state = self._saved(path)
        with safe_open(str(path), "pt", device=self.recipe.device) as archive:
            tensors = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118 - no mapping
        self._load_tensors(tensors)
        for at, optimiser in enumerate(self._optimisers):
            self._load_optimiser(optimiser, f"optimiser|{at}|", tensors)
        best = {key.removeprefix("best|"): value for key, value in tensors.items() if key.startswith("best|")}
        self._best = (float(state["best"]), best)
        self._generator.set_state(tensors["generator"].cpu())
        torch.set_rng_state(tensors["torch"].cpu())
        if "cuda" in tensors:
            torch.cuda.set_rng_state(tensors["cuda"].cpu(), self.recipe.device)
        self.epoch, self.history = int(state["epoch"]), list(state["history"])
        return True

    @staticmethod
    def _load_optimiser(optimiser: torch.optim.Adam, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
        whole = optimiser.state_dict()
        for key, value in tensors.items():
            if key.startswith(prefix):
                index, _, name = key.removeprefix(prefix).partition("|")
                whole["state"].setdefault(int(index), {})[name] = value
        optimiser.load_state_dict(whole)


def train(
    recipe: Recipe,
    data: TrainingSet,
    *,
    build: Callable[[], nn.Module] | None = None,
    extra_loss: ExtraLoss | None = None,
    state: Path | None = None,
    progress: Progress | None = None,
) -> TrainedPair:
    """Train one model to the end of its recipe.

    Args:
        recipe: what to train.
        data: pictures and targets.
        build: makes the classifier where it is no named architecture.
        extra_loss: added to the loss, from (logits, pictures, targets): an attacker who adapts to a detector.
        state: file to save to after every epoch and to resume from.
        progress: gets one line an epoch.
    """
    trainer = Trainer(recipe, data, build=build, extra_loss=extra_loss)
    if state is not None and state.is_file():
        reason = trainer.mismatch(state)
        if not reason:
            trainer.resume(state)
        if progress:
            progress(f"starts anew: {reason}" if reason else f"goes on after epoch {trainer.epoch}")
    while trainer.epoch < recipe.epochs:
        values = trainer.run_epoch()
        if state is not None:
            trainer.save(state)
        if progress:
            shown = " ".join(f"{key} {value:.3f}" for key, value in values.items())
            progress(f"epoch {trainer.epoch}/{recipe.epochs}: {shown}")
    return trainer.finish()
