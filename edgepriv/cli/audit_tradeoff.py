"""``edgepriv audit privacy-tradeoff``: the operator picks the privacy setting of rounds from a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgepriv.errors import DataError, MissingFileError


@click.command("privacy-tradeoff")
@click.option("--data", default="digits", show_default=True, help="Labelled images.")
@click.option("--model", "architecture", default="cnn-bn", show_default=True, help="Architecture with BatchNorm.")
@click.option("--clients", type=click.IntRange(2, 200), default=10, show_default=True, help="Devices in a round.")
@click.option("--rounds", type=click.IntRange(1, 500), default=10, show_default=True)
@click.option("--clip", "clips", type=float, multiple=True, default=(0.5,), show_default=True)
@click.option(
    "--noise", "noises", type=float, multiple=True, default=(0.0, 0.1, 0.5, 1.0), show_default=True,
    help="Noise of the sum over the clip norm.",
)  # fmt: skip
@click.option("--batch-size", "batch_sizes", type=click.IntRange(1, 32), multiple=True, default=(4,), show_default=True)
@click.option("--epochs", "epoch_counts", type=click.IntRange(1, 8), multiple=True, default=(1,), show_default=True)
@click.option("--learning-rate", type=float, default=0.1, show_default=True)
@click.option("--momentum", type=click.FloatRange(0, 0.99), default=0.0, show_default=True)
@click.option("--statistics", type=click.Choice(["both", "shared", "home"]), default="both", show_default=True)
@click.option("--delta", type=float, default=1e-5, show_default=True)
@click.option("--max-iip", type=float, default=0.1, show_default=True, help="Limit of the recommended setting.")
@click.option(
    "--canaries", type=click.IntRange(1, 32), default=4, show_default=True, help="Images of the canary device."
)
@click.option("--iterations", type=click.IntRange(1), default=80, show_default=True, help="Of each attack.")
@click.option("--devices", type=click.IntRange(1, 16), default=1, show_default=True, help="Canary devices, one by one.")
@click.option(
    "--masks", type=click.Choice(["none", "plain", "all"]), default="none", show_default=True,
    help="Judge the settings without noise, or all, as a masked sum too.",
)  # fmt: skip
@click.option("--audited", type=click.IntRange(2, 20), default=3, show_default=True, help="Rounds that are attacked.")
@click.option("--match", type=click.Choice(["cosine", "l2"]), default="cosine", show_default=True, help="The attack's.")
@click.option("--tv", type=click.FloatRange(0), default=1e-2, show_default=True, help="Its total variation.")
@click.option(
    "--add", "earlier", type=click.Path(path_type=Path), multiple=True,
    help="JSON of an earlier sweep of the same data, model, seed and delta: its points join this one's.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(100), default=3000, show_default=True, help="Images used.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 64))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--html", is_flag=False, flag_value="privacy-tradeoff.html", default=None, help="Write the picture.")
@click.option("--toml", type=click.Path(path_type=Path), default=None, help="Write the recommended [rounds] settings.")
def tradeoff(*, as_json: bool, html: str | None, toml: Path | None, **options: Any) -> None:
    """Sweep clipping, noise, batches, local steps and BatchNorm sharing; show leakage against accuracy."""
    from edgepriv import datasets
    from edgepriv.risk import models
    from edgepriv.risk.gradient_leakage import tradeoff as sweep
    from edgepriv.risk.gradient_leakage import tradeoff_page as shown
    from edgepriv.risk.gradient_leakage.inversion import Attack

    models.prepare(threads=options["threads"])
    data = datasets.load(options["data"], limit=options["limit"])
    if len(data) < 100:
        raise DataError(f"{len(data)} images are too few for a trade-off", hint="at least 100")
    grid = sweep.settings_grid(
        clips=options["clips"],
        noises=options["noises"],
        batch_sizes=options["batch_sizes"],
        epoch_counts=options["epoch_counts"],
        statistics=options["statistics"],
        learning_rate=options["learning_rate"],
        momentum=options["momentum"],
        masks=options["masks"],
    )
    world = sweep.make_world(
        data, options["architecture"], clients=options["clients"], seed=options["seed"],
        canaries=options["canaries"], devices=options["devices"], masks=options["masks"] != "none",
        device=options["device"],
    )  # fmt: skip
    result = sweep.run(
        world, grid,
        attack=Attack(options["match"], iterations=options["iterations"], tv_weight=options["tv"]),
        rounds=options["rounds"], audited=options["audited"], delta=options["delta"], max_iip=options["max_iip"],
        earlier=[_read(path) for path in options["earlier"]],
        progress=lambda line: click.echo(line, err=True),
    )  # fmt: skip
    if html:
        Path(html).write_text(shown.tradeoff_html(result), encoding="utf-8")
        click.echo(f"wrote {html}", err=True)
    if toml:
        toml.write_text(shown.recommended_toml(result), encoding="utf-8")
        click.echo(f"wrote {toml}", err=True)
    click.echo(json.dumps(result.record(), indent=2) if as_json else shown.as_text(result))


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingFileError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON", hint="give what privacy-tradeoff --json printed") from error
    if not isinstance(document, dict):
        raise DataError(f"{path} holds no sweep", hint="give what privacy-tradeoff --json printed")
    return document
