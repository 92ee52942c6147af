"""What an audit's conclusion depends on besides the model's bytes, as one digest that is kept beside the conclusion.

When it differs (another policy, purifier, set of pictures, limit, calibration of the detector or release of edgepriv)
what was concluded says nothing about today's question: the model is audited again, and nothing is signed meanwhile.
The pictures themselves are not hashed, only their place: ``report_days`` bounds how long a changed set stays unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from edgepriv.risk.reconstruction.calibration import SHIPPED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edgepriv.risk.config import AuditSection
    from edgepriv.risk.reconstruction.auditors import Pipeline

HOW_IT_RUNS = {
    "workers", "threads", "executor", "ray_address", "device", "max_jobs", "max_model_mb", "memory_mb", "verdict_days",
    "report_days", "policies", "purifier",
}  # fmt: skip


def purifier_digests(pipelines: Iterable[Pipeline]) -> list[bytes]:
    """SHA-256 of the purifier in front of each policy, empty without one."""
    return [bytes(getattr(pipeline, "purifier_digest", b"")) for pipeline in pipelines]


def settings_digest(settings: AuditSection, pipelines: Sequence[Pipeline]) -> str:
    """Digest of everything that a verdict depends on besides the model, hexadecimal."""
    said: dict[str, Any] = {
        field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in HOW_IT_RUNS
    }
    said["policies"] = [pipeline.name for pipeline in pipelines]
    said["purifiers"] = [digest.hex() for digest in purifier_digests(pipelines)]
    said["calibration"], said["edgepriv"] = repr(SHIPPED), version("edgepriv")
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
