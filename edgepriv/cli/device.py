"""``edgepriv device``: run the runtime, give labels, measure it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgepriv.cli import LazyGroup


@click.group(cls=LazyGroup, table={"bench": ("edgepriv.cli.device_bench:bench", "What the runtime costs.")})
def device() -> None:
    """The runtime on the device: run, label, bench."""


@device.command()
@click.option("--config", required=True, type=click.Path(path_type=Path), help="device.toml")
@click.option("--check", is_flag=True, help="Read everything, run one inference, do not connect.")
@click.option("--json-logs", is_flag=True, help="One JSON object a line on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print the counters at the end.")
def run(config: Path, check: bool, json_logs: bool, as_json: bool) -> None:
    """Capture, infer, release, seal, spool and publish until stopped."""
    from edgepriv.device import loop
    from edgepriv.logs import configure_logs

    configure_logs(json_lines=json_logs)
    if check:
        loop.check_device(config)
        click.echo("the configuration, keys, trust list and model are usable")
        return
    report = loop.run_device(config)
    click.echo(json.dumps(report) if as_json else _summary(report))


def _summary(report: dict[str, Any]) -> str:
    counters = ", ".join(f"{name} {value}" for name, value in sorted(report["counters"].items()))
    return f"{report['device']}: {counters}; {report['pending']} items wait for the next start"


@device.command()
@click.option("--labels", required=True, type=click.Path(path_type=Path), help="The file of [rounds] labels.")
@click.option("--frame", required=True, help="Name of the frame, as the log and the output say it.")
@click.option("--label", required=True, type=click.IntRange(0), help="Class index.")
def label(labels: Path, frame: str, label: int) -> None:
    """Say what a frame shows; the running device trains on it in the next round."""
    labels.parent.mkdir(parents=True, exist_ok=True)
    with labels.open("a") as file:
        file.write(json.dumps({"frame": frame, "label": label}) + "\n")
    click.echo(f"{frame} is {label}")
