"""Global weights on disk: one file each, named by its SHA-256 in hex, never half-written."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from edgepriv import files

if TYPE_CHECKING:
    from pathlib import Path


class Weights:
    """The folder ``models`` below a folder of rounds."""

    def __init__(self, folder: Path) -> None:
        self.models = folder / "models"
        self.models.mkdir(parents=True, exist_ok=True)

    def model_path(self, digest: bytes) -> Path:
        """Where the weights of a digest lie (they may not)."""
        return self.models / digest.hex()

    def add_model(self, raw: bytes) -> bytes:
        """Store global weights (bytes of `wire.update`) and return their digest."""
        digest = hashlib.sha256(raw).digest()
        path = self.model_path(digest)
        if not path.exists():
            files.replace(path, raw)
        return digest

    def prune(self, keep: set[bytes]) -> None:
        """Delete all weights but these."""
        for path in self.models.iterdir():
            if len(path.name) == 64 and bytes.fromhex(path.name) not in keep:
                path.unlink(missing_ok=True)
