"""``edgepriv-gateway``: run the daemon, and ask or tell it something.

Results on stdout, progress and logs on stderr; ``--json`` prints one document with a ``schema``. Changes are rows that
the daemon carries out (`gateway.commands`) and audits under the name of the user who typed them.
"""

from __future__ import annotations

import datetime as dt
import getpass
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.errors import ConfigError, EdgeprivError, MissingFileError
from gateway.token_commands import token

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.config import Config
    from gateway.store import Store

CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=Path("/etc/edgepriv/gateway.toml"),
    show_default=True,
    help="The gateway's configuration file.",
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@click.group(context_settings={"auto_envvar_prefix": "EDGEPRIV_GATEWAY", "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edgepriv")
def root() -> None:
    """The gateway: collects sealed frames and released outputs, and runs federated rounds."""


@root.command()
@CONFIG
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Instead of [log] level.")
@click.option("--log-json", is_flag=True, help="Log JSON lines.")
def run(config_path: Path, log_level: str | None, log_json: bool) -> None:
    """Run the gateway until it is told to stop."""
    from gateway import daemon, logs

    config = _load(config_path)
    logs.set_up(log_level or config.log.level, as_json=log_json or config.log.json)
    daemon.serve(config)


@root.command()
@CONFIG
@AS_JSON
def check(config_path: Path, as_json: bool) -> None:
    """Check configuration, keys, trust list and store without touching the network."""
    from edgepriv.keys import load_identity, load_public
    from gateway.roster import Roster
    from gateway.round_driver import check_settings

    config = _load(config_path)
    check_settings(dict(config.rounds))
    identity = load_identity(config.gateway.identity)
    with _store(config, create=True) as store:
        roster = Roster(config.gateway.trust, load_public(config.gateway.owner), store, now=time.time())
        roster.check_self(identity)
        parties = {role: len(roster.trust.with_role(role)) for role in ("device", "recipient", "risk")}
    document = {
        "schema": "edgepriv.gateway-check/1",
        "gateway": identity.name,
        "trust_version": roster.trust.version,
        "trust_expires": roster.trust.expires,
        "parties": parties,
    }
    lines = [f"{identity.name}: configuration, keys, trust list {roster.trust.version} and store are well"]
    lines += [f"  {count} {role}{'s' * (count != 1)}" for role, count in parties.items()]
    _show(document, as_json, lines)


@root.command()
@CONFIG
@AS_JSON
def status(config_path: Path, as_json: bool) -> None:
    """Say how the daemon is."""
    config = _load(config_path)
    path = config.gateway.state / "status.json"
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        raise MissingFileError(f"no status at {path}", hint="the gateway has not run with this state folder") from None
    document["running"] = _is_running(config)
    document["age_s"] = round(time.time() - document["at"], 1)
    store = document["store"]
    _show(
        document,
        as_json,
        [
            f"{document['gateway']}: {'running' if document['running'] else 'not running'} ({document['age_s']} s ago)",
            f"  broker {'connected' if document['connected'] else 'not connected'}",
            f"  {store['frames']} frames, {store['outputs']} outputs, {store['bytes']} of {store['limit_bytes']} bytes",
            f"  {document['devices']} devices, {document['transfers']} uploads, rounds {document['rounds']['running']}",
            *(f"  not ready: {name}: {why}" for name, why in document["failed"].items()),
        ],
    )


@root.command()
@CONFIG
@AS_JSON
@click.option("--since", default="1d", show_default=True, help="Age (10m, 2h, 7d) or ISO date.")
@click.option(
    "--by", "by", default="device,model,class", show_default=True, help="device, model, class, window; comma between."
)
def outputs(config_path: Path, as_json: bool, since: str, by: str) -> None:
    """Show released outputs as counts, mean scores and rates."""
    from gateway.outputs import summary

    config = _load(config_path)
    names = tuple(name for name in by.split(",") if name)
    begin = parse_time(since)
    with _store(config) as store:
        rows = summary(store.database, since=begin, by=names)
    document = {"schema": "edgepriv.gateway-outputs/1", "since": begin, "by": list(names), "rows": rows}
    _show(document, as_json, [_row_text(row, names) for row in rows] or ["no outputs"])


def _row_text(row: dict[str, Any], names: tuple[str, ...]) -> str:
    key = " ".join(str(row[name]) for name in names)
    score = f", mean score {row['mean_score']:.3f}" if row["mean_score"] is not None else ""
    return f"{key}: {row['count']} ({row['rate_per_s']:.3f}/s{score}, {row['bits']} bits)"


@root.command()
@CONFIG
@AS_JSON
@click.option("--device", required=True, help="Full name, as in dev-cam1.")
@click.option("--before", required=True, help="Age (10m, 2h, 7d) or ISO date; what was received before goes.")
@click.confirmation_option("--yes", prompt="Delete for good?")
def erase(config_path: Path, as_json: bool, device: str, before: str) -> None:
    """Delete a device's frames, outputs and counts; the audit log keeps that it was done."""
    before_s = parse_time(before)
    args = {"device": device, "before": before_s}
    config = _load(config_path)
    if _is_running(config):
        result = _command(config, "erase", args)
    else:
        with _store(config) as store:
            result = dict(store.erase(device, before_s, actor=_actor(), now=time.time()))
    document = {"schema": "edgepriv.gateway-erase/1", **args, **result}
    _show(
        document,
        as_json,
        [f"{device}: {result['frames']} frames, {result['outputs']} outputs, {result['windows']} windows"],
    )


@root.group()
def rounds() -> None:
    """Federated rounds."""


@rounds.command("list")
@CONFIG
@AS_JSON
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000))
def rounds_list(config_path: Path, as_json: bool, limit: int) -> None:
    """List rounds, newest first."""
    with _store(_load(config_path)) as store:
        rows = store.database.query(
            "SELECT number, state, record, started, updated FROM rounds ORDER BY number DESC LIMIT ?", (limit,)
        )
    listed = [_round(row) for row in rows]
    lines = [f"round {r['round']}: {r['state']}{' (' + r['reason'] + ')' if r.get('reason') else ''}" for r in listed]
    _show({"schema": "edgepriv.gateway-rounds/1", "rounds": listed}, as_json, lines or ["no rounds"])


