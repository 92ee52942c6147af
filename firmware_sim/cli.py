"""``edgepriv-sim``: run a scenario against the real gateway and a real broker, and tell what happened."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from edgepriv.cli import LazyGroup
from edgepriv.errors import EdgeprivError


@click.group(
    cls=LazyGroup, context_settings={"auto_envvar_prefix": "EDGEPRIV_SIM", "help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="edgepriv")
def root() -> None:
    """The fleet simulator: up to 1,000 virtual devices that run the real device runtime."""


@root.command("run")
@click.argument("scenario", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep keys, stores and logs here (a new folder).")
@click.option("--devices", type=int, help="Instead of [fleet] devices.")
def run_command(scenario: Path, as_json: bool, out: Path | None, devices: int | None) -> None:
    """Run SCENARIO: a TOML file, or the name of a shipped one (see ``edgepriv-sim list``)."""
    from firmware_sim.stage import run_scenario

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        document = run_scenario(scenario, out.resolve(), devices=devices)
    else:
        with tempfile.TemporaryDirectory(prefix="edgepriv-sim-") as folder:
            document = run_scenario(scenario, Path(folder), devices=devices)
    click.echo(json.dumps(document) if as_json else _summary(document))
    if not document["ok"]:
        sys.exit(1)


@root.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def list_command(as_json: bool) -> None:
    """List the shipped scenarios."""
    from firmware_sim.scenario import SHIPPED

    rows = {p.stem: p.read_text().splitlines()[0].lstrip("# ") for p in sorted(SHIPPED.glob("*.toml"))}
    if as_json:
        click.echo(json.dumps({"schema": "edgepriv.sim-list/1", "scenarios": rows}))
    for name, text in {} if as_json else rows.items():
        click.echo(f"{name:<12} {text}")


@root.command("worker", hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("scenario", type=click.Path(path_type=Path))
@click.argument("broker")
@click.argument("part", type=int)
def worker_command(folder: Path, scenario: Path, broker: str, part: int) -> None:
    """One process of virtual devices; started by ``run``."""
    from firmware_sim.fleet import run_worker

    run_worker(folder, scenario, broker, part)


def _summary(document: dict[str, Any]) -> str:
    lines = [f"{document['scenario']}: {document['devices']} devices, {document['seconds']:.0f} s"]
    for one in document["rounds"]:
        reason = f" ({one['reason']})" if one["reason"] else ""
        text = f"  round {one['round']}: {one['outcome']}{reason}, {one['participants']} of {one['invited']} devices"
        lines.append(f"{text}, accuracy {one['accuracy']:.3f}" if one["accuracy"] is not None else text)
    lines += _data_lines(document["data"], document["untrained_accuracy"])
    frames = document["outputs"]
    lines.append(f"  outputs: {frames['accepted']} accepted by devices, {frames['stored']} stored once")
    lines.append(f"  gateway: {document['gateway_cpu_s']:.1f} CPU-s, peak {document['gateway_peak_mb']:.0f} MB")
    return "\n".join(lines)


def _data_lines(data: dict[str, Any], untrained: float) -> list[str]:
    lines = [f"  accuracy is of real digits that no device saw; the untrained head reaches {untrained:.3f}"]
    if data["release"]:
        made = data["release"]
        text = f"{made['released']} synthetic pictures of {made['records']} records, noise ratio {made['noise_ratio']}"
        lines.append(f"  devices saw a release: {text}")
        lines.append(f"  its card: {made['claim']}")
        lines += [f"  its card: {made['audit']['verdict']}"] if made["audit"] else []
        lines.append(f"  its card: {made['recommendation']}")
    if data["probe"]:
        told = data["probe"]
        lines.append(
            f"  audit of the trained model, probed with {told['pictures']} of these pictures: {told['verdict']}"
        )
        lines.append(f"    {told['reason']}")
    return lines


def main() -> None:
    """Entry point: errors as one line with a hint, and the exit code of their class."""
    try:
        root(standalone_mode=False)
    except EdgeprivError as error:
        click.echo(f"edgepriv-sim: {error}" + (f"\n  what to do: {error.hint}" if error.hint else ""), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)


if __name__ == "__main__":
    main()
