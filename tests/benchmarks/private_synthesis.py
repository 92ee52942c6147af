#!/usr/bin/env python3
"""Noise against accuracy and leakage, with every control, in one run: digits, MNIST 28x28 and CIFAR-10.

Rows are release cards. Beside them: the same classifier on real data and on public data alone, DP-SGD (opacus) at
about the release's accuracy, public data with other classes than the private ones, and the speed of sampler and
attacks. Rows run in worker processes of one thread each; ``--keep DIR`` keeps the finished ones, so that a cut run
goes on where it stopped. ``--plot DIR`` draws the trade-off. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import pickle
import sys
import tempfile
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from private_synthesis_plot import plot, show

from edgepriv import datasets
from edgepriv.cli import synthesis_study as studies
from edgepriv.risk.membership import attacks
from edgepriv.risk.membership.audit import AuditReport, audit_released_sets, audit_shadows
from edgepriv.risk.membership.classifier import Recipe, accuracy, train_classifier
from edgepriv.risk.membership.scores import draw_masks
from edgepriv.risk.membership.shadows import no_defence, shadow_nearness
from edgepriv.synthesis import accountant, metric_privacy, training
from edgepriv.synthesis.training import DpSgd, noise_multiplier_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgepriv.synthesis.card import ReleaseCard
    from edgepriv.synthesis.vae import Vae

SCHEMA = "edgepriv.bench-synthesis/1"
DATA = Path(os.environ.get("EDGEPRIV_TEST_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))
DP_DELTA, DP_GRID = 1e-4, (8.0, 32.0, 128.0, 512.0)


@dataclass(frozen=True)
class Plan:
    """What is run on one data set: how many images, and which rows."""

    source: str
    images: int
    settings: studies.Settings
    ratios: tuple[float, ...]
    member_rows: bool = False
    dp_sgd_epochs: int = 0
    dp_vae: bool = False
    public_below: int | None = None
    halve: bool = False


@dataclass(frozen=True)
class Row:
    """One row: a release with its settings, or a classifier without one (``kind`` real, public or dp_sgd)."""

    label: str
    settings: studies.Settings
    kind: str = "release"


@dataclass(frozen=True)
class Outcome:
    """What a worker found for one row."""

    label: str
    audit: AuditReport
    accuracies: NDArray[np.float64]
    card: ReleaseCard | None
    seconds: float
    more: dict[str, Any]


SMALL = studies.Settings(recipe=Recipe(epochs=15), audit_records=1000)
SHIFT = replace(SMALL, conditional=False, extra=0)
PLANS = {
    "digits": Plan("digits", 1797, studies.Settings(extra=3), (0.5, 1, 2, 4), True, 60, dp_vae=True),
    "mnist": Plan("mnist", 4500, SMALL, (0.5, 1, 2, 4), True, 20),
    "cifar10": Plan("cifar10", 3600, replace(SMALL, vae_epochs=20), (2, 4, 8), dp_sgd_epochs=20),
    "shifted": Plan("mnist", 4500, SHIFT, (0.5, 1, 2, 4), public_below=5),
}
THIRTEEN = replace(SMALL, targets=13)
ON_REQUEST = {  # what an idle core does in minutes: 2x2 means of MNIST with the MLP VAE, and few colour pictures
    "mnist14": Plan("mnist", 4500, THIRTEEN, (0.5, 1, 2, 4), True, 60, halve=True),
    "shifted14": replace(
        PLANS["shifted"], settings=replace(SHIFT, targets=13), ratios=(0.25, 0.5, 1, 2, 4), halve=True
    ),
    "cifar10-few": Plan("cifar10", 3600, replace(THIRTEEN, audit_records=500, vae_epochs=20, latent_dim=32), (2,)),
}
LARGE = replace(SMALL, recipe=Recipe(epochs=30), audit_records=2000)
FULL = {
    **PLANS,
    "mnist": replace(PLANS["mnist"], images=9000, settings=LARGE),
    "cifar10": Plan("cifar10", 12000, LARGE, (0.5, 1, 2, 4, 8), True, 40),
    "shifted": replace(PLANS["shifted"], images=9000, settings=replace(LARGE, conditional=False, extra=0)),
}


def log(text: str) -> None:
    """One line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@lru_cache(maxsize=2)
