"""What federated updates give away, measured: attack, bound, defences, and breaching on the same updates.

Usage:
    python tests/benchmarks/gradient_leakage.py [--json] [--breaching PYTHON] [--cifar FOLDER] [--clients N] [--quick]

``--breaching`` names the Python of an environment that has breaching installed (it is no dependency of ours):

    python -m venv br && br/bin/pip install torch torchvision && br/bin/pip install --no-deps breaching
    br/bin/pip install hydra-core omegaconf lpips scipy pandas

``--cifar`` adds CIFAR-10 on a ResNet-style BatchNorm network. All other cases: digits, network cnn-bn, three seeds,
known labels, one process, one thread. PSNR is the mean over images, each capped at 100 dB; the bound is that of each
seed's first client. "trained" means five epochs on 898 public digits.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from edgepriv import datasets
from edgepriv.federated.local_recipe import LocalRecipe, head_recipe
from edgepriv.federated.torch_trainer import train_locally
from edgepriv.risk import models
from edgepriv.risk.gradient_leakage import audit, protections
from edgepriv.risk.gradient_leakage.inversion import PRESETS, Attack
from edgepriv.risk.gradient_leakage.measures import score

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 150
OTHERS = ("invertinggradients", "modern")


@dataclass
class Case:
    """One line of the table: a situation, and how many attacks its figures are the mean of."""

    name: str
    architecture: str = "cnn-bn"
    trained: bool = False
    batch: int = 4
    images: int = 4
    recipe: LocalRecipe | None = None
    protection: object = None
    clients: int = 1
    attack: Attack | None = None
    compare: bool = False
    seeds: int = 3
    iterations: int = ITERATIONS

    @property
    def quick_bound(self) -> bool:
        """Many pixels: the bound of one seed only."""
        return self.images > 4


def cases() -> list[Case]:
    """The table's lines."""
    home, noise = protections.WithoutStatistics(), protections.RelativeNoise
    return [
        Case("fresh B=1", batch=1, images=1, compare=True),
        Case("fresh B=4", compare=True),
        Case("fresh B=8", batch=8, images=8, compare=True),
        Case("fresh B=32", batch=32, images=32, seeds=1),
        Case("fresh K=2, 8 images", images=8, compare=True),
        Case("trained B=1", trained=True, batch=1, images=1, compare=True),
        Case("trained B=4", trained=True, compare=True),
        Case("trained K=2, 8 images", trained=True, images=8, compare=True),
        Case("fresh B=1, no BN term", batch=1, images=1, attack=PRESETS["gradient-only"]),
        Case("fresh K=2, no BN term", images=8, attack=PRESETS["gradient-only"]),
        Case("fresh B=1, attacker assumes frozen BN", batch=1, images=1, attack=PRESETS["fixed-bn"]),
        Case("fresh B=4, labels inferred", attack=Attack(labels="inferred")),
        Case("fresh B=4, labels joint", attack=Attack(labels="joint")),
        Case("fresh B=1, statistics at home", batch=1, images=1, protection=home),
        Case("trained B=1, statistics at home", trained=True, batch=1, images=1, protection=home),
        Case("fresh B=4, statistics at home", protection=home),
        Case("fresh, masked sum of 4 x B=4", images=16, clients=4, seeds=1),
        Case("fresh, masked sum of 16 x B=4", images=64, clients=16, seeds=1),
        Case("trained, masked sum of 4 x B=4", trained=True, images=16, clients=4, seeds=1),
        Case("head only, one image", trained=True, batch=1, images=1, recipe=head_recipe(batch_size=1)),
        Case("head only, 8 images", trained=True, batch=8, images=8, recipe=head_recipe()),
        *(Case(f"fresh B=4, relative noise {level:g}", protection=noise(level)) for level in (1.0, 3.0, 10.0)),
        *(
            Case(f"fresh B=4, statistics at home, clip 1, noise {z:g}", protection=protections.ClippedNoise(1.0, z))
            for z in (1e-3, 1e-2, 1e-1)
        ),
    ]


