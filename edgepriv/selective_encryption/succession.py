"""A further version of a protected model: what the carrier before it has shown stays shown, what it hid stays hidden.

Who the attacker is: holds the carriers of two versions and compares them, kernel by kernel. If positions and decoys
were drawn anew for each version, then kernels that did not change between versions would differ exactly where one of
the carriers has a decoy, and what the second version hides would stand in clear in the first. Therefore, for each
kernel whose true value is (nearly) the same in both versions: encrypted before means encrypted now, in clear before
means in clear now; and a decoy changes as often, and by as much, as the clear kernels around it did. Kernels with an
unrelated new value (training from scratch) are chosen freely and get fresh decoys.

Rules: the owner's side only, no files but by `bundle_files`; keys of segments are fresh for each version (`finish`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import ConfigError
from edgepriv.selective_encryption import bundle_files, carrier, decoys
from edgepriv.selective_encryption.restore import open_carrier, open_with_key

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from edgepriv.selective_encryption.carrier import Layer
    from edgepriv.selective_encryption.decoys import PrfNoise
    from edgepriv.selective_encryption.restore import Restored

CLOSE = 0.5  # a kernel that changed by less than this share of its norm is still the same kernel
STILL_ZERO = 0.5  # a zero of a decoy stays one if at least this share of the clear kernels' zeros did


@dataclass(frozen=True, slots=True)
class Previous:
    """The version before, as its owner has it: true weights, weights with decoys, and the secrets to go on with."""

    name: str
    model_id: bytes
    version: int
    secret: bytes
    about: Mapping[str, Any]
    plain: Any
    masked: Any


def read(folder: Path) -> Previous:
    """Open the owner's copy of a protected model.

    Raises:
        MissingFileError: not a protected model, or not the owner's copy.
    """
    paper, _ = bundle_files.read_manifest(folder, [bundle_files.read_issuer(folder)])
    secrets = bundle_files.read_secrets(folder)
    opened = open_with_key(paper, secrets["key"], len(paper.levels), bundle_files.read_stored(folder, paper))
    shown = open_carrier(paper, bundle_files.read_stored(folder, paper), secrets["key"])
    number, model_id = paper.binding.version, paper.binding.model_id
    return Previous(paper.name, model_id, number, secrets["decoys"], paper.about, _model(opened), _model(shown))


def _model(opened: Restored) -> Any:
    return carrier.from_files(dict(zip(opened.names, opened.files, strict=True)))


@dataclass(frozen=True, slots=True)
class Heir:
    """One layer of the new version beside the same layer of the one before: rows [units, unit_size] and what they say.

    ``same``: the kernel is (nearly) the one of before; ``hidden``: it was encrypted.
    """

    before: NDArray[Any]
    shown: NDArray[Any]
    same: NDArray[np.bool_]
    hidden: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Inherited:
    """What the new version takes over, by layer of the new model."""

    version: int
    heirs: Mapping[str, Heir]

    def forced(self, layer: Layer) -> NDArray[np.bool_]:
        """Units that must be encrypted again."""
        heir = self.heirs.get(layer.name)
        return np.zeros(layer.units, bool) if heir is None else heir.same & heir.hidden

    def barred(self, layer: Layer) -> NDArray[np.bool_]:
        """Units that stood in clear: encrypting them now hides nothing and shows where the decoys are."""
        heir = self.heirs.get(layer.name)
        return np.zeros(layer.units, bool) if heir is None else heir.same & ~heir.hidden

    def label(self, layer: Layer) -> str:
        """Names the randomness of this version's fresh decoys; the same numbers twice would show where they are."""
        return f"{layer.name}\x00version {self.version}"

    def carry_over(
        self, layer: Layer, rows: NDArray[Any], fake: NDArray[Any], selected: NDArray[np.bool_], noise: PrfNoise
    ) -> None:
        """Put the decoys of before back into ``fake`` where the kernel is the same, changed as clear kernels were."""
        heir = self.heirs.get(layer.name)
        keep = selected & self.forced(layer)
        if heir is None or not keep.any():
            return
        fake[keep] = heir.shown[keep]
        moved = keep & (noise.uniform(layer.units) < _changed_share(heir, rows, selected, layer.inputs))
        if moved.any():
            clear = heir.same & ~selected & np.any(rows != heir.before, axis=1)
            made = heir.shown[moved].astype(np.float64)
            step = _steps(heir, rows, clear, layer.inputs, noise)[moved]
            if _zeros_stay(heir, rows, clear):
                step = np.where(made == 0, 0, step)
            at = np.flatnonzero(moved)
            fake[moved] = decoys.fitted(made + step, rows, layer.inputs, at, ~selected, noise, zeros=False)


