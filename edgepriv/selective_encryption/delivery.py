"""Delivery metadata: The Update Framework over a folder, the owner being the root (python-tuf, extra ``ota``).

A *repository* is a folder ``metadata/`` + ``targets/`` that may travel over anything: the gateway's objects, a
mirror, a memory stick. TUF gives what a signature alone does not: no rollback to older metadata, no freeze beyond
its expiry, no mix of old and new files. The root file is pinned by the owner: ``root.json.owner`` is the owner's
Ed25519 signature over the first root. A device keeps the SHA-256 of the first root that it followed and believes no
other one, not even one that the owner signed: another repository would be a way back to older models.

Rules: this runs as a one-shot process (`edgepriv model pull`, `install`), because TUF costs tens of MB; the long-lived
runtime never imports it. The keys of the TUF roles lie with the owner's key (`tuf_keys`), and nothing is signed by keys
that the repository's newest root does not list. A device judges expiry by its own time floor, not by its clock.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepriv import files, primitives
from edgepriv.errors import (
    AuthenticationError,
    DataError,
    KeyFileError,
    MissingDependencyError,
    MissingFileError,
    TrustError,
)
from edgepriv.selective_encryption import tuf_keys
from edgepriv.selective_encryption.tuf_keys import ROLES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgepriv.keys import Identity

ROOT_USE = "tuf-root"
FIRST_ROOT, OWNERS_MARK, FOLLOWED = "1.root.json", "root.json.owner", "first-root"
EXPIRES = {
    "root": dt.timedelta(days=365),
    "targets": dt.timedelta(days=90),
    "snapshot": dt.timedelta(days=90),
    "timestamp": dt.timedelta(days=14),
}
RENEW_ROOT = dt.timedelta(days=180)  # a root with less time left is followed by a new one when something is published


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


def check_keys(repository: Path, owner: Identity, keys: Path, *, earlier: Path | None = None) -> None:
    """Refuse keys that a repository's devices do not know, before anything is written.

    Args:
        repository: folder; one that has no root yet is fine, it gets keys of its own.
        owner: must be the one who pinned the first root.
        keys: file of the TUF role keys, see `tuf_keys`.
        earlier: where an earlier edgepriv kept them, in a bundle's folder; taken over into ``keys`` if they fit.

    Raises:
        KeyFileError: the keys, or the owner's key, are not those of this repository.
    """
    _signers(_tuf(), repository / "metadata", owner, keys, earlier)


def _signers(
    api: Any, metadata: Path, owner: Identity, keys: Path, earlier: Path | None = None
) -> dict[str, SeedSigner] | None:
    """One checked signer for each role; None where the repository has no root yet."""
    if not _newest(metadata, "root"):
        return None
    try:
        first, root = _pinned_root(metadata, owner.public.ed25519), _latest(api, metadata, "root").signed
    except TrustError as error:
        raise KeyFileError(
            f"{metadata.parent} was made by another owner's key", hint="--owner, or a new one"
        ) from error
    seeds = tuf_keys.find(keys, first)
    old = None if seeds or earlier is None else tuf_keys.find(earlier, first)
    signers = {role: SeedSigner(seed) for role, seed in (seeds or old or {}).items()}
    for role in ROLES:
        if role not in signers or signers[role].public_key.keyid not in root.roles[role].keyids:
            raise KeyFileError(
                f"{keys} has not the key that {metadata.parent} lists for its {role}: devices would refuse the result",
                hint="--tuf-keys FILE with the keys that this repository was made with; "
                "an earlier edgepriv left them in owner/tuf.json of the first version's folder",
            )
    if old:
        tuf_keys.keep(keys, first, old)
    return signers


def publish(
    repository: Path,
    delivery: Path,
    name: str,
    owner: Identity,
    keys: Path,
    *,
    now: dt.datetime,
    custom: dict[str, Any],
) -> Path:
    """Add or replace a target and sign new metadata; makes the repository at first use, renews a root that grows old.

    Args:
        repository: folder.
        delivery: the target's file; it is moved into the repository.
        name: target name, for example ``eye.delivery``.
        owner: pins the first root.
        keys: file of the TUF role keys; a new repository's are added to it.
        now: UTC.
        custom: goes into the target's metadata.

    Returns:
        The target file.

    Raises:
        KeyFileError: see `check_keys`; nothing was written.
    """
    api, metadata, targets = _tuf(), repository / "metadata", repository / "targets"
    signers = _signers(api, metadata, owner, keys)
    metadata.mkdir(parents=True, exist_ok=True)
    targets.mkdir(exist_ok=True)
    if signers is None:
        signers = _make_root(api, metadata, keys, owner, now)
    _renew_root(api, metadata, signers, now)
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


def _make_root(api: Any, metadata: Path, keys: Path, owner: Identity, now: dt.datetime) -> dict[str, SeedSigner]:
    """A first root with keys of its own; they and the owner's mark are on the disk before it."""
    seeds = tuf_keys.new_seeds()
    signers = {role: SeedSigner(seed) for role, seed in seeds.items()}
    root = api.Root(consistent_snapshot=True, expires=_seconds(now + EXPIRES["root"]))
    for role in ROLES:
        root.add_key(signers[role].public_key, role)
    signed = api.Metadata(root)
    signed.sign(signers["root"])
    raw = signed.to_bytes()
    tuf_keys.keep(keys, raw, seeds)
    files.replace(metadata / OWNERS_MARK, owner.sign(ROOT_USE, raw))
    files.replace(metadata / FIRST_ROOT, raw)
    return signers


