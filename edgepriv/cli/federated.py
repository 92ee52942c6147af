"""``edgepriv federated``: make an update with torch, and look at an update before it leaves the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.cli import LazyGroup
from edgepriv.cli.recipe_options import read_update_file, recipe_from, recipe_meta, recipe_options
from edgepriv.errors import DataError, MissingFileError, RiskThresholdError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@click.group(cls=LazyGroup)
def federated() -> None:
    """Device-side tools for federated rounds."""


@federated.command("self-check")
@click.option("--update", "update_path", required=True, type=click.Path(path_type=Path), help="Update file.")
@click.option("--images", "n_images", type=click.IntRange(1), default=None, help="Images trained on.")
@click.option("--head", type=click.Path(path_type=Path), default=None, help="Head before the round, as an update file.")
@click.option(
    "--features", type=click.Path(path_type=Path), default=None, help=".npz with features [n, d] and labels [n]."
)
@click.option("--policy", default="add_noise", show_default=True, help="send | drop_bn | add_noise | refuse")
@click.option(
    "--encoding", default="float32", show_default=True, help="Of the upload: what it rounds is the least noise."
)
@click.option("--max-explained", type=float, default=0.2, show_default=True, help="Limit for the worst example.")
@click.option("--noise-sigma", type=float, default=0.0, help="Noise that is added before anybody sees the update.")
@click.option("--masked", is_flag=True, help="The round hides single updates behind masks.")
@click.option("--round", "round_number", type=int, default=None, help="Number of the round.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Write what may be sent.")
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def self_check_command(update_path: Path, *, as_json: bool, out: Path | None, **options: Any) -> None:
    """Check an update before it leaves; numpy only.

    Exit code 3 where what may be sent is still above a limit, 73 where the policy refuses.
    """
    from edgepriv.federated.self_check import CheckPolicy, self_check
    from edgepriv.wire.update import encode_update

    update = read_update_file(update_path)
    policy = CheckPolicy(
        options["policy"],
        max_explained_variance=options["max_explained"],
        noise_sigma=options["noise_sigma"],
        masked=options["masked"],
        encoding=options["encoding"],
    )
    features, labels = _features(options["features"])
    head = read_update_file(options["head"]).tensors if options["head"] else None
    checked = self_check(
        update.tensors,
        recipe_from(options, update.meta),
        policy,
        n_images=_image_count(options["n_images"], update.meta, features),
        round_number=options["round_number"],
        head=head,
        features=features,
        labels=labels,
    )
    if out is not None:
        out.write_bytes(encode_update(checked.update, update.meta))
    record = checked.record()
    click.echo(json.dumps(record, indent=2) if as_json else _as_text(record))
    if checked.within_limits is False:
        raise RiskThresholdError("this update is above the limit", hint="policy add_noise or refuse, or more images")


@federated.command("train")
@click.option("--model", "architecture", required=True, help="Architecture, or module:function.")
@click.option("--weights", type=click.Path(path_type=Path), required=True, help="Global weights (safetensors).")
@click.option("--fresh", is_flag=True, help="Make fresh weights and write them to --weights first.")
@click.option("--data", required=True, help="Labelled images: digits, a folder or a file.")
@click.option("--images", "n_images", type=click.IntRange(1), default=None, help="Only the first so many.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 64))
@click.option("--momentum-in", type=click.Path(path_type=Path), default=None, help="Buffers of the last round.")
@click.option("--momentum-out", type=click.Path(path_type=Path), default=None, help="Write the buffers for the next.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Update file to write.")
@click.option(
    "--canaries", type=click.Path(path_type=Path), default=None, help="Write the images in the order of training."
)
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def train_command(architecture: str, weights: Path, *, out: Path, as_json: bool, **options: Any) -> None:
    """Train the whole model on this machine's images and write the update; needs torch."""
    import numpy as np

    from edgepriv import datasets
    from edgepriv.federated.torch_trainer import train_locally
    from edgepriv.risk import models
    from edgepriv.wire.update import encode_update

    models.prepare(threads=options["threads"])
    data = datasets.load(options["data"], limit=options["n_images"])
    model = _model(architecture, weights, data, fresh=options["fresh"], seed=options["seed"])
    recipe = recipe_from(options)
    x = np.ascontiguousarray(data.images.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    held = read_update_file(options["momentum_in"]).tensors if options["momentum_in"] else None
    trained = train_locally(model, x, data.labels, recipe, seed=options["seed"], momentum=held)
    if options["momentum_out"]:
        options["momentum_out"].write_bytes(encode_update(trained.momentum))
    meta = {"recipe": recipe_meta(recipe), "images": len(data)}
    out.write_bytes(encode_update(trained.tensors, meta))
    if options["canaries"]:
        order = trained.order[: len(data)]
        np.savez(options["canaries"], images=data.images[order], labels=data.labels[order])
    result = {
        "schema": "edgepriv.federated-train/1",
        "images": len(data),
        "steps": trained.steps,
        "mean_loss": trained.mean_loss,
        "tensors": len(trained.tensors),
        "out": str(out),
    }
    words = f"{trained.steps} steps on {len(data)} images, mean loss {trained.mean_loss:.3f}: {out}"
    click.echo(json.dumps(result) if as_json else words)


@federated.command("reference")
@click.option(
    "--update", "update_path", required=True, type=click.Path(path_type=Path), help="Update file to vouch for."
)
@click.option(
    "--base", "base_path", required=True, type=click.Path(path_type=Path), help="Weights that it starts from."
)
@click.option(
    "--key", "key_path", required=True, type=click.Path(path_type=Path), help="Key of the risk service or canary."
)
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), default=24.0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Signed statement to write.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def reference_command(
    update_path: Path, base_path: Path, key_path: Path, hours: float, out: Path, *, as_json: bool
) -> None:
    """Sign a trusted reference update for rounds with the rule fltrust, made on clean data from these very weights."""
    import hashlib
    import time

    from edgepriv.keys import load_identity
    from edgepriv.wire.reference import Reference, sign_reference

    update, base = read_update_file(update_path), read_update_file(base_path)
    if unknown := update.tensors.keys() - base.tensors.keys():
        raise DataError(f"the weights have no {min(unknown)!r}: this update is of another model")
    identity, now = load_identity(key_path), time.time()
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in (base_path, update_path)]
    out.write_bytes(
        sign_reference(
            Reference(identity.name, base=digests[0], update=digests[1], issued=now, expires=now + 3600 * hours),
            identity,
        )
    )
    result = {
        "schema": "edgepriv.federated-reference/1",
        "sender": identity.name,
        "base": digests[0].hex(),
        "update": digests[1].hex(),
        "out": str(out),
    }
    words = f"{identity.name} vouches for {digests[1].hex()} from weights {digests[0].hex()} for {hours:g} h: {out}"
    click.echo(json.dumps(result) if as_json else words)


