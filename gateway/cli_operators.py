"""``edgepriv-gateway operators``: who may log in to the pages."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - click reads the annotations

import click

from edgepriv.errors import MissingFileError
from gateway.console import AS_JSON, CONFIG, as_state_owner, load_config, show


@click.group()
def operators() -> None:
    """Who may log in to the pages."""


@operators.command("add")
@CONFIG
@AS_JSON
@click.argument("name")
@click.option("--role", type=click.Choice(["viewer", "operator"]), default="viewer", show_default=True)
def operators_add(config_path: Path, as_json: bool, name: str, role: str) -> None:
    """Let NAME log in; prints the token, which is kept nowhere. Running it again replaces the token."""
    from gateway.pages.access import Operators

    config = load_config(config_path)
    with as_state_owner(config):
        token = Operators(config.pages.tokens).add(name, role)
    document = {"schema": "edgepriv.gateway-operator/1", "name": name, "role": role, "token": token}
    show(document, as_json, [f"{name} ({role}) logs in with this token; it is not shown again:", token])


@operators.command("list")
@CONFIG
@AS_JSON
def operators_list(config_path: Path, as_json: bool) -> None:
    """List who may log in."""
    from gateway.pages.access import Operators

    rows = [{"name": o.name, "role": o.role} for o in Operators(load_config(config_path).pages.tokens).all()]
    document = {"schema": "edgepriv.gateway-operators/1", "operators": rows}
    show(document, as_json, [f"{row['name']} {row['role']}" for row in rows] or ["nobody"])


@operators.command("remove")
@CONFIG
@AS_JSON
@click.argument("name")
def operators_remove(config_path: Path, as_json: bool, name: str) -> None:
    """Let NAME in no more; open sessions end at their next request."""
    from gateway.pages.access import Operators

    config = load_config(config_path)
    with as_state_owner(config):
        removed = Operators(config.pages.tokens).remove(name)
    if not removed:
        raise MissingFileError(f"{name} is not an operator", hint="edgepriv-gateway operators list")
    show({"schema": "edgepriv.gateway-operator/1", "name": name, "removed": True}, as_json, [f"{name} is removed"])