@rounds.command("show")
@CONFIG
@AS_JSON
@click.argument("number", type=int)
def rounds_show(config_path: Path, as_json: bool, number: int) -> None:
    """Show a round's record."""
    with _store(_load(config_path)) as store:
        rows = store.database.query(
            "SELECT number, state, record, started, updated FROM rounds WHERE number = ?", (number,)
        )
    if not rows:
        raise MissingFileError(f"there was no round {number}", hint="edgepriv-gateway rounds list")
    found = _round(rows[0])
    _show({"schema": "edgepriv.gateway-round/1", **found}, as_json, [f"{k}: {v}" for k, v in found.items()])


def _round(row: tuple[Any, ...]) -> dict[str, Any]:
    from gateway.store import unpack

    number, state, record, started, updated = row
    return _json_map({**unpack(record), "round": number, "state": state, "started": started, "updated": updated})


@rounds.command("start")
@CONFIG
@AS_JSON
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Instead of a value in [rounds].")
def rounds_start(config_path: Path, as_json: bool, changes: tuple[str, ...]) -> None:
    """Open a round over the devices that were heard lately."""
    result = _command(_load(config_path), "round-start", dict(_assignment(text) for text in changes))
    _show({"schema": "edgepriv.gateway-round-start/1", **result}, as_json, [f"round {result['round']} is open"])


