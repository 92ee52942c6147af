"""Protect a model: select, put decoys, calibrate the levels, seal the segments, sign the manifest (owner side).

No files of its own: an ONNX model and arrays go in, named bytes come out. `Draft` is the model with its positions and
decoys, before any key exists: levels are calibrated and attacks are run on drafts; `finish` seals the one that passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import primitives
from edgepriv.errors import ConfigError, RefusedError
from edgepriv.selective_encryption import calibrate, carrier, decoys, levels, manifest, shared_weights
from edgepriv.selective_encryption.level_search import LevelSearch
from edgepriv.selective_encryption.levels import Binding, Region
from edgepriv.selective_encryption.restore import Restored
from edgepriv.selective_encryption.select.choose import Choice, choose, weight_share

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from edgepriv.keys import Identity
    from edgepriv.selective_encryption.calibrate import Samples
    from edgepriv.selective_encryption.carrier import Layer
    from edgepriv.selective_encryption.manifest import Manifest
    from edgepriv.selective_encryption.succession import Inherited

FULL = "full"


@dataclass(slots=True)
class Draft:
    """A model with chosen positions and decoys, in clear on the owner's machine.

    ``plain`` and ``masked`` are the files [name -> uint8 array] with the true weights and with decoys.
    """

    model: Any
    layers: list[Layer]
    choice: Choice
    names: tuple[str, ...]
    regions: list[Region]
    plain: list[NDArray[np.uint8]]
    masked: list[NDArray[np.uint8]]
    share: float
    share_of_all: float

    def partial(self, count: int) -> Restored:
        """The carrier with the first ``count`` units of the order given back, in memory."""
        return self.opened(self.choice.order[:count])

    def opened(self, rows: NDArray[np.int64]) -> Restored:
        """The carrier with the listed units (rows of layer number and unit) given back, in memory."""
        files = [content.copy() for content in self.masked]
        for number, units in _by_region(rows).items():
            region = self.regions[number]
            region.rows(files)[units] = region.rows(self.plain)[units]
        return Restored(0, b"", 0, self.names, files)

    def hidden_after(self, count: int) -> dict[str, NDArray[np.bool_]]:
        """Units of each layer that stay encrypted when the first ``count`` of the order are given back."""
        hidden = {layer.name: np.zeros(layer.units, bool) for layer in self.layers}
        for number, units in _by_region(self.choice.order[count:]).items():
            hidden[self.layers[number].name][units] = True
        return hidden

    def whole(self) -> Restored:
        """The plain model, in memory."""
        return Restored(0, b"", 0, self.names, self.plain)


@dataclass(frozen=True, slots=True)
class LevelPlan:
    """One level before it is sealed: how many units of the order are open, and what that gives."""

    target: float | None
    quality: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """What `finish` made: public files by name (bytes or uint8 arrays), the signed manifest, the owner's top key."""

    files: dict[str, Any]
    manifest: bytes
    key: bytes
    decoded: Manifest


def draft(
    model: Any,
    layers: list[Layer],
    scores: Mapping[str, NDArray[np.float64]],
    share: float,
    *,
    secret: bytes,
    model_id: bytes,
    kind: str = "mixture",
    scope: str = "global",
    external: bool | None = None,
    before: Inherited | None = None,
) -> Draft:
    """Choose positions by score and write decoys there.

    Args:
        model: a normalised ``onnx.ModelProto``.
        layers: what may be encrypted.
        scores: one number a unit, larger first.
        share: at most this share of the layers' weights.
        secret: 32 bytes that the decoys are drawn from.
        model_id: 16 bytes.
        kind: of decoys.
        scope: ``global`` or ``layer`` budget.
        external: force or forbid a separate weight file.
        before: what the version before has hidden and shown.
    """
    files = carrier.file_bytes(model, "carrier", external=external)
    plain = [np.frombuffer(content, np.uint8) for content in files.values()]
    choice = _choice(scores, layers, share, scope, shared_weights.echoes(list(files), plain, plain, layers), before)
    regions = carrier.regions(files, layers)
    masked = [content.copy() for content in plain]
    for layer, region in zip(layers, regions, strict=True):
        hidden = choice.selected[layer.name]
        if hidden.any():
            rows, label = carrier.weight_rows(model, layer), layer.name if before is None else before.label(layer)
            noise = decoys.PrfNoise(secret, model_id, label)
            fake = decoys.decoy_rows(rows, layer.inputs, hidden, noise, kind=kind)
            if before is not None:
                before.carry_over(layer, rows, fake, hidden, noise)
            region.rows(masked)[hidden] = np.ascontiguousarray(fake[hidden]).view(f"V{region.unit_bytes}").reshape(-1)
    chosen = sum(int(choice.selected[layer.name].sum()) * layer.unit_size for layer in layers)
    return Draft(
        model,
        layers,
        choice,
        tuple(files),
        regions,
        plain,
        masked,
        weight_share(choice, layers),
        chosen / _all_weights(model),
    )


def _choice(
    scores: Mapping[str, NDArray[np.float64]],
    layers: list[Layer],
    share: float,
    scope: str,
    twice: Mapping[str, NDArray[np.bool_]],
    before: Inherited | None,
) -> Choice:
    """Positions: never what another tensor or the version before shows, always what that one hid."""
    if before is None:
        return choose(scores, layers, share, scope=scope, barred=twice)
    barred = {layer.name: twice[layer.name] | before.barred(layer) for layer in layers}
    forced = {layer.name: before.forced(layer) & ~barred[layer.name] for layer in layers}
    return choose(scores, layers, share, scope=scope, barred=barred, forced=forced)


