"""Run the attacks and their references, and say who gained how much: the judge of `edgepriv protect`.

An attacker's *gain* is its accuracy minus the larger of training from scratch and the same attack on the model with
every convolution encrypted, with the same data and seed. A label-free attacker is set against chance instead of
scratch. Reported is the worst seed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.selective_encryption import carrier
from edgepriv.selective_encryption.attack import recovery
from edgepriv.selective_encryption.protection import masked_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from edgepriv.selective_encryption.attack.recovery import Target
    from edgepriv.selective_encryption.calibrate import Samples
    from edgepriv.selective_encryption.carrier import Layer

LABELLED = ("fine-tuning", "folded, BatchNorm re-inserted", "known positions, BatchNorm fixed", "known positions")
LABEL_FREE = "BatchNorm re-calibration"
OPENED_LABELS = 100  # what the holder of a level fine-tunes with


@dataclass(frozen=True, slots=True)
class Attacker:
    """One attacker with one amount of data; accuracies are those of the seed with the worst gain."""

    name: str
    data: int
    accuracy: float
    scratch: float
    all_conv: float
    gain: float
    seeds: int

    def fields(self) -> dict[str, Any]:
        """As the audit document writes it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Opened:
    """A level below the whole model, as its holder has it: what it is worth, and the units that stay encrypted."""

    level: int
    quality: float
    hidden: Mapping[str, NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Forms:
    """The same masked model as an attacker may hold it: with its BatchNorm layers, and folded.

    ``kept`` is None when the model came without BatchNorm: then only the folded form exists.
    """

    kept: Target | None
    folded: Target


def targets(
    plain: Any,
    layers: Sequence[Layer],
    selected: Mapping[str, NDArray[np.bool_]],
    *,
    secret: bytes,
    model_id: bytes,
    kind: str = "mixture",
) -> tuple[Forms, Forms]:
    """The model under attack and the all-convolutions reference, both from the plain model.

    Args:
        plain: normalised model, BatchNorm kept if it has any.
        layers: its convolutions (same initializer names before and after folding).
        selected: encrypted units.
        secret: of the decoys.
        model_id: of the decoys.
        kind: of the decoys.
    """
    everything = {layer.name: np.ones(layer.units, bool) for layer in layers}
    options = {"secret": secret, "model_id": model_id, "kind": kind}
    return forms(plain, layers, selected, **options), forms(plain, layers, everything, **options)


def forms(plain: Any, layers: Sequence[Layer], selected: Mapping[str, NDArray[np.bool_]], **options: Any) -> Forms:
    """The plain model with decoys in the selected units; ``options`` of `masked_rows`."""
    folded, count = carrier.fold_batchnorm(plain)

    def made(model: Any) -> Target:
        rows = masked_rows(model, layers, selected, **options)
        return recovery.Target(carrier.with_rows(model, rows), selected)

    return Forms(made(plain) if count else None, made(folded))


def run_attacks(
    masked: Forms,
    all_conv: Forms,
    data: Samples,
    test: Samples,
    *,
    label_counts: Sequence[int],
    names: Sequence[str] = LABELLED,
    seeds: int = 1,
    flip: bool = True,
    log: Callable[[str], None] = lambda _: None,
) -> list[Attacker]:
    """Every attacker with every amount of labels, worst seed each."""
    found = [_label_free(masked, all_conv, data, test)]
    log(_line(found[0]))
    for count in label_counts:
        part = data.head(count)
        recipe = recovery.Recipe(recovery.steps_for(count), flip=flip)
        bare = [recovery.scratch(_best(masked), part, test, recipe, seed=seed) for seed in range(seeds)]
        for name in names:
            runs = []
            for seed in range(seeds):
                ours = _attack(name, masked, part, test, recipe, seed)
                theirs = _attack(name, all_conv, part, test, recipe, seed)
                gain = ours - max(bare[seed], theirs)
                runs.append(Attacker(name, count, ours, bare[seed], theirs, gain, seeds))
            found.append(max(runs, key=lambda run: run.gain))
            log(_line(found[-1]))
    return found


def _label_free(masked: Forms, all_conv: Forms, data: Samples, test: Samples) -> Attacker:
    ours = recovery.recalibrate(_best(masked), data, test)
    theirs = recovery.recalibrate(_best(all_conv), data, test)
    return Attacker(LABEL_FREE, 0, ours, test.floor, theirs, ours - max(test.floor, theirs), 1)


def attack_opened(
    opened: Sequence[tuple[Opened, Forms]],
    all_conv: Forms,
    data: Samples,
    test: Samples,
    *,
    flip: bool = True,
    log: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Attack the levels above one's own, one seed: without labels, and by fine-tuning with 100.

    Gain: over the larger of what the level gives anyway, training from scratch (chance where there are no labels)
    and the same attack on the all-convolutions-encrypted model.
    """
    if not opened:
        return []
    part = data.head(OPENED_LABELS)
    recipe = recovery.Recipe(recovery.steps_for(len(part.x)), flip=flip)
    bare = recovery.scratch(_best(all_conv), part, test, recipe, seed=0)
    references = {
        (LABEL_FREE, 0): (test.floor, recovery.recalibrate(_best(all_conv), data, test)),
        (LABELLED[0], len(part.x)): (bare, recovery.fine_tune(_best(all_conv), part, test, recipe, seed=0)),
    }
    rows = []
    for one, forms_ in opened:
        for (name, count), (scratch, theirs) in references.items():
            if count:
                ours = recovery.fine_tune(_best(forms_), part, test, recipe, seed=0)
            else:
                ours = recovery.recalibrate(_best(forms_), data, test)
            row = {"level": one.level, "opened": one.quality, "name": name, "data": count, "accuracy": ours}
            row |= {"scratch": scratch, "all_conv": theirs, "gain": ours - max(one.quality, scratch, theirs)}
            rows.append(row)
            log(opened_line(row))
    return rows


def opened_line(row: Mapping[str, Any]) -> str:
    """One row of `attack_opened` for people."""
    return (
        f"level {row['level']} ({row['opened']:.3f}), {row['name']}, {row['data']} labels: {row['accuracy']:.3f}; "
        f"scratch {row['scratch']:.3f}, all conv {row['all_conv']:.3f}, gain {row['gain']:+.3f}"
    )


def _attack(name: str, forms: Forms, data: Samples, test: Samples, recipe: recovery.Recipe, seed: int) -> float:
    if name == LABELLED[0]:
        return recovery.fine_tune(_best(forms), data, test, recipe, seed=seed)
    if name == LABELLED[1]:
        return recovery.fine_tune(forms.folded, data, test, recipe, seed=seed, extra_norm=True)
    return recovery.known_positions(_best(forms), data, test, recipe, seed=seed, norm_training=name == LABELLED[3])


def _best(forms: Forms) -> Target:
    """The form that helps the attacker more: BatchNorm kept, where there is one."""
    return forms.folded if forms.kept is None else forms.kept


def _line(run: Attacker) -> str:
    return (
        f"{run.name}, {run.data} labels: {run.accuracy:.3f}; scratch {run.scratch:.3f}, "
        f"all conv {run.all_conv:.3f}, gain {run.gain:+.3f}"
    )


def worst_gain(attackers: Sequence[Attacker]) -> float:
    """The largest gain of an attacker with labels."""
    return max((run.gain for run in attackers if run.name != LABEL_FREE), default=0.0)


def label_free_gain(attackers: Sequence[Attacker]) -> float:
    """The gain of the attacker without labels."""
    return max((run.gain for run in attackers if run.name == LABEL_FREE), default=0.0)