@rounds.command("stop")
@CONFIG
@AS_JSON
@click.argument("number", type=int)
@click.option("--reason", default="stopped by the operator", show_default=True)
def rounds_stop(config_path: Path, as_json: bool, number: int, reason: str) -> None:
    """Abort a round."""
    _command(_load(config_path), "round-stop", {"round": number, "reason": reason})
    _show({"schema": "edgepriv.gateway-round-stop/1", "round": number}, as_json, [f"round {number} is aborted"])


@rounds.command("weights")
@CONFIG
@AS_JSON
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="Id of the model whose tensors these are.")
def rounds_weights(config_path: Path, as_json: bool, file: Path, model: str) -> None:
    """Make a file of weights (edgepriv update format) the base of the next round."""
    config = _load(config_path)
    result = _command(config, "round-weights", {"path": str(file.resolve()), "model": model})
    document = {
        "schema": "edgepriv.gateway-weights/1",
        "model": model,
        "digest": result["digest"].hex(),
        "size": result["size"],
    }
    _show(document, as_json, [f"weights {document['digest']} of {model} are the base of the next round"])


@root.group()
def models() -> None:
    """Models for devices."""


@models.command("add")
@CONFIG
@AS_JSON
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--id", "name", required=True, help="The model's id.")
@click.option("--model-version", "version", default="1", show_default=True)
def models_add(config_path: Path, as_json: bool, file: Path, name: str, version: str) -> None:
    """Offer a model file to devices (withheld until it has a verdict, where one is required)."""
    result = _command(
        _load(config_path), "model-add", {"path": str(file.resolve()), "name": name, "version": version}, timeout_s=60
    )
    document = {"schema": "edgepriv.gateway-model/1", "id": name, "version": version, "digest": result["digest"].hex()}
    _show(document, as_json, [f"{name} {version}: {document['digest']}"])


@models.command("list")
@CONFIG
@AS_JSON
def models_list(config_path: Path, as_json: bool) -> None:
    """List models with verdict and state."""
    from edgepriv.keys import load_public
    from gateway.models import Models
    from gateway.roster import Roster

    config, now = _load(config_path), time.time()
    with _store(config) as store:
        roster = Roster(config.gateway.trust, load_public(config.gateway.owner), store, now=now)
        listed = [_json_map(model) for model in Models(store, roster, config.models).listed(now)]
    lines = [
        f"{m['id']} {m['version']}: {m['verdict']}, {m['withheld'] or m['state']} ({m['digest'][:12]})" for m in listed
    ]
    _show({"schema": "edgepriv.gateway-models/1", "models": listed}, as_json, lines or ["no models"])


@models.command("halt")
@CONFIG
@AS_JSON
@click.argument("model")
def models_halt(config_path: Path, as_json: bool, model: str) -> None:
    """Withhold a model from all devices."""
    result = _command(_load(config_path), "model-halt", {"model": model})
    _show(
        {"schema": "edgepriv.gateway-model/1", "model": model, **_json_map(result)}, as_json, [f"{model} is withheld"]
    )


@models.command("offer")
@CONFIG
@AS_JSON
@click.argument("model")
def models_offer(config_path: Path, as_json: bool, model: str) -> None:
    """Offer a halted model again."""
    result = _command(_load(config_path), "model-offer", {"model": model})
    _show({"schema": "edgepriv.gateway-model/1", "model": model, **_json_map(result)}, as_json, [f"{model} is offered"])


@root.command()
@CONFIG
def pages(config_path: Path) -> None:
    """Serve the operator pages until told to stop."""
    from gateway import logs
    from gateway.pages.serve import serve

    config = _load(config_path)
    logs.set_up(config.log.level, as_json=config.log.json)
    serve(config)


@root.group()
def operators() -> None:
    """Who may log in to the pages."""