def _renew_root(api: Any, metadata: Path, signers: dict[str, SeedSigner], now: dt.datetime) -> None:
    root = _latest(api, metadata, "root")
    if root.signed.expires - now < RENEW_ROOT:
        _save(root, "root", metadata, signers, now)


def _latest(api: Any, metadata: Path, role: str) -> Any:
    path = metadata / ("timestamp.json" if role == "timestamp" else f"{_newest(metadata, role)}.{role}.json")
    from tuf.api.serialization import DeserializationError

    try:
        return api.Metadata.from_file(str(path)) if path.is_file() else None
    except DeserializationError as error:
        raise DataError(f"{path} is no delivery metadata", hint="restore the repository from a copy") from error


def _newest(metadata: Path, role: str) -> int:
    numbers = [path.name.split(".")[0] for path in metadata.glob(f"*.{role}.json")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _save(role: Any, name: str, metadata: Path, signers: dict[str, Any], now: dt.datetime) -> int:
    file = metadata / ("timestamp.json" if name == "timestamp" else f"{role.signed.version + 1}.{name}.json")
    role.signed.version += 1
    role.signed.expires = _seconds(now + EXPIRES[name])
    role.sign(signers[name])
    files.replace(file, role.to_bytes())
    return int(role.signed.version)


def _seconds(moment: dt.datetime) -> dt.datetime:
    return moment.astimezone(dt.timezone.utc).replace(microsecond=0)


def pull(
    repository: Path, name: str, owner: bytes, state: Path, *, now_s: int | None = None
) -> tuple[Path, dict[str, Any]]:
    """Verify the metadata and the target as a device; returns the verified file and its custom metadata.

    Args:
        repository: a copy of the repository, complete or growing.
        name: target name.
        owner: the pinned owner's Ed25519 key.
        state: the device's folder for trusted metadata and the target; survives between calls.
        now_s: the device's time floor, seconds since 1970, that expiry is judged by; the system's clock if not given.

    Raises:
        MissingFileError: the repository or the target is not there.
        TrustError: unsigned, rolled back, expired or mixed metadata, or another repository than was followed so far.
    """
    _tuf()
    from tuf.api.exceptions import DownloadError, RepositoryError

    root = _pinned_root(repository / "metadata", owner)
    _check_followed(state, root)
    trusted, place = state / "metadata", state / "target"
    trusted.mkdir(parents=True, exist_ok=True, mode=0o700)
    place.mkdir(exist_ok=True, mode=0o700)
    try:
        updater = _updater(repository, trusted, place, root, now_s)
        updater.refresh()
        files.replace(state / FOLLOWED, hashlib.sha256(root).hexdigest().encode())
        info = updater.get_targetinfo(name)
        if info is None:
            raise MissingFileError(f"the repository offers no {name!r}")
        path = Path(updater.download_target(info, str(place / hashlib.sha256(name.encode()).hexdigest())))
    except (RepositoryError, DownloadError, ValueError, OSError) as error:
        raise TrustError(f"the delivery metadata is refused: {type(error).__name__}: {error}") from error
    return path, dict(info.custom or {})


def _check_followed(state: Path, root: bytes) -> None:
    """Refuse another first root than the one whose metadata was once verified here."""
    path, first = state / FOLLOWED, state / "metadata" / "root_history" / FIRST_ROOT
    known = path.read_text() if path.is_file() else ""
    if not known and (state / "metadata" / "targets.json").is_file() and first.is_file():
        known = hashlib.sha256(first.read_bytes()).hexdigest()  # followed before the file was kept
    if known and known != hashlib.sha256(root).hexdigest():
        raise TrustError(
            "this is another repository than the one that this device follows",
            hint=f"if its owner began a new one on purpose, delete {state} on the device",
        )


def _updater(repository: Path, trusted: Path, place: Path, root: bytes, now_s: int | None) -> Any:
    """A TUF client that reads the repository's folder and judges expiry at the given time."""
    from tuf.ngclient import Updater

    class DatedUpdater(Updater):  # type: ignore[misc]
        """TUF's own client asks the system's clock, which may be wrong or set back on a device."""

        def judge_at(self, moment: dt.datetime) -> None:
            """Take this as the present time."""
            self._trusted_set.reference_time = moment

    fetcher = _folder_fetcher(repository)
    updater = DatedUpdater(str(trusted), "metadata/", str(place), "targets/", fetcher=fetcher, bootstrap=root)
    if now_s is not None:
        updater.judge_at(dt.datetime.fromtimestamp(now_s, dt.timezone.utc))
    return updater


def _pinned_root(metadata: Path, owner: bytes) -> bytes:
    try:
        root, signature = (metadata / FIRST_ROOT).read_bytes(), (metadata / OWNERS_MARK).read_bytes()
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
    names = [*roots, OWNERS_MARK, "timestamp.json", *newest]
    target = f"targets/{role.signed.targets[name].hashes['sha256']}.{name}"
    return {**{f"metadata/{n}": metadata / n for n in names}, target: repository / target}
