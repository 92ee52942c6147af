"""``edgepriv audit model``: what the final global model itself gives away, update or not."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.errors import ConfigError, DataError, RiskThresholdError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from edgepriv.risk.gradient_leakage.class_inversion import ClassInversion

    Pictures = tuple[NDArray[np.float32], NDArray[np.int64]]


@click.command()
@click.option("--model", "architecture", required=True, help="Architecture, or module:function.")
@click.option("--weights", type=click.Path(path_type=Path), default=None, help="safetensors; the frozen part at least.")
@click.option(
    "--global", "global_path", type=click.Path(path_type=Path), default=None,
    help="The gateway's global weights (state/rounds/models/DIGEST), put over --weights.",
)  # fmt: skip
@click.option("--public", required=True, help="Pictures of the auditor: class means, prior. Never a device's.")
@click.option("--members", default=None, help="Pictures that were trained on, where the auditor has some.")
@click.option("--non-members", default=None, help="Pictures of the same kind that were not.")
@click.option("--iterations", type=click.IntRange(1), default=150, show_default=True, help="Of the class inversion.")
@click.option("--limit", type=click.IntRange(20), default=2000, show_default=True, help="Pictures of each set.")
@click.option(
    "--fail-on-leak", is_flag=True, help="Exit code 3 where classes or members can be told, or it cannot be decided."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 64))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--html", is_flag=False, flag_value="audit-model.html", default=None, help="Write a page with pictures.")
def model(
    architecture: str, weights: Path | None, global_path: Path | None, public: str, *, as_json: bool, **options: Any
) -> None:
    """Invert the classes of a global model; with members and non-members, ask who was in its training set.

    Membership by the loss alone is a weak attack: `edgepriv audit membership` trains shadows for a strong one.
    """
    from edgepriv.risk import models
    from edgepriv.risk.gradient_leakage.class_inversion import LEAK, UNDECIDABLE, invert_classes, judge_classes

    if (options["members"] is None) != (options["non_members"] is None):
        raise ConfigError("membership needs both --members and --non-members")
    models.prepare(threads=options["threads"])
    images, labels = _pictures(public, options["limit"])
    net, classes = _network(architecture, weights, global_path, images)
    if int(labels.max()) >= classes:
        raise DataError(f"the model knows {classes} classes, --public has label {int(labels.max())}")
    found = invert_classes(net, classes, images, labels, iterations=options["iterations"], seed=options["seed"])
    judged = judge_classes(found, _fresh(architecture, classes, (images, labels), options))
    leaks = judged.word == LEAK
    record: dict[str, Any] = {
        "schema": "edgepriv.audit-model/1",
        "class_inversion": found.record(),
        "classes_leak": None if judged.word == UNDECIDABLE else leaks,
        "classes": asdict(judged),
        "membership": _membership(net, options) if options["members"] else None,
        "caveat": "Class pictures are averages, not persons; a failed attack is no proof.",
    }
    if options["html"]:
        _write_html(Path(options["html"]), found, (images, labels), record)
    click.echo(json.dumps(record, indent=2) if as_json else _as_text(record))
    told = record["membership"] is not None and record["membership"]["above_threshold"]
    if options["fail_on_leak"] and (leaks or told):
        raise RiskThresholdError("the model gives its classes or members away", hint="more noise in the rounds")
    if options["fail_on_leak"] and judged.word == UNDECIDABLE:
        raise RiskThresholdError(
            f"whether the model gives its classes away is undecidable: {judged.reason}",
            hint="--public with pictures of two classes or more",
        )


def _pictures(spec: str, limit: int) -> Pictures:
    import numpy as np

    from edgepriv import datasets

    data = datasets.load(spec, split="all", limit=limit)
    return np.ascontiguousarray(data.images.transpose(0, 3, 1, 2), np.float32) / np.float32(255), data.labels


def _network(architecture: str, weights: Path | None, global_path: Path | None, images: Any) -> tuple[Any, int]:
    """Return the network and how many classes it has."""
    from edgepriv.cli.recipe_options import read_update_file
    from edgepriv.risk import models

    if weights is None and global_path is None:
        raise ConfigError("no weights", hint="--weights X.safetensors, --global FILE of the gateway, or both")
    given = read_update_file(global_path).tensors if global_path else {}
    classes = models.classes_in(weights) if weights else None
    if classes is None:
        if "head.bias" not in given:
            raise DataError("the weights hold no head.bias, so the classes cannot be counted")
        classes = len(given["head.bias"])
    net = models.build(architecture, classes, images.shape[1], images.shape[2])
    if weights is not None:
        models.load_weights(net, weights)
    if given:
        models.put_weights(net, given, architecture, complete=weights is None)
    return net.eval(), classes


def _fresh(
    architecture: str, classes: int, known: Pictures, options: dict[str, Any]
) -> Callable[[int], ClassInversion]:
    """Return what inverts a network of this architecture that has seen nothing, by number."""
    from edgepriv.risk import models
    from edgepriv.risk.gradient_leakage.class_inversion import invert_classes

    images, labels = known

    def inverted(number: int) -> ClassInversion:
        seed = 1_000_003 * (number + 1) + int(options["seed"])
        net = models.build_seeded(architecture, classes, images.shape[1], images.shape[2], seed)
        return invert_classes(
            net, classes, images, labels, iterations=options["iterations"], seed=options["seed"] + number + 1
        )

    return inverted


def _membership(net: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Margin and likelihood attacks without shadows."""
    import numpy as np

    from edgepriv.risk import models
    from edgepriv.risk.membership import audit, scores

    inside, outside = (
        _pictures(options["members"], options["limit"]),
        _pictures(options["non_members"], options["limit"]),
    )
    images, labels = np.concatenate([inside[0], outside[0]]), np.concatenate([inside[1], outside[1]])
    logits = models.logits_of(net, images)
    is_member = np.arange(len(labels)) < len(inside[1])
    view = audit.TargetView(
        margins=scores.margin(logits, labels), log_probabilities=scores.log_probability(logits, labels)
    )
    rng = np.random.default_rng(options["seed"])
    found = audit.report([audit.attack_target(view)], [is_member], rng, fair_coins=False)
    return {
        "verdict": found.verdict(),
        "above_threshold": found.exceeds(audit.LIMITS),
        **found.as_json(),
    }


