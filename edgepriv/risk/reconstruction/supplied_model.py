"""A supplier's model as a file: opened only in a child process with limits, known here by its outputs and digest.

Rules: the file is never parsed in this process and nothing is ever unpickled; the digest is over the exact bytes of
the model and of its external data, so that a verdict can be bound to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError, MissingFileError, RefusedError
from edgepriv.risk.reconstruction.isolation import TAKEN

if TYPE_CHECKING:
    from numpy.typing import NDArray


WITHOUT_NETWORK = "the model ran without network"


@dataclass(frozen=True, slots=True)
class OpeningLimits:
    """What one supplier's model may use while it is opened."""

    memory_bytes: int = 6 * 2**30
    cpu_s: int = 600
    timeout_s: float = 900.0
    max_model_bytes: int = 2 * 2**30
    threads: int = 1


@dataclass(frozen=True, slots=True)
class SuppliedModel:
    """An ONNX file with its digest.

    Attributes:
        path: the file.
        sha256: digest of its bytes, external data included, hexadecimal.
        size_bytes: of all of them.
        limits: what the child process may use.
        scale: factor from uint8 pixels to the model's float input; None is 1/255.
        output: name of the output to audit; None is the first.
        observed: what the child process said of itself when it last opened the file: ``network``.
    """

    path: Path
    sha256: str
    size_bytes: int
    limits: OpeningLimits
    scale: float | None = None
    output: str | None = None
    observed: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def find(
        cls,
        path: Path,
        *,
        limits: OpeningLimits | None = None,
        scale: float | None = None,
        output: str | None = None,
    ) -> SuppliedModel:
        """Locate a model, check its size against limits and memory, and compute its digest.

        Raises:
            MissingFileError: there is no such file.
            RefusedError: it is larger than the limit or than this machine could open.
        """
        limits = limits or OpeningLimits()
        if not path.is_file():
            raise MissingFileError(f"no such model: {path}")
        files = [path, *sorted(p for p in (path.with_name(path.name + s) for s in (".data", "_data")) if p.is_file())]
        size = sum(file.stat().st_size for file in files)
        allowed = min(limits.max_model_bytes, available_memory_bytes() // 3)
        if size > allowed:
            raise RefusedError(
                f"{path} has {-(-size // 2**20)} MiB; on this machine models up to {allowed >> 20} MiB are opened",
                hint="audit it where three times its size is free; the risk service's own limit is max_model_mb",
            )
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return cls(path, digest.hexdigest(), size, limits, scale, output)

    def outputs(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the model's outputs on pictures [n, h, w, c], float32 [n, k].

        Raises:
            DataError: the file is no usable classifier; the message says why.
        """
        with tempfile.TemporaryDirectory(prefix="edgepriv-model-") as folder:
            np.save(Path(folder) / "images.npy", images)
            request = {"what": "run", "image_shape": list(images.shape[1:]), "scale": self.scale, "output": self.output}
            self._ask(Path(folder), request)
            values = np.load(Path(folder) / "outputs.npy", allow_pickle=False)
        if values.ndim != 2 or len(values) != len(images) or values.dtype != np.float32:
            raise DataError(f"{self.path}: the opened model answered in a wrong form")
        return np.asarray(values, np.float32)

    def graph(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Return the graph as plain values and its weights by initializer name, for the importer."""
        with tempfile.TemporaryDirectory(prefix="edgepriv-model-") as folder:
            reply = self._ask(Path(folder), {"what": "extract"})
            with np.load(Path(folder) / "weights.npz", allow_pickle=False) as archive:
                weights = {name: archive[key] for name, key in reply["constants"].items()}
        return reply, weights

    @property
    def isolation(self) -> str:
        """One sentence on the network of the process that opened the file."""
        network = self.observed.get("network", "unknown")
        return WITHOUT_NETWORK if network == TAKEN else f"the model's network {network}"

    def _ask(self, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
        limits = self.limits
        request |= {
            "model": str(self.path.resolve()),
            "folder": str(folder),
            "memory_bytes": limits.memory_bytes,
            "cpu_s": limits.cpu_s,
            "threads": limits.threads,
        }
        (folder / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-m", "edgepriv.risk.reconstruction.isolation", str(folder / "request.json")]
        environment = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": str(limits.threads)}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, timeout=limits.timeout_s, check=False, cwd=folder
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(f"{self.path}: the model did not answer within {limits.timeout_s:.0f} s") from error
        reply_path = folder / "reply.json"
        if not reply_path.is_file():
            raise DataError(
                f"{self.path}: the model's process ended with status {done.returncode}",
                hint=f"it may have passed its limits of {limits.memory_bytes >> 20} MiB and {limits.cpu_s} s",
            )
        reply: dict[str, Any] = json.loads(reply_path.read_text())
        self.observed["network"] = str(reply.get("network", "unknown"))
        if "error" in reply:
            raise DataError(f"{self.path}: {reply['error']}")
        return reply


def available_memory_bytes() -> int:
    """Return the memory that is free for use on this machine, in bytes."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2
