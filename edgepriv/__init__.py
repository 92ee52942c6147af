"""Private AI on edge devices. The public names are loaded when first used: importing edgepriv costs nothing.

Seal and open: `Identity`, `load_identity`, `DeviceEpoch`, `Picture`, `open_frame`, `OpenedFrames`. Run a device:
`start_device`, `DeviceRuntime`, `Frame`, `FrameSource`, `ReleasePolicy`, `parse_policy`. Talk to a gateway:
`GatewayClient`, `TrustFile`. Audit: `audit_outputs`, `judge_update`, `audit_shadows`. Models: `make_bundle`,
`open_level`. Every error that is raised on purpose is an `EdgeprivError`. No other name is promised.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# onnxruntime reports its use to its vendor unless this stands before it is imported: no device of ours calls out.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from edgepriv.cipher.cipher import open_frame as open_frame
    from edgepriv.cipher.epochs import DeviceEpoch as DeviceEpoch
    from edgepriv.cipher.opened import OpenedFrames as OpenedFrames
    from edgepriv.cipher.picture import Picture as Picture
    from edgepriv.client import GatewayClient as GatewayClient
    from edgepriv.device.capture import Frame as Frame
    from edgepriv.device.capture import FrameSource as FrameSource
    from edgepriv.device.release import ReleasePolicy as ReleasePolicy
    from edgepriv.device.release import parse_policy as parse_policy
    from edgepriv.device.runtime import DeviceRuntime as DeviceRuntime
    from edgepriv.device.start import start_device as start_device
    from edgepriv.errors import EdgeprivError as EdgeprivError
    from edgepriv.keys import Identity as Identity
    from edgepriv.keys import load_identity as load_identity
    from edgepriv.risk.gradient_leakage.audit import judge_update as judge_update
    from edgepriv.risk.membership.audit import audit_shadows as audit_shadows
    from edgepriv.risk.reconstruction.audit import audit_outputs as audit_outputs
    from edgepriv.selective_encryption.pipeline import make_bundle as make_bundle
    from edgepriv.selective_encryption.restore import open_level as open_level
    from edgepriv.trust_file import TrustFile as TrustFile

_HOMES = {
    "DeviceEpoch": "edgepriv.cipher.epochs",
    "DeviceRuntime": "edgepriv.device.runtime",
    "EdgeprivError": "edgepriv.errors",
    "Frame": "edgepriv.device.capture",
    "FrameSource": "edgepriv.device.capture",
    "GatewayClient": "edgepriv.client",
    "Identity": "edgepriv.keys",
    "OpenedFrames": "edgepriv.cipher.opened",
    "Picture": "edgepriv.cipher.picture",
    "ReleasePolicy": "edgepriv.device.release",
    "TrustFile": "edgepriv.trust_file",
    "audit_outputs": "edgepriv.risk.reconstruction.audit",
    "audit_shadows": "edgepriv.risk.membership.audit",
    "judge_update": "edgepriv.risk.gradient_leakage.audit",
    "load_identity": "edgepriv.keys",
    "make_bundle": "edgepriv.selective_encryption.pipeline",
    "open_frame": "edgepriv.cipher.cipher",
    "open_level": "edgepriv.selective_encryption.restore",
    "parse_policy": "edgepriv.device.release",
    "start_device": "edgepriv.device.start",
}

__all__ = [  # noqa: PLE0604 - the table is the one list
    *_HOMES
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'edgepriv' has no public name {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(_HOMES)
