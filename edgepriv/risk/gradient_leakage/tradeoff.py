"""Leakage against accuracy over privacy settings, so that an operator picks a setting from a picture.

For each setting a small federation is trained from scratch (accuracy) and canary devices are attacked at the first
round, at some between and after the last (leakage). Noise is stated as the *sum's* standard deviation over the clip
norm, z; with m devices each adds ``z * clip / sqrt(m)``. Two views are judged:

* one device: somebody sees its own update with the noise that it adds itself (a clear round, or all others collude);
* ``masked``: the gateway sees the sum over a cohort with all of its noise.

Epsilon is that of the *sum* by dp-accounting, one Gaussian event a round, no amplification (the gateway knows who took
part), unit of privacy = one device. ``single_epsilon`` is the same for the device's own share of the noise.

Settings whose noise is 0 have no epsilon.
"""

from __future__ import annotations

import copy
import hashlib
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
from edgepriv.risk.gradient_leakage.audit import CONTAINED, LEAKS, Canaries, audit_round, make_canaries
from edgepriv.risk.gradient_leakage.inversion import Attack
from edgepriv.risk.gradient_leakage.protections import ClippedNoise
from edgepriv.risk.gradient_leakage.simulate import MAX_IMAGES
from edgepriv.risk.gradient_leakage.verdict import SEVERITY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from edgepriv.datasets import Dataset


SCHEMA = "edgepriv.privacy-tradeoff/1"
MAX_COHORT = 4  # devices of a masked cohort that are played


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of the sweep; ``masked``: the sum over a cohort is seen, else one device's own update."""

    recipe: LocalRecipe
    clip: float
    noise_multiplier: float
    masked: bool = False

    @property
    def name(self) -> str:
        """Short name for tables."""
        return (
            f"clip {self.clip:g}, noise {self.noise_multiplier:g}, B={self.recipe.batch_size}, "
            f"E={self.recipe.epochs}, {self.kind}"
        )

    @property
    def kind(self) -> str:
        """What is done besides clipping and noise."""
        return ("BN shared" if self.recipe.shares_statistics else "BN home") + (", masks" if self.masked else "")


