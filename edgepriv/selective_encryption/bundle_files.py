"""A protected model as a folder: what lies where, read and written. The only files-touching part, used by the CLI.

``manifest.cbor``, ``carrier.onnx`` (and ``carrier.weights``; with ``.sealed`` in the sealed modes), ``level-N.segment``
are public. ``owner/`` (0700) holds the top level's key and the decoy secret (0600): never ship it.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError, KeyFileError, MissingFileError
from edgepriv.keys import load_public
from edgepriv.selective_encryption import manifest

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from edgepriv.keys import PublicIdentity

MANIFEST = "manifest.cbor"
OWNER = "owner"
SECRETS = "secrets.json"
ISSUER = "signed-by.pub"


def write_bundle(
    folder: Path, files: Mapping[str, Any], signed: bytes, secrets: Mapping[str, bytes], issuer: PublicIdentity
) -> None:
    """Write a bundle; the manifest comes last, so that a folder with one is whole.

    Raises:
        KeyFileError: the folder already holds the secrets of a protected model.
    """
    owner = folder / OWNER
    owner.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner.chmod(0o700)
    text = json.dumps({name: value.hex() for name, value in secrets.items()}, indent=1)
    try:
        fd = os.open(owner / SECRETS, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise KeyFileError(f"{folder} holds a protected model already", hint="choose another --out") from error
    with os.fdopen(fd, "w") as file:
        file.write(text)
    (owner / ISSUER).write_text(issuer.to_text())
    for name, content in files.items():  # bytes, or uint8 arrays that may be gigabytes
        with (folder / name).open("wb") as file:
            file.write(memoryview(content))
    (folder / MANIFEST).write_bytes(signed)


def read_secrets(folder: Path) -> dict[str, bytes]:
    """The owner's secrets of a bundle.

    Raises:
        MissingFileError: this folder is not the owner's copy.
        KeyFileError: readable by others, or malformed.
    """
    path = folder / OWNER / SECRETS
    if not path.is_file():
        raise MissingFileError(f"{folder} has no owner's secrets", hint="give the folder that `protect` wrote")
    if path.stat().st_mode & 0o077:
        raise KeyFileError(f"{path} can be read by others", hint=f"chmod 600 {path}")
    try:
        return {name: bytes.fromhex(value) for name, value in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError, TypeError):
        raise KeyFileError(f"{path} is malformed") from None


def read_issuer(folder: Path) -> bytes:
    """Ed25519 key of the issuer that signed the owner's copy."""
    require_bundle(folder)
    return load_public(folder / OWNER / ISSUER).ed25519


def require_bundle(folder: Path) -> None:
    """Raise MissingFileError unless the folder holds a protected model."""
    if not (folder / MANIFEST).is_file():
        raise MissingFileError(f"{folder} holds no protected model", hint="it must hold manifest.cbor")


def read_manifest(folder: Path, issuers: Collection[bytes]) -> tuple[manifest.Manifest, bytes]:
    """Read and verify a bundle's manifest; returns it with its signed bytes."""
    require_bundle(folder)
    signed = (folder / MANIFEST).read_bytes()
    return manifest.decode_manifest(signed, issuers), signed


def read_stored(folder: Path, paper: manifest.Manifest, *, level: int | None = None) -> dict[str, Any]:
    """Read the bundle's files into memory for restoring; nothing is ever written back.

    Raises:
        MissingFileError: a file is not there.
        DataError: a file has not its signed size.
    """
    stored: dict[str, Any] = {}
    for entry in paper.files:
        path = folder / paper.stored_name(entry)
        if not path.is_file():
            raise MissingFileError(f"the bundle lacks {path.name}", hint="fetch the model again")
        if not paper.sealed and path.stat().st_size != entry.size:
            raise DataError(f"{path.name} has {path.stat().st_size} bytes, the manifest says {entry.size}")
        stored[path.name] = np.fromfile(path, np.uint8)  # huge pages: cheaper than copy-on-write page by page
    for item in paper.levels[:level]:
        path = folder / item.segment.name
        if not path.is_file():
            raise MissingFileError(f"the bundle lacks {path.name}", hint="fetch the model again")
        stored[path.name] = path.read_bytes()
    return stored
