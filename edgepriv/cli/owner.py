"""``edgepriv owner``: the offline root that says who takes part."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv import files
from edgepriv.cli import LazyGroup
from edgepriv.errors import ConfigError, MissingFileError, TrustError

if TYPE_CHECKING:
    from edgepriv.keys import Identity, PublicIdentity
    from edgepriv.wire.trust import TrustList

OWNER_FILE = "owner.key"
FILE = click.Path(path_type=Path, dir_okay=False)


@click.group(cls=LazyGroup)
def owner() -> None:
    """The offline root key: it signs trust.cbor, the one list that all parties believe."""


@owner.command("new")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for the key.")
@click.option("--json", "as_json", is_flag=True)
def new(out: Path, as_json: bool) -> None:
    """Make the owner's key: OUT/owner.key (secret, offline) and OUT/owner.key.pub (to be pinned everywhere)."""
    from edgepriv.keys import Identity, public_path

    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {out}: {error.strerror}") from None
    path = out / OWNER_FILE
    Identity.new("owner", "owner").save(path)
    if as_json:
        click.echo(json.dumps({"schema": "edgepriv.owner-new/1", "key": str(path), "public": str(public_path(path))}))
    else:
        click.echo(f"{path}: keep it offline\n{public_path(path)}: pin it on every device, recipient and service")


@owner.command("sign")
@click.argument("parties", nargs=-1, type=FILE)
@click.option("--key", required=True, type=FILE, help="The owner's private key.")
@click.option("--trust", required=True, type=FILE, help="trust.cbor to make or to extend.")
@click.option("--policy", type=FILE, help='TOML: one table for each device, or ["*"] for all others.')
@click.option("--days", default=365, show_default=True, type=click.IntRange(1, 3660), help="Days until it expires.")
@click.option("--replace", is_flag=True, help="Give a listed party new keys (after a loss or a scheduled rotation).")
@click.option("--json", "as_json", is_flag=True)
def sign(
    parties: tuple[Path, ...], key: Path, trust: Path, policy: Path | None, days: int, replace: bool, as_json: bool
) -> None:
    """Add PARTIES (their .pub files: devices, recipients, gateways, risk services) and sign the next version."""
    from edgepriv.keys import load_public

    root, listed = _load(key, trust, missing_ok=True)
    added = [load_public(path) for path in parties]
    now = int(time.time())
    merged = _merge(listed.parties if listed else (), added, listed.revoked if listed else (), replace=replace)
    signed = _next(
        listed,
        issued=now,
        expires=now + days * 86400,
        parties=merged,
        policy=_policy(policy, merged) if policy else (listed.policy if listed else {}),
    )
    _write(signed, root, trust, as_json=as_json)


@owner.command("revoke")
@click.argument("names", nargs=-1, required=True)
@click.option("--key", required=True, type=FILE, help="The owner's private key.")
@click.option("--trust", required=True, type=FILE, help="trust.cbor to extend.")
@click.option("--json", "as_json", is_flag=True)
def revoke(names: tuple[str, ...], key: Path, trust: Path, as_json: bool) -> None:
    """Revoke parties by NAME (dev-cam1, op-ann) for good and sign the next version."""
    root, listed = _load(key, trust, missing_ok=False)
    assert listed is not None  # noqa: S101 - missing_ok=False; tells the type checker
    known = {party.name for party in listed.parties}
    if unknown := sorted(set(names) - known):
        raise TrustError(f"{unknown[0]} is not in the trust list", hint="edgepriv owner show lists the names")
    revoked = tuple(sorted({*listed.revoked, *names}))
    _write(_next(listed, issued=int(time.time()), revoked=revoked), root, trust, as_json=as_json)


