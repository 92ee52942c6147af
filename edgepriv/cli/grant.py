"""``edgepriv grant``: permit one device to open a protected model up to a level, until a date."""

from __future__ import annotations

import datetime as dt
import json
import time
from pathlib import Path

import click

from edgepriv.errors import ConfigError


@click.command()
@click.option("--model", "folder", required=True, type=click.Path(path_type=Path), help="Folder that protect wrote.")
@click.option("--level", required=True, type=int, help="Highest level that the device may open.")
@click.option("--device", required=True, type=click.Path(path_type=Path), help="The device's .pub file.")
@click.option("--expires", required=True, help="Date, 2027-01-31, or 2027-01-31T12:00 (UTC).")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Permission file to write.")
@click.option("--issuer", type=click.Path(path_type=Path), help="Key that signs; default: DIR/owner/issuer.key.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def grant(folder: Path, level: int, device: Path, expires: str, out: Path, issuer: Path | None, as_json: bool) -> None:
    """Wrap a level's key to a device and sign the permission."""
    from edgepriv.keys import load_identity, load_public
    from edgepriv.selective_encryption import bundle_files, levels, manifest

    bundle_files.require_bundle(folder)
    signer = load_identity(issuer or folder / "owner" / "issuer.key")
    paper, _ = bundle_files.read_manifest(folder, [signer.public.ed25519])
    paper.level(level)
    secrets = bundle_files.read_secrets(folder)
    key = levels.key_at(secrets["key"], paper.binding.model_id, len(paper.levels), level)
    who, until = load_public(device), timestamp(expires)
    signed = manifest.grant(paper.binding, level, key, who, signer, now_s=int(time.time()), expires_s=until)
    out.write_bytes(signed)
    report = {"schema": "edgepriv.grant/1", "device": who.name, "level": level, "expires": until, "file": str(out)}
    text = f"{out}: {who.name} may open {paper.name} up to level {level} of {len(paper.levels)} until {expires}"
    click.echo(json.dumps(report) if as_json else text)


def timestamp(text: str) -> int:
    """Seconds since 1970 of an ISO date, in UTC unless it says otherwise.

    Raises:
        ConfigError: not a date.
    """
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--expires {text!r} is not a date", hint="for example 2027-01-31") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.timezone.utc)
    return int(moment.timestamp())
