"""``edgepriv-gateway models``: add, list, roll out, halt and roll back models."""

from __future__ import annotations

import time
from pathlib import Path

import click

from edgepriv.errors import ConfigError, MissingFileError
from gateway.console import AS_JSON, CONFIG, ask_daemon, handed_over, json_map, load_config, opened_store, show


@click.group()
def models() -> None:
    """Models for devices."""


@models.command("add")
@CONFIG
@AS_JSON
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--id", "name", default="", help="The model's id; a protected model has its own.")
@click.option("--model-version", "version", default="", help="Default: 1, or a protected model's own.")
@click.option("--only-judge", is_flag=True, help="For the risk service alone: withheld from devices.")
def models_add(config_path: Path, as_json: bool, file: Path, name: str, version: str, only_judge: bool) -> None:
    """Take a model file, or a protected model's shipment.

    Without the verdict that it needs it is withheld from devices.

    The first version of a model is offered to all devices; a further one is held until `models rollout`. The same file
    again changes nothing; other bytes under an id and version that are here are refused.
    """
    config = load_config(config_path)
    with handed_over(config, file) as path:
        args = {"path": str(path), "name": name, "version": version, "only_judge": only_judge}
        result = ask_daemon(config, "model-add", args, timeout_s=60)
    document = {"schema": "edgepriv.gateway-model/1", **json_map(result)}
    lines = [f"{document['id']} {document['version']}: {document['digest']}"]
    if document.get("unchanged"):
        lines.append(f"it was here already ({document['state']}): state, rollout and verdict are as they were")
    elif document.get("held"):
        lines.append("held: it is not the first of its id; edgepriv-gateway models rollout offers it")
    elif document.get("state") in {"halted", "rolled back"}:
        lines.append(
            f"{document['state']}, like what was here of this version; edgepriv-gateway models offer offers it"
        )
    show(document, as_json, lines)


@models.command("list")
@CONFIG
@AS_JSON
def models_list(config_path: Path, as_json: bool) -> None:
    """List models with verdict and state."""
    from edgepriv.keys import load_public
    from gateway.models import Models
    from gateway.roster import Roster

    config, now = load_config(config_path), time.time()
    with opened_store(config) as store:
        roster = Roster(config.gateway.trust, load_public(config.gateway.owner), store, now=now)
        listed = [json_map(model) for model in Models(store, roster, config.models).listed(now)]
    lines = [
        f"{m['id']} {m['version']}: {m['verdict']}, {m['withheld'] or m['state']} ({m['digest'][:12]})"
        + (f"; {m['stage']}" if m["stage"] else "")
        for m in listed
    ]
    show({"schema": "edgepriv.gateway-models/1", "models": listed}, as_json, lines or ["no models"])


@models.command("verdict")
@CONFIG
@AS_JSON
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
def models_verdict(config_path: Path, as_json: bool, model: str, out: Path) -> None:
    """Write a model's signed verdict to a file.

    It is for `edgepriv model publish --verdict`.
    """
    from edgepriv.keys import load_public
    from gateway.models import Models
    from gateway.roster import Roster

    config, now = load_config(config_path), time.time()
    with opened_store(config) as store:
        roster = Roster(config.gateway.trust, load_public(config.gateway.owner), store, now=now)
        held = Models(store, roster, config.models)
        digest = held.find(model)
        (found,) = [m for m in held.listed(now) if m["digest"] == digest]
    if not found["verdict_bytes"]:
        raise MissingFileError(f"{model} has no verdict yet", hint="is the risk service running?")
    out.write_bytes(found["verdict_bytes"])
    document = {"schema": "edgepriv.gateway-model/1", "model": model, "verdict": found["verdict"], "file": str(out)}
    show(document, as_json, [f"{out}: {model} has {found['verdict']}"])


@models.command("halt")
@CONFIG
@AS_JSON
@click.argument("model")
def models_halt(config_path: Path, as_json: bool, model: str) -> None:
    """Withhold a model from all devices."""
    result = ask_daemon(load_config(config_path), "model-halt", {"model": model})
    show({"schema": "edgepriv.gateway-model/1", "model": model, **json_map(result)}, as_json, [f"{model} is withheld"])


@models.command("rollout")
@CONFIG
@AS_JSON
@click.argument("model")
@click.option("--stages", default="5,25,100", show_default=True, help="Rising percentages of the devices.")
@click.option("--settle", "settle_s", default=3600.0, show_default=True, help="Seconds that a stage lasts at least.")
@click.option("--min-good", default=3, show_default=True, help="Devices that must report good in a stage.")
@click.option("--max-failed", default=0.1, show_default=True, help="Share of failures that halts it.")
def models_rollout(
    config_path: Path, as_json: bool, model: str, stages: str, settle_s: float, min_good: int, max_failed: float
) -> None:
    """Offer a model to a growing share of the devices.

    It halts by itself when too many report a failure.
    """
    try:
        shares = [int(share) for share in stages.split(",")]
    except ValueError:
        raise ConfigError(f"{stages!r} is not a list of percentages", hint="for example 5,25,100") from None
    args = {
        "model": model,
        "stages": shares,
        "settle_s": settle_s,
        "min_good": min_good,
        "max_failed_share": max_failed,
    }
    result = ask_daemon(load_config(config_path), "model-rollout", args)
    lines = [f"{model} is offered to {shares[0]} % of the devices"]
    show({"schema": "edgepriv.gateway-model/1", "model": model, **json_map(result)}, as_json, lines)


@models.command("rollback")
@CONFIG
@AS_JSON
@click.argument("model")
def models_rollback(config_path: Path, as_json: bool, model: str) -> None:
    """Withhold a version, so that an earlier one counts again.

    Nobody is offered it; the newest earlier one that is on offer is offered instead. Devices that have confirmed the
    version keep it: they take no older one. Publish a newer version for them.
    """
    result = ask_daemon(load_config(config_path), "model-rollback", {"model": model})
    lines = [
        f"{model} is rolled back; version {result['version']} is offered to {result['share']} % of the devices",
        f"devices that have confirmed {model} keep it",
    ]
    show({"schema": "edgepriv.gateway-model/1", "model": model, **json_map(result)}, as_json, lines)


@models.command("offer")
@CONFIG
@AS_JSON
@click.argument("model")
def models_offer(config_path: Path, as_json: bool, model: str) -> None:
    """Offer a halted or held model.

    A rollout goes on where it was; without one the model is offered to all devices.
    """
    result = ask_daemon(load_config(config_path), "model-offer", {"model": model})
    show({"schema": "edgepriv.gateway-model/1", "model": model, **json_map(result)}, as_json, [f"{model} is offered"])
