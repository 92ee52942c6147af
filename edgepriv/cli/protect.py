"""``edgepriv protect``: encrypt a few per cent of a model, with levels; ``protect audit`` attacks the result."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.cli import LazyGroup
from edgepriv.cli.protect_audit import audit
from edgepriv.cli.protect_data import InputForm, input_form, load_samples
from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from edgepriv.keys import Identity
    from edgepriv.selective_encryption.calibrate import Samples
    from edgepriv.selective_encryption.protection import Bundle
    from edgepriv.selective_encryption.succession import Previous


class DefaultGroup(LazyGroup):
    """A group whose first argument is a sub-command, or else the model of the default command ``model``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the default command before a model's path or an option."""
        if args and args[0] not in self.commands and args[0] not in {"-h", "--help"}:
            args = ["model", *args]
        return super().parse_args(ctx, args)


@click.group(cls=DefaultGroup, invoke_without_command=False)
def protect() -> None:
    """Encrypt a few per cent of a model: `protect MODEL ...`, or `protect audit DIR` to attack a protected one."""


protect.add_command(audit)


@protect.command("model", short_help="Protect MODEL (the default command).")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--arch", help="Named architecture or module:function, with --weights, instead of MODEL.")
@click.option("--weights", type=click.Path(path_type=Path), help="Safetensors file for --arch.")
@click.option("--input", "input_shape", help="Input of --arch: channels,height,width (default 3,32,32).")
@click.option("--data", help="The owner's data: a folder, a file or 'digits'.")
@click.option("--share", default=0.08, show_default=True, help="At most this share of the convolution weights.")
@click.option("--levels", default="full", show_default=True, help="Target qualities, 'full' last: 0.6,0.8,full.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--select", "select_", default="fisher", show_default=True, help="fisher, decoy-gates, pss, magnitude.")
@click.option("--scope", default="global", show_default=True, help="global: one budget; layer: the published rule.")
@click.option("--decoys", default="mixture", show_default=True, help="mixture, dprm (published) or zeros.")
@click.option("--mode", default="levels", show_default=True, help="levels, full (whole file sealed) or both.")
@click.option("--keep-bn", is_flag=True, help="Do not fold BatchNorm into the convolutions first.")
@click.option("--dense", is_flag=True, help="Also take Gemm and MatMul weights.")
@click.option("--task", default="classify", show_default=True, help="classify or denoise.")
@click.option("--sigma", default=25.0, show_default=True, help="Noise of denoise, in steps of 255.")
@click.option("--mean", help="Input = (pixel - mean) * scale; default: model.toml beside the model, else 0.")
@click.option("--scale", help="Default: model.toml beside the model, else 1/255.")
@click.option("--limit", default=2000, show_default=True, help="Samples used of each part of the data.")
@click.option("--issuer", type=click.Path(path_type=Path), help="Key that signs; made in --out/owner if not given.")
@click.option("--name", help="Name in the manifest.")
@click.option("--version", "version", type=int, help="Version of this model; default 1, or one more than --previous.")
@click.option("--previous", type=click.Path(path_type=Path), help="Folder that protect wrote for the version before.")
@click.option("--check", default="quick", show_default=True, help="Attacks before release: quick or none.")
@click.option("--margin", default=0.10, show_default=True, help="Largest gain an attacker may have.")
@click.option("--max-share", default=0.3, show_default=True, help="How far the share may be raised.")
@click.option("--trainable", default="", help="Initializers that federated rounds may change; never encrypted ones.")
@click.option("--steps", type=int, help="Training steps of decoy-gates and pss.")
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Where selection and attackers train: cuda, say.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def protect_model(**flags: Any) -> None:
    """Write a carrier with decoys, sealed segments for each level, and a signed manifest."""
    model_path: Path | None = flags["model"]
    from edgepriv.selective_encryption.calibrate import TASKS
    from edgepriv.selective_encryption.pipeline import Options, make_bundle

    if flags["device"] != "cpu":
        from edgepriv.selective_encryption.select import compute

        compute.use(flags["threads"], flags["device"])
    if flags["task"] not in TASKS:
        raise ConfigError(f"unknown --task {flags['task']!r}", hint=f"use one of {', '.join(TASKS)}")
    options = Options(**{name: flags[name + "_" if name == "select" else name] for name in Options.__slots__})
    form = input_form(model_path, flags["task"], flags["mean"], flags["scale"], flags["sigma"])
    plain = _plain_model(model_path, flags["arch"], flags["weights"], flags["input_shape"])
    train, test = _samples(flags["data"], form, flags["limit"])
    previous = _previous(flags["previous"])
    issuer = _issuer(flags["issuer"], flags["out"], flags["previous"])
    name = flags["name"] or (previous.name if previous else model_path.stem if model_path else flags["arch"])
    bundle, report = make_bundle(
        plain,
        train,
        test,
        options,
        form.fields(),
        issuer,
        name,
        flags["version"] or (previous.version + 1 if previous else 1),
        now_s=int(time.time()),
        previous=previous,
        log=_log,
    )
    _write(flags["out"], bundle, report, issuer)
    if model_path is not None and model_path.with_name("model.toml").is_file():
        shutil.copyfile(model_path.with_name("model.toml"), flags["out"] / "model.toml")
    click.echo(json.dumps(report, indent=1) if flags["as_json"] else _text(report, flags["out"]))


