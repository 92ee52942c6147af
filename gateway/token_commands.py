"""``edgepriv-gateway token``: hand out enrolment tokens and serve enrolment."""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from edgepriv.errors import ConfigError, EdgeprivError, MissingDependencyError, TrustError
from gateway.console import as_state_owner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.config import Config
    from gateway.enrol import Enrolment

_CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("/etc/edgepriv/gateway.toml"),
    show_default=True,
    help="The gateway's configuration file.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group()
def token() -> None:
    """Enrol devices: one-time tokens, certificates, the server."""


@token.command("new")
@_CONFIG
@click.option("--device", required=True, help="Name of the device, as in cam1.")
@click.option("--url", required=True, help="Where devices reach `token serve`: https://HOST:PORT.")
@click.option("--hours", default=24.0, show_default=True, type=click.FloatRange(0.01, 24.0))
@click.option("--replace", is_flag=True, help="The device was replaced: give its name to new keys.")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Token file (secret).")
@_JSON
def new(config_path: Path, device: str, url: str, hours: float, replace: bool, out: Path, as_json: bool) -> None:
    """Make a token for one device.

    It is one line of text, also fit for a QR code.
    """
    from edgepriv.keys import load_public

    with _enrolment(config_path) as (config, enrolment):
        owner = load_public(config.gateway.owner)
        made = enrolment.new_token(device, url, owner, lifetime_s=int(hours * 3600), replace=replace)
    try:
        with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(made.to_text() + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from None
    document = {
        "schema": "edgepriv.gateway-token/1",
        "id": made.id.hex(),
        "device": made.device,
        "expires": made.expires,
        "out": str(out),
    }
    click.echo(json.dumps(document) if as_json else f"{out}: for {made.device}, once, for {hours:g} hours")


@token.command("list")
@_CONFIG
@_JSON
def list_(config_path: Path, as_json: bool) -> None:
    """Show tokens, their state and alarms."""
    with _enrolment(config_path) as (_, enrolment):
        rows = enrolment.tokens()
    if as_json:
        click.echo(json.dumps({"schema": "edgepriv.gateway-tokens/1", "tokens": rows}))
        return
    for row in rows:
        alarm = f"  {row['alarms']} ALARMS: used again with other keys" if row["alarms"] else ""
        click.echo(f"{row['id']}  {row['device']:40} {row['state']}{alarm}")


@token.command("revoke")
@_CONFIG
@click.argument("token_id")
def revoke(config_path: Path, token_id: str) -> None:
    """Make an unused token useless."""
    with _enrolment(config_path) as (_, enrolment):
        try:
            found = enrolment.revoke(bytes.fromhex(token_id))
        except ValueError:
            found = False
    if not found:
        raise TrustError(f"no unused token {token_id}", hint="edgepriv-gateway token list shows them")
    click.echo(f"{token_id}: revoked")


@token.command("export")
@_CONFIG
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def export(config_path: Path, folder: Path) -> None:
    """Write the public keys of enrolled devices to FOLDER.

    They are for `edgepriv owner sign`; the owner should check them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _enrolment(config_path) as (_, enrolment):
        devices = enrolment.devices()
    for public in devices:
        path = folder / f"{public.name}.pub"
        path.write_text(public.to_text())
        click.echo(str(path))


@token.command("ca")
@_CONFIG
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Where the broker reads it; - prints it.",
)
def ca(config_path: Path, out: Path) -> None:
    """Write the certificate of the devices' CA to a file.

    It is made on first use, and is for the broker's device listener.
    """
    with _enrolment(config_path) as (_, enrolment):
        certificate = enrolment.ca.certificate
    if str(out) == "-":
        click.echo(certificate, nl=False)
        return
    try:
        out.write_bytes(certificate)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from None
    click.echo(f"{out}: the CA of this gateway's devices")


@token.command("serve")
@_CONFIG
@click.option("--listen", default="127.0.0.1:8443", show_default=True, help="HOST:PORT; port 0 takes a free one.")
@click.option("--host", "hosts", multiple=True, help="Names or addresses that devices use for this server; repeatable.")
def serve(config_path: Path, listen: str, hosts: tuple[str, ...]) -> None:
    """Serve enrolment and renewal over HTTPS until it is told to stop."""
    from gateway.enrol_server import EnrolServer

    host, port = _address(listen)
    with _enrolment(config_path) as (config, enrolment):
        server = EnrolServer(
            (host, port), enrolment, (*hosts, host), lambda: _trust(config.gateway.trust), lambda: _revoked(config)
        )
        click.echo(f"enrolment at https://{host}:{server.server_address[1]}", err=True)
        try:
            server.serve_forever()
        finally:
            server.server_close()


def _address(listen: str) -> tuple[str, int]:
    parts = urlsplit(f"//{listen}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None:
        raise ConfigError(f"{listen!r} is not HOST:PORT", hint="--listen 0.0.0.0:8443")
    return host, port


def _trust(path: Path) -> bytes:
    """The current list, unread: the device verifies it against the owner key in its token."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _revoked(config: Config) -> tuple[str, ...]:
    """Names that the owner's list revokes; none where it cannot be read: a certificate alone makes nobody believed."""
    from edgepriv.keys import load_public
    from edgepriv.wire.trust import read_trust

    try:
        owner = load_public(config.gateway.owner)
        return read_trust(_trust(config.gateway.trust), owner.ed25519, now=time.time()).revoked
    except EdgeprivError:
        return ()


@contextmanager
def _enrolment(config_path: Path) -> Iterator[tuple[Config, Enrolment]]:
    from gateway.config import load

    try:
        from gateway.enrol import Enrolment
    except ImportError as error:
        raise MissingDependencyError(
            "enrolment needs the cryptography package", hint="pip install 'edgepriv[gateway]'"
        ) from error
    config = load(config_path)
    ca = config.broker.ca
    broker_ca = ca.read_bytes() if ca and ca.is_file() else b""
    with as_state_owner(config):
        enrolment = Enrolment(config.gateway.state / "enrolment", clock=time.time, broker_ca=broker_ca)
        try:
            yield config, enrolment
        finally:
            enrolment.close()
