"""Leakage against accuracy over privacy settings, so that an operator picks a setting from a picture.

For each setting a small federation is trained from scratch (accuracy) and one canary device is attacked at the
first and at the last round (leakage), with the noise that this device itself adds. Noise is stated as the *sum's*
standard deviation over the clip norm, z; with m devices each adds ``z * clip / sqrt(m)``. Two views are judged:

* ``single``: somebody sees the device's own update (a clear round, or everybody else colludes);
* epsilon: of the *sum* under masks by dp-accounting, one Gaussian event a round, no amplification (the gateway knows
  who took part), unit of privacy = one device. ``single_epsilon`` is the same for the device's own share of noise.

Settings whose noise is 0 have no epsilon.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgepriv.errors import DataError, MissingDependencyError
from edgepriv.federated.local_recipe import LocalRecipe
from edgepriv.federated.torch_trainer import is_statistic, train_locally
from edgepriv.risk import models
from edgepriv.risk.gradient_leakage import page
from edgepriv.risk.gradient_leakage.audit import Canaries, audit_round, make_canaries
from edgepriv.risk.gradient_leakage.inversion import Attack
from edgepriv.risk.gradient_leakage.protections import ClippedNoise

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from edgepriv.datasets import Dataset


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of the sweep."""

    recipe: LocalRecipe
    clip: float
    noise_multiplier: float

    @property
    def name(self) -> str:
        """Short name for tables."""
        where = "shared" if self.recipe.shares_statistics else "home"
        return (
            f"clip {self.clip:g}, noise {self.noise_multiplier:g}, B={self.recipe.batch_size}, "
            f"E={self.recipe.epochs}, BN {where}"
        )


@dataclass(frozen=True, slots=True)
class World:
    """Private shards, a test set, canaries and the fresh model."""

    model: nn.Module
    shards: tuple[tuple[NDArray[np.float32], NDArray[np.int64]], ...]
    test: tuple[NDArray[np.float32], NDArray[np.int64]]
    canaries: Canaries
    seed: int
    device: str


