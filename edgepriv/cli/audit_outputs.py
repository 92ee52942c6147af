"""``edgepriv audit outputs``: what a classifier's released outputs give away, and whether it was made to leak."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.errors import ConfigError, DataError, MissingFileError, RiskThresholdError

if TYPE_CHECKING:
    from edgepriv.device.release import ReleasePolicy
    from edgepriv.risk.reconstruction.audit import AuditRequest, OutputAudit
    from edgepriv.risk.reconstruction.leakage import Probe

DEFAULT_POLICIES = ("argmax", "softmax:1", "softmax:2", "unsafe_raw_logits")
ATTRIBUTE_POLICIES = ("steps:4", "unsafe_raw_logits")
INDICATOR_NEEDS = "it needs two reference models, labels and at most 100 classes"


@click.command()
@click.option("--model", "model_path", required=True, type=click.Path(path_type=Path), help="ONNX classifier.")
@click.option("--data", required=True, help="Pictures: a data set, or a folder of pictures without labels.")
@click.option("--policy", "policies", multiple=True, help="Release policy; several are allowed.")
@click.option(
    "--targets",
    default="classes",
    show_default=True,
    type=click.Choice(["classes", "digit-attributes"]),
    help="What the outputs are: scores of classes, or one logit for each attribute (steps:SIZE, unsafe_raw_logits).",
)
@click.option("--arch", default=None, help="The model's architecture, where its graph cannot be read.")
@click.option("--weights", default=None, type=click.Path(path_type=Path), help="Its weights (safetensors).")
@click.option("--reference-models", default=5, show_default=True, type=click.IntRange(0, 1000))
@click.option(
    "--auditors",
    default="conv",
    show_default=True,
    type=click.Choice(["ridge", "mlp", "conv"]),
    help="Closed-form alone, or with a trained decoder.",
)
@click.option("--decoder-epochs", default=6, show_default=True, type=click.IntRange(1, 1000))
@click.option("--images", default=6000, show_default=True, type=click.IntRange(60, 1_000_000))
@click.option("--output", default=None, help="Name of the output to audit; the first by default.")
@click.option("--input-scale", default=None, type=float, help="Factor from 0..255 pixels to the input; 1/255.")
@click.option("--side", default=None, type=click.IntRange(8, 1024), help="Pad pictures with black to this side.")
@click.option("--unlabelled", is_flag=True, help="Do not use the labels.")
@click.option(
    "--purifier", default=None, type=click.Path(path_type=Path), help="Audit behind this file, as the device releases."
)
@click.option("--ridge", default=1e-2, show_default=True, type=float, help="Of the covariance in R.")
@click.option("--limit", default=0.25, show_default=True, type=float, help="Explained variance that counts as high.")
@click.option("--fail-on", default="never", show_default=True, type=click.Choice(["never", "vicious", "high"]))
@click.option("--memory-mib", default=6144, show_default=True, type=click.IntRange(256), help="For opening the model.")
@click.option("--device", default="cpu", show_default=True, help="torch device.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 64))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option(
    "--html", is_flag=False, flag_value="audit-outputs.html", default=None, help="Write a page with pictures."
)
@click.option(
    "--indicator", default=None, type=click.Path(path_type=Path), help="Write the device's indicator file (references)."
)
def outputs(
    model_path: Path,
    data: str,
    *,
    as_json: bool,
    html: str | None,
    fail_on: str,
    indicator: Path | None,
    **options: Any,
) -> None:
    """Measure what a model's released outputs give away.

    Exit code 3 where --fail-on is reached.
    """
    check_files(html, indicator, options)
    audit = _audit(model_path, data, options)
    click.echo(json.dumps(audit.as_dict(), indent=2) if as_json else as_text(audit))
    write_files(audit, html, indicator)
    failing = {"never": (), "vicious": ("vicious",), "high": ("vicious", "high leakage")}[fail_on]
    if audit.verdict.word in failing:
        raise RiskThresholdError(f"{model_path}: {audit.verdict.word}", hint="do not deploy it, or release less")


def check_files(html: str | None, indicator: Path | None, options: dict[str, Any]) -> None:
    """Refuse before the audit what could not be written after it (ConfigError, MissingFileError)."""
    without = options["unlabelled"] or options["reference_models"] < 2 or options["targets"] != "classes"
    if indicator is not None and without:
        raise ConfigError("no indicator can be made", hint=INDICATOR_NEEDS)
    for path in (Path(html) if html else None, indicator):
        if path is not None and not path.absolute().parent.is_dir():
            raise MissingFileError(f"there is no folder {path.absolute().parent} to write {path.name} to")


def write_files(audit: OutputAudit, html: str | None, indicator: Path | None) -> None:
    """Write the page and the device's indicator, after the report was printed.

    Raises:
        DataError: no indicator was made.
    """
    if html:
        from edgepriv.risk.report import audit_html

        Path(html).write_text(audit_html(audit), encoding="utf-8")
        click.echo(f"wrote {html}", err=True)
    if indicator is not None:
        if not audit.indicator:
            raise DataError("no indicator was made", hint=INDICATOR_NEEDS)
        indicator.write_bytes(audit.indicator)
        click.echo(f"wrote {indicator}", err=True)


def _audit(model_path: Path, data: str, options: dict[str, Any]) -> OutputAudit:
    from edgepriv.device.purify import OutputPurifier, PurifiedPolicy
    from edgepriv.risk.compute import use_threads
    from edgepriv.risk.reconstruction.audit import audit_outputs
    from edgepriv.risk.reconstruction.supplied_model import OpeningLimits, SuppliedModel

    if options["weights"] and not options["arch"]:
        raise ConfigError("--weights needs --arch", hint="name the architecture that the weights belong to")
    attributes = options["targets"] == "digit-attributes"
    pipelines = attribute_policies(options["policies"]) if attributes else classifier_policies(options["policies"])
    notes = []
    if options["purifier"]:
        purifier = OutputPurifier.load(options["purifier"])
        pipelines = [PurifiedPolicy(policy, purifier) for policy in pipelines]
        notes.append(f"the policies were applied behind the purifier {options['purifier'].name}")
    use_threads(options["threads"])
    limits = OpeningLimits(memory_bytes=options["memory_mib"] << 20, threads=options["threads"])
    model = SuppliedModel.find(model_path, limits=limits, scale=options["input_scale"], output=options["output"])
    probe, reference_data = open_pictures(data, unlabelled=options["unlabelled"], side=options["side"])
    if attributes:
        probe, reference_data = with_attributes(probe), with_attributes(reference_data)
    audit = audit_outputs(
        model,
        probe,
        pipelines,
        _request(options),
        reference_data=reference_data,
        progress=lambda s: click.echo(s, err=True),
    )
    return replace(audit, notes=(*notes, *audit.notes))


def classifier_policies(specs: tuple[str, ...]) -> list[ReleasePolicy]:
    """Read the release policies of ``--policy``, or the usual four (ConfigError: one is not for classifiers)."""
    from edgepriv.device.release import parse_policy

    found: list[ReleasePolicy] = [parse_policy(spec) for spec in specs or DEFAULT_POLICIES]
    if unfit := [policy.name for policy in found if policy.task != "classify"]:
        raise ConfigError(f"not a policy for classifiers: {', '.join(unfit)}")
    return found


def attribute_policies(specs: tuple[str, ...]) -> list[ReleasePolicy]:
    """Read policies for a model of attributes (ConfigError: one takes the outputs for scores of classes)."""
    from edgepriv.device.release import parse_policy

    found: list[ReleasePolicy] = [parse_policy(spec) for spec in specs or ATTRIBUTE_POLICIES]
    if unfit := [policy.name for policy in found if not policy.name.startswith(("steps:", "unsafe_raw_logits"))]:
        raise ConfigError(f"not a policy for attributes: {', '.join(unfit)}", hint="steps:SIZE or unsafe_raw_logits")
    return found


def with_attributes(probe: Any) -> Any:
    """Return labelled digits as pictures with attributes (ConfigError: they have no labels, or not ten classes)."""
    from edgepriv.risk.reconstruction.attack import digit_attributes
    from edgepriv.risk.reconstruction.leakage import Probe

    if probe is None or probe.labels is None or probe.labels.max() != 9:
        raise ConfigError("digit-attributes needs ten digit classes", hint="use MNIST or 'digits', with labels")
    return Probe.of_attributes(probe.name, probe.images, digit_attributes(probe.labels))


def _request(options: dict[str, Any]) -> AuditRequest:
    from edgepriv.risk.reconstruction.audit import AuditRequest
    from edgepriv.risk.reconstruction.decoders import DecoderSettings
    from edgepriv.risk.reconstruction.leakage import AuditSettings

    trained = None
    if options["auditors"] != "ridge":
        trained = DecoderSettings(form=options["auditors"], epochs=options["decoder_epochs"], device=options["device"])
    return AuditRequest(
        settings=AuditSettings(options["images"], trained, options["ridge"], options["device"]),
        references=options["reference_models"],
        architecture=options["arch"],
        weights=options["weights"],
        limit=options["limit"],
    )


def open_pictures(spec: str, *, unlabelled: bool = False, side: int | None = None) -> tuple[Probe, Probe | None]:
    """Return the audit's pictures (the test part) and those that references train on, None without labels."""
    from edgepriv import datasets
    from edgepriv.risk.reconstruction.attack import padded
    from edgepriv.risk.reconstruction.leakage import Probe

    def fit(images: Any) -> Any:
        return images if side is None else padded(images, side)

    folder = Path(spec)
    if folder.is_dir() and (flat := sorted(p for p in folder.iterdir() if p.suffix.lower() in datasets.IMAGE_SUFFIXES)):
        return Probe(folder.name, fit(_stack([datasets.read_image(path) for path in flat], spec)), None), None
    test = datasets.load(spec, split="test")
    if unlabelled:
        return Probe(test.name, fit(test.images), None), None
    train = datasets.load(spec, split="train")
    return Probe(test.name, fit(test.images), test.labels), Probe(train.name, fit(train.images), train.labels)


def _stack(images: list[Any], spec: str) -> Any:
    import numpy as np

    if not images:
        raise MissingFileError(f"{spec} holds no pictures")
    if len({image.shape for image in images}) != 1:
        raise DataError(f"{spec}: the pictures differ in size or channels", hint="bring them to one size first")
    return np.stack(images)


def as_text(audit: OutputAudit) -> str:
    """Return the report for a terminal."""
    lines = [f"{audit.model}: {audit.verdict.word} - {audit.verdict.reason}", ""]
    lines.append(f"{'policy':<20}{'bits':>8}{'expl.var.':>11}{'SSIM':>8}{'PSNR dB':>9}{'R':>8}{'accuracy':>10}")
    for policy in audit.policies:
        values = policy.as_dict()
        risk = "-" if values["risk_r"] is None else f"{values['risk_r']:.3f}"
        right = "-" if values["accuracy"] is None else f"{values['accuracy']:.3f}"
        lines.append(
            f"{policy.policy:<20}{policy.bits:>8.1f}{values['explained_variance']:>11.3f}{values['ssim']:>8.3f}"
            f"{values['psnr_db']:>9.2f}{risk:>8}{right:>10}"
        )
    return "\n".join([*lines, "", *(f"note: {note}" for note in audit.notes)])
