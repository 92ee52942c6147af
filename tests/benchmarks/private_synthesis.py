#!/usr/bin/env python3
"""Noise against accuracy and leakage, with every control, in one run: digits, MNIST (2x2 means) and CIFAR-10.

Rows are release cards. Beside them: the same classifier on real data and on public data alone, DP-SGD (opacus) at
about the release's accuracy, public data with other classes than the private ones, and the speed of sampler and
attacks. ``--plot DIR`` draws the trade-off. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgepriv import datasets
from edgepriv.cli import synthesis_study as studies
from edgepriv.risk.membership import attacks
from edgepriv.risk.membership.audit import audit_shadows
from edgepriv.risk.membership.classifier import Recipe, accuracy, train_classifier
from edgepriv.risk.membership.scores import draw_masks
from edgepriv.risk.membership.shadows import ShadowScores, no_defence
from edgepriv.synthesis import metric_privacy
from edgepriv.synthesis.training import DpSgd, noise_multiplier_for

SCHEMA = "edgepriv.bench-synthesis/1"
DATA = Path(os.environ.get("EDGEPRIV_TEST_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))


@dataclass(frozen=True)
class Plan:
    """What is run on one data set: how many images, whether 2x2 means of their pixels, and which rows."""

    images: int
    settings: studies.Settings
    ratios: tuple[float, ...]
    halve: bool = False
    member_rows: bool = False
    dp_sgd: bool = False


SMALL = studies.Settings(targets=13, recipe=Recipe(epochs=15), audit_records=1000)
PLANS = {
    "digits": Plan(1797, studies.Settings(extra=3), (0.5, 1.0, 2.0, 4.0), member_rows=True, dp_sgd=True),
    "mnist": Plan(4500, SMALL, (0.5, 1.0, 2.0, 4.0), halve=True, member_rows=True, dp_sgd=True),
    "cifar10": Plan(3600, replace(SMALL, audit_records=500, vae_epochs=20), (2.0,)),
}
FULL = {
    **PLANS,
    "mnist": Plan(
        9000, replace(SMALL, targets=16, audit_records=2000), (0.5, 1.0, 2.0, 4.0), member_rows=True, dp_sgd=True
    ),
    "cifar10": Plan(12000, replace(SMALL, targets=16, audit_records=2000), (0.5, 1.0, 2.0, 4.0), member_rows=True),
}


def log(text: str) -> None:
    """One line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def load(name: str, plan: Plan) -> datasets.Dataset:
    """The data set, cut to the plan's number of images."""
    if name == "digits":
        return datasets.load("digits", split="all")
    data = datasets.load(DATA / name, limit=plan.images)
    if not plan.halve:
        return data
    n, height, width, channels = data.images.shape
    blocks = data.images.reshape(n, height // 2, 2, width // 2, 2, channels)
    return replace(data, name=f"{name} 14x14", images=blocks.mean(axis=(2, 4)).round().astype(np.uint8))


def table(name: str, plan: Plan) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All rows of one data set: release cards, then the controls that are not releases."""
    parts, base = studies.take_parts(load(name, plan), None, 0), plan.settings
    release = studies.make_release(parts, base)
    log(f"{name}: the public VAE is trained")
    real = studies.shadows_of(parts, base, no_defence, "real", released=False)
    public = studies.shadows_of(parts, base, studies.public_only(parts, base), "public", released=False)
    others = [reference(parts, "real data, no defence", real), reference(parts, "public data alone", public)]
    priors = studies.prior_settings(base)
    prior = studies.shadows_of(parts, priors, studies.pipeline_of(parts, priors, release), "prior")
    controls = studies.Controls(real.accuracies, public.accuracies, prior.accuracies)
    rows = []
    for label, settings in variants(base, plan):
        known = prior if settings == priors else None
        rows.append(row(parts, label, settings, release, controls, known))
    if plan.dp_sgd:
        others.append(dp_sgd_row(parts, base, rows))
    return rows, others


def row(
    parts: studies.Parts,
    label: str,
    settings: studies.Settings,
    release: studies.Release,
    controls: studies.Controls,
    known: ShadowScores | None,
) -> dict[str, Any]:
    """One release card, with the loss in points against real data and its interval over the targets."""
    started = time.perf_counter()
    made = release if settings.vae_from == "public" else studies.make_release(parts, settings)
    made = replace(made, mechanism=studies.mechanism_of(made.vae, parts, settings))
    scores = known or studies.shadows_of(parts, settings, studies.pipeline_of(parts, settings, made), label)
    audit = audit_shadows(scores, np.random.default_rng(3))
    found = studies.Study(audit, scores.accuracies, controls)
    card = studies.fill_card(parts, settings, made, found).as_json()
    loss = 100 * (controls.real - scores.accuracies)
    half = 1.96 * float(loss.std(ddof=1)) / len(loss) ** 0.5
    card["row"] = label
    card["loss_points"] = [round(float(v), 2) for v in (loss.mean(), loss.mean() - half, loss.mean() + half)]
    card["seconds"] = round(time.perf_counter() - started, 1)
    log(f"{parts.name}: {label}: loss {loss.mean():.1f}, {audit.strongest.attack} {audit.strongest.auc:.3f}")
    return card


def variants(base: studies.Settings, plan: Plan) -> list[tuple[str, studies.Settings]]:
    """Names and settings of the rows."""
    bare = replace(base, mode="unsafe_no_noise", extra=0)
    found = [("public VAE, no noise", bare)]
    found += [(f"public VAE, noise ratio {r:g}", replace(base, noise_ratio=r)) for r in plan.ratios]
    found += [("public VAE, prior samples", studies.prior_settings(base))]
    if base.extra == 3:  # digits: small enough to train sixteen VAEs by DP-SGD
        private = replace(base, vae_from="dp", dp=DpSgd(8.0, 1e-4))
        found += [("DP-SGD VAE (epsilon 8), noise ratio 2", private)]
    if plan.member_rows:
        member = replace(base, vae_from="private")
        found += [
            ("member VAE, no noise", replace(bare, vae_from="private")),
            ("member VAE, noise ratio 2", replace(member, noise_ratio=2.0)),
            ("member VAE, prior samples", studies.prior_settings(member)),
        ]
    return found


def reference(parts: studies.Parts, label: str, scores: ShadowScores) -> dict[str, Any]:
    """One row that releases a classifier and no pictures."""
    audit = audit_shadows(scores, np.random.default_rng(0)).as_json()
    log(f"{parts.name}: {label}: accuracy {scores.accuracies.mean():.3f}, {audit['strongest']} {audit['auc']:.3f}")
    return {"data": parts.name, "row": label, "accuracy": round(float(scores.accuracies.mean()), 4), "audit": audit}


def dp_sgd_row(parts: studies.Parts, base: studies.Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """DP-SGD on the real records, at the accuracy of the default release where an epsilon reaches it."""
    wanted = next(r["accuracy_synthetic"] for r in rows if r["row"] == "public VAE, noise ratio 2")
    epsilon, recipe = matched_dp_sgd(parts, base, wanted)
    scores = studies.shadows_of(parts, replace(base, recipe=recipe), no_defence, "DP-SGD", released=False)
    found = reference(parts, "DP-SGD on real data", scores)
    return {**found, "epsilon": epsilon, "delta": 1e-4, "matched_to": wanted}


def matched_dp_sgd(parts: studies.Parts, settings: studies.Settings, wanted: float) -> tuple[float, Recipe]:
    """The smallest epsilon of a grid whose accuracy reaches the release's (else the largest tried)."""
    mask = draw_masks(1, settings.audit_records, np.random.default_rng(9))[0]
    rows = np.nonzero(mask[: len(parts.private[0])])[0]
    base = replace(settings.recipe, epochs=60, learning_rate=4e-3)
    rate = min(1.0, base.batch_size / len(rows))
    steps = base.epochs * max(1, round(1 / rate))
    for epsilon in (2.0, 8.0, 32.0, 128.0, 512.0):
        sigma = noise_multiplier_for(DpSgd(epsilon, 1e-4), rate, steps)
        recipe = replace(base, noise_multiplier=sigma)
        model = train_classifier(parts.private[0][rows], parts.private[1][rows], parts.classes, recipe, seed=1)
        reached = accuracy(model, *parts.test)
        log(f"DP-SGD epsilon {epsilon:g} (noise {sigma:.2f}): accuracy {reached:.3f}, wanted {wanted:.3f}")
        if reached >= wanted:
            break
    return epsilon, recipe


def shifted(plan: Plan) -> dict[str, Any]:
    """Public images of classes 0-4 only, private of 0-9, a VAE without labels: does the release gain anything?"""
    parts = studies.take_parts(load("mnist", plan), None, 0)
    low = parts.public[1] < 5
    parts = replace(parts, public=(parts.public[0][low], parts.public[1][low]), note="public: classes 0-4 only")
    base = replace(plan.settings, conditional=False, extra=0)
    release = studies.make_release(parts, base)
    controls = studies.run_controls(parts, base, release)
    rows = []
    for ratio in (0.25, 0.5, 1.0, 2.0, 4.0):
        settings = replace(base, noise_ratio=ratio)
        found = studies.study(parts, settings, release, controls=controls)
        top = found.audit.strongest
        rows.append(
            {
                "noise_ratio": ratio,
                "accuracy": round(float(found.synthetic.mean()), 4),
                "strongest": top.attack,
                "auc": round(top.auc, 4),
                "tpr_at_1pct": top.tpr_at_1pct,
            }
        )
        log(f"shifted: ratio {ratio:g}: accuracy {rows[-1]['accuracy']:.3f}, {top.attack} {top.auc:.3f}")
    return {
        "accuracy_real": round(float(controls.real.mean()), 4),
        "accuracy_public_only": round(float(controls.public_only.mean()), 4),
        "rows": rows,
    }


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


def plot(result: dict[str, Any], folder: Path) -> None:
    """Accuracy against the strongest attack's AUC, one picture a data set."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted({row["data"] for row in result["rows"]}):
        figure, axes = plt.subplots(figsize=(10, 5))
        releases = [(r["row"], r["accuracy_synthetic"], r["audit"]) for r in result["rows"] if r["data"] == name]
        others = [(c["row"], c["accuracy"], c["audit"]) for c in result["controls"] if c["data"] == name]
        for number, (label, y, audit) in enumerate([*releases, *others], 1):
            marker = "o" if number <= len(releases) else "s"
            axes.scatter([audit["auc"]], [y], marker=marker, label=f"{number} {label}")
            axes.annotate(str(number), (audit["auc"], y), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.axvline(0.5, color="grey", linewidth=0.8)
        axes.set(xlabel="AUC of the strongest attack", ylabel="accuracy on unseen real images", title=name)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
        figure.tight_layout()
        figure.savefig(folder / f"private-synthesis-{name}.png", dpi=120)
        plt.close(figure)


def show(result: dict[str, Any]) -> None:
    """The tables as Markdown."""
    print("| data | row | accuracy | loss, points | strongest attack | AUC | TPR at 1 % FPR | null |")
    print("|---|---|---|---|---|---|---|---|")
    for row in [*result["rows"], *result["controls"]]:
        audit, losses = row["audit"], row.get("loss_points")
        loss = f"{losses[0]:.1f} ({losses[1]:.1f} to {losses[2]:.1f})" if losses else "-"
        label = row["row"] + (f", epsilon {row['epsilon']:g}" if "matched_to" in row else "")
        value = row.get("accuracy_synthetic", row.get("accuracy"))
        print(
            f"| {row['data']} | {label} | {value:.3f} | {loss} | {audit['strongest']} | {audit['auc']:.3f} "
            f"| {100 * (audit['tpr_at_1pct'] or 0):.1f} % | {audit['null_auc']:.3f} |"
        )
    for key in ("shifted_public", "throughput"):
        if key in result:
            print(f"\n{key}: {json.dumps(result[key])}")


def main() -> None:
    """Run what was asked and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--only", choices=[*PLANS, "shifted", "throughput"], help="run one part")
    parser.add_argument("--plot", type=Path, help="folder for the plots")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="28x28 MNIST, more images and targets: hours")
    options = parser.parse_args()
    plans = FULL if options.full else PLANS
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"schema": SCHEMA, "rows": [], "controls": []}
    for name, plan in plans.items():
        if options.only not in {None, name} or (name != "digits" and not (DATA / name).is_dir()):
            continue
        rows, controls = table(name, plan)
        result["rows"] += rows
        result["controls"] += controls
    if options.only in {None, "shifted"} and (DATA / "mnist").is_dir():
        result["shifted_public"] = shifted(plans["mnist"])
    if options.only in {None, "throughput"}:
        result["throughput"] = throughput()
    if options.plot and result["rows"]:
        plot(result, options.plot)
    print(json.dumps(result)) if options.json else show(result)


if __name__ == "__main__":
    main()
