"""From ``[model]`` to what inference takes: a plain file, a protected bundle with a permission, or the model store.

Rules: a carrier is never run as if it were a model: with a manifest beside it a permission is demanded. True weights
exist in memory only. Time is the device's persisted floor (see `ModelStore`), never the network's clock.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

from edgepriv.device.infer import Inferer, load_spec
from edgepriv.device.models import VERDICT, ModelStore, Trust
from edgepriv.device.verdicts import check_verdict
from edgepriv.errors import DataError, EdgeprivError, MissingFileError
from edgepriv.keys import load_public
from edgepriv.selective_encryption import bundle_files
from edgepriv.selective_encryption.calibrate import options as session_options
from edgepriv.selective_encryption.calibrate import runtime
from edgepriv.selective_encryption.restore import open_level

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np

    from edgepriv.device.config import DeviceConfig
    from edgepriv.keys import Identity
    from edgepriv.selective_encryption.restore import Restored
    from edgepriv.wire.trust import TrustList


def is_protected(path: Path) -> bool:
    """Whether a model path is a protected bundle: its folder, or a file with a manifest beside it."""
    folder = path if path.is_dir() else path.parent
    return (folder / bundle_files.MANIFEST).is_file()


def trust_of(listed: TrustList, owner: bytes, policy: dict[str, Any] | None = None) -> Trust:
    """Whom a device believes about models: the owner, listed issuers, risk keys; policy is the owner's."""
    chosen = policy or {}
    return Trust(
        [owner, *(party.ed25519 for party in listed.with_role("issuer"))],
        [party.ed25519 for party in listed.with_role("risk")],
        require_verdict=bool(chosen.get("require_verdict", False)),
        revoked=listed.revoked,
    )


def open_protected(path: Path, permission: Path | None, identity: Identity, trust: Trust, *, now_s: int) -> Restored:
    """Open a bundle with a permission file, in memory.

    Raises:
        DataError: the path is a carrier and no permission was given.
        EdgeprivError: see `restore.open_level`.
    """
    folder = path if path.is_dir() else path.parent
    if permission is None:
        raise DataError(f"{path} is a protected model", hint="set [model] permission, or ask its owner for one")
    if not permission.is_file():
        raise MissingFileError(f"no such permission: {permission}", hint="ask the owner: edgepriv grant")
    paper, signed = bundle_files.read_manifest(folder, trust.issuers)
    stored = bundle_files.read_stored(folder, paper)
    return open_level(signed, permission.read_bytes(), stored, identity, trust.issuers, now_s=now_s)


def open_inferer(config: DeviceConfig, identity: Identity, listed: TrustList, clock: Callable[[], float]) -> Inferer:
    """The inference stage of ``[model]``: a plain file, a bundle with a permission, or the folder of the model store.

    A model of the store that is on trial is confirmed when it opens and infers, and rolled back when it does not.

    Raises:
        EdgeprivError: nothing that may run can be opened.
    """
    model = config.model
    path, threads = model.path, model.threads
    trust = _device_trust(config, identity, listed)
    if (path / "state.json").is_file():
        return _from_store(ModelStore(path, identity, trust), threads)
    if not is_protected(path):
        if trust.require_verdict:
            check_verdict(path.with_name(VERDICT), _digest(path), trust.risk_keys, int(clock()))
        return Inferer.from_file(path, threads=threads)
    restored = open_protected(path, model.permission, identity, trust, now_s=int(clock()))
    folder = path if path.is_dir() else path.parent
    if trust.require_verdict:
        check_verdict(folder / VERDICT, restored.digest, trust.risk_keys, int(clock()))
    return _inferer(restored, folder, threads)


def _digest(path: Path) -> bytes:
    if not path.is_file():
        raise MissingFileError(f"no such model: {path}", hint="set [model] path")
    return hashlib.sha256(path.read_bytes()).digest()


def _device_trust(config: DeviceConfig, identity: Identity, listed: TrustList) -> Trust:
    return trust_of(listed, load_public(config.device.owner).ed25519, listed.policy_for(identity.name))


def _inferer(restored: Restored, folder: Path, threads: int) -> Inferer:
    try:
        return Inferer(restored, load_spec(folder / "carrier.onnx"), threads=threads)
    finally:
        restored.wipe()


def _from_store(store: ModelStore, threads: int) -> Inferer:
    """Open what is current; one failure on trial brings the last good model back."""
    store.recover()
    try:
        inferer = _inferer(store.open(), store.place(), threads)
    except EdgeprivError as error:
        if not store.state.trial:
            raise
        store.roll_back(f"it did not start: {error}")
        return _inferer(store.open(), store.place(), threads)
    store.confirm()
    return inferer


def runner(restored: Restored) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """A function ``inputs -> first output`` on a restored model, for the self-test."""
    ort = runtime()
    session = restored.session(ort, session_options(ort))
    name = session.get_inputs()[0].name

    def infer(inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        output: np.ndarray[Any, Any] = session.run(None, {name: inputs})[0]
        return output.reshape(-1)

    return infer


def resident_bytes() -> int:
    """Resident memory of this process (Linux); 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - not a path of ours
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def store_of(state: Path, identity: Identity, trust: Trust, log: Callable[[str], None]) -> ModelStore:
    """The device's model store under its state folder."""
    return ModelStore(state / "models", identity, trust, log=log)
