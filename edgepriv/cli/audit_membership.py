"""``edgepriv audit membership``: who was in the training set of a model, or behind a released set."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgepriv.risk.membership.audit import AuditReport, TargetView

SCHEMA = "edgepriv.audit-membership/1"


@dataclass(frozen=True, slots=True)
class Records:
    """Members, then non-members, then a part of the non-members that the attacker is allowed to know as such."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    members: NDArray[np.bool_]
    known: tuple[NDArray[np.uint8], NDArray[np.int64]]


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="The classifier, as ONNX.")
@click.option("--release", type=click.Path(path_type=Path), help="A directory that edgepriv synthesize wrote.")
@click.option("--members", required=True, help="Records that were trained on: a folder, IDX or CIFAR files, .npz.")
@click.option("--non-members", required=True, help="Records of the same kind that were not.")
@click.option("--shadow-scores", type=click.Path(path_type=Path), help="With --model: .npz with masks, margins, ...")
@click.option(
    "--arch", help="With --model: train shadows of this architecture ('auto', 'cnn', 'mlp', module:function)."
)
@click.option(
    "--shadows", type=click.IntRange(min=1), default=16, show_default=True, help="How many shadows are trained."
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="Epochs of a shadow: those of the model.",
)
@click.option(
    "--fpr", type=click.Choice(["0.01", "0.001"]), default="0.01", show_default=True, help="Where TPR is read."
)
@click.option(
    "--max-auc", type=click.FloatRange(0, 1), default=0.60, show_default=True, help="Above it the exit code is 3."
)
@click.option("--max-tpr", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="TPR above it, likewise.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first records of each set.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def membership(
    model: Path | None, release: Path | None, members: str, non_members: str, limit: int | None, **options: Any
) -> None:
    """Attack a model or a released set and report the strongest attack.

    With neither shadow scores nor an architecture only the weak attacks run, and the verdict says so. A release is
    attacked with shadow releases where its VAE lies beside it. The exit code is 3 when an attack passes a threshold.
    """
    from edgepriv.errors import ConfigError, RiskThresholdError

    if (model is None) == (release is None):
        raise ConfigError("give either --model or --release", hint="--model M.onnx, or --release DIR")
    if options["shadow_scores"] and options["arch"]:
        raise ConfigError("give either --shadow-scores or --arch", hint="one names shadows, the other trains them")
    if release is not None and (options["shadow_scores"] or options["arch"]):
        raise ConfigError("--shadow-scores and --arch belong to --model; a release makes its own shadows")
    records = _records(members, non_members, limit, float(options["fpr"]), hold_out=model is not None)
    view = _model_view(model, records, options) if model else _release_view(release or Path(), records, options)
    found = _report(view, records, options)
    document = _document(found, str(model or release), options)
    click.echo(json.dumps(document) if options["as_json"] else _table(document))
    if document["above_threshold"]:
        raise RiskThresholdError(document["verdict"], hint="see edgepriv/risk/membership/README.md for what helps")


def _records(members: str, non_members: str, limit: int | None, rate: float, *, hold_out: bool) -> Records:
    import numpy as np

    from edgepriv import datasets
    from edgepriv.errors import DataError

    # in the order in which they lie: a file of shadow scores counts its records so
    inside = datasets.load(members, split="whole", limit=limit)
    outside = datasets.load(non_members, split="whole", limit=limit)
    if inside.images.shape[1:] != outside.images.shape[1:]:
        raise DataError(f"members are {inside.images.shape[1:]}, non-members {outside.images.shape[1:]}")
    shared = {image.tobytes() for image in inside.images} & {image.tobytes() for image in outside.images}
    if shared:
        raise DataError(
            f"{len(shared)} pictures are both among the members and among the non-members",
            hint="remove them from one side: they would make every figure meaningless",
        )
    known = np.arange(len(outside)) % 3 == 2 if hold_out else np.zeros(len(outside), np.bool_)  # of every class
    tested = int((~known).sum())
    if tested * rate < 1 or (rate < 0.01 and tested < 5000):
        needed = 100 if rate >= 0.01 else 5000
        raise DataError(
            f"{tested} non-members are too few to read a false-positive rate of {rate:g}",
            hint=f"give at least {needed + (needed // 2 if hold_out else 0)}, or ask for --fpr 0.01",
        )
    return Records(
        np.concatenate([inside.images, outside.images[~known]]),
        np.concatenate([inside.labels, outside.labels[~known]]),
        np.arange(len(inside) + tested) < len(inside),
        (outside.images[known], outside.labels[known]),
    )