class World:
    """Digits in two halves, networks by seed, and phi for the identification measure."""

    def __init__(self, spec: str, architecture: str, size: int) -> None:
        data = datasets.load(spec, split="train" if spec != "digits" else "all", limit=3000)
        x = np.ascontiguousarray(data.images.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
        half = len(x) // 2
        self.x, self.y, self.public, self.public_labels = x[:half], data.labels[:half], x[half:], data.labels[half:]
        self.architecture, self.size = architecture, size
        self.held = audit.make_canaries(self.x[:1], self.y[:1], self.public, self.public_labels)
        self._models: dict[tuple[int, bool], torch.nn.Module] = {}

    def model(self, seed: int, *, trained: bool) -> torch.nn.Module:
        key = (seed, trained)
        if key not in self._models:
            torch.manual_seed(seed)
            model = models.build(self.architecture, 10, self.x.shape[1], self.x.shape[2])
            if trained:
                recipe = LocalRecipe(0.05, batch_size=16, epochs=5)
                moved = train_locally(model, self.public, self.public_labels, recipe, seed=seed).tensors
                model.load_state_dict({k: v + torch.tensor(moved[k]) for k, v in model.state_dict().items()})
            self._models[key] = model
        return self._models[key]


def run_case(world: World, case: Case, clients: int, breaching: str | None) -> dict:
    """Attack every client of every seed and average."""
    pairs = list(itertools.product(range(case.seeds), range(clients if case.seeds > 1 else 1)))
    rows = [_one(world, case, seed, which) for seed, which in pairs]
    if breaching and case.compare:
        others = _breaching(breaching, world, case, pairs)
        rows = [{**row, **other} for row, other in zip(rows, others, strict=True)]
    return {"name": case.name, "attacks": len(rows), **_mean(rows)}


def _client(world: World, case: Case, seed: int, which: int):
    """Return the model, the canaries of this client, the recipe and the unprotected update."""
    model = world.model(seed, trained=case.trained)
    picks = np.random.default_rng([seed, which]).choice(len(world.x), case.images, replace=False)
    held = replace(world.held, images=world.x[picks], labels=world.y[picks])
    recipe = case.recipe or LocalRecipe(batch_size=case.batch)
    return model, held, recipe, audit.canary_update(model, recipe, held, clients=case.clients)


def _one(world: World, case: Case, seed: int, which: int) -> dict:
    model, held, recipe, update = _client(world, case, seed, which)
    protection = case.protection or protections.NoProtection()
    sent = protection.apply(update, np.random.default_rng([seed, which]))
    attack = replace(case.attack or Attack(), iterations=case.iterations, seed=seed)
    if case.protection is not None and case.attack is None:
        attack = replace(attack, tv_weight=1e-2)
    clip = getattr(protection, "clip", None)
    sigmas = protection.sigmas(update) if which == 0 and (seed == 0 or not case.quick_bound) else None
    found = audit.judge_update(model, sent, recipe, held, attack=attack, clients=case.clients, sigmas=sigmas, clip=clip)
    leak, ceiling = found.leakage, found.ceiling
    kept = ("psnr_db", "mean_mse_psnr_db", "ssim", "iip", "rdlv")
    return {
        **{key: getattr(leak, key) for key in kept},
        "bound_psnr_db": ceiling and ceiling.psnr_db,
        "bound_floor_db": ceiling and ceiling.floor_db,
        "seconds": found.reconstruction.seconds,
        "bound_seconds": ceiling and ceiling.seconds,
    }


def _breaching(python: str, world: World, case: Case, pairs: list[tuple[int, int]]) -> list[dict]:
    """The better of breaching's two attacks without a data prior, in its train-mode branch, for each client."""
    with tempfile.TemporaryDirectory() as folder:
        for seed, which in pairs:
            model, held, recipe, update = _client(world, case, seed, which)
            weights = {f"weight/{n}": p.detach().numpy() for n, p in model.named_parameters()}
            deltas = {f"delta/{n}": v for n, v in update.items() if f"weight/{n}" in weights}
            for attack in OTHERS:
                spec = {
                    "architecture": world.architecture,
                    "shape": list(held.images.shape),
                    "attack": attack,
                    "iterations": case.iterations,
                    "total_variation": case.attack.tv_weight if case.attack else 0.0,
                    "learning_rate": recipe.learning_rate,
                    "steps": recipe.steps(len(held.images)),
                    "batch_size": recipe.batch_size,
                    "seed": seed,
                }
                path = Path(folder) / f"{seed}-{which}-{attack}.case.npz"
                np.savez(path, spec=json.dumps(spec), labels=held.labels, **weights, **deltas)
        worker = Path(__file__).with_name("breaching_worker.py")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [python, str(worker), folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"breaching failed: {done.stderr[-2000:]}")
        return [_better(world, case, Path(folder), seed, which) for seed, which in pairs]


def _better(world: World, case: Case, folder: Path, seed: int, which: int) -> dict:
    _, held, _, _ = _client(world, case, seed, which)
    found = []
    for attack in OTHERS:
        with np.load(folder / f"{seed}-{which}-{attack}.result.npz") as archive:
            images, seconds = archive["images"], float(archive["seconds"])
        leak = score(
            images, held.images.transpose(0, 2, 3, 1), held.public.transpose(0, 2, 3, 1),
            truth_labels=held.labels, pool_labels=held.public_labels, features=held.features,
        )  # fmt: skip
        found.append((leak.psnr_db, leak.iip, seconds))
    best = max(found)
    return {"breaching_psnr_db": best[0], "breaching_iip": best[1], "breaching_seconds": best[2]}


def over_rounds(world: World, rounds=(0, 2, 5, 10, 20)) -> list[dict]:
    """One canary device of four images after so many rounds of plain FedAvg of eight devices."""
    out = []
    torch.manual_seed(0)
    model = models.build(world.architecture, 10, world.x.shape[1], world.x.shape[2])
    shards = np.array_split(np.arange(8, len(world.x)), 8)
    held = replace(world.held, images=world.x[:4], labels=world.y[:4])
    recipe = LocalRecipe(0.05, batch_size=8)
    for number in range(max(rounds) + 1):
        if number in rounds:
            found, _ = audit.audit_round(
                model, LocalRecipe(batch_size=4), held, round_number=number, attack=Attack(iterations=ITERATIONS)
            )
            out.append({"round": number, **{k: found["attack"][k] for k in ("psnr_db", "ssim", "iip")}})
        parts = [train_locally(model, world.x[s], world.y[s], recipe, seed=number).tensors for s in shards]
        state = model.state_dict()
        for name in state:
            mean = np.mean([part[name] for part in parts], axis=0)
            state[name] = state[name] + torch.tensor(mean).to(state[name].dtype)
        model.load_state_dict(state)
    return out


def cifar_cases(folder: str, breaching: str | None) -> list[dict]:
    """ResNet-style BatchNorm networks on CIFAR-10, fresh; bound over the affordable low frequencies."""
    world, out = World(folder, "resnet8-map", 32), []
    smooth = Attack(tv_weight=0.1)
    home = protections.WithoutStatistics()
    one = Case("", batch=1, images=1, attack=smooth, iterations=250)
    for case in (
        replace(one, name="CIFAR-10 resnet8-map B=1", compare=True),
        replace(one, name="CIFAR-10 resnet8-map B=1, no BN term", attack=replace(smooth, bn_weight=0.0)),
        replace(one, name="CIFAR-10 resnet8-map B=1, statistics at home", protection=home),
        replace(one, name="CIFAR-10 resnet8-map B=4", batch=4, images=4, seeds=1),
        replace(one, name="CIFAR-10 resnet8-map, masked sum of 4 x B=1", images=4, clients=4, seeds=1),
    ):
        out.append(run_case(world, case, 1, breaching))
        print(json.dumps(out[-1]), file=sys.stderr, flush=True)
    pooled = replace(one, name="CIFAR-10 resnet8 (global pooling) B=1", attack=replace(smooth, match="l2"))
    out.append(run_case(World(folder, "resnet8", 32), pooled, 1, None))
    print(json.dumps(out[-1]), file=sys.stderr, flush=True)
    return out


def _mean(rows: list[dict]) -> dict:
    found = {}
    for key in rows[0]:
        values = [row[key] for row in rows if row[key] is not None]
        found[key] = float(np.mean(values)) if values else None
    return {"breaching_psnr_db": None, "breaching_seconds": None, **found}


def as_text(document: dict) -> str:
    lines = [f"{'case':52} {'PSNR':>6} {'IIP':>5} {'SSIM':>5} {'bound':>6} {'s':>5} {'breaching':>10} {'s':>5}"]
    for row in document["cases"]:
        other = (
            ""
            if row["breaching_psnr_db"] is None
            else f"{row['breaching_psnr_db']:10.1f} {row['breaching_seconds']:5.1f}"
        )
        lines.append(
            f"{row['name']:52} {row['psnr_db']:6.1f} {row['iip']:5.2f} {row['ssim']:5.2f} "
            f"{row['bound_psnr_db']:6.1f} {row['seconds']:5.1f} {other}"
        )
    lines += [f"round {r['round']:3}: PSNR {r['psnr_db']:5.1f} dB, IIP {r['iip']:.2f}" for r in document["rounds"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--breaching", default=None, help="Python of an environment with breaching")
    parser.add_argument("--cifar", default=None, help="folder with CIFAR-10 binary batches")
    parser.add_argument("--clients", type=int, default=1, help="attacked devices a seed")
    parser.add_argument("--quick", action="store_true", help="the first two lines only")
    parser.add_argument("--only", default="", help="lines whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    world, rows = World("digits", "cnn-bn", 8), []
    chosen = [case for case in cases() if options.only in case.name]
    for case in chosen[: 2 if options.quick else None]:
        rows.append(run_case(world, case, options.clients, options.breaching))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    document = {
        "schema": "edgepriv.bench-gradient-leakage/1",
        "cases": rows,
        "rounds": [] if options.quick or options.only else over_rounds(world),
    }
    if options.cifar:
        document["cases"] += cifar_cases(options.cifar, options.breaching)
    document["seconds"] = time.perf_counter() - began
    print(json.dumps(document, indent=2) if options.json else as_text(document))


if __name__ == "__main__":
    main()