@dataclass(frozen=True, slots=True)
class World:
    """Private shards, a test set, canaries (``per_device`` for each canary device) and the fresh model.

    ``data`` is the SHA-256 of all pictures and labels, by which sweeps of one federation know each other.
    """

    model: nn.Module
    shards: tuple[tuple[NDArray[np.float32], NDArray[np.int64]], ...]
    test: tuple[NDArray[np.float32], NDArray[np.int64]]
    canaries: Canaries
    per_device: int
    devices: int
    seed: int
    device: str
    architecture: str
    data: str

    def federation(self, rounds: int, delta: float) -> dict[str, Any]:
        """Return what sweeps must have in common if their points are to be compared."""
        return {
            "rounds": rounds,
            "clients": len(self.shards),
            "data": self.data,
            "model": self.architecture,
            "seed": self.seed,
            "delta": delta,
            "canaries": self.per_device,
        }

    @property
    def cohort(self) -> int:
        """How many canary devices stand for a masked cohort: a smaller one than the real leaks more, never less."""
        return max(1, min(len(self.shards), MAX_COHORT, len(self.canaries.images) // self.per_device))


@dataclass(frozen=True, slots=True)
class Point:
    """What one setting costs and leaks: ``leaks`` holds (number of the round, mean record over the canary devices)."""

    setting: Setting
    accuracy: float
    epsilon: float | None
    single_epsilon: float | None
    leaks: tuple[tuple[int, dict[str, Any]], ...]
    seconds: float

    @property
    def fresh(self) -> dict[str, Any]:
        """Leakage of the first round."""
        return self.leaks[0][1]

    @property
    def final(self) -> dict[str, Any]:
        """Leakage of a round that begins with the final model."""
        return self.leaks[-1][1]

    @property
    def iip(self) -> float:
        """The worst of all audited rounds."""
        return float(max(leak["iip"] for _, leak in self.leaks))

    @property
    def psnr_db(self) -> float:
        """The worst of all audited rounds."""
        return float(max(leak["psnr_db"] for _, leak in self.leaks))

    @property
    def bound_gain_db(self) -> float:
        """How far the bound is above the prior, at the worst of all audited rounds; infinite where there is none."""
        return max(_gain(leak["bound_psnr_db"], leak["bound_floor_db"]) for _, leak in self.leaks)

    @property
    def worst(self) -> tuple[int, dict[str, Any]]:
        """The audited round with the worst verdict, the first of them."""
        return max(self.leaks, key=lambda row: SEVERITY.index(row[1]["verdict"]))

    @property
    def verdict(self) -> str:
        """The worst of all audited rounds and canary devices."""
        return str(self.worst[1]["verdict"])

    @property
    def gap(self) -> str:
        """What keeps this setting from being contained, empty where nothing does."""
        number, leak = self.worst
        return "" if self.verdict == CONTAINED else f"{self.verdict} in round {number}: {leak['reason']}"

    def record(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "name": self.setting.name,
            "recipe": asdict(self.setting.recipe),
            "clip": self.setting.clip,
            "noise_multiplier": self.setting.noise_multiplier,
            "masked": self.setting.masked,
            "accuracy": self.accuracy,
            "epsilon": self.epsilon,
            "single_epsilon": self.single_epsilon,
            "fresh": self.fresh,
            "final": self.final,
            "rounds": [{"round": number, **leak} for number, leak in self.leaks],
            "verdict": self.verdict,
            "gap": self.gap,
            "seconds": self.seconds,
        }


def _gain(bound: float | None, floor: float | None) -> float:
    """How far a bound is above its floor; what is missing or no number counts as infinitely far."""
    gain = math.inf if bound is None or floor is None else bound - floor
    return math.inf if math.isnan(gain) else gain


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """All points and the recommended one (``None`` where no setting meets the limit)."""

    points: tuple[Point, ...]
    recommended: Point | None
    rounds: int
    clients: int
    cohort: int
    delta: float
    max_iip: float
    federation: dict[str, Any]
    notes: tuple[str, ...] = field(default=())

    def record(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "schema": SCHEMA,
            "rounds": self.rounds,
            "clients": self.clients,
            "masked_cohort": self.cohort,
            "delta": self.delta,
            "max_iip": self.max_iip,
            "federation": self.federation,
            "points": [point.record() for point in self.points],
            "recommended": None if self.recommended is None else self.recommended.record(),
            "notes": list(self.notes),
        }


NOTES = (
    "Leakage is that of canary devices whose own update is seen; with masks only the sum over the cohort is seen.",
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
    momentum: float = 0.0,
    masks: str = "none",
) -> list[Setting]:
    """Return every combination; ``statistics`` is shared, home or both.

    ``masks`` judges as a masked sum too: ``none``, the ``plain`` settings without noise, or ``all``.
    """
    sharing = {"shared": (True,), "home": (False,), "both": (True, False)}[statistics]
    return [
        Setting(LocalRecipe(learning_rate, batch, epochs, momentum, shares_statistics=shares), clip, noise, masked)
        for batch, epochs, clip, shares, noise, masked in itertools.product(
            batch_sizes, epoch_counts, clips, sharing, noises, (False, True)
        )
        if not masked or masks == "all" or (masks == "plain" and not noise)
    ]


def make_world(
    data: Dataset,
    architecture: str,
    *,
    clients: int,
    seed: int,
    canaries: int = 4,
    devices: int = 1,
    masks: bool = False,
    device: str = "cpu",
) -> World:
    """Split a data set: 30 % public (canaries among them), 20 % test, the rest private, shared by the clients.

    Args:
        data: labelled images.
        architecture: of the model.
        clients: devices of the federation.
        seed: of split and fresh weights.
        canaries: images of one canary device.
        devices: canary devices that are attacked one by one.
        masks: hold as many canary devices as a masked cohort needs.
        device: a torch device.
    """
    x = np.ascontiguousarray(data.images.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    order = np.random.default_rng(seed).permutation(len(x))
    public, test, private = np.split(order, [int(0.3 * len(x)), int(0.5 * len(x))])
    if len(private) < 2 * clients:
        raise DataError(f"{len(private)} private images are too few for {clients} clients")
    torch.manual_seed(seed)
    model = models.build(architecture, len(data.class_names), x.shape[1], x.shape[2])
    shards = tuple((x[rows], data.labels[rows]) for rows in np.array_split(private, clients))
    cohort = min(clients, MAX_COHORT, max(1, MAX_IMAGES // canaries)) if masks else 1
    held = max(devices, cohort) * canaries
    if len(public) < held + 2:
        raise DataError(f"{len(public)} public images are too few for {held} canaries")
    mine, rest = public[:held], public[held:]
    kept = make_canaries(x[mine], data.labels[mine], x[rest], data.labels[rest], seed=seed)
    digest = hashlib.sha256(x.tobytes() + np.asarray(data.labels, "<i8").tobytes()).hexdigest()
    test_set = x[test], data.labels[test]
    return World(model, shards, test_set, kept, canaries, devices, seed, device, architecture, digest)


def run(
    world: World,
    settings: Sequence[Setting],
    *,
    rounds: int,
    audited: int = 3,
    delta: float = 1e-5,
    max_iip: float = 0.1,
    attack: Attack | None = None,
    earlier: Sequence[dict[str, Any]] = (),
    progress: Callable[[str], None] | None = None,
) -> Tradeoff:
    """Judge every setting and recommend one, see :func:`recommend`.

    Args:
        world: see :func:`make_world`.
        settings: see :func:`settings_grid`.
        rounds: of the federation.
        audited: how many rounds are attacked, from the first to the one after the last.
        delta: of epsilon.
        max_iip: mean IIP that the recommended setting may have.
        attack: budget and options.
        earlier: JSON documents of sweeps over the same federation, whose points are added.
        progress: told about each point.
    """
    federation = world.federation(rounds, delta)
    points: list[Point] = [point for document in earlier for point in _points_of(document, federation)]
    trained: dict[tuple[LocalRecipe, float, float], dict[int, nn.Module]] = {}
    for index, setting in enumerate(settings):
        key = setting.recipe, setting.clip, setting.noise_multiplier
        began = time.perf_counter()
        if key not in trained:  # what is seen of a federation does not change its training
            trained = {key: train_federation(world, setting, rounds, spread(rounds, audited))}
        attacker = attack or Attack(iterations=80, tv_weight=1e-2)
        points.append(_judge(world, setting, trained[key], rounds, delta, attacker, began))
        if progress is not None:
            point = points[-1]
            found = f"accuracy {point.accuracy:.3f}, IIP {point.iip:.2f}, PSNR {point.psnr_db:.1f} dB"
            progress(f"{index + 1}/{len(settings)} {setting.name}: {found}")
    cohort = max([world.cohort, *(int(point.fresh["clients"]) for point in points)])
    best = recommend(points, max_iip)
    clients = len(world.shards)
    return Tradeoff(tuple(points), best, rounds, clients, cohort, delta, max_iip, federation, NOTES)


def _points_of(document: dict[str, Any], federation: dict[str, Any]) -> list[Point]:
    """Read the points of an earlier sweep.

    Raises:
        DataError: it is none, or of another federation, or does not say of which.
    """
    if "points" in document and "federation" not in document:
        raise DataError(
            "the earlier sweep does not say of which data, model, seed and delta it is, and judged means only",
            hint="make it again with this version",
        )
    try:
        points = [_point_of(row) for row in document["points"]]
        told = {name: document["federation"][name] for name in federation}
    except (KeyError, TypeError) as error:
        raise DataError("this is no sweep of privacy-tradeoff --json") from error
    if different := [name for name, value in federation.items() if told[name] != value]:
        name = different[0]
        raise DataError(f"the earlier sweep has other {name}: {told[name]}, not {federation[name]}")
    return points


def _point_of(row: dict[str, Any]) -> Point:
    recipe = LocalRecipe(**{**row["recipe"], "trainable": tuple(row["recipe"]["trainable"])})
    leaks = tuple((leak["round"], {k: v for k, v in leak.items() if k != "round"}) for leak in row["rounds"])
    setting = Setting(recipe, row["clip"], row["noise_multiplier"], row["masked"])
    return Point(setting, row["accuracy"], row["epsilon"], row["single_epsilon"], leaks, row["seconds"])


def spread(rounds: int, audited: int) -> tuple[int, ...]:
    """Return numbers of rounds from 1 to one after the last, evenly spaced."""
    return tuple(sorted({round(n) for n in np.linspace(1, rounds + 1, max(2, audited))}))


def recommend(points: Sequence[Point], max_iip: float) -> Point | None:
    """Return the most accurate setting that is contained in every audited round; at equal accuracy the safer one.

    Where none is contained: the one whose bound is the nearest to the prior, unless the attack succeeds on it; its
    ``gap`` says what is open. A setting that leaks, or with a mean IIP above ``max_iip``, is never recommended.
    """
    allowed = [p for p in points if p.iip <= max_iip and p.verdict != LEAKS]
    contained = [p for p in allowed if p.verdict == CONTAINED]
    if not contained:
        return min(allowed, key=lambda p: (p.bound_gain_db, -p.accuracy), default=None)
    return min(contained, key=lambda p: (-round(p.accuracy, 2), p.setting.recipe.shares_statistics, p.bound_gain_db))


def _judge(
    world: World,
    setting: Setting,
    trained: dict[int, nn.Module],
    rounds: int,
    delta: float,
    attack: Attack,
    began: float,
) -> Point:
    m = len(world.shards)
    leaks = [(number, _leak(world, setting, model, number, attack)) for number, model in sorted(trained.items())]
    return Point(
        setting=setting,
        accuracy=accuracy(trained[rounds + 1], *world.test),
        epsilon=epsilon(setting.noise_multiplier, rounds, delta),
        single_epsilon=epsilon(setting.noise_multiplier / math.sqrt(m), rounds, delta),
        leaks=tuple(leaks),
        seconds=time.perf_counter() - began,
    )


def _leak(world: World, setting: Setting, model: nn.Module, number: int, attack: Attack) -> dict[str, Any]:
    """Attack the canary devices one by one, or the masked cohort at once, and average."""
    m, shares, size = len(world.shards), setting.recipe.shares_statistics, world.per_device
    cohort = world.cohort if setting.masked else 1
    share = setting.noise_multiplier / (cohort if setting.masked else math.sqrt(m))
    records = [
        audit_round(
            model, setting.recipe, world.canaries.take(slice(first, first + cohort * size)), round_number=number,
            protection=ClippedNoise(setting.clip, share, shares), clients=cohort, clip=setting.clip,
            attack=attack, seed=index, device=world.device,
        )[0]
        for index, first in enumerate(range(0, (1 if setting.masked else world.devices) * size, size))
    ]  # fmt: skip
    kept = {key: [record["attack"][key] for record in records] for key in ("psnr_db", "ssim", "iip", "rdlv")}
    kept |= {key: [record[key] for record in records] for key in ("bound_psnr_db", "bound_floor_db")}
    means = {key: _mean([v for v in values if v is not None]) for key, values in kept.items()}
    worst = max(records, key=lambda record: SEVERITY.index(record["verdict"]))
    said = {"verdict": worst["verdict"], "reason": worst["reason"]}
    return {**means, **said, "clients": cohort, "attacks": len(records)}


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def train_federation(world: World, setting: Setting, rounds: int, keep: Sequence[int]) -> dict[int, nn.Module]:
    """Run FedAvg with clipping and noise over all shards; return the models that the rounds of ``keep`` begin with.

    BatchNorm statistics that are kept at home are re-estimated on public images in the last, as an evaluator must.
    """
    kept = {}
    model = copy.deepcopy(world.model)
    rng = np.random.default_rng([world.seed, 7])
    m = len(world.shards)
    protect = ClippedNoise(setting.clip, 0.0, shares_statistics=setting.recipe.shares_statistics)
    for number in range(rounds):
        if number + 1 in keep:
            kept[number + 1] = copy.deepcopy(model)
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
    return {**kept, rounds + 1: model}


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
