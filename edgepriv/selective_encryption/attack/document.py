"""The protect-audit document: everything that is measured on one protected model, under one schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.selective_encryption import carrier, decoys, protection
from edgepriv.selective_encryption.attack import audit, detect
from edgepriv.selective_encryption.select.choose import choose
from edgepriv.selective_encryption.select.scores import random_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from edgepriv.selective_encryption.attack.audit import Opened
    from edgepriv.selective_encryption.calibrate import Samples
    from edgepriv.selective_encryption.carrier import Layer

SCHEMA = "edgepriv.protect-audit/1"
LABELS = (20, 100)
DATA_SHARES = (0.01, 0.1)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is audited, in clear on the owner's machine.

    ``original`` is the plain model, with its BatchNorm layers where the owner still has it so; ``layers`` its
    convolutions; ``selected`` the encrypted units; ``kind`` the decoys; ``share`` of the convolution weights;
    ``opened`` the levels below the whole model, each attacked by its own holder.
    """

    original: Any
    layers: Sequence[Layer]
    selected: Mapping[str, NDArray[np.bool_]]
    kind: str
    share: float
    opened: Sequence[Opened] = ()


def document(
    subject: Subject,
    data: Samples,
    test: Samples,
    *,
    masked_quality: float,
    plain_quality: float,
    levels: Sequence[dict[str, Any]],
    startup_ratio: float | None,
    seeds: int = 2,
    labels: Sequence[int] = LABELS,
    shares: Sequence[float] = DATA_SHARES,
    flip: bool = True,
    detectors: Sequence[str] = detect.DETECTORS,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Attack a protected model in every way of the list and write down what happened.

    Args:
        subject: the model.
        data: what the attackers have, at most (labels used as counted).
        test: what everybody is judged on.
        masked_quality: of the carrier.
        plain_quality: of the plain model.
        levels: rows ``level, target, accuracy``.
        startup_ratio: see `startup.ratio`; None where it was not measured.
        seeds: attacker seeds; the worst counts.
        labels: label counts.
        shares: shares of ``data``, turned into label counts as well.
        flip: whether mirrored pictures are still pictures of the class.
        detectors: decoy detectors.
        log: progress.
    """
    how: dict[str, Any] = {"secret": np.random.default_rng(0).bytes(32), "model_id": bytes(16), "kind": subject.kind}
    pair = audit.targets(subject.original, subject.layers, subject.selected, **how)
    counts = sorted({*labels, *(max(1, round(share * len(data.x))) for share in shares)})
    attackers = audit.run_attacks(*pair, data, test, label_counts=counts, seeds=seeds, flip=flip, log=log)
    holders = [(one, audit.forms(subject.original, subject.layers, one.hidden, **how)) for one in subject.opened]
    return {
        "schema": SCHEMA,
        "share": subject.share,
        "masked_accuracy": masked_quality,
        "plain_accuracy": plain_quality,
        "chance": test.floor,
        "attackers": [run.fields() for run in attackers],
        "worst_gain": audit.worst_gain(attackers),
        "label_free_gain": audit.label_free_gain(attackers),
        "opened_levels": audit.attack_opened(holders, pair[1], data, test, flip=flip, log=log),
        "decoys": decoy_rows(subject, detectors, log),
        "levels": list(levels),
        "startup_ratio": startup_ratio,
        "data_share_labels": {f"{share:g}": max(1, round(share * len(data.x))) for share in shares},
    }


def decoy_rows(
    subject: Subject, detectors: Sequence[str], log: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Each detector on our decoys and on the published ones, with BatchNorm folded and not.

    ``auc_on_dprm``: the published decoys at the published ratio in the same layers (the positive control). Both are
    None where none of the layers could be tested; ``layers`` says in how many the decoys were.
    """
    folded, count = carrier.fold_batchnorm(subject.original)
    forms = [(True, folded), *([(False, subject.original)] if count else [])]
    rows = []
    for is_folded, model in forms:
        ours = _masked(model, subject.layers, subject.selected, subject.kind)
        layers = detect.mixed_layers(subject.layers, subject.selected)
        published = published_choice(layers) if layers else {}
        theirs = _masked(model, layers, published, "dprm")
        for name in detectors:
            auc, tested = detect.detect(ours, subject.layers, subject.selected, name, kind=subject.kind)
            dprm, _ = detect.detect(theirs, layers, published, name, kind="dprm")
            rows.append({"detector": name, "bn_folded": is_folded, "auc": auc, "auc_on_dprm": dprm, "layers": tested})
            log(detection(rows[-1]))
    return rows


def detection(row: Mapping[str, Any]) -> str:
    """One row of ``decoys`` for people."""
    head = f"decoy detector {row['detector']}, BatchNorm {'folded' if row['bn_folded'] else 'kept'}: "
    if row["auc"] is None:
        return head + "no layer has enough encrypted and enough clear kernels to be tested"
    dprm = "not tested" if row["auc_on_dprm"] is None else f"{row['auc_on_dprm']:.3f}"
    return head + f"AUC {row['auc']:.3f} in {row['layers']} layers (published decoys {dprm})"


def published_choice(layers: Sequence[Layer], share: float = 0.02) -> dict[str, NDArray[np.bool_]]:
    """The published rule, one ratio of each layer; which kernels does not matter to a detector of decoys."""
    return choose(random_scores(layers, 0), layers, share, scope="layer").selected


def _masked(model: Any, layers: Sequence[Layer], selected: Mapping[str, NDArray[np.bool_]], kind: str) -> Any:
    rows = {
        layer.name: decoys.decoy_rows(
            carrier.weight_rows(model, layer),
            layer.inputs,
            selected[layer.name],
            decoys.PrfNoise(b"d" * 32, bytes(16), layer.name),
            kind=kind,
        )
        for layer in layers
    }
    return carrier.with_rows(model, rows)


def table(
    model: Any,
    layers: Sequence[Layer],
    scores: Mapping[str, Mapping[str, NDArray[np.float64]]],
    shares: Sequence[float],
    judge: Callable[[Any], float],
    *,
    scopes: Sequence[str] = ("layer", "global"),
) -> list[dict[str, Any]]:
    """Masked accuracy for each selection, budget rule and share: the table of the reference."""
    rows = []
    for name, score in scores.items():
        for scope in scopes:
            cells = {}
            for share in shares:
                selected = choose(score, layers, share, scope=scope).selected
                masked = protection.masked_rows(
                    model, layers, selected, secret=b"t" * 32, model_id=bytes(16), kind="dprm"
                )
                cells[f"{share:g}"] = judge(carrier.with_rows(model, masked))
            rows.append({"selection": name, "scope": scope, "masked_accuracy": cells})
    return rows
