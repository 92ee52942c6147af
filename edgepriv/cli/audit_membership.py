"""``edgepriv audit membership``: who was in the training set of a model, or behind a released set."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgepriv.cli.audited_records import Records
    from edgepriv.risk.membership.audit import AuditReport, Limits, TargetView

SCHEMA = "edgepriv.audit-membership/1"
NEAR_CHANCE = 0.15  # share of the way from chance to always right: below it a model was asked wrongly
SAME_SIZE = 0.1  # shadow releases may differ from the release by this share of its records


@dataclass(frozen=True, slots=True)
class Held:
    """What the attacker holds, the model's accuracy on members and non-members, and why the result may be weak."""

    view: TargetView
    accuracy: tuple[float, float] | None = None
    weak_because: tuple[str, ...] = ()


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
    attacked with shadow releases where its VAE lies beside it. The exit code is 3 when an attack passes a threshold, or
    when a null is off, so that the audit is void.
    """
    from edgepriv.cli.audited_records import load_records
    from edgepriv.errors import ConfigError, RiskThresholdError
    from edgepriv.synthesis.release import read_card

    if (model is None) == (release is None):
        raise ConfigError("give either --model or --release", hint="--model M.onnx, or --release DIR")
    if options["shadow_scores"] and options["arch"]:
        raise ConfigError("give either --shadow-scores or --arch", hint="one names shadows, the other trains them")
    if release is not None and (options["shadow_scores"] or options["arch"]):
        raise ConfigError("--shadow-scores and --arch belong to --model; a release makes its own shadows")
    rate = float(options["fpr"])
    if model:
        records = load_records(members, non_members, limit, rate, hold_out=True)
        held = _held_of_model(model, records, options)
    else:
        card = read_card(release or Path())
        records = load_records(
            members, non_members, limit, rate, hold_out=False, names=[str(n) for n in card.get("class_names") or ()]
        )
        held = _held_of_release(release or Path(), card, records, options)
    document = _document(_report(held, records, options), held, str(model or release), options)
    click.echo(json.dumps(document) if options["as_json"] else _table(document))
    if document["outcome"] in {"leak", "void"}:
        raise RiskThresholdError(document["verdict"], hint="see edgepriv/risk/membership/README.md for what helps")


def _held_of_model(path: Path, records: Records, options: dict[str, Any]) -> Held:
    from edgepriv.errors import DataError
    from edgepriv.risk.membership import attacks, scores, shadows
    from edgepriv.risk.membership.audit import TargetView
    from edgepriv.risk.membership.onnx_model import OnnxClassifier

    target = OnnxClassifier(path, threads=options["threads"])
    own = target.logits(records.images)
    if records.labels.max() >= own.shape[1]:
        raise DataError(f"{path} knows {own.shape[1]} classes, the records have label {records.labels.max()}")
    right = own.argmax(axis=1) == records.labels
    accuracy = (float(right[records.members].mean()), float(right[~records.members].mean()))
    features, known_features = shadows.features_of(records.images, records.labels, *records.known)
    view = TargetView(
        margins=scores.margin(own, records.labels),
        log_probabilities=scores.log_probability(own, records.labels),
        agreements=attacks.agreement(target.labels, records.images, records.labels),
        features=features,
        reference_features=known_features,
        reference_margins=scores.margin(target.logits(records.known[0]), records.known[1]),
        **_shadow_arrays(records, options),
    )
    return Held(view, accuracy, _asked_wrongly(accuracy[0], own.shape[1], int(records.members.sum())))


def _asked_wrongly(accuracy: float, classes: int, members: int) -> tuple[str, ...]:
    chance = 1.0 / classes
    if accuracy >= chance + max(NEAR_CHANCE * (1 - chance), 3 * (chance * (1 - chance) / members) ** 0.5):
        return ()
    return (
        (
            f"the model is right on {accuracy:.1%} of its own members, about chance for {classes} classes: it may "
            "want other pixel values than 0 to 1, or count the classes otherwise"
        ),
    )


def _shadow_arrays(records: Records, options: dict[str, Any]) -> dict[str, NDArray[Any]]:
    if options["shadow_scores"]:
        from edgepriv.risk.membership.shadow_file import read_shadow_scores

        found = read_shadow_scores(options["shadow_scores"], len(records.members))
        _check_shadows(len(found["shadow_masks"]), float(found["shadow_masks"].mean()), options)
        return found
    return _trained_shadows(records, options) if options["arch"] else {}


def _trained_shadows(records: Records, options: dict[str, Any]) -> dict[str, NDArray[Any]]:
    import numpy as np

    from edgepriv.risk.membership import scores, shadows
    from edgepriv.risk.membership.classifier import Recipe, use_threads

    rate = float(records.members.mean())
    _check_shadows(options["shadows"], rate, options)
    use_threads(options["threads"])
    rng = np.random.default_rng(options["seed"])
    masks = scores.draw_masks(options["shadows"], len(records.members), rng, rate=rate)
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


def _held_of_release(release: Path, card: dict[str, Any], records: Records, options: dict[str, Any]) -> Held:
    import numpy as np

    from edgepriv import datasets
    from edgepriv.risk.membership import released_set, scores
    from edgepriv.risk.membership.audit import TargetView
    from edgepriv.synthesis.release import shadow_releases

    published = datasets.load(release, split="all")
    randomised = card.get("labels") != "exact"  # a record's own picture may then stand in another class

    def near(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        found = [released_set.nearness(records.images, records.labels, images, labels)]
        return [*found, released_set.nearness_any(records.images, images)] if randomised else found

    own, rate = near(published.images, published.labels), float(records.members.mean())
    view = TargetView(nearness=own[0], nearness_any=own[1] if randomised else None)
    rng = np.random.default_rng(options["seed"])
    masks = scores.draw_masks(options["shadows"], len(records.members), rng, rate=rate)
    made = shadow_releases(release, records.images, records.labels, masks, options["seed"])
    if made is None:
        return Held(view)
    _check_shadows(len(masks), rate, options)
    rows = []
    for done, (images, labels) in enumerate(made):
        rows.append(near(images, labels))
        _progress(done + 1, len(masks))
    shadows = [np.stack(surface) for surface in zip(*rows, strict=True)]
    view = replace(
        view,
        shadow_masks=masks,
        shadow_nearness=shadows[0],
        shadow_nearness_any=shadows[1] if randomised else None,
    )
    return Held(view, weak_because=_other_than_shadows(card, records))


def _other_than_shadows(card: dict[str, Any], records: Records) -> tuple[str, ...]:
    """In what the release differs from the shadow releases that calibrate its attack."""
    given, found = int(records.members.sum()), []
    held = card.get("records")
    if isinstance(held, int) and abs(given - held) > SAME_SIZE * held:
        found.append(
            f"{given} members were given and the release was made from {held} records: shadow releases of another size "
            "calibrate the attacks badly, so give all of them, and none that was held out as public or test"
        )
    if card.get("vae_trained_on") == "dp":
        found.append(
            "the shadow releases reuse the VAE that the members trained, so what its weights give away is not judged"
        )
    return tuple(found)


def _report(held: Held, records: Records, options: dict[str, Any]) -> AuditReport:
    import numpy as np

    from edgepriv.risk.membership import audit

    masks = held.view.shadow_masks
    found = audit.report(
        [audit.attack_target(held.view)],
        [records.members],
        np.random.default_rng(options["seed"]),
        shadow_masks=() if masks is None else [masks],
        rate=float(options["fpr"]),
        fair_coins=False,  # the user chose who is a member
    )
    more = list(held.weak_because)
    return replace(found, weak_because=[*found.weak_because, *more], warnings=[*found.warnings, *more])


def _check_shadows(count: int, rate: float, options: dict[str, Any]) -> None:
    from edgepriv.risk.membership.scores import check_shadow_count

    check_shadow_count(count, float(options["fpr"]), rate)


def _document(found: AuditReport, held: Held, what: str, options: dict[str, Any]) -> dict[str, Any]:
    limits = _limits(options)
    return {
        "schema": SCHEMA,
        "audited": what,
        "outcome": found.outcome(limits),
        "verdict": found.verdict(limits),
        "above_threshold": found.exceeds(limits),
        "max_auc": limits.auc,
        "max_tpr": limits.tpr,
        "fpr": limits.rate,
        "accuracy_members": held.accuracy and round(held.accuracy[0], 4),
        "accuracy_non_members": held.accuracy and round(held.accuracy[1], 4),
        **found.as_json(),
    }


def _limits(options: dict[str, Any]) -> Limits:
    from edgepriv.risk.membership.audit import Limits

    return Limits(options["max_auc"], options["max_tpr"], float(options["fpr"]))


def _table(document: dict[str, Any]) -> str:
    column = "tpr_at_1pct" if document["fpr"] >= 0.01 else "tpr_at_01pct"
    lines = [f"{'attack':24} {'surface':11} {'AUC':>6}  95 % interval   TPR at {100 * document['fpr']:g} % FPR"]
    for row in document["attacks"]:
        low, high = row["auc_interval"]
        share = "-" if row[column] is None else f"{100 * row[column]:.1f} %"
        lines.append(f"{row['attack']:24} {row['surface']:11} {row['auc']:6.3f}  {low:.3f} to {high:.3f}  {share:>8}")
    if document["accuracy_members"] is not None:
        lines.append(
            f"the model's accuracy: {document['accuracy_members']:.3f} on members, "
            f"{document['accuracy_non_members']:.3f} on non-members"
        )
    lines.append(f"null (permuted membership): {document['null_auc']:.3f}")
    if document["noise_null"] is not None:
        lines.append(f"null (random scores): {document['noise_null']:.3f}")
    return "\n".join([*lines, *document["warnings"], document["verdict"]])


def _progress(done: int, total: int) -> None:
    import sys

    if sys.stderr.isatty():
        click.echo(f"\rshadows: {done}/{total}  ", err=True, nl=done == total)
    elif done == total:
        click.echo(f"shadows: {total} done", err=True)
