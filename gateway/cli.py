"""``edgepriv-gateway``: run the daemon, and ask or tell it something.

Results on stdout, progress and logs on stderr; ``--json`` prints one document with a ``schema``. Changes are rows that
the daemon carries out (`gateway.commands`) and audits under the name of the user who typed them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path  # noqa: TC003 - click reads the annotations
from typing import TYPE_CHECKING, Any

import click

from edgepriv.errors import EdgeprivError, MissingFileError
from gateway.cli_devices import devices
from gateway.cli_models import models
from gateway.cli_operators import operators
from gateway.cli_rounds import rounds
from gateway.console import (
    AS_JSON,
    CONFIG,
    actor,
    ask_daemon,
    is_running,
    load_config,
    make_state,
    opened_store,
    parse_time,
    show,
)
from gateway.token_commands import token

if TYPE_CHECKING:
    from collections.abc import Callable


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
    from edgepriv.logs import configure_logs
    from gateway import daemon

    config = load_config(config_path)
    configure_logs(log_level or config.log.level, json_lines=log_json or config.log.json)
    make_state(config)
    daemon.serve(config)


@root.command()
@CONFIG
@AS_JSON
def check(config_path: Path, as_json: bool) -> None:
    """Check configuration, keys, trust list and store, offline."""
    from edgepriv.keys import load_identity, load_public
    from gateway.roster import Roster
    from gateway.round_driver import check_settings

    config = load_config(config_path)
    check_settings(dict(config.rounds))
    identity = load_identity(config.gateway.identity)
    with opened_store(config, create=True) as store:
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
    show(document, as_json, lines)


@root.command()
@CONFIG
@AS_JSON
def status(config_path: Path, as_json: bool) -> None:
    """Say how the daemon is."""
    config = load_config(config_path)
    path = config.gateway.state / "status.json"
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        raise MissingFileError(f"no status at {path}", hint="the gateway has not run with this state folder") from None
    document["running"] = is_running(config)
    document["age_s"] = round(time.time() - document["at"], 1)
    store = document["store"]
    show(
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

    config = load_config(config_path)
    names = tuple(name for name in by.split(",") if name)
    begin = parse_time(since)
    with opened_store(config) as store:
        rows = summary(store.database, since=begin, by=names)
    document = {"schema": "edgepriv.gateway-outputs/1", "since": begin, "by": list(names), "rows": rows}
    show(document, as_json, [_row_text(row, names) for row in rows] or ["no outputs"])


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
    """Delete a device's frames, outputs and counts for good.

    The audit log keeps that it was done.
    """
    before_s = parse_time(before)
    args = {"device": device, "before": before_s}
    config = load_config(config_path)
    if is_running(config):
        result = ask_daemon(config, "erase", args)
    else:
        with opened_store(config) as store:
            result = dict(store.erase(device, before_s, actor=actor(), now=time.time()))
    document = {"schema": "edgepriv.gateway-erase/1", **args, **result}
    show(
        document,
        as_json,
        [f"{device}: {result['frames']} frames, {result['outputs']} outputs, {result['windows']} windows"],
    )


@root.command()
@CONFIG
@AS_JSON
@click.option("--no-network", is_flag=True, help="Do not connect to the broker.")
def doctor(config_path: Path, as_json: bool, no_network: bool) -> None:
    """Check what the gateway needs; say how to mend what is wrong.

    Ends with 1 where something fails.
    """
    from edgepriv.doctor import show as shown
    from gateway.doctor import examine

    config = load_config(config_path)
    found = examine(config, network=not no_network, running=is_running(config))
    text, code = shown("gateway", found, as_json=as_json)
    click.echo(text)
    sys.exit(code)


@root.command()
@CONFIG
def pages(config_path: Path) -> None:
    """Serve the operator pages until told to stop."""
    from edgepriv.logs import configure_logs
    from gateway.pages.serve import serve

    config = load_config(config_path)
    configure_logs(config.log.level, json_lines=config.log.json)
    serve(config)


for part in (devices, rounds, models, operators, token):
    root.add_command(part)


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


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console command ``edgepriv-gateway``."""
    run_tree(root, argv)