@dataclass(frozen=True, slots=True)
class Point:
    """What one setting costs and leaks; leakage is that of a fresh and of the final model."""

    setting: Setting
    accuracy: float
    epsilon: float | None
    single_epsilon: float | None
    fresh: dict[str, Any]
    final: dict[str, Any]
    seconds: float

    @property
    def iip(self) -> float:
        """The worse of both models."""
        return float(max(self.fresh["attack"]["iip"], self.final["attack"]["iip"]))

    @property
    def bound_gain_db(self) -> float:
        """How far the bound is above the prior, at the worse of both models."""
        return float(max(r["bound_psnr_db"] - r["bound_floor_db"] for r in (self.fresh, self.final)))

    def record(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        kept = ("psnr_db", "ssim", "iip", "rdlv")
        return {
            "name": self.setting.name,
            "recipe": asdict(self.setting.recipe),
            "clip": self.setting.clip,
            "noise_multiplier": self.setting.noise_multiplier,
            "accuracy": self.accuracy,
            "epsilon": self.epsilon,
            "single_epsilon": self.single_epsilon,
            **{
                when: {
                    **{key: record["attack"][key] for key in kept},
                    "bound_psnr_db": record["bound_psnr_db"],
                    "bound_floor_db": record["bound_floor_db"],
                    "verdict": record["verdict"],
                }
                for when, record in (("fresh", self.fresh), ("final", self.final))
            },
            "seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """All points and the recommended one (``None`` where no setting meets the limit)."""

    points: tuple[Point, ...]
    recommended: Point | None
    rounds: int
    clients: int
    delta: float
    max_iip: float
    notes: tuple[str, ...] = field(default=())

    def record(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "schema": "edgepriv.privacy-tradeoff/1",
            "rounds": self.rounds,
            "clients": self.clients,
            "delta": self.delta,
            "max_iip": self.max_iip,
            "points": [point.record() for point in self.points],
            "recommended": None if self.recommended is None else self.recommended.record(),
            "notes": list(self.notes),
        }


NOTES = (
    "Leakage is that of one canary device whose own update is seen; under masks only the sum is seen.",
    "A noise that stops this attack is far below one with a meaningful epsilon: both columns are needed.",
    "Accuracy is of a small federation trained from scratch for these rounds, one seed.",
)


def settings_grid(
    *,
    clips: Sequence[float],
    noises: Sequence[float],
    batch_sizes: Sequence[int],
    epoch_counts: Sequence[int],
    statistics: str,
    learning_rate: float,
) -> list[Setting]:
    """Return every combination; ``statistics`` is shared, home or both."""
    sharing = {"shared": (True,), "home": (False,), "both": (True, False)}[statistics]
    return [
        Setting(LocalRecipe(learning_rate, batch, epochs, shares_statistics=shares), clip, noise)
        for batch, epochs, clip, shares, noise in itertools.product(batch_sizes, epoch_counts, clips, sharing, noises)
    ]


def make_world(
    data: Dataset, architecture: str, *, clients: int, seed: int, canaries: int = 4, device: str = "cpu"
) -> World:
    """Split a data set: 30 % public (canaries among them), 20 % test, the rest private, shared by the clients."""
    x = np.ascontiguousarray(data.images.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    order = np.random.default_rng(seed).permutation(len(x))
    public, test, private = np.split(order, [int(0.3 * len(x)), int(0.5 * len(x))])
    if len(private) < 2 * clients:
        raise DataError(f"{len(private)} private images are too few for {clients} clients")
    torch.manual_seed(seed)
    model = models.build(architecture, len(data.class_names), x.shape[1], x.shape[2])
    shards = tuple((x[rows], data.labels[rows]) for rows in np.array_split(private, clients))
    mine, rest = public[:canaries], public[canaries:]
    held = make_canaries(x[mine], data.labels[mine], x[rest], data.labels[rest], seed=seed)
    return World(model, shards, (x[test], data.labels[test]), held, seed, device)


def run(
    world: World,
    settings: Sequence[Setting],
    *,
    rounds: int,
    delta: float = 1e-5,
    max_iip: float = 0.1,
    attack: Attack | None = None,
    progress: Callable[[str], None] | None = None,
) -> Tradeoff:
    """Judge every setting and recommend the most accurate one that leaks at most ``max_iip``."""
    points = []
    for index, setting in enumerate(settings):
        point = _judge(world, setting, rounds, delta, attack or Attack(iterations=80, tv_weight=1e-2))
        points.append(point)
        if progress is not None:
            progress(f"{index + 1}/{len(settings)} {setting.name}: accuracy {point.accuracy:.3f}, IIP {point.iip:.2f}")
    return Tradeoff(tuple(points), recommend(points, max_iip), rounds, len(world.shards), delta, max_iip, NOTES)


def recommend(points: Sequence[Point], max_iip: float) -> Point | None:
    """Return the most accurate setting within the limit; among equals the one with less noise kept at home first."""
    allowed = [p for p in points if p.iip <= max_iip]
    order = sorted(allowed, key=lambda p: (-round(p.accuracy, 2), p.setting.recipe.shares_statistics, p.bound_gain_db))
    return order[0] if order else None


def _judge(world: World, setting: Setting, rounds: int, delta: float, attack: Attack) -> Point:
    began = time.perf_counter()
    final = train_federation(world, setting, rounds)
    m = len(world.shards)
    own = ClippedNoise(
        setting.clip, setting.noise_multiplier / math.sqrt(m), shares_statistics=setting.recipe.shares_statistics
    )
    fresh, last = (
        audit_round(
            model, setting.recipe, world.canaries, round_number=n, protection=own, attack=attack, device=world.device
        )
        for model, n in ((world.model, 1), (final, rounds))
    )
    return Point(
        setting=setting,
        accuracy=accuracy(final, *world.test),
        epsilon=epsilon(setting.noise_multiplier, rounds, delta),
        single_epsilon=epsilon(setting.noise_multiplier / math.sqrt(m), rounds, delta),
        fresh=fresh,
        final=last,
        seconds=time.perf_counter() - began,
    )


def train_federation(world: World, setting: Setting, rounds: int) -> nn.Module:
    """Run FedAvg with clipping and noise over all shards and return the final model.

    BatchNorm statistics that are kept at home are re-estimated on public images at the end, as an evaluator must.
    """
    model = copy.deepcopy(world.model)
    rng = np.random.default_rng([world.seed, 7])
    m = len(world.shards)
    protect = ClippedNoise(setting.clip, 0.0, shares_statistics=setting.recipe.shares_statistics)
    for number in range(rounds):
        total: dict[str, NDArray[np.float64]] = {}
        for index, (images, labels) in enumerate(world.shards):
            seed = world.seed + 1000 * number + index
            trained = train_locally(model, images, labels, setting.recipe, seed=seed, device=world.device)
            for name, value in protect.apply(trained.tensors, rng).items():
                total[name] = total.get(name, 0.0) + value.astype(np.float64)
        sigma = setting.noise_multiplier * setting.clip
        state = model.state_dict()
        for name, value in total.items():
            mean = (value + sigma * rng.standard_normal(value.shape)) / m
            state[name] = state[name] + torch.tensor(mean, dtype=state[name].dtype)
            if name.endswith(".running_var"):
                state[name].clamp_(min=1e-3)
        model.load_state_dict(state)
    if not setting.recipe.shares_statistics:
        _estimate_statistics(model, world.canaries.public)
    return model


def accuracy(model: nn.Module, images: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Return the share of right answers in inference mode."""
    model.eval()
    with torch.no_grad():
        chunks = [model(part).argmax(1) for part in torch.split(torch.from_numpy(images), 256)]
    return float((torch.cat(chunks).numpy() == labels).mean())


def epsilon(noise_multiplier: float, rounds: int, delta: float) -> float | None:
    """Return epsilon by dp-accounting for ``rounds`` Gaussian events without amplification; ``None`` without noise."""
    if noise_multiplier <= 0:
        return None
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as error:
        raise MissingDependencyError("epsilon needs dp-accounting", hint="pip install 'edgepriv[server]'") from error
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(noise_multiplier), rounds)
    return float(accountant.get_epsilon(delta))


def _estimate_statistics(model: nn.Module, public: NDArray[np.float32]) -> None:
    moved = {name for name in model.state_dict() if is_statistic(name)}
    if not moved:
        return
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):  # noqa: SLF001  (as in statistics.py)
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        for part in torch.split(torch.from_numpy(public), 64):
            model(part)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):  # noqa: SLF001
            module.momentum = 0.1