@owner.command("show")
@click.option("--key", required=True, type=FILE, help="The owner's key or its .pub file.")
@click.option("--trust", required=True, type=FILE)
@click.option("--json", "as_json", is_flag=True)
def show(key: Path, trust: Path, as_json: bool) -> None:
    """Verify a trust list and show what it says."""
    from edgepriv.keys import load_public

    listed = _read(load_public(key).ed25519, trust)
    document = _document(listed, trust)
    if as_json:
        click.echo(json.dumps(document))
        return
    expires = time.strftime("%Y-%m-%d", time.gmtime(listed.expires))
    click.echo(f"version {listed.version}, expires {expires}, policy for {len(listed.policy)} entries")
    for row in document["parties"]:
        click.echo(f"{row['role']:10} {row['name']:40} {'revoked' if row['revoked'] else row['key_id']}")


def _load(key: Path, trust: Path, *, missing_ok: bool) -> tuple[Identity, TrustList | None]:
    from edgepriv.keys import load_identity

    root = load_identity(key)
    if root.public.role != "owner":
        raise ConfigError(f"{key} is the key of {root.name}, not the owner's")
    if not trust.is_file():
        if missing_ok:
            return root, None
        raise MissingFileError(f"no such trust list: {trust}")
    return root, _read(root.public.ed25519, trust)


def _read(owner_ed25519: bytes, trust: Path) -> TrustList:
    """Verify a list; an expired one may be read here, because signing a new one is the remedy."""
    from edgepriv.wire.trust import read_trust

    try:
        raw = trust.read_bytes()
    except OSError as error:
        raise MissingFileError(f"cannot read the trust list {trust}: {error.strerror}") from None
    return read_trust(raw, owner_ed25519, now=0)


def _next(listed: TrustList | None, **changes: Any) -> TrustList:
    import dataclasses

    from edgepriv.wire.trust import TrustList

    if listed is None:
        return TrustList(version=1, **changes)
    return dataclasses.replace(listed, version=listed.version + 1, **changes)


def _merge(
    listed: tuple[PublicIdentity, ...], added: list[PublicIdentity], revoked: tuple[str, ...], *, replace: bool
) -> tuple[PublicIdentity, ...]:
    by_name = {party.name: party for party in listed}
    for party in added:
        if party.role == "owner":
            raise ConfigError("the owner is pinned, not listed")
        if party.name in revoked:
            raise TrustError(f"{party.name} was revoked for good", hint="enrol it under a new name")
        if by_name.get(party.name, party) != party and not replace:
            raise TrustError(f"{party.name} is listed with other keys", hint="--replace gives it new ones")
        by_name[party.name] = party
    return tuple(sorted(by_name.values(), key=lambda party: (party.role, party.name)))


def _policy(path: Path, parties: tuple[PublicIdentity, ...]) -> dict[str, dict[str, Any]]:
    from edgepriv.cipher.policy import check_names, check_policy

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        value = tomllib.loads(path.read_text())
    except OSError as error:
        raise MissingFileError(f"cannot read the policy {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    check_policy(value)
    check_names(value, parties)
    return value


def _write(trust: TrustList, root: Identity, path: Path, *, as_json: bool) -> None:
    from edgepriv.wire.trust import sign_trust

    raw = sign_trust(trust, root)
    try:
        files.replace(path, raw)
    except OSError as error:
        raise ConfigError(f"cannot write the trust list {path}: {error.strerror}") from None
    if as_json:
        click.echo(json.dumps(_document(trust, path)))
    else:
        click.echo(f"{path}: version {trust.version}, {len(trust.parties)} parties, {len(trust.revoked)} revoked")


def _document(trust: TrustList, path: Path) -> dict[str, Any]:
    parties = [
        {"role": p.role, "name": p.name, "key_id": p.key_id.hex(), "revoked": p.name in trust.revoked}
        for p in trust.parties
    ]
    return {
        "schema": "edgepriv.trust/1",
        "path": str(path),
        "version": trust.version,
        "issued": trust.issued,
        "expires": trust.expires,
        "parties": parties,
        "policy": trust.policy,
    }
