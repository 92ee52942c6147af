"""``edgepriv audit update`` and ``edgepriv audit privacy-tradeoff``: what federated updates give away."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.cli.recipe_options import read_update_file, recipe_from, recipe_options
from edgepriv.errors import ConfigError, DataError, RiskThresholdError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgepriv.federated.local_recipe import LocalRecipe
    from edgepriv.risk.gradient_leakage.audit import Canaries, UpdateAudit

PRESET_NAMES = (
    "bn-aware",
    "gradient-only",
    "statistics-only",
    "fixed-bn",
    "inverting-gradients",
    "dlg",
    "idlg",
)


@click.command()
@click.option("--model", "architecture", required=True, help="Architecture, or module:function.")
@click.option("--weights", required=True, type=click.Path(path_type=Path), help="Global weights before the round.")
@click.option("--update", "update_path", required=True, type=click.Path(path_type=Path), help="Update file.")
@click.option("--data", default=None, help="The canary images whose update it is, in the order of training.")
@click.option("--public", default=None, help="Public images of the same kind: prior, pool; without --data bound only.")
@click.option("--images", "n_images", type=click.IntRange(1), default=None, help="Only the first so many of --data.")
@click.option("--attack", "preset", default="bn-aware", show_default=True, type=click.Choice(PRESET_NAMES))
@click.option("--labels", default=None, type=click.Choice(["known", "inferred", "joint"]))
@click.option("--iterations", type=click.IntRange(1), default=None, help="Of each restart.")
@click.option(
    "--tv", type=click.FloatRange(0), default=None, help="Weight of the total variation: 0.1 for photographs."
)
@click.option("--restarts", type=click.IntRange(1), default=1, show_default=True)
@click.option("--noise-sigma", type=click.FloatRange(0), default=0.0, help="Noise in the update, for the bound.")
@click.option("--clip", type=float, default=None, help="L2 norm the update was clipped to.")
@click.option("--clients", type=click.IntRange(1), default=1, show_default=True, help="The update is their mean.")
@click.option("--subspace", type=click.IntRange(0), default=None, help="Bound over so many low frequencies only.")
@click.option(
    "--momentum-state", type=click.Path(path_type=Path), default=None,
    help="Momentum buffers before the round, as an update file, where the recipe carries them.",
)  # fmt: skip
@click.option("--classes", "with_classes", is_flag=True, help="Invert the classes of the model too.")
@click.option("--no-bound", is_flag=True, help="Leave the bound out.")
@click.option("--fail-on", default="never", show_default=True, type=click.Choice(["never", "leaks", "at-risk"]))
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="torch device.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 64))
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--html", is_flag=False, flag_value="audit-update.html", default=None, help="Write a page with pictures.")
def update(
    architecture: str, weights: Path, update_path: Path, *, as_json: bool, html: str | None, **options: Any
) -> None:
    """Measure what one federated update gives away.

    With --data the update is attacked and scored against those canaries. With --public alone nothing is inverted:
    the bound is computed on public images with the same recipe. Exit code 3 where --fail-on is reached.
    """
    from edgepriv.risk import models

    models.prepare(threads=options["threads"])
    sent = read_update_file(update_path)
    recipe = recipe_from(options, sent.meta)
    canaries = _canaries(options, sent.meta)
    model = _model(architecture, weights, canaries, options)
    if options["data"] is None:
        record, audit = _bound_only(model, sent.tensors, recipe, canaries, options), None
    else:
        audit = _audit(model, sent.tensors, recipe, canaries, options)
        record = {**audit.record(), "attack_settings": asdict(_attack(options))}
    record["recipe"] = asdict(recipe)
    record["notes"] = _notes(model, sent.tensors, record)
    if options["with_classes"]:
        record["class_inversion"] = _class_inversion(model, canaries)
    if html:
        _write_html(Path(html), audit, canaries, record)
    click.echo(json.dumps(record, indent=2) if as_json else _as_text(record))
    failing = {"never": (), "leaks": ("leaks",), "at-risk": ("leaks", "at risk")}[options["fail_on"]]
    if record["verdict"] in failing:
        raise RiskThresholdError(f"{update_path}: {record['verdict']}", hint="edgepriv audit privacy-tradeoff")


def _audit(
    model: Any, tensors: dict[str, Any], recipe: LocalRecipe, canaries: Canaries, options: dict[str, Any]
) -> UpdateAudit:
    from edgepriv.risk.gradient_leakage.audit import judge_update

    sigma = None if options["no_bound"] else options["noise_sigma"]
    return judge_update(
        model,
        tensors,
        recipe,
        canaries,
        attack=_attack(options),
        sigmas=sigma,
        clip=options["clip"],
        clients=options["clients"],
        subspace=options["subspace"],
        device=options["device"],
        momentum=_momentum(options),
        progress=_progress(),
    )


def _momentum(options: dict[str, Any]) -> dict[str, Any] | None:
    from edgepriv.risk import models

    if options["momentum_state"] is None:
        return None
    return models.as_tensors(read_update_file(options["momentum_state"]).tensors, options["device"])


def _notes(model: Any, tensors: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """What limits this audit, in words."""
    from edgepriv.risk.gradient_leakage.statistics import momenta

    notes = []
    if not momenta(model):
        notes.append("the model has no BatchNorm layer: gradients alone are matched")
    elif not any(name.endswith(".running_mean") for name in tensors):
        notes.append("the update holds no BatchNorm statistics: gradients alone are matched")
    if record["bound"] is not None and (kept := record["bound"]["subspace"]):
        notes.append(
            f"the bound is over the lowest {kept} x {kept} frequencies of each channel; the attacker is taken to know"
            " the others, so it is a ceiling still and its floor is higher"
        )
    return notes


def _class_inversion(model: Any, canaries: Canaries) -> dict[str, Any]:
    """Show what the model itself gives away, update or not."""
    from edgepriv.risk.gradient_leakage.class_inversion import invert_classes

    classes = int(model.state_dict()["head.weight"].shape[0])
    return invert_classes(model, classes, canaries.public, canaries.public_labels).record()


def _bound_only(
    model: Any, tensors: dict[str, Any], recipe: LocalRecipe, canaries: Canaries, options: dict[str, Any]
) -> dict[str, Any]:
    from edgepriv.risk.gradient_leakage.audit import Limits, judge, with_rounding
    from edgepriv.risk.gradient_leakage.bound import affordable_subspace, bound, jacobian
    from edgepriv.risk.gradient_leakage.inversion import check_update

    check_update(model.state_dict(), tensors)
    chosen = options["subspace"]
    jac = jacobian(
        model, canaries.images, canaries.labels, recipe, canaries.public,
        subspace=affordable_subspace(canaries.images.shape) if chosen is None else chosen,
        clients=options["clients"], momentum=_momentum(options), device=options["device"],
    )  # fmt: skip
    shares = any(name.endswith(".running_mean") for name in tensors)
    sigma = with_rounding(model.state_dict(), tensors, options["noise_sigma"])
    ceiling = bound(jac, sigma, shares_statistics=shares, clip=options["clip"])
    verdict, reason = judge(None, ceiling, Limits())
    record = ceiling.record()
    return {
        "schema": "edgepriv.audit-update/1",
        "attack": None,
        "bound_psnr_db": record["psnr_db"],
        "bound_floor_db": record["floor_db"],
        "bound": record,
        "verdict": verdict,
        "reason": reason,
        "about": "public images trained with the same recipe; nothing is said about the images behind this update",
        "caveat": ceiling.caveat,
    }


def _canaries(options: dict[str, Any], meta: dict[str, Any]) -> Canaries:
    from edgepriv.risk.gradient_leakage.audit import canaries_alone, make_canaries

    if options["data"] is None and options["public"] is None:
        raise ConfigError("nothing to audit against", hint="--data with the canaries, or --public for the bound only")
    if options["data"] is not None:
        images, labels = _pictures(options["data"], limit=options["n_images"])
        if options["public"] is None:
            click.echo("no --public: judged by absolute figures, and nothing can be called contained", err=True)
            return canaries_alone(images, labels)
        return make_canaries(images, labels, *_pictures(options["public"]), seed=options["seed"])
    public, public_labels = _pictures(options["public"])
    stated = meta.get("images")
    n = options["n_images"] or (stated if isinstance(stated, int) and stated > 0 else 1)
    if len(public) < n + 2:
        raise DataError(f"{len(public)} public images are too few for {n} canaries", hint="--images")
    alone = canaries_alone(public[:n], public_labels[:n])
    return replace(alone, public=public[n:], public_labels=public_labels[n:], apart=True)


def _pictures(spec: str, limit: int | None = None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Load float images [n, c, h, w] in 0..1; an .npz keeps the order of its rows."""
    import numpy as np

    from edgepriv import datasets

    parts = [datasets.load(spec, split="train")]
    with contextlib.suppress(DataError):  # fewer than five images have no test part
        parts.append(datasets.load(spec, split="test"))
    images = np.concatenate([part.images for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    order = np.arange(len(images))
    if spec.endswith(".npz"):
        # every fifth row was set apart as test: undo it, because the order of training matters to the attack
        order = np.argsort(np.concatenate([order[order % 5 != 4], order[order % 5 == 4]]))
    chosen = order[:limit]
    x = np.ascontiguousarray(images[chosen].transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    return x, labels[chosen]


def _model(architecture: str, weights: Path, canaries: Canaries, options: dict[str, Any]) -> Any:
    from edgepriv.risk import models

    classes = models.classes_in(weights) or int(max(canaries.public_labels.max(), canaries.labels.max())) + 1
    model = models.build(architecture, classes, canaries.images.shape[1], canaries.images.shape[2])
    return models.load_weights(model, weights).to(options["device"])


def _attack(options: dict[str, Any]) -> Any:
    from edgepriv.risk.gradient_leakage.inversion import PRESETS

    changes = {"restarts": options["restarts"], "seed": options["seed"]}
    for name, field in (("labels", "labels"), ("iterations", "iterations"), ("tv", "tv_weight")):
        if options[name] is not None:
            changes[field] = options[name]
    return replace(PRESETS[options["preset"]], **changes)


def _progress() -> Any:
    if not sys.stderr.isatty():
        return None

    def show(done: int, of: int, loss: float) -> None:
        end = "\n" if done == of else ""
        sys.stderr.write(f"\rattack: {done}/{of}, loss {loss:.3g}   {end}")
        sys.stderr.flush()

    return show


def _write_html(path: Path, audit: UpdateAudit | None, canaries: Canaries, record: dict[str, Any]) -> None:
    from edgepriv.risk.gradient_leakage import page

    if audit is None:
        body = f"<h1>The bound of one update</h1><p>{record['reason']}</p>" + page.record_rows(record["bound"])
        path.write_text(page.document("The bound of one update", body), encoding="utf-8")
    else:
        path.write_text(page.update_html(audit, canaries, "What one federated update gives away"), encoding="utf-8")
    click.echo(f"wrote {path}", err=True)


def _as_text(record: dict[str, Any]) -> str:
    lines = [f"{record['verdict']}: {record['reason']}"]
    if record["attack"] is not None:
        found = record["attack"]
        rdlv = "undefined" if found["rdlv"] is None else f"{found['rdlv']:.2f}"
        lines.append(
            f"attack   PSNR {found['psnr_db']:.1f} dB, SSIM {found['ssim']:.3f}, IIP {found['iip']:.2f} "
            f"of {found['images']} among {found['pool_size']}, RDLV {rdlv}, {found['seconds']:.1f} s"
        )
    if record["bound_psnr_db"] is not None:
        lines.append(f"bound    {record['bound_psnr_db']:.1f} dB; the prior alone {record['bound_floor_db']:.1f} dB")
    if found := record.get("class_inversion"):
        lines.append(
            f"classes  {found['recognised']:.0%} of the inverted classes are recognised, "
            f"SSIM {found['mean_ssim']:.2f} with the class means (the prior: {found['prior_ssim']:.2f})"
        )
    lines += [f"note     {note}" for note in record["notes"]]
    return "\n".join([*lines, record["caveat"]])
