"""``edgepriv synthesize``: private pictures in, a release with its card out."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgepriv.cli.synthesis_parts import Parts
    from edgepriv.cli.synthesis_study import Release, Settings
    from edgepriv.synthesis.card import ReleaseCard

VAE_DELTA = 1e-5
SECONDS_BETWEEN_LINES = 10.0  # where progress goes to a file


@click.command()
@click.option("--data", required=True, help="Private pictures: a folder, IDX or CIFAR files, or 'digits'.")
@click.option("--public-data", help="Pictures that are not private. Without it a disjoint part of --data is held out.")
@click.option("--test-data", help="Pictures to measure accuracy with. Without it a part of --data is held out.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New directory for the release.")
@click.option("--noise-ratio", type=float, help="Noise over latent standard deviation: the main knob; default 2.")
@click.option("--epsilon", type=float, help="Metric epsilon instead; it has no meaning across two VAEs.")
@click.option("--mode", type=click.Choice(["noised", "prior", "unsafe_no_noise"]), default="noised", show_default=True)
@click.option(
    "--copies", type=int, default=1, show_default=True, help="Synthetic pictures per record; each costs kappa."
)
@click.option(
    "--extra",
    type=int,
    help="Pictures per record without its code; default 3 for small ones, else 1; 0 without labels.",
)
@click.option("--label-epsilon", type=float, help="Release labels by randomised response with this epsilon.")
@click.option("--vae", "vae_from", type=click.Choice(["public", "private", "dp"]), default="public", show_default=True)
@click.option("--vae-epsilon", type=float, help="With --vae dp: epsilon of the VAE's training.")
@click.option("--vae-delta", type=float, help="With --vae dp: its delta; default 1e-5.")
@click.option("--conditional/--no-conditional", default=True, help="Whether the VAE is given labels.")
@click.option("--latent-dim", type=int, help="Latent dimensions; the default depends on the size of the pictures.")
@click.option("--vae-epochs", type=click.IntRange(min=1), help="Epochs of the VAE.")
@click.option("--beta", type=click.FloatRange(min=0), help="Weight of the KL term.")
@click.option(
    "--targets", type=click.IntRange(min=1), default=16, show_default=True, help="Models that the audit trains."
)
@click.option("--epochs", type=click.IntRange(min=1), help="Epochs of each of them.")
@click.option(
    "--audit-records",
    type=click.IntRange(min=1),
    default=2000,
    show_default=True,
    help="Private records that are audited.",
)
@click.option("--no-audit", is_flag=True, help="Skip accuracies and audit; the card then recommends nothing.")
@click.option(
    "--keep-vae/--drop-vae",
    default=None,
    help="Whether the VAE goes beside the release. By default it does, but not where it saw a held-out part of --data "
    "without DP-SGD: --keep-vae publishes that too. One that saw the private records without DP-SGD never does.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first pictures of each set.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="Repeat an experiment exactly. Who knows it can remove the noise, so omit it for a release.",
)
@click.option("--device", default="cpu", show_default=True, help="torch device.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="CPU threads.")
@click.option(
    "--max-auc",
    type=click.FloatRange(0, 1),
    help="What the audit calls a leak instead of 0.60; it then ends with exit code 3 on a leak or a void audit.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the card as JSON.")
def synthesize(
    data: str, public_data: str | None, test_data: str | None, out: Path, limit: int | None, **options: Any
) -> None:
    """Make synthetic data with a release card.

    The images and labels go to OUT/release.npz, which every --data of edgepriv reads; OUT/card.json and card.html say
    what is proved, what was measured and whether it should be released at all. A run that was cut goes on where it
    stopped.
    """
    from edgepriv import datasets
    from edgepriv.cli import synthesis_study
    from edgepriv.errors import ConfigError
    from edgepriv.synthesis.training import check_device, use_threads

    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise ConfigError(f"{out} exists already", hint="a release is never overwritten: name a new directory")
    if options["max_auc"] is not None and options["no_audit"]:
        raise ConfigError("--max-auc needs the audit", hint="drop --no-audit")
    if options["vae_from"] != "dp" and (options["vae_epsilon"], options["vae_delta"]) != (None, None):
        raise ConfigError("--vae-epsilon and --vae-delta have no effect without --vae dp", hint="add --vae dp")
    use_threads(options["threads"])
    check_device(options["device"])
    private = datasets.load(data, split="all", limit=limit)
    public, test = (datasets.load(d, split="all", limit=limit) if d else None for d in (public_data, test_data))
    checkpoint, rows = (out.with_name(out.name + suffix) for suffix in (".vae-checkpoint", ".audit-rows"))
    settings = replace(_settings(options, private.images.shape[1:]), keep=rows)
    parts = synthesis_study.take_parts(private, public, settings.seed, test)
    synthesis_study.check(settings, parts, audited=not options["no_audit"])
    click.echo(f"{len(parts.private[0])} private records, {parts.note}", err=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        click.echo(f"resuming a run that was cut: {checkpoint}", err=True)
    release = synthesis_study.make_release(parts, settings, checkpoint, _progress())
    found = None if options["no_audit"] else synthesis_study.study(parts, settings, release, _progress())
    card = synthesis_study.fill_card(parts, settings, release, found)
    _write(out, card, release, settings, keep_vae=_vae_travels(options["keep_vae"], settings, parts))
    checkpoint.unlink(missing_ok=True)
    shutil.rmtree(rows, ignore_errors=True)
    click.echo(json.dumps(card.as_json()) if options["as_json"] else _summary(card, out))
    if options["max_auc"] is not None:
        _refuse_leaks(card)


def _settings(options: dict[str, Any], shape: tuple[int, ...]) -> Settings:
    from edgepriv.cli.synthesis_study import Settings
    from edgepriv.risk.membership.audit import LIMITS
    from edgepriv.risk.membership.classifier import Recipe
    from edgepriv.synthesis.training import DpSgd

    small = shape[0] * shape[1] * shape[2] <= 100
    seed, budget, max_auc = options["seed"], options["vae_epsilon"], options["max_auc"]
    delta = VAE_DELTA if options["vae_delta"] is None else options["vae_delta"]
    same = ("noise_ratio", "epsilon", "mode", "copies", "label_epsilon", "vae_from", "conditional", "latent_dim")
    return Settings(
        **{name: options[name] for name in (*same, "vae_epochs", "beta", "targets", "audit_records", "device")},
        dp=DpSgd(budget, delta) if budget is not None else None,
        extra=_extra(options, small=small),
        recipe=Recipe(epochs=options["epochs"] or (60 if small else 30)),
        seed=seed or 0,
        noise_seed=secrets.randbits(60) if seed is None else seed + 1,
        limits=LIMITS if max_auc is None else replace(LIMITS, auc=max_auc),
    )


def _extra(options: dict[str, Any], *, small: bool) -> int:
    if options["extra"] is not None:
        return int(options["extra"])
    if not options["conditional"] or options["mode"] != "noised":
        return 0
    return 3 if small else 1


def _vae_travels(wish: bool | None, settings: Settings, parts: Parts) -> bool:
    """Never where it saw the private records without DP-SGD; where it saw a held-out part so, on demand alone."""
    if settings.vae_from == "private":
        return False
    return wish if wish is not None else settings.vae_from == "dp" or not parts.held_out


def _write(out: Path, card: ReleaseCard, release: Release, settings: Settings, *, keep_vae: bool) -> None:
    from edgepriv.cli.synthesis_study import prior_pictures
    from edgepriv.synthesis.card import picture_grid
    from edgepriv.synthesis.release import write_release

    pictures = {"Released pictures, one column a class": picture_grid(release.images, release.labels)}
    if settings.conditional:
        sample = picture_grid(*prior_pictures(release, settings.seed))
        pictures["The generator alone (no record's code)"] = sample
    write_release(out, release.images, release.labels, card, pictures, release.vae if keep_vae else None)


def _summary(card: ReleaseCard, out: Path) -> str:
    lines = [f"{card.released} synthetic pictures in {out}; card: {out / 'card.html'}", card.claim]
    if card.audit:
        figures = {
            "real": card.accuracy_real,
            "release": card.accuracy_synthetic,
            "public data alone": card.accuracy_public_only,
            "generator samples": card.accuracy_prior_samples,
        }
        lines.append(card.measured_on)
        lines.append(
            "accuracy: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if value is not None)
        )
        lines.append(card.audit["verdict"])
    return "\n".join([*lines, f"recommendation: {card.recommendation}"])


def _refuse_leaks(card: ReleaseCard) -> None:
    from edgepriv.errors import RiskThresholdError

    if card.audit and card.audit["outcome"] in {"leak", "void"}:
        raise RiskThresholdError(
            card.audit["verdict"], hint="raise --noise-ratio, or release generator samples with --mode prior"
        )


def _progress() -> Callable[[str, int, int], None]:
    import sys
    import time

    terminal, last = sys.stderr.isatty(), [time.monotonic()]

    def show(stage: str, done: int, total: int) -> None:
        if terminal:
            click.echo(f"\r{stage}: {done}/{total}   ", err=True, nl=done == total)
        elif done == total or time.monotonic() - last[0] > SECONDS_BETWEEN_LINES:
            click.echo(f"{stage}: {total} done" if done == total else f"{stage}: {done}/{total}", err=True)
            last[0] = time.monotonic()

    return show