def parts_of(plan: Plan) -> studies.Parts:
    """The data set, cut to the plan's number of images and into its parts."""
    where = plan.source if plan.source == "digits" else str(DATA / plan.source)
    found = datasets.load(where, split="all" if plan.source == "digits" else "train", limit=plan.images)
    if plan.halve:
        n, height, width, channels = found.images.shape
        blocks = found.images.reshape(n, height // 2, 2, width // 2, 2, channels)
        found = replace(found, images=blocks.mean(axis=(2, 4)).round().astype(np.uint8))
    parts = studies.take_parts(found, None, 0)
    if plan.public_below is None:
        return parts
    low = parts.public[1] < plan.public_below
    return replace(parts, public=(parts.public[0][low], parts.public[1][low]), name=f"{parts.name}, shifted public")


def rows_of(plan: Plan) -> list[list[Row]]:
    """The rows, those that share what is costly together."""
    base = plan.settings
    bare = replace(base, mode="unsafe_no_noise", extra=0)
    groups = [[Row("real data, no defence", base, "real")], [Row("public data alone", base, "public")]]
    groups += [[Row("public VAE, no noise", bare)]]
    groups += [[Row(f"public VAE, noise ratio {r:g}", replace(base, noise_ratio=float(r)))] for r in plan.ratios]
    if base.conditional:
        groups.append([Row("public VAE, prior samples", studies.prior_settings(base))])
    if plan.dp_vae:
        private = replace(base, vae_from="dp", dp=DpSgd(8.0, DP_DELTA))
        groups.append([Row("DP-SGD VAE (epsilon 8), noise ratio 2", private)])
    if plan.member_rows:
        member = replace(base, vae_from="private")
        rows = [Row("member VAE, no noise", replace(bare, vae_from="private"))]
        rows += [Row("member VAE, noise ratio 2", replace(member, noise_ratio=2.0))]
        groups.append([*rows, Row("member VAE, prior samples", studies.prior_settings(member))])
    return [*groups, [Row("DP-SGD on real data", base, "dp_sgd")]] if plan.dp_sgd_epochs else groups


def run_group(plan: Plan, rows: list[Row], folder: Path) -> list[Outcome]:
    """In a worker: rows that share the VAEs they train."""
    trained: dict[int, Vae] = {}
    return [run_row(plan, row, folder, trained) for row in rows]


def run_row(plan: Plan, row: Row, folder: Path, trained: dict[int, Vae]) -> Outcome:
    """Shadows, audit and card of one row."""
    started, parts, settings = time.process_time(), parts_of(plan), row.settings
    card, more = None, {}
    if row.kind == "release":
        release = public_release(plan, folder)
        if settings.vae_from != "public":
            release = studies.make_release(parts, settings)
        release = replace(release, mechanism=studies.mechanism_of(release.vae, parts, settings))
        scores = studies.shadows_of(parts, settings, studies.pipeline_of(parts, settings, release, trained), row.label)
    else:
        if row.kind == "dp_sgd":
            settings, more = matched_dp_sgd(parts, plan, folder)
        pipeline = studies.public_only(parts, settings) if row.kind == "public" else no_defence
        scores = studies.shadows_of(parts, settings, pipeline, row.label, released=False)
    audit = audit_shadows(scores, np.random.default_rng(3))
    if row.kind == "release":
        louder = studies.suggest_ratio(parts, settings, release, audit) if settings.noise_ratio == 2 else None
        card = studies.fill_card(parts, settings, release, studies.Study(audit, scores.accuracies, None, louder))
    return Outcome(row.label, audit, scores.accuracies, card, round(time.process_time() - started, 1), more)


def public_release(plan: Plan, folder: Path) -> studies.Release:
    """The release by the public VAE, which is trained once and lies in the folder."""
    decides = (plan.source, plan.images, plan.halve, plan.settings, plan.public_below)
    parts, path = parts_of(plan), folder / f"{digest(decides)}.vae"
    if not path.exists():
        made = studies.make_release(parts, plan.settings)
        training.save_vae(path, made.vae)
        return made
    vae = training.load_vae(path)
    return studies.Release(*parts.private, vae, studies.mechanism_of(vae, parts, plan.settings))


def matched_dp_sgd(parts: studies.Parts, plan: Plan, folder: Path) -> tuple[studies.Settings, dict[str, Any]]:
    """The smallest epsilon of a grid whose accuracy reaches that of one default release (else the largest)."""
    rows = np.nonzero(draw_masks(1, plan.settings.audit_records, np.random.default_rng(9))[0][: len(parts.private[0])])
    private = (parts.private[0][rows], parts.private[1][rows])
    plain, release = plan.settings.recipe, public_release(plan, folder)
    made = studies.pipeline_of(parts, plan.settings, release)(*private, 1)
    wanted = accuracy(train_classifier(*made, parts.classes, plain, seed=1), *parts.test)
    base = replace(plain, epochs=plan.dp_sgd_epochs, learning_rate=4e-3)
    rate = min(1.0, base.batch_size / len(private[0]))
    tried = []
    for epsilon in DP_GRID:
        sigma = noise_multiplier_for(DpSgd(epsilon, DP_DELTA), rate, base.epochs * max(1, round(1 / rate)))
        recipe = replace(base, noise_multiplier=sigma)
        reached = accuracy(train_classifier(*private, parts.classes, recipe, seed=1), *parts.test)
        tried.append({"epsilon": epsilon, "accuracy": round(reached, 4)})
        if reached >= wanted:
            break
    more = {"epsilon": epsilon, "delta": DP_DELTA, "matched_to": round(wanted, 4), "tried": tried}
    return replace(plan.settings, recipe=recipe), more


def digest(*what: object) -> str:
    """A name for what decides a result, so that a kept one is never taken for another."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def run_all(plans: dict[str, Plan], folder: Path, workers: int) -> dict[str, dict[str, Outcome]]:
    """Every row of every plan, by name and label; rows that the folder holds are read instead of run."""
    found: dict[str, dict[str, Outcome]] = {name: {} for name in plans}
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # for the workers
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        ready = {pool.submit(public_release, plan, folder): name for name, plan in plans.items()}
        for done in as_completed(ready):
            done.result()
            log(f"{ready[done]}: the public VAE is trained")
        groups = [(name, plan, rows) for name, plan in plans.items() for rows in rows_of(plan)]
        waiting = {}
        for name, plan, rows in groups:
            kept = folder / f"{digest(plan, rows)}.rows"
            if kept.exists():  # written by this program
                found[name].update({row.label: row for row in pickle.loads(kept.read_bytes())})
            else:
                waiting[pool.submit(run_group, plan, rows, folder)] = (name, kept)
        for done in as_completed(waiting):
            name, kept = waiting[done]
            kept.write_bytes(pickle.dumps(done.result()))
            for row in done.result():
                found[name][row.label] = row
                top = row.audit.strongest
                log(f"{name}: {row.label}: {row.accuracies.mean():.3f}, {top.attack} {top.auc:.3f}, {row.seconds} s")
    return found


def cards_of(name: str, plan: Plan, rows: dict[str, Outcome]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Release cards with the loss in points against real data, then the rows that release no pictures."""
    real, prior = rows["real data, no defence"].accuracies, rows.get("public VAE, prior samples")
    controls = studies.Controls(real, rows["public data alone"].accuracies, prior.accuracies if prior else None)
    releases, others = [], []
    for row in [rows[r.label] for group in rows_of(plan) for r in group]:
        if row.card is None:
            found: dict[str, Any] = {"accuracy": round(float(row.accuracies.mean()), 4), "audit": row.audit.as_json()}
        else:
            found = studies.with_controls(row.card, controls).as_json()
        loss = 100 * (real - row.accuracies)
        half = 1.96 * float(loss.std(ddof=1)) / len(loss) ** 0.5
        points = [round(float(v), 2) for v in (loss.mean(), loss.mean() - half, loss.mean() + half)]
        found |= {"data": name, "row": row.label, "loss_points": points, "cpu_seconds": row.seconds, **row.more}
        (releases if row.card else others).append(found)
    return releases, others


def latent(name: str, plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """What latent dimensions, KL weight and noise ratio do to one classifier and to the released-set attacks."""
    parts, found = parts_of(plan), []
    pool = (parts.private[0][:500], parts.private[1][:500])
    masks = draw_masks(16, 500, np.random.default_rng(2))
    swept = [(16, 0.2), (16, 1.0)] if name == "mnist" else [(8, 0.2), (16, 0.2), (32, 0.2)]
    for (dim, beta), ratio in itertools.product(swept, (2.0, 4.0)):
        base = replace(plan.settings, latent_dim=dim, beta=beta)
        release = public_release(replace(plan, settings=base), folder)
        settings = replace(base, noise_ratio=ratio)
        mechanism = studies.mechanism_of(release.vae, parts, settings)
        pipeline = studies.pipeline_of(parts, settings, release)
        near = shadow_nearness(pool, masks, pipeline, seed=1000)
        audit = audit_released_sets(near, masks, np.random.default_rng(3))
        model = train_classifier(*pipeline(*pool, 1), parts.classes, settings.recipe, seed=1)
        row = {"data": name, "latent_dim": dim, "beta": beta, "noise_ratio": ratio}
        row |= {"kappa": round(accountant.kappa(mechanism.clip_radius, mechanism.epsilon), 1)}
        row |= {"accuracy": round(accuracy(model, *parts.test), 4), "attack": audit.strongest.attack}
        found.append({**row, "auc": round(audit.strongest.auc, 4), "null_auc": round(audit.null_auc, 4)})
        log(f"latent: {found[-1]}")
    return found


def throughput(records: int = 100_000, shadows: int = 64) -> dict[str, Any]:
    """Draws a second, and seconds and peak working memory of the attacks on [shadows, records] arrays."""
    rng = np.random.default_rng(0)
    started = time.perf_counter()
    metric_privacy.sample_noise(1_000_000, 16, 2.0, rng)
    found: dict[str, Any] = {"sampler_draws_per_s": round(1_000_000 / (time.perf_counter() - started))}
    scores, masks = rng.standard_normal((shadows, records)), draw_masks(shadows, records, rng)
    target, found["records"], found["shadows"] = rng.standard_normal(records), records, shadows
    for attack in (attacks.lira, attacks.rmia_all, attacks.rmia_out, attacks.calibrated_difference):
        started = time.perf_counter()
        attack(target, scores, masks)
        seconds = time.perf_counter() - started
        tracemalloc.start()
        attack(target, scores, masks)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        found[attack.__name__] = {
            "seconds": round(seconds, 3),
            "peak_mib": round(peak / 2**20, 1),
            "peak_over_scores": round(peak / scores.nbytes, 3),
        }
    return found


def main() -> None:
    """Run what was asked and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--only", choices=[*PLANS, *ON_REQUEST, "latent", "throughput"], action="append", help="run these parts"
    )
    parser.add_argument("--plot", type=Path, help="folder for the plots")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes of one thread")
    parser.add_argument("--keep", type=Path, help="folder that keeps finished rows")
    parser.add_argument("--full", action="store_true", help="more images, records and epochs: hours")
    options = parser.parse_args()
    started = time.perf_counter()
    wanted = options.only or [*PLANS, "latent", "throughput"]
    all_plans = {**(FULL if options.full else PLANS), **ON_REQUEST}
    there = {name: plan for name, plan in all_plans.items() if name == "digits" or (DATA / plan.source).is_dir()}
    plans = {name: plan for name, plan in there.items() if name in wanted}
    result: dict[str, Any] = {"schema": SCHEMA, "rows": [], "controls": []}
    if "throughput" in wanted:
        result["throughput"] = throughput()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = run_all(plans, folder, options.workers) if plans else {}
        torch.set_num_threads(options.workers)
        swept = [name for name in ("mnist", "cifar10") if "latent" in wanted and name in there]
        result["latent"] = [row for name in swept for row in latent(name, there[name], folder)]
    for name, rows in found.items():
        releases, others = cards_of(name, plans[name], rows)
        result["rows"] += releases
        result["controls"] += others
    result["wall_seconds"] = round(time.perf_counter() - started, 1)
    result["cpu_seconds"] = round(sum(row["cpu_seconds"] for row in [*result["rows"], *result["controls"]]), 1)
    if options.plot and result["rows"]:
        plot(result, options.plot)
    print(json.dumps(result)) if options.json else show(result)


if __name__ == "__main__":
    main()
