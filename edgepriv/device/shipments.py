"""Install a shipment that the gateway delivered: repository and permissions in one file, checked as any other copy.

One process for one shipment (`edgepriv model install`): it verifies the TUF metadata against the pinned owner, then
stages, verifies, tests and switches as `ModelStore.install` says. What it unpacked is deleted again. The target's name
and the model's name in its signed paper must be the same, and the name that is followed.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from typing import TYPE_CHECKING, Any

from edgepriv.device import packing, protected
from edgepriv.device.models import PASSING
from edgepriv.errors import DataError, EdgeprivError, StorageFullError, TrustError
from edgepriv.selective_encryption import delivery as metadata
from edgepriv.wire import delivery

if TYPE_CHECKING:
    from pathlib import Path

    from edgepriv.device.golden_test import Measured
    from edgepriv.device.models import ModelStore

SUFFIX = ".delivery"
EXPIRED = "ExpiredMetadataError"  # of python-tuf


def permission_name(device_key: bytes) -> str:
    """Under which name a shipment carries the permission of the device with this X25519 key."""
    return f"{delivery.PERMISSIONS}/{hashlib.sha256(device_key).hexdigest()[:32]}"


def install_shipment(
    shipment: Path, store: ModelStore, owner: bytes, permission: bytes | None = None, *, model: str = ""
) -> Measured:
    """Verify, stage, test and switch; on any failure the running model stays.

    Args:
        shipment: the fetched file.
        store: the device's models.
        owner: the pinned owner's Ed25519 key.
        permission: used where the shipment carries none for this device.
        model: the only model that is wanted; empty: whichever the shipment carries.

    Raises:
        EdgeprivError: the reason; see `passes`.
    """
    with store.installing():
        place = store.folder / "incoming"
        shutil.rmtree(place, ignore_errors=True)
        if shutil.disk_usage(store.folder).free < 4 * shipment.stat().st_size:
            raise StorageFullError("no room to install the model", hint="free the disk; the running model is untouched")
        try:
            name = _model(packing.unpack(shipment, place, delivery.SHIPMENT))
            if model and name != model:
                raise TrustError(f"the shipment carries the model {name!r}, and {model!r} is followed")
            path, _ = metadata.pull(place, name + SUFFIX, owner, store.folder / "tuf", now_s=store.state.floor_s)
            own = place / permission_name(store.identity.public.x25519)
            permission = own.read_bytes() if own.is_file() else permission
            return install_file(path, store, permission, name)
        finally:
            shutil.rmtree(place, ignore_errors=True)
            shutil.rmtree(store.folder / "tuf" / "target", ignore_errors=True)


def install_file(path: Path, store: ModelStore, permission: bytes | None, model: str) -> Measured:
    """Install a verified target of the repository as the model of this name; see `ModelStore.install`."""
    clock, rss = time.perf_counter, protected.resident_bytes
    return store.install(path, permission, protected.runner, clock=clock, rss=rss, model=model)


def passes(error: EdgeprivError) -> bool:
    """Whether the same shipment may be installed later: disk, library, or the clock that judged the metadata."""
    cause = error.__cause__
    late = isinstance(error, TrustError) and (isinstance(cause, OSError) or type(cause).__name__ == EXPIRED)
    return late or isinstance(error, PASSING)


def _model(names: list[str]) -> str:
    """The model's name by the only target's: ``targets/SHA256.NAME.delivery``."""
    targets = [name for name in names if name.startswith(delivery.TARGETS + "/")]
    name = targets[0].partition("/")[2].partition(".")[2] if len(targets) == 1 else ""
    if not name.endswith(SUFFIX):
        raise DataError("a shipment carries one delivery", hint="edgepriv model publish --shipment")
    return name.removesuffix(SUFFIX)


def outcome(store: ModelStore, error: EdgeprivError | None, measured: Measured | None) -> dict[str, Any]:
    """The report of an installation, for people and for the runtime; ``again``: what stopped it may pass."""
    found: dict[str, Any] = {**store.report(), "installed": error is None, "reason": str(error or "")}
    if error is not None:
        found["again"] = passes(error)
    if measured is not None:
        found |= {"quality": measured.quality, "unit": measured.unit}
        found["latency_ms"] = round(1e3 * measured.latency_s, 3)
    return found