def _log(text: str) -> None:
    click.echo(text, err=True)


def _plain_model(path: Path | None, arch: str | None, weights: Path | None, shape: str | None) -> Any:
    if (path is None) == (arch is None):
        raise ConfigError("give a model file, or --arch with --weights", hint="edgepriv protect --help")
    from edgepriv.selective_encryption import carrier

    if path is not None:
        return carrier.load(path)
    if weights is None:
        raise ConfigError("--arch needs --weights", hint="a .safetensors file")
    from edgepriv.selective_encryption.select import architectures

    try:
        sizes = tuple(int(v) for v in (shape or "3,32,32").split(","))
    except ValueError:
        raise ConfigError(f"--input {shape!r} is not channels,height,width", hint="for example 3,32,32") from None
    return carrier.normalised(architectures.to_onnx(architectures.with_weights(arch or "", weights), sizes))


def _samples(spec: str | None, form: InputForm, limit: int) -> tuple[Samples | None, Samples | None]:
    if spec is None:
        return None, None
    parts = [load_samples(spec, form, split=split, limit=limit) for split in ("train", "test")]
    return parts[0], parts[1]


def _previous(folder: Path | None) -> Previous | None:
    if folder is None:
        return None
    from edgepriv.selective_encryption import succession

    return succession.read(folder)


def _issuer(path: Path | None, out: Path, previous: Path | None) -> Identity:
    """The key that signs: the given one, that of the version before, or a new one; the latter two lie in OUT/owner."""
    from edgepriv.keys import Identity, load_identity

    if path is not None:
        return load_identity(path)
    own = out / "owner" / "issuer.key"
    if own.is_file():
        return load_identity(own)
    own.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    before = previous / "owner" / "issuer.key" if previous is not None else None
    if previous is not None and (before is None or not before.is_file()):
        raise ConfigError(f"{previous} was signed with another key", hint="--issuer, the key that signed it")
    issuer = load_identity(before) if before is not None else Identity.new("owner", "model-issuer")
    issuer.save(own)
    return issuer


def _write(out: Path, bundle: Bundle, report: dict[str, Any], issuer: Identity) -> None:
    from edgepriv.selective_encryption.bundle_files import write_bundle

    write_bundle(out, bundle.files, bundle.manifest, report.pop("secrets"), issuer.public)


def _text(report: dict[str, Any], out: Path) -> str:
    def shown(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.4g}"

    shares = f"{report['share']:.2%} of the convolution weights, {report['share_of_all_weights']:.2%} of all"
    lines = [
        f"{out}: {report['units']} kernels encrypted ({shares}), chosen by {report['selection']}",
        f"  input {report['input_type']}",
        f"  plain {shown(report['plain'])}, masked {shown(report['masked'])}, chance {shown(report['chance'])}",
    ]
    for level in report["levels"]:
        goal = "full" if level["target"] is None else f"{level['target']:g}"
        lines.append(f"  level {level['level']}: target {goal}, measured {shown(level['quality'])}")
    lines += [
        f"  attack {run['name']}, {run['data']} labels: {run['accuracy']:.3f}, gain {run['gain']:+.3f}"
        for run in report["quick_attacks"]
    ]
    lines.append("  keep owner/ secret; ship the rest. Weights that were not selected are in clear.")
    return "\n".join(lines)
