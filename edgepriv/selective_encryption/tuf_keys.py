"""The keys of a delivery repository's TUF roles: raw Ed25519 seeds in one file (0600) beside the owner's key.

The file holds one set of seeds for each repository, under the SHA-256 of the repository's first root: no two
repositories share a key, so metadata of one never passes for metadata of another. A device follows those keys through
all versions of a model, so they live with the owner and not with one version's bundle. Losing the file means that
the devices must be given a new repository by hand: back it up with the owner's key.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from edgepriv import files, primitives
from edgepriv.errors import KeyFileError

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = "edgepriv.tuf-keys/1"
ROLES = ("root", "timestamp", "snapshot", "targets")
ANY = ""  # an earlier form of the file: one set, which may be any repository's

Seeds = dict[str, bytes]


def default_path(owner_key: Path) -> Path:
    """Where the role keys lie if nobody says otherwise: beside the owner's key file."""
    return owner_key.with_name(owner_key.name + ".tuf.json")


def new_seeds() -> Seeds:
    """A fresh set."""
    return {role: primitives.random_bytes(32) for role in ROLES}


def find(path: Path, first_root: bytes) -> Seeds | None:
    """The set of the repository with this first root; None where the file has none, or is not there.

    Raises:
        KeyFileError: the file can be read by others, or is malformed.
    """
    held = _read(path)
    return held.get(_name(first_root), held.get(ANY))


def keep(path: Path, first_root: bytes, seeds: Seeds) -> None:
    """Add the set of a repository, durably; sets that are there stay."""
    held = {**_read(path), _name(first_root): seeds}
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    body = {name: {role: seed.hex() for role, seed in one.items()} for name, one in held.items()}
    text = json.dumps({"schema": SCHEMA, "repositories": body}, indent=1)
    files.replace(path, text.encode(), mode=0o600)


def _name(first_root: bytes) -> str:
    return hashlib.sha256(first_root).hexdigest()


def _read(path: Path) -> dict[str, Seeds]:
    if not path.is_file():
        return {}
    if path.stat().st_mode & 0o077:
        raise KeyFileError(f"{path} can be read by others", hint=f"chmod 600 {path}")
    try:
        body = json.loads(path.read_text())
        sets = body["repositories"] if body.get("schema") == SCHEMA else {ANY: body}
        return {name: {role: bytes.fromhex(one[role]) for role in ROLES} for name, one in sets.items()}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise KeyFileError(f"{path} holds no keys of delivery roles", hint="restore it from a copy") from None
