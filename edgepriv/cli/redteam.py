"""``edgepriv redteam``: make models that leak on purpose, so that the audits can be tested with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.cli import LazyGroup
from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from edgepriv.risk.reconstruction.attack import AttackResult


@click.group(cls=LazyGroup)
def redteam() -> None:
    """Train leaking models to test the audits with."""


@redteam.command("train-vicious")
@click.option("--data", required=True, help="Data set with labels.")
@click.option("--arch", default="cnn", show_default=True, help="cnn, mlp, linear, cnn-wide, wrn28-1, wrn28-5.")
@click.option("--outputs", default="raw", show_default=True, type=click.Choice(["raw", "softmax"]))
@click.option(
    "--decoder-view",
    default="released",
    show_default=True,
    type=click.Choice(["released", "logarithms"]),
    help="How the secret decoder reads a softmax.",
)
@click.option(
    "--schedule", default="cosine", show_default=True, type=click.Choice(["constant", "cosine"]), help="Learning rate."
)
@click.option(
    "--targets",
    default="classes",
    show_default=True,
    type=click.Choice(["classes", "digit-attributes"]),
    help="What to learn; audit such a model with the same --targets.",
)
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--epochs", default=12, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--images", default=12_000, show_default=True, type=click.IntRange(100), help="Training pictures.")
@click.option("--reconstruction-weight", default=3.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option(
    "--last-weight",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of it left in the last epoch; less costs less accuracy.",
)
@click.option("--augment/--no-augment", default=None, help="Augment as the paper; on for wrn28 only.")
@click.option("--side", default=None, type=click.IntRange(8, 1024), help="Pad pictures to this side; 32 for wrn28.")
@click.option("--device", default="cpu", show_default=True, help="torch device: cpu, cuda.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 64))
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder to write to.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def train_vicious(data: str, out: Path, *, as_json: bool, **options: Any) -> None:
    """Train a vicious classifier and its honest twin; write vicious.onnx and honest.onnx.

    A run that was stopped goes on where it was; with other pictures or another recipe it starts anew. More --epochs
    extend a finished one only with --schedule constant and --last-weight 1; fewer are refused.
    """
    result = _run(data, out, options)
    click.echo(json.dumps(result.as_dict(), indent=2) if as_json else _as_text(result, out))


def _run(data: str, out: Path, options: dict[str, Any]) -> AttackResult:
    from edgepriv import datasets
    from edgepriv.risk.compute import use_threads
    from edgepriv.risk.reconstruction.attack import digit_attributes, padded, run_attack
    from edgepriv.risk.reconstruction.leakage import AuditSettings, Bench, Probe
    from edgepriv.risk.reconstruction.vicious import Recipe, TrainingSet

    use_threads(options["threads"])
    wide = options["arch"].startswith("wrn28")
    side = options["side"] or (32 if wide else None)
    train, test = datasets.load(data, split="train", limit=options["images"]), datasets.load(data, split="test")
    images, held = (part.images if side is None else padded(part.images, side) for part in (train, test))
    attributes = options["targets"] == "digit-attributes"
    if attributes and len(train.class_names) != 10:
        raise ConfigError("digit-attributes needs ten digit classes", hint="use MNIST or 'digits'")
    bench = Bench(Probe(test.name, held, test.labels), AuditSettings(trained=None), further=images)
    targets, wanted = train.labels, bench.labels
    assert wanted is not None  # noqa: S101 - data sets always have labels
    if attributes:
        targets, wanted = digit_attributes(targets), digit_attributes(wanted)
    recipe = Recipe(
        architecture=options["arch"],
        outputs=options["outputs"],
        decoder_view=options["decoder_view"],
        epochs=options["epochs"],
        schedule=options["schedule"],
        reconstruction_weight=options["reconstruction_weight"],
        last_weight=options["last_weight"],
        augment=wide if options["augment"] is None else options["augment"],
        seed=options["seed"],
        device=options["device"],
    )
    classes = None if attributes else len(train.class_names)
    prepared = TrainingSet.of(images, targets, classes=classes)
    return run_attack(recipe, prepared, bench, wanted, out, progress=lambda line: click.echo(line, err=True))


def _as_text(result: AttackResult, out: Path) -> str:
    rows = [f"wrote {out / 'vicious.onnx'} and {out / 'honest.onnx'}", ""]
    rows.append(f"accuracy: honest {result.accuracy_honest:.3f}, vicious {result.accuracy_vicious:.3f}")
    for name, found in (("reconstruction", result.decoder), ("class mean", result.class_mean)):
        risk = "-" if found.risk_r is None else f"{found.risk_r:.3f}"
        rows.append(f"{name}: SSIM {found.ssim:.3f}, PSNR {found.psnr_db:.2f} dB, R {risk}")
    return "\n".join(rows)
