"""A supplier's model fed as a device feeds it: ``(pixel - mean) * scale`` per channel, in its colour order.

What was read and how is in ``judged``, and becomes part of the verdict. One factor for all channels and no mean (the
default) leaves the child process to scale; anything else is computed here and sent as float32, and then the graph's
importer does not follow: such a model is audited as a black box.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import ConfigError
from edgepriv.risk.reconstruction.supplied_model import SuppliedModel

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from edgepriv.risk.config import AuditSection
    from edgepriv.risk.reconstruction.supplied_model import OpeningLimits


@dataclass(frozen=True)
class PreparedModel(SuppliedModel):
    """A model with its preprocessing. ``read``: what the child process said that it read."""

    mean: tuple[float, ...] = (0.0,)
    factors: tuple[float, ...] = (1 / 255,)
    colour: str = "RGB"
    read: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def prepared(cls, path: Path, settings: AuditSection, *, limits: OpeningLimits) -> PreparedModel:
        """Locate a model; raises as `SuppliedModel.find`."""
        found = SuppliedModel.find(path, limits=limits)
        plain = len(settings.scale) == 1 and not any(settings.mean)
        return cls(
            path=found.path,
            sha256=found.sha256,
            size_bytes=found.size_bytes,
            limits=limits,
            scale=settings.scale[0] if plain else 1.0,
            output=settings.output or None,
            mean=settings.mean,
            factors=settings.scale,
            colour=settings.colour,
        )

    @property
    def _plain(self) -> bool:
        return len(self.factors) == 1 and not any(self.mean)

    def outputs(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See SuppliedModel."""
        self.read["channels"] = int(images.shape[-1])
        return super().outputs(self._pixels(images))

    def _ask(self, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
        reply = super()._ask(folder, request)
        if request["what"] == "run":
            self.read["output"], self.read["outputs"] = str(reply["output"]), [str(name) for name in reply["outputs"]]
        return reply

    def _pixels(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        channels = images.shape[-1]
        for name, values in (("mean", self.mean), ("scale", self.factors)):
            if len(values) not in {1, channels}:
                raise ConfigError(f"[audit] {name} has {len(values)} values, the pictures have {channels} channels")
        ordered = images[..., ::-1] if self.colour == "BGR" and channels == 3 else images
        if self._plain:
            return np.ascontiguousarray(ordered)
        made = (ordered.astype(np.float32) - np.array(self.mean, np.float32)) * np.array(self.factors, np.float32)
        return np.ascontiguousarray(made, np.float32)

    def judged(self, purifier: bytes) -> dict[str, Any]:
        """What the audit holds for, once the model has been run: for the report, and from there for the verdict."""
        first = self.read["outputs"][0] == self.read["output"]
        return {
            "purifier": purifier.hex(),
            "output": [*([""] if first else []), self.read["output"]],
            "scale": list(self.factors),
            "mean": list(self.mean),
            "colour": "gray" if self.read["channels"] == 1 else self.colour,
        }
