"""Delivery metadata: The Update Framework over a folder, the owner being the root (python-tuf, extra ``ota``).

A *repository* is a folder ``metadata/`` + ``targets/`` that may travel over anything: the gateway's objects, a
mirror, a memory stick. TUF gives what a signature alone does not: no rollback to older metadata, no freeze beyond
its expiry, no mix of old and new files. The root file is pinned by the owner: ``root.json.owner`` is the owner's
Ed25519 signature over the first root, and a device believes no other first root.

Rules: this runs as a one-shot process (`edgepriv model pull`, `install`), because TUF costs tens of MB; the long-lived
runtime never imports it. The keys of the TUF roles are raw Ed25519 seeds in the owner's folder.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepriv import primitives
from edgepriv.errors import (
    AuthenticationError,
    KeyFileError,
    MissingDependencyError,
    MissingFileError,
    TrustError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgepriv.keys import Identity

ROOT_USE = "tuf-root"
ROLES = ("root", "timestamp", "snapshot", "targets")
EXPIRES = {
    "root": dt.timedelta(days=365),
    "targets": dt.timedelta(days=90),
    "snapshot": dt.timedelta(days=90),
    "timestamp": dt.timedelta(days=14),
}


def _tuf() -> Any:
    try:
        from tuf.api import metadata
    except ImportError as error:
        raise MissingDependencyError("delivery needs python-tuf", hint="pip install 'edgepriv[ota]'") from error
    return metadata


class SeedSigner:
    """Signs metadata with a raw Ed25519 seed through our own primitives: what `Metadata.sign` needs of a signer."""

    def __init__(self, seed: bytes) -> None:
        from securesystemslib.signer import SSlibKey

        public = primitives.backend().ed25519_public(seed).hex()
        key_id = hashlib.sha256(public.encode()).hexdigest()
        self._seed, self.public_key = seed, SSlibKey(key_id, "ed25519", "ed25519", {"public": public})

    def sign(self, payload: bytes) -> Any:
        """A signature as TUF metadata holds it."""
        from securesystemslib.signer import Signature

        return Signature(self.public_key.keyid, primitives.backend().ed25519_sign(self._seed, payload).hex())


def _signers(seed_file: Path) -> dict[str, SeedSigner]:
    """One Ed25519 signer for each TUF role; the seeds are made at first use (0600)."""
    return {role: SeedSigner(seed) for role, seed in _seeds(seed_file).items()}


def _seeds(path: Path) -> dict[str, bytes]:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = {role: primitives.random_bytes(32).hex() for role in ROLES}
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(made, file)
    if path.stat().st_mode & 0o077:
        raise KeyFileError(f"{path} can be read by others", hint=f"chmod 600 {path}")
    try:
        return {role: bytes.fromhex(value) for role, value in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError):
        raise KeyFileError(f"{path} is malformed") from None


def publish(
    repository: Path,
    delivery: Path,
    name: str,
    owner: Identity,
    seeds: Path,
    *,
    now: dt.datetime,
    custom: dict[str, Any],
) -> Path:
    """Add or replace a target and sign new metadata; makes the repository at first use.

    Args:
        repository: folder.
        delivery: the target's file; it is moved into the repository.
        name: target name, for example ``eye.delivery``.
        owner: pins the first root.
        seeds: file of the TUF role keys.
        now: UTC.
        custom: goes into the target's metadata.

    Returns:
        The target file.
    """
    api, signers = _tuf(), _signers(seeds)
    metadata, targets = repository / "metadata", repository / "targets"
    metadata.mkdir(parents=True, exist_ok=True)
    targets.mkdir(exist_ok=True)
    if not (metadata / "1.root.json").is_file():
        _make_root(api, metadata, signers, owner, now)
    role = _latest(api, metadata, "targets") or api.Metadata(api.Targets())
    target = api.TargetFile.from_file(name, str(delivery), ["sha256"])
    path = targets / f"{target.hashes['sha256']}.{name}"
    shutil.move(delivery, path)
    target.unrecognized_fields["custom"] = custom
    role.signed.targets[name] = target
    version = _save(role, "targets", metadata, signers, now)
    snapshot = _latest(api, metadata, "snapshot") or api.Metadata(api.Snapshot())
    snapshot.signed.meta["targets.json"] = api.MetaFile(version)
    version = _save(snapshot, "snapshot", metadata, signers, now)
    timestamp = _latest(api, metadata, "timestamp") or api.Metadata(api.Timestamp())
    timestamp.signed.snapshot_meta = api.MetaFile(version)
    _save(timestamp, "timestamp", metadata, signers, now)
    return path


def _make_root(api: Any, metadata: Path, signers: dict[str, Any], owner: Identity, now: dt.datetime) -> None:
    root = api.Root(consistent_snapshot=True, expires=_seconds(now + EXPIRES["root"]))
    for role in ROLES:
        root.add_key(signers[role].public_key, role)
    signed = api.Metadata(root)
    signed.sign(signers["root"])
    raw = signed.to_bytes()
    (metadata / "1.root.json").write_bytes(raw)
    (metadata / "root.json.owner").write_bytes(owner.sign(ROOT_USE, raw))


def _latest(api: Any, metadata: Path, role: str) -> Any:
    if role == "timestamp":
        path = metadata / "timestamp.json"
        return api.Metadata.from_file(str(path)) if path.is_file() else None
    number = _newest(metadata, role)
    return api.Metadata.from_file(str(metadata / f"{number}.{role}.json")) if number else None


def _newest(metadata: Path, role: str) -> int:
    return max((int(path.name.split(".")[0]) for path in metadata.glob(f"*.{role}.json")), default=0)


def _save(role: Any, name: str, metadata: Path, signers: dict[str, Any], now: dt.datetime) -> int:
    file = metadata / ("timestamp.json" if name == "timestamp" else f"{role.signed.version + 1}.{name}.json")
    role.signed.version += 1
    role.signed.expires = _seconds(now + EXPIRES[name])
    role.sign(signers[name])
    part = file.with_suffix(".part")
    role.to_file(str(part))
    part.replace(file)
    return int(role.signed.version)


def _seconds(moment: dt.datetime) -> dt.datetime:
    return moment.astimezone(dt.timezone.utc).replace(microsecond=0)


def pull(repository: Path, name: str, owner: bytes, state: Path) -> tuple[Path, dict[str, Any]]:
    """Verify the metadata and the target as a device; returns the verified file and its custom metadata.

    Args:
        repository: a copy of the repository, complete or growing.
        name: target name.
        owner: the pinned owner's Ed25519 key.
        state: the device's folder for trusted metadata and the target; survives between calls.

    Raises:
        MissingFileError: the repository or the target is not there.
        TrustError: unsigned, rolled back, expired or mixed metadata.
    """
    _tuf()
    from tuf.api.exceptions import DownloadError, RepositoryError
    from tuf.ngclient import Updater

    root = _pinned_root(repository / "metadata", owner)
    trusted, place = state / "metadata", state / "target"
    trusted.mkdir(parents=True, exist_ok=True, mode=0o700)
    place.mkdir(exist_ok=True, mode=0o700)
    try:
        updater = Updater(
            str(trusted), "metadata/", str(place), "targets/", fetcher=_folder_fetcher(repository), bootstrap=root
        )
        updater.refresh()
        info = updater.get_targetinfo(name)
        if info is None:
            raise MissingFileError(f"the repository offers no {name!r}")
        path = Path(updater.download_target(info, str(place / hashlib.sha256(name.encode()).hexdigest())))
    except (RepositoryError, DownloadError, ValueError, OSError) as error:
        raise TrustError(f"the delivery metadata is refused: {type(error).__name__}: {error}") from error
    return path, dict(info.custom or {})


def _pinned_root(metadata: Path, owner: bytes) -> bytes:
    try:
        root, signature = (metadata / "1.root.json").read_bytes(), (metadata / "root.json.owner").read_bytes()
    except OSError as error:
        raise MissingFileError(f"no delivery repository at {metadata.parent}") from error
    try:
        primitives.verify(owner, ROOT_USE, root, signature)
    except AuthenticationError as error:
        raise TrustError("the repository's root is not signed by the pinned owner") from error
    return root


def _folder_fetcher(repository: Path) -> Any:
    """A TUF fetcher that reads files of the repository's folder."""
    from tuf.api.exceptions import DownloadHTTPError
    from tuf.ngclient import FetcherInterface

    class FolderFetcher(FetcherInterface):  # type: ignore[misc]
        """Reads below the repository only."""

        def _fetch(self, url: str) -> Iterator[bytes]:
            path = (repository / url).resolve()
            if repository.resolve() not in path.parents or not path.is_file():
                raise DownloadHTTPError("not found", 404)
            return _blocks(path)

    return FolderFetcher()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


def shipped_files(repository: Path, name: str) -> dict[str, Path]:
    """What a device needs of a repository to pull one target: newest metadata, all roots, the target.

    Returns:
        Path below the repository -> file, small files first.

    Raises:
        MissingFileError: the repository does not offer the target.
    """
    api, metadata = _tuf(), repository / "metadata"
    role = _latest(api, metadata, "targets")
    if role is None or name not in role.signed.targets:
        raise MissingFileError(f"{repository} offers no {name!r}", hint="edgepriv model publish")
    newest = [f"{_newest(metadata, part)}.{part}.json" for part in ("snapshot", "targets")]
    roots = sorted(path.name for path in metadata.glob("*.root.json"))
    names = [*roots, "root.json.owner", "timestamp.json", *newest]
    target = f"targets/{role.signed.targets[name].hashes['sha256']}.{name}"
    return {**{f"metadata/{n}": metadata / n for n in names}, target: repository / target}