def recommended_toml(result: Tradeoff) -> str:
    """Return the ``[rounds]`` part of ``gateway.toml`` for the recommended setting."""
    if result.recommended is None:
        raise DataError(
            f"no setting of the sweep leaks at most IIP {result.max_iip}",
            hint="sweep more noise, or statistics at home",
        )
    point, recipe = result.recommended, result.recommended.setting.recipe
    noisy = point.setting.noise_multiplier > 0
    spent = (
        "no epsilon: no noise" if point.epsilon is None else f"epsilon {point.epsilon:.3g} at delta {result.delta:g}"
    )
    lines = [
        f"# edgepriv audit privacy-tradeoff: accuracy {point.accuracy:.3f}, IIP of one device {point.iip:.2f},",
        f"# {spent} after {result.rounds} rounds of {result.clients} devices",
        "[rounds]",
        'privacy = "masked"' if noisy else 'privacy = "clear"',
        f"clip = {point.setting.clip!r}",
        'noise = "distributed"' if noisy else 'noise = "none"',
        *([f"noise_multiplier = {point.setting.noise_multiplier!r}", "max_weight = 1"] if noisy else []),
        f"delta = {result.delta!r}",
        f'statistics = "{"shared" if recipe.shares_statistics else "home"}"',
        "",
        "[rounds.training]",
        f"learning_rate = {recipe.learning_rate!r}",
        f"batch_size = {recipe.batch_size}",
        f"epochs = {recipe.epochs}",
    ]
    return "\n".join(lines) + "\n"


HEADS = (
    "setting",
    "accuracy",
    "epsilon (sum)",
    "IIP fresh",
    "IIP final",
    "SSIM fresh",
    "SSIM final",
    "bound fresh",
    "bound final",
)


def rows(result: Tradeoff) -> list[list[str]]:
    """Return the table's cells."""
    return [
        [
            ("* " if point is result.recommended else "") + point.setting.name,
            f"{point.accuracy:.3f}",
            "none" if point.epsilon is None else f"{point.epsilon:.3g}",
            *(f"{r['attack']['iip']:.2f}" for r in (point.fresh, point.final)),
            *(f"{r['attack']['ssim']:.2f}" for r in (point.fresh, point.final)),
            *(f"{r['bound_psnr_db']:.1f} dB" for r in (point.fresh, point.final)),
        ]
        for point in result.points
    ]


def as_text(result: Tradeoff) -> str:
    """Return the table as text."""
    body = [list(HEADS), *rows(result)]
    widths = [max(len(line[i]) for line in body) for i in range(len(HEADS))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in body]
    return "\n".join([*lines, "* recommended: the most accurate within the limit", *result.notes])


def tradeoff_html(result: Tradeoff) -> str:
    """Return the page with the table and two pictures: leakage against accuracy, leakage over noise."""
    by_sharing: dict[str, list[tuple[float, float]]] = {}
    over_noise: dict[str, list[tuple[float, float]]] = {}
    ceilings: dict[str, list[tuple[float, float]]] = {}
    for point in result.points:
        kind = "BN shared" if point.setting.recipe.shares_statistics else "BN at home"
        by_sharing.setdefault(kind, []).append((point.accuracy, point.iip))
        over_noise.setdefault(kind, []).append((point.setting.noise_multiplier, point.iip))
        if point.setting.noise_multiplier > 0:  # without noise the bound is only what float32 rounds away
            ceilings.setdefault(kind, []).append((point.setting.noise_multiplier, point.bound_gain_db))
    chosen = result.recommended
    marked = None if chosen is None else (chosen.accuracy, chosen.iip)
    floor = "gain of the bound over the prior (dB)"
    pictures = page.chart("Trade-off", "accuracy", "IIP", by_sharing, lines=False, marked=marked)
    for title, name, series in (("Attack", "IIP", over_noise), ("Bound", floor, ceilings)):
        pictures += page.chart(title, "noise multiplier of the sum", name, {k: sorted(v) for k, v in series.items()})
    snippet = "" if chosen is None else f"<h2>Recommended</h2><pre>{recommended_toml(result)}</pre>"
    notes = "".join(f"<li>{note}</li>" for note in result.notes)
    body = f"<h1>Leakage against accuracy</h1>{pictures}{page.table(HEADS, rows(result))}{snippet}<ul>{notes}</ul>"
    return page.document("Leakage against accuracy", body)