def masked_rows(
    model: Any,
    layers: Sequence[Layer],
    selected: Mapping[str, NDArray[np.bool_]],
    *,
    secret: bytes,
    model_id: bytes,
    kind: str = "mixture",
) -> dict[str, NDArray[Any]]:
    """Weights of each layer with decoys in the selected units."""
    return {
        layer.name: decoys.decoy_rows(
            carrier.weight_rows(model, layer),
            layer.inputs,
            selected[layer.name],
            decoys.PrfNoise(secret, model_id, layer.name),
            kind=kind,
        )
        for layer in layers
    }


def _all_weights(model: Any) -> int:
    return sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer if len(tensor.dims))


def parse_levels(text: str) -> list[float | None]:
    """Read ``0.6,0.8,full`` as rising targets; the last level is always the whole model (None).

    Raises:
        ConfigError: not numbers, not rising, or too many.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        targets: list[float | None] = [None if word == FULL else float(word) for word in words]
    except ValueError:
        raise ConfigError(f"--levels {text!r} is not a list of numbers", hint="for example 0.6,0.8,full") from None
    if not targets or targets[-1] is not None:
        targets.append(None)
    numbers = [target for target in targets[:-1] if target is not None]
    if len(numbers) != len(targets) - 1 or sorted(set(numbers)) != numbers or len(targets) > levels.MAX_LEVELS:
        raise ConfigError(f"--levels {text!r}: targets must rise, with 'full' last", hint="for example 0.6,0.8,full")
    return targets


def plan_levels(
    made: Draft,
    targets: Sequence[float | None],
    samples: Samples | None,
    *,
    threads: int = 1,
    log: Callable[[str], None] = lambda _: None,
) -> list[LevelPlan]:
    """Find each level's share on the owner's data; may change the order in which the draft gives units back."""
    total = made.choice.units
    numbers = [target for target in targets if target is not None]
    if samples is None:
        if numbers:
            raise ConfigError("target qualities need data to measure them on", hint="give --data")
        return [LevelPlan(None, None, total)]

    def measure(order: NDArray[np.int64]) -> float:
        return calibrate.quality(made.opened(order), samples, threads=threads)

    search = LevelSearch(measure, made.choice.order, log)
    found = search.find(numbers)
    made.choice = Choice(made.choice.selected, search.order)
    plans = [LevelPlan(target, value, count) for target, (count, value) in zip(numbers, found, strict=True)]
    return [*plans, LevelPlan(None, search.at(total), total)]


def finish(
    made: Draft,
    plans: Sequence[LevelPlan],
    issuer: Identity,
    *,
    model_id: bytes,
    version: int,
    mode: str,
    name: str,
    now_s: int,
    about: Mapping[str, Any],
    trainable: Sequence[str] = (),
) -> Bundle:
    """Seal the segments under a fresh key and sign the manifest.

    Raises:
        ConfigError: unknown mode, or a trainable tensor is encrypted.
        RefusedError: an encrypted unit stands in clear in another tensor.
    """
    if mode not in manifest.MODES:
        raise ConfigError(f"unknown mode {mode!r}", hint=f"use one of {', '.join(manifest.MODES)}")
    hidden = {layer.name for layer in made.layers if made.choice.selected[layer.name].any()}
    if hidden & set(trainable):
        raise ConfigError(f"trainable tensors are encrypted: {sorted(hidden & set(trainable))}")
    _check_hidden(made)
    binding = Binding(model_id, version, levels.model_digest(made.masked))
    key, top = primitives.random_bytes(32), len(plans)
    files: dict[str, Any] = {}
    entries, done = [], 0
    for number, plan in enumerate(plans, 1):
        level_key = levels.key_at(key, model_id, top, number)
        chosen = _by_region(made.choice.order[done : plan.count])
        sealed = levels.seal(level_key, binding, number, levels.encode_segment(made.plain, made.regions, chosen))
        segment = _entry(f"level-{number}.segment", sealed)
        files[segment.name] = sealed
        digest = levels.model_digest(made.partial(plan.count).files)
        share = plan.count / made.choice.units
        entries.append(manifest.Level(number, plan.target, plan.quality, share, plan.count, segment, digest))
        done = plan.count
    paper = manifest.Manifest(
        name,
        binding,
        mode,
        tuple(_entry(n, content) for n, content in zip(made.names, made.masked, strict=True)),
        tuple(made.regions),
        tuple(entries),
        now_s,
        tuple(trainable),
        dict(about),
    )
    first = levels.key_at(key, model_id, top, 1)
    for index, (entry, content) in enumerate(zip(paper.files, made.masked, strict=True)):
        public: Any = content.view()
        public.flags.writeable = False  # it may be opened in memory, which patches what can be written
        files[paper.stored_name(entry)] = (
            levels.seal_file(first, binding, index, public.data) if paper.sealed else public
        )
    return Bundle(files, manifest.encode_manifest(paper, issuer), key, paper)


def _check_hidden(made: Draft) -> None:
    """Refuse a draft in which another tensor shows what was encrypted."""
    shown = shared_weights.echoes(made.names, made.plain, made.masked, made.layers)
    for name, hits in shown.items():
        count = int((hits & made.choice.selected[name]).sum())
        if count:
            raise RefusedError(
                f"{count} encrypted kernels of {name!r} stand in clear in another tensor of the same shape",
                hint="load the model with carrier.load, which joins equal weights",
            )


def _entry(name: str, content: Any) -> manifest.FileEntry:
    return manifest.FileEntry(name, len(content), levels.model_digest([content]))


def _by_region(rows: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    return {int(number): np.sort(rows[rows[:, 0] == number, 1]) for number in np.unique(rows[:, 0])}
