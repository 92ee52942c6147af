"""Options that describe local training, shared by the commands that make, check or audit an update."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import click

from edgepriv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from edgepriv.federated.local_recipe import LocalRecipe
    from edgepriv.wire.update import Update

MAX_UPDATE_BYTES = 1 << 30
_OPTIONS = (
    click.option("--learning-rate", type=float, default=None, help="Of SGD."),
    click.option("--batch-size", type=click.IntRange(1), default=None, help="Images in a step."),
    click.option("--epochs", type=click.IntRange(1), default=None, help="Passes over the images."),
    click.option("--momentum", type=float, default=None, help="Of SGD; starts at zero each round."),
    click.option("--carry-momentum", is_flag=True, help="The momentum buffers survive from round to round."),
    click.option("--weight-decay", type=float, default=None, help="L2 penalty."),
    click.option("--proximal-mu", type=float, default=None, help="FedProx's pull to the global model."),
    click.option("--head-only", is_flag=True, help="Only the last layer is trained, on a frozen backbone."),
    click.option("--frozen-bn", is_flag=True, help="BatchNorm uses its running statistics."),
    click.option("--keep-statistics", is_flag=True, help="BatchNorm's running statistics stay on the device."),
)
NAMES = ("learning_rate", "batch_size", "epochs", "momentum", "weight_decay", "proximal_mu")


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; the command gets them as keyword arguments for :func:`recipe_from`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def recipe_from(options: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> LocalRecipe:
    """Return the recipe of the options; what they leave open comes from an update's meta, then from the defaults."""
    from edgepriv.federated.local_recipe import LocalRecipe

    stated = (meta or {}).get("recipe") or {}
    known = {field.name for field in fields(LocalRecipe)}
    if not isinstance(stated, dict) or set(stated) - known:
        raise DataError("the update states a recipe that cannot be read", hint="give the recipe by options")
    values = {**stated, "trainable": tuple(stated.get("trainable", ()))}
    try:
        recipe = LocalRecipe(**values)
    except TypeError as error:
        raise DataError(f"the update's recipe is malformed: {error}") from error
    recipe = replace(recipe, **{name: options[name] for name in NAMES if options.get(name) is not None})
    if options.get("carry_momentum"):
        recipe = replace(recipe, carries_momentum=True)
    if options.get("head_only"):
        recipe = replace(recipe, trainable=("head.",), batch_normalisation="frozen", shares_statistics=False)
    if options.get("frozen_bn"):
        recipe = replace(recipe, batch_normalisation="frozen", shares_statistics=False)
    if options.get("keep_statistics"):
        recipe = replace(recipe, shares_statistics=False)
    return recipe


def recipe_meta(recipe: LocalRecipe) -> dict[str, Any]:
    """Return the recipe as plain values for an update's meta."""
    return {**asdict(recipe), "trainable": list(recipe.trainable)}


def read_update_file(path: Path) -> Update:
    """Decode an update file."""
    from edgepriv.errors import MissingFileError
    from edgepriv.wire.update import decode_update

    if not path.is_file():
        raise MissingFileError(f"no such update: {path}")
    if path.stat().st_size > MAX_UPDATE_BYTES:
        raise DataError(f"{path} is larger than {MAX_UPDATE_BYTES >> 20} MB")
    return decode_update(path.read_bytes(), max_bytes=MAX_UPDATE_BYTES)
