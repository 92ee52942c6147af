"""What protection costs at start-up: CPU time of a session from a plain path, and of one from a protected bundle.

Each run is a process of its own (``python -m edgepriv.selective_encryption.startup KIND FOLDER``), timed after the
imports, from the first file read to the ready session; the median of several is reported. CPU time, because hosts are
busy.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edgepriv.errors import DataError
from edgepriv.keys import Identity, load_identity
from edgepriv.selective_encryption import bundle_files, calibrate, levels, manifest
from edgepriv.selective_encryption.restore import open_level

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgepriv.selective_encryption.protection import Bundle

RUNS = 9
FAR_FUTURE_S = 4_000_000_000
_NOW_S = 1_000


def prepare(folder: Path, bundle: Bundle, issuer: Identity, plain: dict[str, bytes]) -> None:
    """Write what the timed processes read: the plain model, the bundle, a device key and its permission."""
    (folder / "plain").mkdir(parents=True)
    (folder / "bundle").mkdir()
    for name, content in plain.items():
        (folder / "plain" / name).write_bytes(content)
    for name, content in bundle.files.items():
        (folder / "bundle" / name).write_bytes(content)
    (folder / "bundle" / bundle_files.MANIFEST).write_bytes(bundle.manifest)
    device = Identity.new("device", "timer")
    device.save(folder / "device.key")
    top = len(bundle.decoded.levels)
    key = levels.key_at(bundle.key, bundle.decoded.binding.model_id, top, top)
    signed = manifest.grant(
        bundle.decoded.binding, top, key, device.public, issuer, now_s=_NOW_S, expires_s=FAR_FUTURE_S
    )
    (folder / "permission").write_bytes(signed)
    (folder / "issuer").write_bytes(issuer.public.ed25519)


def median_cpu_s(starts: Sequence[tuple[str, Path]], *, runs: int = RUNS) -> list[float]:
    """Median CPU seconds of several starts (``plain`` or ``protected``, folder), taken in turns on a busy host."""
    times: list[list[float]] = [[] for _ in starts]
    for _ in range(runs):
        for kept, (kind, folder) in zip(times, starts, strict=True):
            kept.append(_cpu_s(kind, folder))
    return [statistics.median(kept) for kept in times]


def _cpu_s(kind: str, folder: Path) -> float:
    command = [sys.executable, "-m", __name__, kind, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"the start-up measurement failed: {done.stderr.strip()[-300:]}")
    return float(done.stdout)


def ratio(folder: Path, *, runs: int = RUNS) -> float:
    """CPU time of a protected start over that of a plain one, in one run of this function."""
    plain, protected = median_cpu_s([("plain", folder), ("protected", folder)], runs=runs)
    return protected / plain


def start_plain(folder: Path) -> float:
    """Load the plain file by path; returns CPU seconds."""
    ort = calibrate.runtime()
    path = next((folder / "plain").glob("*.onnx"))
    began = time.process_time()
    ort.InferenceSession(str(path), calibrate.options(ort))
    return time.process_time() - began


def start_protected(folder: Path) -> float:
    """Verify, decrypt, patch, check and load, all levels; returns CPU seconds."""
    ort = calibrate.runtime()
    device, issuer = load_identity(folder / "device.key"), (folder / "issuer").read_bytes()
    began = time.process_time()
    paper, signed = bundle_files.read_manifest(folder / "bundle", [issuer])
    stored = bundle_files.read_stored(folder / "bundle", paper)
    permission = (folder / "permission").read_bytes()
    opened = open_level(signed, permission, stored, device, [issuer], now_s=_NOW_S)
    opened.session(ort, calibrate.options(ort))
    return time.process_time() - began


if __name__ == "__main__":
    sys.stdout.write(str({"plain": start_plain, "protected": start_protected}[sys.argv[1]](Path(sys.argv[2]))))
