"""``edgepriv demo``: the whole product on this machine, and a report to read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command()
@click.option("--devices", default=4, show_default=True, type=click.IntRange(1, 16))
@click.option("--frames", default=40, show_default=True, type=click.IntRange(1, 5000), help="Frames of each device.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(0, 50), help="Federated rounds.")
@click.option("--data", default="digits", show_default=True, help="digits, an MNIST or CIFAR-10 folder, or images.")
@click.option("--out", default="demo-report", show_default=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=0, show_default=True)
@click.option("--broker", default="auto", show_default=True, type=click.Choice(["auto", "mosquitto", "amqtt"]))
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
def demo(devices: int, frames: int, rounds: int, data: str, out: Path, seed: int, broker: str, as_json: bool) -> None:
    """Run broker, gateway, risk service and devices as in production; end with the path of the report."""
    from edgepriv.demo.report import summary, write_report
    from edgepriv.demo.run import DemoOptions, run_demo
    from edgepriv.logs import configure_logs

    configure_logs("error")
    options = DemoOptions(devices, frames, rounds, data, out.resolve(), seed, broker)
    outcome = run_demo(options, _progress)
    report = write_report(outcome)
    document = summary(outcome, report)
    if as_json:
        click.echo(json.dumps(document))
        return
    click.echo(f"frames     {document['frames']}")
    click.echo(f"outputs    {document['outputs']}")
    click.echo(f"federated  {document['federated']}")
    for model in document["models"]:
        click.echo(f"model      {model}")
    click.echo(str(report))


def _progress(text: str) -> None:
    """One line that is overwritten on a terminal, plain lines elsewhere."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{text}", err=True, nl=False)
    else:
        click.echo(text, err=True)
