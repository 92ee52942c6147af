"""From ``[model]`` to what inference takes: a plain file, a protected bundle with a permission, or the model store.

Rules: a carrier is never run as if it were a model: with a manifest beside it a permission is demanded. True weights
exist in memory only. Time is the device's `TimeFloor`, never the system's clock.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

from edgepriv.device.infer import Inferer, as_taken, load_spec
from edgepriv.device.models import CARRIER, ModelStore, Trust
from edgepriv.device.purify import OutputPurifier
from edgepriv.device.release import parse_policy
from edgepriv.device.time_floor import TimeFloor
from edgepriv.device.verdicts import Release, check_verdict, verdict_path
from edgepriv.errors import DataError, EdgeprivError, MissingFileError
from edgepriv.keys import load_identity, load_public
from edgepriv.selective_encryption import bundle_files
from edgepriv.selective_encryption.calibrate import options as session_options
from edgepriv.selective_encryption.calibrate import runtime
from edgepriv.selective_encryption.restore import open_level
from edgepriv.wire.trust import read_trust

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np

    from edgepriv.device.config import DeviceConfig, ReleaseConfig
    from edgepriv.device.infer import ModelSpec
    from edgepriv.device.model_state import Candidate
    from edgepriv.keys import Identity
    from edgepriv.selective_encryption.restore import Restored
    from edgepriv.wire.trust import TrustList


def is_protected(path: Path) -> bool:
    """Whether a model path is a protected bundle: its folder, or a file with a manifest beside it."""
    folder = path if path.is_dir() else path.parent
    return (folder / bundle_files.MANIFEST).is_file()


def trust_of(
    listed: TrustList, owner: bytes, policy: dict[str, Any] | None = None, *, release: Release | None = None
) -> Trust:
    """Whom a device believes about models: the owner, listed issuers, risk keys; policy is the owner's."""
    chosen = policy or {}
    return Trust(
        [owner, *(party.ed25519 for party in listed.with_role("issuer"))],
        [party.ed25519 for party in listed.with_role("risk")],
        require_verdict=bool(chosen.get("require_verdict", False)),
        revoked=listed.revoked,
        release=release,
    )


def release_of(config: ReleaseConfig) -> Release:
    """What a verdict must have been reached for: ``[release]`` policy and purifier."""
    purifier = OutputPurifier.load(config.purifier).digest if config.purifier is not None else b""
    return Release(parse_policy(config.policy).name, purifier)


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


def open_inferer(
    config: DeviceConfig,
    identity: Identity,
    listed: TrustList,
    now_s: int,
    *,
    accept: Callable[[Inferer], None] = lambda _: None,
    only_look: bool = False,
) -> Inferer:
    """The inference stage of ``[model]``: a plain file, a bundle with a permission, or the folder of the model store.

    A model of the store that is on trial is confirmed when it opens, infers and is accepted, else it is rolled back.

    Args:
        config: the device's configuration.
        identity: opens permissions.
        listed: the owner's trust list.
        now_s: the time floor.
        accept: raises where the model does not fit the rest of the device.
        only_look: leave the store's state as it is (self-checks).

    Raises:
        EdgeprivError: nothing that may run can be opened.
    """
    path, threads = config.model.path, config.model.threads
    trust = device_trust(config, identity, listed)
    if is_store(path):
        store = ModelStore(path, identity, trust)
        if only_look:
            return _inferer(store.open_judged(), store.place(), threads)
        store.raise_floor(now_s)
        return _from_store(store, threads, accept)
    inferer = _from_path(config, identity, trust, now_s)
    accept(inferer)
    return inferer


def open_to_look(config: DeviceConfig, now: float) -> Inferer:
    """The model of a configuration for a self-check or a measurement, as the runtime opens it; changes nothing."""
    owner = load_public(config.device.owner)
    trust = read_trust(config.device.trust.read_bytes(), owner.ed25519, now=now)
    floor_s = max(TimeFloor(config.device.state / "time-floor").now(), trust.issued)
    return open_inferer(config, load_identity(config.device.key), trust, floor_s, only_look=True)


def _from_path(config: DeviceConfig, identity: Identity, trust: Trust, now_s: int) -> Inferer:
    path, threads = config.model.path, config.model.threads
    if not is_protected(path):
        if trust.require_verdict:
            _check(trust, path.parent, 0, _digest(path), load_spec(path), now_s)
        return Inferer.from_file(path, threads=threads)
    restored = open_protected(path, config.model.permission, identity, trust, now_s=now_s)
    folder = path if path.is_dir() else path.parent
    if trust.require_verdict:
        try:
            _check(trust, folder, restored.level, restored.digest, load_spec(folder / CARRIER), now_s)
        except BaseException:
            restored.wipe()
            raise
    return _inferer(restored, folder, threads)


def _check(trust: Trust, folder: Path, level: int, digest: bytes, spec: ModelSpec, now_s: int) -> None:
    path = verdict_path(folder, level)
    check_verdict(path, digest, trust.risk_keys, now_s, release=trust.release, spec=spec)


def is_store(path: Path) -> bool:
    """Whether a model path is the folder of a model store."""
    return (path / "state.json").is_file()


def configured_store(config: DeviceConfig, identity: Identity, listed: TrustList) -> ModelStore:
    """The model store that ``[model] path`` names."""
    return ModelStore(config.model.path, identity, device_trust(config, identity, listed))


def _digest(path: Path) -> bytes:
    if not path.is_file():
        raise MissingFileError(f"no such model: {path}", hint="set [model] path")
    return hashlib.sha256(path.read_bytes()).digest()


def device_trust(config: DeviceConfig, identity: Identity, listed: TrustList) -> Trust:
    """Whom this device believes about models, and what for, by its configuration and the owner's policy."""
    owner, policy = load_public(config.device.owner).ed25519, listed.policy_for(identity.name)
    return trust_of(listed, owner, policy, release=release_of(config.release))


def _inferer(restored: Restored, folder: Path, threads: int) -> Inferer:
    try:
        return Inferer(restored, load_spec(folder / CARRIER), threads=threads)
    finally:
        restored.wipe()


def _from_store(store: ModelStore, threads: int, accept: Callable[[Inferer], None]) -> Inferer:
    """Open what is current; one failure on trial brings the last good model back."""

    def opened(candidate: Candidate) -> Inferer:
        inferer = _inferer(store.open_judged(candidate), store.place(candidate), threads)
        accept(inferer)
        return inferer

    store.recover()
    if store.revoked():
        store.withdraw("the owner has revoked it")
    candidate = store.current
    try:
        inferer = opened(candidate)
    except EdgeprivError as error:
        if not store.state.trial:
            raise
        store.roll_back(f"it did not start: {error}", candidate)
        return opened(store.current)
    store.confirm(candidate)
    return inferer


def runner(restored: Restored) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """A function ``inputs -> first output`` on a restored model, for the self-test.

    Both raise DataError with onnxruntime's reason where it does not run.
    """
    ort = runtime()
    try:
        session = restored.session(ort, session_options(ort))
        wanted = session.get_inputs()[0]
    except Exception as error:  # onnxruntime raises many types
        raise _does_not_run(error) from error

    def infer(inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        try:
            output: np.ndarray[Any, Any] = session.run(None, {wanted.name: as_taken(wanted, inputs)})[0]
            return output.reshape(-1)
        except Exception as error:
            raise _does_not_run(error) from error

    return infer


def _does_not_run(error: Exception) -> EdgeprivError:
    if isinstance(error, EdgeprivError):
        return error
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"self-test: the model does not run: {line[:200]}")


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
