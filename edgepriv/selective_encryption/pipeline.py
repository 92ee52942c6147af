"""The whole way of `edgepriv protect` in memory: score, select, attack, raise the share or refuse, calibrate, seal.

Rules: a bundle is made only from a draft that passed its check; the check compares with references on the same data
(see `attack.audit`); what was measured is written into the signed manifest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import ConfigError, RefusedError
from edgepriv.primitives import random_bytes
from edgepriv.selective_encryption import calibrate, carrier, decoys, manifest, protection
from edgepriv.selective_encryption.restore import Restored
from edgepriv.selective_encryption.select.choose import SCOPES
from edgepriv.selective_encryption.select.scoring import STRATEGIES
from edgepriv.selective_encryption.succession import inherited

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgepriv.keys import Identity
    from edgepriv.selective_encryption.calibrate import Samples
    from edgepriv.selective_encryption.protection import Bundle, Draft, LevelPlan
    from edgepriv.selective_encryption.succession import Inherited, Previous

    Log = Callable[[str], None]

SCHEMA = "edgepriv.protect/1"
SHARE_STEPS = (1.0, 1.5, 2.25, 3.4)  # how far the share is raised before protection is refused
MASKED_MARGIN = 0.02
CHECKS = ("quick", "none")
NO_PREVIOUS = (
    "warning: a later version without --previous draws positions and decoys anew: whoever holds the carriers of two "
    "versions finds the encrypted kernels by comparing them, and reads in one what the other hides"
)


@dataclass(frozen=True, slots=True)
class Options:
    """What `edgepriv protect` was asked for; its flags say what each means."""

    share: float = 0.08
    levels: str = "full"
    select: str = "fisher"
    scope: str = "global"
    decoys: str = "mixture"
    mode: str = "levels"
    keep_bn: bool = False
    dense: bool = False
    check: str = "quick"
    margin: float = 0.10
    max_share: float = 0.3
    threads: int = 1
    seed: int = 0
    steps: int | None = None
    trainable: str = ""


def make_bundle(
    plain: Any,
    train: Samples | None,
    test: Samples | None,
    options: Options,
    form: Mapping[str, Any],
    issuer: Identity,
    name: str,
    version: int,
    *,
    now_s: int,
    previous: Previous | None = None,
    log: Log = print,
) -> tuple[Bundle, dict[str, Any]]:
    """Protect a model in memory; raises the share, or refuses, while the quick attacks gain too much."""
    _check_options(options)
    secret, model_id = random_bytes(32), random_bytes(16)
    if previous is not None:
        secret, model_id = previous.secret, previous.model_id
    elif version > 1:
        log(NO_PREVIOUS)
    targets = protection.parse_levels(options.levels)
    original, taken = plain, carrier.input_type(plain)
    folded = 0
    if not options.keep_bn:
        plain, folded = carrier.fold_batchnorm(plain)
    layers = carrier.layers(plain, dense=options.dense)
    before = _inherited(previous, plain, layers, options, folded, version)
    scores, used = _scores(plain, layers, options, train, log)
    decoys_of = (secret, model_id, before)
    share, made, attackers = _accepted(original, plain, layers, scores, options, train, test, decoys_of, log)
    plans = protection.plan_levels(made, targets, test, threads=options.threads, log=log)
    report = _report(name, made, plans, test, used, share, folded, attackers, options)
    report["input_type"] = taken
    report["previous_version"] = previous.version if previous is not None else None
    about = {**report, "input": dict(form)}
    bundle = protection.finish(
        made,
        plans,
        issuer,
        model_id=model_id,
        version=version,
        mode=options.mode,
        name=name,
        now_s=now_s,
        about=about,
        trainable=[name.strip() for name in options.trainable.split(",") if name.strip()],
    )
    report["secrets"] = {"key": bundle.key, "decoys": secret}
    return bundle, report


def _inherited(
    previous: Previous | None, plain: Any, layers: Any, options: Options, folded: int, version: int
) -> Inherited | None:
    """What the version before has hidden and shown; refuses flags that would undo its protection (ConfigError)."""
    if previous is None:
        return None
    if version <= previous.version:
        raise ConfigError(f"version {version} does not follow version {previous.version}", hint="raise --version")
    if bool(folded) != bool(previous.about.get("batchnorm_folded")):
        raise ConfigError(
            "BatchNorm is folded in one of the two versions only: each would show what the other one hides",
            hint="give --keep-bn as for the previous version",
        )
    if previous.about.get("dense") and not options.dense:
        raise ConfigError("the previous version hid Gemm and MatMul weights too", hint="give --dense again")
    return inherited(previous, plain, layers, version)


def _check_options(options: Options) -> None:
    """Refuse what cannot work before anything is computed (ConfigError)."""
    if not 0 < options.share <= 1:
        raise ConfigError(f"--share {options.share:g} is not a share", hint="more than 0, at most 1: for example 0.08")
    for flag, given, known in (
        ("--select", options.select, STRATEGIES),
        ("--scope", options.scope, SCOPES),
        ("--decoys", options.decoys, decoys.KINDS),
        ("--mode", options.mode, manifest.MODES),
        ("--check", options.check, CHECKS),
    ):
        if given not in known:
            raise ConfigError(f"unknown {flag} {given!r}", hint=f"use one of {', '.join(known)}")


def _scores(plain: Any, layers: Any, options: Options, train: Samples | None, log: Log) -> tuple[Any, str]:
    from edgepriv.selective_encryption.select.scoring import unit_scores

    if train is None:
        log("no --data: the training-free score 'magnitude' is used, and nothing is measured")
        from edgepriv.selective_encryption.select.scores import magnitude

        return magnitude((layer.name, carrier.weight_rows(plain, layer)) for layer in layers), "magnitude"
    files = carrier.file_bytes(plain, "m")
    runnable = Restored(0, b"", 0, tuple(files), [np.frombuffer(content, np.uint8) for content in files.values()])
    reference = calibrate.outputs(runnable, train.x[:8])
    del files, runnable
    scores, used = unit_scores(
        plain,
        layers,
        options.select,
        task=train.task,
        x=train.x,
        y=train.y,
        reference=reference,
        seed=options.seed,
        threads=options.threads,
        steps=options.steps,
    )
    if used != options.select:
        log(f"this model cannot be trained through: '{used}' was used instead of '{options.select}'")
    return scores, used


def _accepted(
    original: Any,
    plain: Any,
    layers: Any,
    scores: Any,
    options: Options,
    train: Samples | None,
    test: Samples | None,
    decoys_of: tuple[bytes, bytes, Inherited | None],
    log: Log,
) -> tuple[float, Draft, list[dict[str, Any]]]:
    """Raise the share until the quick attacks gain no more than the margin.

    ``decoys_of``: their secret, the model id, and what the version before leaves.
    """
    secret, model_id, before = decoys_of
    for factor in SHARE_STEPS:
        share = min(options.share * factor, 1.0)
        if factor > 1 and share > options.max_share:
            break
        made = protection.draft(
            plain,
            layers,
            scores,
            share,
            secret=secret,
            model_id=model_id,
            kind=options.decoys,
            scope=options.scope,
            before=before,
        )
        if options.check == "none" or train is None or test is None or options.mode == "full":
            return share, made, []
        problem, attackers = _quick_check(original, made, options, train, test, secret, model_id, log)
        if not problem:
            return share, made, attackers
        log(f"share {share:.3f}: {problem}")
    raise RefusedError(
        f"an attacker gains too much up to a share of {options.max_share:g}: {problem}",
        hint="raise --max-share or --margin, choose another --select, use --mode full"
        + (", or protect a retrained model without --previous" if before is not None else ""),
    )


def _quick_check(
    original: Any,
    made: Draft,
    options: Options,
    train: Samples,
    test: Samples,
    secret: bytes,
    model_id: bytes,
    log: Log,
) -> tuple[str, list[dict[str, Any]]]:
    """Masked quality and, for classifiers, the label-free attack and fine-tuning with 100 labels, one seed."""
    masked = calibrate.quality(made.partial(0), test, threads=options.threads)
    if train.task == "denoise":
        return ("the masked model still denoises" if masked > test.floor else ""), []
    if masked > test.floor + MASKED_MARGIN:
        return f"the masked model has {masked:.3f}, chance is {test.floor:.3f}", []
    from edgepriv.selective_encryption.attack import audit
    from edgepriv.selective_encryption.select.network import UnsupportedModelError

    try:
        pair = audit.targets(
            original, made.layers, made.choice.selected, secret=secret, model_id=model_id, kind=options.decoys
        )
        names = audit.LABELLED[:2]
        runs = audit.run_attacks(
            *pair, train, test, label_counts=[100], names=names, flip=train.x.shape[1] == 3, log=log
        )
    except UnsupportedModelError as error:
        log(f"the attacks cannot run on this model ({error}); only the masked quality was checked")
        return "", []
    worst = max(run.gain for run in runs)
    problem = f"an attacker gains {worst:.3f}, the margin is {options.margin:g}" if worst > options.margin else ""
    return problem, [run.fields() for run in runs]


def _report(
    name: str,
    made: Draft,
    plans: list[LevelPlan],
    test: Samples | None,
    used: str,
    asked: float,
    folded: int,
    attackers: list[dict[str, Any]],
    options: Options,
) -> dict[str, Any]:
    masked = calibrate.quality(made.partial(0), test, threads=options.threads) if test is not None else None
    return {
        "schema": SCHEMA,
        "name": name,
        "selection": used,
        "scope": options.scope,
        "decoys": options.decoys,
        "dense": options.dense,
        "mode": options.mode,
        "batchnorm_folded": folded,
        "share": made.share,
        "share_asked": asked,
        "share_of_all_weights": made.share_of_all,
        "units": made.choice.units,
        "plain": plans[-1].quality,
        "masked": masked,
        "chance": test.floor if test is not None else None,
        "levels": [
            {"level": n, "target": p.target, "quality": p.quality, "share_open": p.count / made.choice.units}
            for n, p in enumerate(plans, 1)
        ],
        "quick_attacks": attackers,
    }
