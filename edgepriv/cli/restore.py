"""``edgepriv restore``: open a protected model with a permission, in memory, and say what runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from edgepriv.errors import ConfigError, MissingFileError


@click.command()
@click.option("--model", "folder", required=True, type=click.Path(path_type=Path), help="The bundle's folder.")
@click.option("--permission", required=True, type=click.Path(path_type=Path), help="Permission for this device.")
@click.option("--key", required=True, type=click.Path(path_type=Path), help="This device's private key file.")
@click.option("--issuer", required=True, type=click.Path(path_type=Path), help="The issuer's .pub file.")
@click.option("--level", type=int, help="Open less than the permission allows.")
@click.option("--export-unprotected", type=click.Path(path_type=Path), help="WRITES THE TRUE WEIGHTS to a new folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def restore(
    folder: Path,
    permission: Path,
    key: Path,
    issuer: Path,
    level: int | None,
    export_unprotected: Path | None,
    as_json: bool,
) -> None:
    """Verify, decrypt and patch the model in memory; nothing in clear is written unless asked for by name."""
    from edgepriv.keys import load_identity, load_public
    from edgepriv.selective_encryption import bundle_files
    from edgepriv.selective_encryption.restore import open_level

    if not permission.is_file():
        raise MissingFileError(f"no such permission: {permission}", hint="ask the owner: edgepriv grant")
    pinned = [load_public(issuer).ed25519]
    paper, signed = bundle_files.read_manifest(folder, pinned)
    stored = bundle_files.read_stored(folder, paper)
    started = time.process_time()
    opened = open_level(
        signed, permission.read_bytes(), stored, load_identity(key), pinned, now_s=int(time.time()), level=level
    )
    spent_s = time.process_time() - started
    report = {
        "schema": "edgepriv.restore/1",
        "model": paper.name,
        "version": paper.binding.version,
        "level": opened.level,
        "levels": len(paper.levels),
        "sha256": opened.digest.hex(),
        "cpu_s": round(spent_s, 4),
    }
    if export_unprotected is not None:
        if export_unprotected.exists():
            raise ConfigError(f"{export_unprotected} exists", hint="name a new folder")
        export_unprotected.mkdir(mode=0o700)
        for name, content in zip(opened.names, opened.files, strict=True):
            (export_unprotected / name).write_bytes(content.tobytes())
    opened.wipe()
    text = f"{paper.name}: level {opened.level} of {len(paper.levels)} opened in memory, SHA-256 {report['sha256']}"
    click.echo(json.dumps(report) if as_json else text)
