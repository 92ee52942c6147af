"""``edgepriv harden``: the optional defences beside the release policy, made and compared for one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgepriv.risk.reconstruction.hardening import Hardening


@click.command()
@click.option("--model", "model_path", required=True, type=click.Path(path_type=Path), help="ONNX classifier.")
@click.option("--data", required=True, help="Labelled pictures of your own: the test part measures, the rest fits.")
@click.option("--policy", "policies", multiple=True, help="Release policy; several are allowed.")
@click.option(
    "--strength", "strengths", multiple=True, default=(0.5, 0.9), show_default=True, type=click.FloatRange(0, 1),
    help="Of the purifier; the file is made for the last one.",
)  # fmt: skip
@click.option("--reference-models", default=5, show_default=True, type=click.IntRange(0, 1000), help="0: no indicator.")
@click.option("--auditors", default="ridge", show_default=True, type=click.Choice(["ridge", "mlp", "conv"]))
@click.option("--images", default=4000, show_default=True, type=click.IntRange(60, 1_000_000))
@click.option("--input-scale", default=None, type=float, help="Factor from 0..255 pixels to the input; 1/255.")
@click.option("--memory-mib", default=6144, show_default=True, type=click.IntRange(256), help="For opening the model.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 64))
@click.option("--out", default=None, type=click.Path(path_type=Path, file_okay=False), help="Folder for the files.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def harden(model_path: Path, data: str, *, out: Path | None, as_json: bool, **options: Any) -> None:
    """Make and compare the optional defences against leaking outputs.

    With --out: purifier.json and indicator.json for the device's [release] section, retrained.onnx to deploy in the
    model's place, defences.json with the table.
    """
    found = _hardened(model_path, data, options)
    if out is not None:
        _write(found, out)
    click.echo(json.dumps(found.as_dict(), indent=2) if as_json else as_text(found))


def _hardened(model_path: Path, data: str, options: dict[str, Any]) -> Hardening:
    from edgepriv.cli.audit_outputs import classifier_policies, open_pictures
    from edgepriv.risk.compute import use_threads
    from edgepriv.risk.reconstruction.audit import AuditRequest
    from edgepriv.risk.reconstruction.decoders import DecoderSettings
    from edgepriv.risk.reconstruction.hardening import harden as made
    from edgepriv.risk.reconstruction.leakage import AuditSettings
    from edgepriv.risk.reconstruction.supplied_model import OpeningLimits, SuppliedModel

    pipelines = classifier_policies(options["policies"])
    use_threads(options["threads"])
    limits = OpeningLimits(memory_bytes=options["memory_mib"] << 20, threads=options["threads"])
    model = SuppliedModel.find(model_path, limits=limits, scale=options["input_scale"])
    probe, training = open_pictures(data)
    trained = None if options["auditors"] == "ridge" else DecoderSettings(form=options["auditors"])
    request = AuditRequest(AuditSettings(options["images"], trained), references=options["reference_models"])
    say = lambda line: click.echo(line, err=True)  # noqa: E731
    return made(model, probe, training, pipelines, request, strengths=options["strengths"] or (0.9,), progress=say)


def _write(found: Hardening, out: Path) -> None:
    from edgepriv.risk.reconstruction.onnx_writer import write_imported

    out.mkdir(parents=True, exist_ok=True)
    (out / "defences.json").write_text(json.dumps(found.as_dict(), indent=2))
    (out / "purifier.json").write_bytes(found.purifier)
    written = ["defences.json", "purifier.json"]
    if found.indicator:
        (out / "indicator.json").write_bytes(found.indicator)
        written.append("indicator.json")
    if found.retrained is not None:
        write_imported(found.retrained, out / "retrained.onnx")
        written.append("retrained.onnx")
    click.echo(f"wrote {', '.join(written)} in {out}", err=True)


def as_text(found: Hardening) -> str:
    """Return the table for a terminal."""
    lines = [f"{'defence':<18}{'released':<20}{'bits':>7}{'leaves':>8}{'accuracy':>10}{'cost':>8}{'expl.var.':>11}"]
    lines += [
        f"{row.defence:<18}{row.policy:<20}{row.bits:>7.1f}{row.released:>8.2f}{row.accuracy:>10.3f}"
        f"{row.accuracy_cost:>8.3f}{row.explained_variance:>11.3f}"
        for row in found.rows
    ]
    return "\n".join([*lines, "", *(f"note: {note}" for note in found.notes)])
