"""Gradient inversion of one federated update: images out of what a device sent.

The objective (README.md, section "The attack"; our form of Hatamizadeh et al. 2023):

    L = match(dW_sim, dW) + w_bn * sum_layers (|mu - s|/|s| + |v - s|/|s|) + w_tv * TV(x) [+ w_prior * |x - prior|^2]

with ``match`` = 1 - cosine over all tensors together, or |.| / |dW| (``l2``). Presets give the earlier attacks as
baselines: DLG (Zhu et al. 2019), iDLG (Zhao et al. 2020), inverting gradients (Geiping et al. 2020), and the
attacker who believes that BatchNorm was frozen. Rules: seeded; the model is never changed; the iterate with the
lowest loss is the result, never the last one; images stay in 0..1.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgepriv.errors import ConfigError, DataError
from edgepriv.federated.torch_trainer import is_statistic
from edgepriv.risk.gradient_leakage import statistics
from edgepriv.risk.gradient_leakage.labels import infer_labels
from edgepriv.risk.gradient_leakage.simulate import MAX_IMAGES, Simulation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from edgepriv.federated.local_recipe import LocalRecipe
    from edgepriv.risk.gradient_leakage.simulate import Simulated
    from edgepriv.risk.gradient_leakage.statistics import BatchStatistics

    Progress = Callable[[int, int, float], None]

MAX_BATCH = 32


@dataclass(frozen=True, slots=True)
class Attack:
    """What the attacker does and believes; a report states all of it.

    Attributes:
        match: ``cosine``, ``l2`` (relative) or ``squared`` (DLG's sum of squares).
        bn_weight: of the BatchNorm term; 0 leaves it out.
        tv_weight: of the total variation.
        prior_weight: of the squared distance to the prior image.
        iterations: of each restart.
        restarts: the restart with the lowest loss wins.
        optimiser: ``adam``, ``signed-adam`` (Geiping et al.) or ``lbfgs`` (DLG).
        learning_rate: of Adam: warm-up over a tenth, then cosine to 0.
        start: ``uniform``, ``normal``, ``grey`` or ``prior``.
        labels: ``known``, ``inferred`` (from the head) or ``joint`` (optimised with the images).
        believes_frozen: simulate BatchNorm in inference mode whatever the recipe says.
        seed: of the starting images.
    """

    match: str = "cosine"
    bn_weight: float = 0.1
    tv_weight: float = 1e-3
    prior_weight: float = 0.0
    iterations: int = 120
    restarts: int = 1
    optimiser: str = "adam"
    learning_rate: float = 0.1
    start: str = "uniform"
    labels: str = "known"
    believes_frozen: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.iterations < 1 or self.restarts < 1:
            raise ConfigError("iterations and restarts must be at least 1")


_CHOICES = {
    "match": ("cosine", "l2", "squared"),
    "optimiser": ("adam", "signed-adam", "lbfgs"),
    "start": ("uniform", "normal", "grey", "prior"),
    "labels": ("known", "inferred", "joint"),
}

PRESETS: dict[str, Attack] = {
    "bn-aware": Attack(),
    "gradient-only": Attack(bn_weight=0.0),
    "statistics-only": Attack(match="l2", bn_weight=1.0),
    "fixed-bn": Attack(bn_weight=0.0, believes_frozen=True),
    "inverting-gradients": Attack(bn_weight=0.0, tv_weight=1e-2, optimiser="signed-adam"),
    "dlg": Attack("squared", 0.0, 0.0, optimiser="lbfgs", learning_rate=1.0, start="normal", labels="joint"),
    "idlg": Attack("squared", 0.0, 0.0, optimiser="lbfgs", learning_rate=1.0, start="normal", labels="inferred"),
}


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """What came out: images float32 [n, h, w, c] in 0..1, their labels, both parts of the loss, the time taken."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    matching_loss: float
    statistics_loss: float
    seconds: float
    recovered_layers: int = 0
    trace: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Target:
    """An update as the attacker holds it: parameter changes and recovered batch statistics."""

    changes: dict[str, Tensor]
    statistics: dict[str, BatchStatistics]


def read_update(
    model: nn.Module,
    update: Mapping[str, NDArray[Any]],
    recipe: LocalRecipe,
    n_images: int,
    device: str = "cpu",
    uses: Mapping[str, int] | None = None,
) -> Target:
    """Check an update against the model and split it into changes and batch statistics.

    Raises:
        DataError: unknown tensors, other shapes, NaN or infinity, counters that contradict the recipe.
    """
    state = model.state_dict()
    check_update(state, update)
    changes = {
        name: torch.from_numpy(np.array(value, np.float32)).to(device)
        for name, value in update.items()
        if not is_statistic(name)
    }
    if not changes:
        raise DataError("the update holds no parameter change", hint="is it an update of this model?")
    layers = statistics.momenta(model)
    found = statistics.recover(state, update, layers, recipe.steps(n_images), uses)
    moved = {n: statistics.BatchStatistics(s.mean.to(device), s.variance.to(device)) for n, s in found.items()}
    return Target(changes, moved)


def check_update(state: Mapping[str, Tensor], update: Mapping[str, NDArray[Any]]) -> None:
    """Refuse an update that cannot be one of this model.

    Raises:
        DataError: with the first tensor that does not fit.
    """
    for name, value in update.items():
        if name not in state:
            raise DataError(
                f"the update has a tensor {name!r} that the model has not", hint="an update of another architecture?"
            )
        if tuple(value.shape) != tuple(state[name].shape):
            raise DataError(
                f"{name}: shape {tuple(value.shape)} in the update, {tuple(state[name].shape)} in the model",
                hint="an update of another architecture?",
            )
        if not np.isfinite(np.asarray(value, np.float64)).all():
            raise DataError(f"{name} holds NaN or infinity", hint="refuse this update: it would spoil the round too")


def invert(
    model: nn.Module,
    update: Mapping[str, NDArray[Any]],
    recipe: LocalRecipe,
    shape: tuple[int, int, int, int],
    attack: Attack | None = None,
    *,
    labels: NDArray[np.int64] | None = None,
    prior: NDArray[np.float32] | None = None,
    clients: int = 1,
    momentum: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Reconstruction:
    """Reconstruct the images behind ``update``.

    Args:
        model: the global model before the round, running statistics included.
        update: changes by ``state_dict`` name, as decoded from the wire.
        recipe: what the device declared.
        shape: (n, channels, height, width) of the images looked for.
        attack: see :class:`Attack`; the default is ``bn-aware``.
        labels: in the order of training, where the attack knows them.
        prior: public images [m, c, h, w] for ``start="prior"``, the prior term and label inference.
        clients: the update is the mean over this many devices with equal shares of the images.
        momentum: momentum buffers before the round, where the recipe carries them.
        device: a torch device.
        progress: called with (iteration, of how many, loss).

    Raises:
        DataError: the update does not fit the model, the batch is too large, something needed is missing.
    """
    attack = attack or Attack()
    _check_size(shape, recipe, clients)
    began = time.perf_counter()
    share, uses = shape[0] // clients, statistics.uses_per_pass(model, shape[1:])
    target = read_update(model, update, recipe, share, device, uses)
    believed = replace(recipe, batch_normalisation="frozen") if attack.believes_frozen else recipe
    simulation = Simulation(model, believed, clients=clients, momentum=momentum, device=device)
    _check_trained(simulation, target)
    known = _labels_for(attack, model, update, recipe, shape[0], labels, prior)
    n_classes = _classes(model, shape, device)
    best: _Run | None = None
    for restart in range(attack.restarts):
        run = _Run(simulation, target, attack, shape, known, n_classes, prior, restart, device)
        run.optimise(progress)
        best = run if best is None or run.best_loss < best.best_loss else best
    if best is None or not np.isfinite(best.best_loss):
        raise DataError("the attack found no finite loss", hint="try another optimiser, or fewer local steps")
    return best.result(time.perf_counter() - began)


def _check_size(shape: tuple[int, int, int, int], recipe: LocalRecipe, clients: int) -> None:
    if shape[0] < 1 or shape[0] % clients:
        raise DataError(f"{shape[0]} images cannot be shared equally by {clients} clients")
    if shape[0] > MAX_IMAGES or min(recipe.batch_size, shape[0]) > MAX_BATCH:
        raise DataError(
            f"this attack is built for batches up to {MAX_BATCH} and {MAX_IMAGES} images, "
            f"not {recipe.batch_size} and {shape[0]}",
            hint="audit a smaller canary batch, or use the bound",
        )


def _check_trained(simulation: Simulation, target: Target) -> None:
    if set(simulation.trained) != set(target.changes):
        different = sorted(set(simulation.trained) ^ set(target.changes))
        raise DataError(
            f"the recipe and the update disagree on what is trained: {different[0]}",
            hint="check the recipe's trainable",
        )


def _labels_for(
    attack: Attack,
    model: nn.Module,
    update: Mapping[str, NDArray[Any]],
    recipe: LocalRecipe,
    n_images: int,
    labels: NDArray[np.int64] | None,
    prior: NDArray[np.float32] | None,
) -> NDArray[np.int64] | None:
    if attack.labels == "joint":
        return None
    if attack.labels == "inferred":
        if prior is None and n_images > 1:
            raise DataError("label inference for several images needs public images", hint="give a prior")
        public = prior if prior is not None else np.zeros((0,), np.float32)
        return infer_labels(model, update, recipe, n_images, public)
    if labels is None or len(labels) != n_images:
        raise DataError(f"the attack needs {n_images} labels", hint="give them, or labels='inferred' or 'joint'")
    return np.asarray(labels, np.int64)


def _classes(model: nn.Module, shape: tuple[int, int, int, int], device: str) -> int:
    twin, _ = statistics.instrument(model, training=False)
    with torch.no_grad():
        return int(twin.to(device)(torch.zeros(1, *shape[1:], device=device)).shape[1])


class _Run:
    """One restart: its leaves, its loss and its best iterate."""

    def __init__(
        self,
        simulation: Simulation,
        target: Target,
        attack: Attack,
        shape: tuple[int, int, int, int],
        labels: NDArray[np.int64] | None,
        n_classes: int,
        prior: NDArray[np.float32] | None,
        restart: int,
        device: str,
    ) -> None:
        generator = torch.Generator().manual_seed(attack.seed * 1000 + restart)
        self.simulation, self.target, self.attack = simulation, target, attack
        self.prior = None if prior is None else torch.from_numpy(np.asarray(prior.mean(0), np.float32)).to(device)
        self.images = self._start(shape, generator).to(device).requires_grad_()
        self.scores: Tensor | None = None
        if labels is None:
            self.scores = (0.1 * torch.randn(shape[0], n_classes, generator=generator)).to(device).requires_grad_()
            self.fixed_targets = torch.empty(0)
        else:
            rows = torch.from_numpy(labels).to(device)
            self.fixed_targets = nn.functional.one_hot(rows, n_classes).float()
        self.norm = torch.sqrt(sum((c * c).sum() for c in target.changes.values()) + torch.tensor(1e-30))
        self.best_loss, self.best_parts = float("inf"), (float("inf"), float("inf"))
        self.best_images, self.best_targets = self.images.detach().clone(), self.targets().detach()
        self.trace: list[float] = []

    def _start(self, shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
        noise = torch.rand(shape, generator=generator)
        if self.attack.start == "uniform":
            return noise
        if self.attack.start == "normal":
            return torch.randn(shape, generator=generator).mul(0.25).add(0.5).clamp(0, 1)
        if self.attack.start == "grey":
            return 0.5 + 0.01 * (noise - 0.5)
        if self.prior is None:
            raise DataError("start='prior' needs public images", hint="give a prior")
        return (self.prior.cpu() + 0.05 * (noise - 0.5)).clamp(0, 1)

    def targets(self) -> Tensor:
        return self.fixed_targets if self.scores is None else torch.softmax(self.scores, 1)

    def loss(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the objective and its two parts: matching and statistics."""
        simulated = self.simulation.update(self.images, self.targets())
        matching = match_loss(simulated.changes, self.target.changes, self.attack.match, self.norm)
        bn = statistics_loss(simulated, self.target)
        total = matching + self.attack.tv_weight * total_variation(self.images)
        if self.attack.bn_weight:
            total = total + self.attack.bn_weight * bn
        if self.attack.prior_weight and self.prior is not None:
            total = total + self.attack.prior_weight * ((self.images - self.prior) ** 2).mean()
        return total, matching, bn

    def optimise(self, progress: Progress | None) -> None:
        leaves = [self.images] if self.scores is None else [self.images, self.scores]
        optimiser, schedule = _optimiser(leaves, self.attack)
        for iteration in range(self.attack.iterations):
            optimiser.step(lambda: self._closure(leaves))  # type: ignore[no-untyped-call,unused-ignore]
            if schedule is not None:
                schedule.step()
            with torch.no_grad():
                self.images.clamp_(0, 1)
            if progress is not None:
                progress(iteration + 1, self.attack.iterations, self.best_loss)
            if not bool(torch.isfinite(self.images).all()):
                break

    def _closure(self, leaves: list[Tensor]) -> float:
        total, matching, bn = self.loss()
        for leaf, gradient in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
            leaf.grad = gradient.sign() if self.attack.optimiser == "signed-adam" and leaf is self.images else gradient
        value = float(total.detach())
        self.trace.append(value)
        if value < self.best_loss:
            self.best_loss, self.best_parts = value, (float(matching.detach()), float(bn.detach()))
            self.best_images, self.best_targets = self.images.detach().clone(), self.targets().detach().clone()
        return value

    def result(self, seconds: float) -> Reconstruction:
        images = self.best_images.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        labels = self.best_targets.argmax(1).cpu().numpy().astype(np.int64)
        return Reconstruction(images, labels, *self.best_parts, seconds, len(self.target.statistics), tuple(self.trace))


def match_loss(simulated: Mapping[str, Tensor], observed: Mapping[str, Tensor], kind: str, norm: Tensor) -> Tensor:
    """Return the distance of two updates over all tensors together."""
    if kind == "cosine":
        dot = torch.stack([(simulated[n] * c).sum() for n, c in observed.items()]).sum()
        own = torch.stack([(simulated[n] ** 2).sum() for n in observed]).sum()
        return 1 - dot / (torch.sqrt(own + 1e-30) * norm)
    squares = torch.stack([((simulated[n] - c) ** 2).sum() for n, c in observed.items()]).sum()
    # DLG compares gradients: the relative form has the same minimiser and does not depend on the learning rate
    return squares / norm**2 if kind == "squared" else torch.sqrt(squares + 1e-30) / norm


def statistics_loss(simulated: Simulated, target: Target) -> Tensor:
    """Return the normalised distance of batch means and variances, summed over the layers that were recovered."""
    terms = [torch.zeros(())]
    for name, wanted in target.statistics.items():
        if name not in simulated.statistics:
            continue
        got = simulated.statistics[name]
        for a, b in ((got.mean, wanted.mean), (got.variance, wanted.variance)):
            terms.append(torch.sqrt(((a - b) ** 2).sum() + 1e-20) / (b.norm() + 1e-8))
    return torch.stack([t.to(terms[-1].device) for t in terms]).sum()


def total_variation(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbours, right and down."""
    right = (images[..., :, 1:] - images[..., :, :-1]).abs().mean()
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return right + down


def _optimiser(
    leaves: list[Tensor], attack: Attack
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]:
    if attack.optimiser == "lbfgs":
        return torch.optim.LBFGS(leaves, lr=attack.learning_rate, max_iter=4, history_size=30), None
    optimiser = torch.optim.Adam(leaves, lr=attack.learning_rate)
    return optimiser, cosine_schedule(optimiser, attack.iterations)


def cosine_schedule(optimiser: torch.optim.Optimizer, iterations: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm up over a tenth of the iterations (at most 50), then fall to zero along a cosine."""
    warm_up = max(1, min(50, iterations // 10))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, iterations - warm_up)
        return float(0.5 * (1 + np.cos(np.pi * done)))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