def _write_html(path: Path, found: ClassInversion, known: Pictures, record: dict[str, Any]) -> None:
    import numpy as np

    from edgepriv.risk.gradient_leakage import page
    from edgepriv.risk.pictures import grid_png

    images, labels = known
    kept = [c for c in range(len(found.images)) if (labels == c).any()]
    means = np.stack([images[labels == c].mean(axis=0) for c in kept]).transpose(0, 2, 3, 1)
    inverted = found.images[kept]
    nearest = page.nearest_public(inverted, images.transpose(0, 2, 3, 1))
    grid = grid_png([page.as_bytes(column) for column in (means, inverted, nearest)])
    words = "".join(f"<p>{line}</p>" for line in _as_text(record).splitlines())
    caption = "mean of the class in public pictures | inverted from the model | nearest public picture"
    body = f"<h1>What the global model gives away</h1>{words}{page.figure(grid, caption)}"
    path.write_text(page.document("What the global model gives away", body), encoding="utf-8")
    click.echo(f"wrote {path}", err=True)


def _as_text(record: dict[str, Any]) -> str:
    found, told = record["class_inversion"], record["membership"]
    judged = record["classes"]
    similar = f"SSIM with the class means {found['mean_ssim']:.2f} (the prior: {found['prior_ssim']:.2f})"
    return "\n".join(
        [
            f"classes {judged['word']}: {judged['reason']}, {similar}",
            f"members: {told['verdict']}" if told else "members: not asked (--members and --non-members)",
            record["caveat"],
        ]
    )