def _model(architecture: str, weights: Path, data: Any, *, fresh: bool, seed: int) -> Any:
    from edgepriv.risk import models

    models.prepare(seed=seed)
    model = models.build(architecture, len(data.class_names), data.images.shape[3], data.images.shape[1])
    if not fresh:
        return models.load_weights(model, weights)
    models.save_weights(model, weights)
    return model


def _features(path: Path | None) -> tuple[NDArray[np.float64] | None, NDArray[np.int64] | None]:
    import numpy as np

    if path is None:
        return None, None
    if not path.is_file():
        raise MissingFileError(f"no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive["features"].astype(np.float64), archive["labels"].astype(np.int64)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} must hold 'features' and 'labels'") from error


def _image_count(given: int | None, meta: dict[str, Any], features: NDArray[np.float64] | None) -> int:
    if given is not None:
        return given
    if features is not None:
        return len(features)
    stated = meta.get("images")
    if not isinstance(stated, int) or stated < 1:
        raise DataError("the update does not say how many images it comes from", hint="give --images")
    return stated


def _as_text(record: dict[str, Any]) -> str:
    words = {True: "within the limits", False: "ABOVE a limit", None: "nothing found, but no bound was computed"}
    lines = [f"{record['action']}: {words[record['within_limits']]}"]
    lines += [
        f"  {'above' if f['above'] else 'ok':5} {f['code']}: {f['words']} ({f['value']:.3g})"
        for f in record["findings"]
    ]
    if record["sigma"]:
        lines.append(f"  noise of std {record['sigma']:.3g} added")
    return "\n".join(lines)