def inherited(previous: Previous, model: Any, layers: list[Layer], version: int) -> Inherited:
    """Set the layers of the new model beside those of the version before.

    Raises:
        ConfigError: the versions have no weights in common.
    """
    old = carrier.layers(previous.plain, dense=True)
    pairs = _pairs(layers, old)
    if not pairs:
        raise ConfigError(
            f"the model has no weights in common with version {previous.version} of {previous.name}",
            hint="without --previous it becomes a model of its own, with its own permissions",
        )
    heirs = {}
    for layer, match in pairs:
        before, shown = (carrier.weight_rows(source, match) for source in (previous.plain, previous.masked))
        rows = carrier.weight_rows(model, layer)
        if rows.dtype != before.dtype:
            continue
        change = np.linalg.norm(rows.astype(np.float64) - before, axis=1)
        same = change <= CLOSE * np.linalg.norm(before.astype(np.float64), axis=1)
        heirs[layer.name] = Heir(before, shown, same, np.any(before != shown, axis=1))
    return Inherited(version, heirs)


def _pairs(new: list[Layer], old: list[Layer]) -> list[tuple[Layer, Layer]]:
    """The same layers by name and shape; by their order where an exporter named everything anew."""
    named = {layer.name: layer for layer in old}
    found = [(x, named[x.name]) for x in new if x.name in named and named[x.name].dims == x.dims]
    if not found and [x.dims for x in new] == [x.dims for x in old][: len(new)]:
        return list(zip(new, old, strict=False))
    return found


def _changed_share(heir: Heir, rows: NDArray[Any], selected: NDArray[np.bool_], inputs: int) -> NDArray[np.float64]:
    """For each unit: which share of the clear kernels of its output channel changed at all [units]."""
    changed = np.any(rows != heir.before, axis=1).reshape(-1, inputs)
    clear = (heir.same & ~selected).reshape(-1, inputs)
    overall = changed[clear].mean() if clear.any() else 0.0
    count = clear.sum(1)
    share = np.where(count >= 3, (changed & clear).sum(1) / np.maximum(count, 1), overall)
    return np.repeat(share, inputs)


def _steps(
    heir: Heir, rows: NDArray[Any], clear: NDArray[np.bool_], inputs: int, noise: PrfNoise
) -> NDArray[np.float64]:
    """Changes for every unit as the clear kernels changed: a mixture fitted to those, or the scale of a few."""
    change = rows.astype(np.float64) - heir.before
    change[~clear] = 0
    out: NDArray[np.float64] = np.zeros(change.shape)
    if clear.sum() < 2 * min(change.shape[1], decoys.MAX_FULL_TAPS):
        return out if not clear.any() else np.asarray(float(change[clear].std()) * noise.normal(*change.shape))
    out[~clear] = decoys.mixture_rows(change, inputs, ~clear, noise)
    return out


def _zeros_stay(heir: Heir, rows: NDArray[Any], clear: NDArray[np.bool_]) -> bool:
    zeros = heir.before[clear] == 0
    return bool(zeros.any() and np.mean(rows[clear][zeros] == 0) >= STILL_ZERO)