@operators.command("add")
@CONFIG
@AS_JSON
@click.argument("name")
@click.option("--role", type=click.Choice(["viewer", "operator"]), default="viewer", show_default=True)
def operators_add(config_path: Path, as_json: bool, name: str, role: str) -> None:
    """Let NAME log in; prints the token, which is kept nowhere. Running it again replaces the token."""
    from gateway.pages.access import Operators

    token = Operators(_load(config_path).pages.tokens).add(name, role)
    document = {"schema": "edgepriv.gateway-operator/1", "name": name, "role": role, "token": token}
    _show(document, as_json, [f"{name} ({role}) logs in with this token; it is not shown again:", token])


@operators.command("list")
@CONFIG
@AS_JSON
def operators_list(config_path: Path, as_json: bool) -> None:
    """List who may log in."""
    from gateway.pages.access import Operators

    rows = [{"name": o.name, "role": o.role} for o in Operators(_load(config_path).pages.tokens).all()]
    document = {"schema": "edgepriv.gateway-operators/1", "operators": rows}
    _show(document, as_json, [f"{row['name']} {row['role']}" for row in rows] or ["nobody"])


@operators.command("remove")
@CONFIG
@AS_JSON
@click.argument("name")
def operators_remove(config_path: Path, as_json: bool, name: str) -> None:
    """Let NAME in no more; open sessions end at their next request."""
    from gateway.pages.access import Operators

    if not Operators(_load(config_path).pages.tokens).remove(name):
        raise MissingFileError(f"{name} is not an operator", hint="edgepriv-gateway operators list")
    _show({"schema": "edgepriv.gateway-operator/1", "name": name, "removed": True}, as_json, [f"{name} is removed"])


# --- shared by the commands -------------------------------------------------------------------------------


def parse_time(text: str) -> float:
    """Unix seconds of an age (``10m``) or an ISO date, or ConfigError."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text):
        return time.time() - float(match[1]) * _UNITS[match[2]]
    try:
        moment = dt.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise ConfigError(
            f"{text!r} is not a time", hint="an age like 10m, 2h, 7d, or a date like 2026-11-20"
        ) from None
    return moment.timestamp()


def _load(path: Path) -> Config:
    from gateway.config import load

    return load(path)


class _store:  # noqa: N801 - reads as a verb: with _store(config)
    """The store of a configuration, closed at the end."""

    def __init__(self, config: Config, *, create: bool = False) -> None:
        from gateway.daemon import open_store

        if not create and not config.store.url_file and not (config.gateway.state / "gateway.db").is_file():
            raise MissingFileError(f"no store in {config.gateway.state}", hint="the gateway has not run yet")
        self._store = open_store(config, create=create)

    def __enter__(self) -> Store:
        return self._store

    def __exit__(self, *_: object) -> None:
        self._store.close()


def _is_running(config: Config) -> bool:
    """Whether a daemon holds the state folder's lock."""
    import fcntl

    try:
        with (config.gateway.state / "lock").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _command(config: Config, action: str, args: dict[str, Any], timeout_s: float = 20.0) -> dict[str, Any]:
    from gateway import commands

    with _store(config) as store:
        number = commands.submit(store, _actor(), action, args, time.time())
        return commands.wait(store, number, timeout_s)


def _actor() -> str:
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return f"cli:{os.getuid()}"


def _assignment(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _jsonable(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value


def _json_map(value: dict[str, Any]) -> dict[str, Any]:
    return {key: _jsonable(item) for key, item in value.items()}


def _show(document: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    click.echo(json.dumps(document) if as_json else "\n".join(lines))


def run_tree(command: Callable[..., Any], argv: list[str] | None = None) -> None:
    """Run the commands so that every edgepriv error ends as one clear line and its exit code."""
    try:
        code = command.main(args=argv, prog_name="edgepriv-gateway", standalone_mode=False)  # type: ignore[attr-defined]
        sys.exit(code if isinstance(code, int) else 0)
    except EdgeprivError as error:
        click.echo(f"edgepriv-gateway: {error}", err=True)
        if error.hint:
            click.echo(f"  what to do: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


root.add_command(token)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console command ``edgepriv-gateway``."""
    run_tree(root, argv)
