"""``edgepriv-gateway rounds``: start, stop, list and show federated rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgepriv.errors import MissingFileError
from gateway.console import (
    AS_JSON,
    CONFIG,
    ask_daemon,
    assignment,
    handed_over,
    json_map,
    load_config,
    opened_store,
    show,
)


@click.group()
def rounds() -> None:
    """Federated rounds."""


@rounds.command("list")
@CONFIG
@AS_JSON
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000))
def rounds_list(config_path: Path, as_json: bool, limit: int) -> None:
    """List rounds, newest first."""
    with opened_store(load_config(config_path)) as store:
        rows = store.database.query(
            "SELECT number, state, record, started, updated FROM rounds ORDER BY number DESC LIMIT ?", (limit,)
        )
    listed = [_round(row) for row in rows]
    lines = [f"round {r['round']}: {r['state']}{' (' + r['reason'] + ')' if r.get('reason') else ''}" for r in listed]
    show({"schema": "edgepriv.gateway-rounds/1", "rounds": listed}, as_json, lines or ["no rounds"])


@rounds.command("show")
@CONFIG
@AS_JSON
@click.argument("number", type=int)
def rounds_show(config_path: Path, as_json: bool, number: int) -> None:
    """Show a round's record.

    With what the risk service found that its updates give away.
    """
    from gateway import round_audits

    with opened_store(load_config(config_path)) as store:
        leakage = round_audits.leakage(store.database, number)
        rows = store.database.query(
            "SELECT number, state, record, started, updated FROM rounds WHERE number = ?", (number,)
        )
    if not rows:
        raise MissingFileError(f"there was no round {number}", hint="edgepriv-gateway rounds list")
    found = _round(rows[0])
    document = {"schema": "edgepriv.gateway-round/1", **found, "leakage": leakage and json_map(leakage)}
    show(document, as_json, [*(f"{k}: {v}" for k, v in found.items()), *round_audits.lines(leakage)])


def _round(row: tuple[Any, ...]) -> dict[str, Any]:
    from gateway.store import unpack

    number, state, record, started, updated = row
    return json_map({**unpack(record), "round": number, "state": state, "started": started, "updated": updated})


@rounds.command("start")
@CONFIG
@AS_JSON
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Instead of a value in [rounds].")
def rounds_start(config_path: Path, as_json: bool, changes: tuple[str, ...]) -> None:
    """Open a round over the devices that were heard lately."""
    result = ask_daemon(load_config(config_path), "round-start", dict(assignment(text) for text in changes))
    show({"schema": "edgepriv.gateway-round-start/1", **result}, as_json, [f"round {result['round']} is open"])


@rounds.command("stop")
@CONFIG
@AS_JSON
@click.argument("number", type=int)
@click.option("--reason", default="stopped by the operator", show_default=True)
def rounds_stop(config_path: Path, as_json: bool, number: int, reason: str) -> None:
    """Abort a round."""
    ask_daemon(load_config(config_path), "round-stop", {"round": number, "reason": reason})
    show({"schema": "edgepriv.gateway-round-stop/1", "round": number}, as_json, [f"round {number} is aborted"])


@rounds.command("weights")
@CONFIG
@AS_JSON
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="Id of the model whose tensors these are.")
@click.option(
    "--over",
    multiple=True,
    metavar="SHA256",
    help="Digest of a model that the weights are for, as devices report it (one for each level): others sit out.",
)
def rounds_weights(config_path: Path, as_json: bool, file: Path, model: str, over: tuple[str, ...]) -> None:
    """Make a file of weights the base of the next round.

    It is in edgepriv's update format.
    """
    models = [_digest(text) for text in over]
    config = load_config(config_path)
    with handed_over(config, file) as path:
        result = ask_daemon(config, "round-weights", {"path": str(path), "model": model, "over": models})
    document = {
        "schema": "edgepriv.gateway-weights/1",
        "model": model,
        "digest": result["digest"].hex(),
        "size": result["size"],
    }
    show(document, as_json, [f"weights {document['digest']} of {model} are the base of the next round"])


def _digest(text: str) -> str:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise click.BadParameter(f"{text!r} is no SHA-256 in hex", param_hint="--over")
    return digest.hex()


@rounds.command("reference")
@CONFIG
@AS_JSON
@click.argument("update", type=click.Path(path_type=Path))
@click.argument("statement", type=click.Path(path_type=Path))
def rounds_reference(config_path: Path, as_json: bool, update: Path, statement: Path) -> None:
    """Hand in a signed reference update for the rule fltrust.

    `edgepriv federated reference` makes the statement.
    """
    paths = {"update": str(update.resolve()), "statement": str(statement.resolve())}
    result = ask_daemon(load_config(config_path), "round-reference", paths)
    document = {"schema": "edgepriv.gateway-reference/1", **json_map(result)}
    show(document, as_json, [f"the reference of {document['sender']} is used with weights {document['base']}"])


@rounds.command("merge")
@AS_JSON
@click.option("--base", type=click.Path(path_type=Path), required=True, help="The weights that all shards began with.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the new weights go.")
@click.argument("partials", type=click.Path(path_type=Path), nargs=-1, required=True)
def rounds_merge(as_json: bool, base: Path, out: Path, partials: tuple[Path, ...]) -> None:
    """Add the partial sums of several gateways' shards.

    Writes the new global weights.
    """
    from gateway.shards import merge_partials

    if missing := [path for path in (base, *partials) if not path.is_file()]:
        raise MissingFileError(f"no such file: {missing[0]}")
    result = merge_partials(base, partials, out)
    document = {"schema": "edgepriv.gateway-merge/1", "digest": result.digest.hex(), "devices": result.devices}
    show(document, as_json, [f"{out}: weights {document['digest']} over {result.devices} devices"])