def _model_view(path: Path, records: Records, options: dict[str, Any]) -> TargetView:
    import numpy as np

    from edgepriv.errors import DataError
    from edgepriv.risk.membership import attacks, scores, shadows
    from edgepriv.risk.membership.audit import TargetView
    from edgepriv.risk.membership.onnx_model import OnnxClassifier

    target = OnnxClassifier(path, threads=options["threads"])
    own = target.logits(records.images)
    if records.labels.max() >= own.shape[1]:
        raise DataError(f"{path} knows {own.shape[1]} classes, the records have label {records.labels.max()}")
    votes = attacks.agreement(target.labels, records.images, records.labels, np.random.default_rng(0), copies=6)
    features, known_features = shadows.features_of(records.images, records.labels, *records.known)
    return TargetView(
        margins=scores.margin(own, records.labels),
        log_probabilities=scores.log_probability(own, records.labels),
        agreements=votes,
        features=features,
        reference_features=known_features,
        reference_margins=scores.margin(target.logits(records.known[0]), records.known[1]),
        **_shadow_arrays(records, options),
    )


def _shadow_arrays(records: Records, options: dict[str, Any]) -> dict[str, NDArray[Any]]:
    if options["shadow_scores"]:
        from edgepriv.risk.membership.shadow_file import read_shadow_scores

        found = read_shadow_scores(options["shadow_scores"], len(records.members))
        _check_shadows(len(found["shadow_masks"]), options)
        return found
    return _trained_shadows(records, options) if options["arch"] else {}


def _trained_shadows(records: Records, options: dict[str, Any]) -> dict[str, NDArray[Any]]:
    import numpy as np

    from edgepriv.risk.membership import scores, shadows
    from edgepriv.risk.membership.classifier import Recipe, use_threads

    _check_shadows(options["shadows"], options)
    use_threads(options["threads"])
    rng = np.random.default_rng(options["seed"])
    masks = scores.draw_masks(options["shadows"], len(records.members), rng, rate=float(records.members.mean()))
    made = shadows.run_shadows(
        (records.images, records.labels),
        records.known,
        masks,
        shadows.no_defence,
        Recipe(arch=options["arch"], epochs=options["epochs"]),
        seed=options["seed"] + 1,
        released=False,
        progress=_progress,
    )
    return {
        "shadow_masks": masks,
        "shadow_margins": made.margins,
        "shadow_log_probabilities": made.log_probabilities,
        "shadow_agreements": made.agreements,
    }


def _release_view(release: Path, records: Records, options: dict[str, Any]) -> TargetView:
    import numpy as np

    from edgepriv import datasets
    from edgepriv.risk.membership import released_set, scores
    from edgepriv.risk.membership.audit import TargetView
    from edgepriv.synthesis.release import shadow_releases

    published = datasets.load(release, split="all")
    near = released_set.nearness(records.images, records.labels, published.images, published.labels)
    rng = np.random.default_rng(options["seed"])
    masks = scores.draw_masks(options["shadows"], len(records.members), rng, rate=float(records.members.mean()))
    made = shadow_releases(release, records.images, records.labels, masks, options["seed"])
    if made is None:
        return TargetView(nearness=near)
    _check_shadows(len(masks), options)
    shadow_near = []
    for done, (images, labels) in enumerate(made):
        shadow_near.append(released_set.nearness(records.images, records.labels, images, labels))
        _progress(done + 1, len(masks))
    return TargetView(nearness=near, shadow_masks=masks, shadow_nearness=np.stack(shadow_near))


def _report(view: TargetView, records: Records, options: dict[str, Any]) -> AuditReport:
    import numpy as np

    from edgepriv.risk.membership import audit

    found = audit.attack_target(view)
    return audit.report(
        [found], [records.members], np.random.default_rng(options["seed"]), shadow_masks=view.shadow_masks
    )


def _check_shadows(count: int, options: dict[str, Any]) -> None:
    from edgepriv.risk.membership.scores import check_shadow_count

    check_shadow_count(count, float(options["fpr"]))


def _document(found: AuditReport, what: str, options: dict[str, Any]) -> dict[str, Any]:
    rate = float(options["fpr"])
    limits = (options["max_auc"], options["max_tpr"])
    return {
        "schema": SCHEMA,
        "audited": what,
        "verdict": found.verdict(*limits, rate=rate),
        "above_threshold": found.exceeds(*limits, rate=rate),
        "max_auc": limits[0],
        "max_tpr": limits[1],
        "fpr": rate,
        **found.as_json(),
    }


def _table(document: dict[str, Any]) -> str:
    lines = [f"{'attack':24} {'surface':11} {'AUC':>6}  95 % interval   TPR at 1 % FPR"]
    for row in document["attacks"]:
        low, high = row["auc_interval"]
        share = "-" if row["tpr_at_1pct"] is None else f"{100 * row['tpr_at_1pct']:.1f} %"
        lines.append(f"{row['attack']:24} {row['surface']:11} {row['auc']:6.3f}  {low:.3f} to {high:.3f}  {share:>8}")
    lines += [f"null (permuted membership): {document['null_auc']:.3f}", *document["warnings"], document["verdict"]]
    return "\n".join(lines)


def _progress(done: int, total: int) -> None:
    import sys

    if sys.stderr.isatty():
        click.echo(f"\rshadows: {done}/{total}  ", err=True, nl=done == total)
    elif done == total:
        click.echo(f"shadows: {total} done", err=True)
