"""``edgepriv keys``: make a party's keys, show the public half."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgepriv.cli import LazyGroup


@click.group(cls=LazyGroup)
def keys() -> None:
    """Make and show key files. Private keys are written with mode 0600 and never shown."""


@keys.command("new")
@click.option("--role", required=True, type=click.Choice(["device", "gateway", "risk", "recipient", "issuer"]))
@click.option("--name", required=True, help="1 to 48 of a-z, 0-9 and -; the role's prefix is added.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Private key file; PATH.pub is public.")
@click.option("--json", "as_json", is_flag=True)
def new(role: str, name: str, out: Path, as_json: bool) -> None:
    """Make an Ed25519 and an X25519 key for one party."""
    from edgepriv.keys import Identity, public_path

    identity = Identity.new(role, name)
    identity.save(out)
    _show(identity.name, public_path(out), as_json=as_json)


@keys.command("show")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True)
def show(path: Path, as_json: bool) -> None:
    """Show the public half of a key file."""
    from edgepriv.keys import load_identity, load_public

    private = path.suffix != ".pub"
    public = load_identity(path).public if private else load_public(path)
    if as_json:
        document = {
            "schema": "edgepriv.key/1",
            "role": public.role,
            "name": public.name,
            "ed25519": public.ed25519.hex(),
            "x25519": public.x25519.hex(),
        }
        click.echo(json.dumps(document))
    else:
        click.echo(public.to_text(), nl=False)


def _show(name: str, public: Path, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"schema": "edgepriv.key-new/1", "name": name, "public": str(public)}))
    else:
        click.echo(f"{name}: give {public} to the owner; keep the file beside it secret")
