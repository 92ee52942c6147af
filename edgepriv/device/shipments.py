"""Install a shipment that the gateway delivered: repository and permissions in one file, checked as any other copy.

One process for one shipment (`edgepriv model install`): it verifies the TUF metadata against the pinned owner, then
stages, verifies, tests and switches as `ModelStore.install` says. What it unpacked is deleted again.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from typing import TYPE_CHECKING, Any

from edgepriv.device import packing, protected
from edgepriv.errors import DataError, EdgeprivError
from edgepriv.selective_encryption import delivery as metadata
from edgepriv.wire import delivery

if TYPE_CHECKING:
    from pathlib import Path

    from edgepriv.device.models import Measured, ModelStore

SUFFIX = ".delivery"


def permission_name(device_key: bytes) -> str:
    """Under which name a shipment carries the permission of the device with this X25519 key."""
    return f"{delivery.PERMISSIONS}/{hashlib.sha256(device_key).hexdigest()[:32]}"


def install_shipment(shipment: Path, store: ModelStore, owner: bytes, permission: bytes | None = None) -> Measured:
    """Verify, stage, test and switch; on any failure the running model stays.

    Args:
        shipment: the fetched file.
        store: the device's models.
        owner: the pinned owner's Ed25519 key.
        permission: used where the shipment carries none for this device.

    Raises:
        EdgeprivError: the reason.
    """
    place = store.folder / "incoming"
    shutil.rmtree(place, ignore_errors=True)
    if shutil.disk_usage(store.folder).free < 4 * shipment.stat().st_size:
        raise DataError("no room to install the model", hint="free the disk; the running model is untouched")
    try:
        names = packing.unpack(shipment, place, delivery.SHIPMENT)
        path, _ = metadata.pull(place, _target(names), owner, store.folder / "tuf")
        own = place / permission_name(store.identity.public.x25519)
        permission = own.read_bytes() if own.is_file() else permission
        store.recover()
        return store.install(path, permission, protected.runner, clock=time.perf_counter, rss=protected.resident_bytes)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(store.folder / "tuf" / "target", ignore_errors=True)


def _target(names: list[str]) -> str:
    """The target's name: ``targets/SHA256.NAME``."""
    targets = [name for name in names if name.startswith(delivery.TARGETS + "/")]
    if len(targets) != 1 or "." not in targets[0]:
        raise DataError("a shipment carries one delivery", hint="edgepriv model publish --shipment")
    return targets[0].partition("/")[2].partition(".")[2]


def outcome(store: ModelStore, error: EdgeprivError | None, measured: Measured | None) -> dict[str, Any]:
    """The report of an installation, for people and for the runtime."""
    found: dict[str, Any] = {**store.report(), "installed": error is None, "reason": str(error or "")}
    if measured is not None:
        found |= {"quality": measured.quality, "unit": measured.unit}
        found["latency_ms"] = round(1e3 * measured.latency_s, 3)
    return found
