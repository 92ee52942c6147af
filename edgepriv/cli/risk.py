"""``edgepriv risk``: run the risk service, list what it has concluded."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.cli import LazyGroup
from edgepriv.errors import EdgeprivError, KeyFileError, MissingFileError, RiskThresholdError, TemporaryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edgepriv.risk.config import RiskConfig
    from edgepriv.risk.jobs import Job, JobQueue
    from edgepriv.risk.service import RiskService

CONFIG = click.option(
    "--config", "config_path", required=True, type=click.Path(path_type=Path, dir_okay=False), help="risk.toml"
)


@click.group(cls=LazyGroup)
def risk() -> None:
    """The risk service."""


@risk.command()
@CONFIG
@click.option("--json-logs", is_flag=True, help="One JSON object a log line.")
@click.option("--steps", default=0, hidden=True, help="Stop after so many steps; 0 runs until a signal.")
def serve(config_path: Path, json_logs: bool, steps: int) -> None:
    """Audit models that the gateway offers, sign verdicts, watch for drift."""
    from edgepriv.logs import configure_logs
    from edgepriv.notify import Notifier
    from edgepriv.risk.config import load_config
    from edgepriv.risk.pages import serve as serve_pages

    configure_logs(json_lines=json_logs)
    config = load_config(config_path)
    stop, notifier = threading.Event(), Notifier()

    def waiting() -> None:
        """The service waits for the gateway: it is alive, and a stop does not wait with it."""
        notifier.alive()
        if stop.is_set():
            raise TemporaryError("the service stops")

    service = open_service(config, waiting)
    pages = serve_pages(service, config.http.host, config.http.port) if config.http.port else None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    notifier.ready()
    done = 0
    try:
        while not stop.is_set() and (not steps or done < steps):
            service.step()
            notifier.alive()
            done += 1
            stop.wait(config.risk.poll_s)
    finally:
        notifier.stopping()
        service.close()
        if pages is not None:
            pages.shutdown()


def open_service(config: RiskConfig, on_wait: Callable[[], None] = lambda: None) -> RiskService:
    """Read keys and trust list, and make the service with the device's own release policies."""
    import time

    from edgepriv.cli.pinned_trust import adopt_newer
    from edgepriv.client import GatewayClient
    from edgepriv.device.purify import OutputPurifier, PurifiedPolicy
    from edgepriv.device.release import parse_policy
    from edgepriv.keys import load_identity
    from edgepriv.risk.service import RiskService
    from edgepriv.risk.worker import open_pool
    from edgepriv.trust_file import TrustFile

    identity = load_identity(config.risk.identity)
    if identity.public.role != "risk":
        raise KeyFileError(f"{config.risk.identity} is the key of {identity.name}, not of a risk service")
    config.risk.state.mkdir(parents=True, exist_ok=True)
    trust = TrustFile(config.risk.trust, config.risk.owner, config.risk.state / "trust.version", clock=time.time)
    broker = config.broker

    def connect() -> GatewayClient:
        client = GatewayClient(
            broker.url, identity, trust.current(), config.risk.gateway, shard=config.risk.shard,
            tls=broker.tls, username=broker.username, password_file=broker.password_file,
            on_wait=on_wait,
        )  # fmt: skip
        try:
            adopt_newer(client, trust)
        except EdgeprivError:
            client.close()
            raise
        return client

    pipelines = [parse_policy(spec) for spec in config.audit.policies]
    if config.audit.purifier is not None:
        purifier = OutputPurifier.load(config.audit.purifier)
        pipelines = [PurifiedPolicy(policy, purifier) for policy in pipelines]
    return RiskService(config, connect, identity.sign, pipelines, open_pool(config.audit))


@risk.command("list")
@CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def list_(config_path: Path, as_json: bool) -> None:
    """List audited and waiting models."""
    from edgepriv.risk.config import load_config
    from edgepriv.risk.drift import drift_in, drift_of

    seen = drift_in(load_config(config_path).risk.state)
    rows: list[dict[str, Any]] = [
        {
            "model": job.name,
            "digest": job.digest.hex(),
            "state": job.state,
            "verdict": (job.report or {}).get("verdict") if job.state == "done" else None,
            "before": (job.report or {}).get("verdict") if job.state != "done" else None,
            "error": job.error,
            "drift": drift_of(seen, job.digest, job.name),
        }
        for job in _jobs(config_path)
    ]
    if as_json:
        click.echo(json.dumps({"schema": "edgepriv.risk-list/1", "models": rows}))
        return
    for row in rows:
        drift = row["drift"] or {}
        words = [row["error"], f"drift: index {drift['index']:.2f}" if drift.get("alert") else ""]
        said = "; ".join(filter(None, words))
        click.echo(f"{row['digest'][:12]} {row['model']}: {row['verdict'] or row['state']} {said}".rstrip())


@risk.command()
@CONFIG
@click.argument("digest")
@click.option("--json", "as_json", is_flag=True, help="Print the audit's JSON report.")
def show(config_path: Path, digest: str, as_json: bool) -> None:
    """Show the audit of a model by the beginning of its digest; exit code 3 unless leakage is low."""
    found = [job for job in _jobs(config_path) if job.digest.hex().startswith(digest)]
    if len(found) != 1 or found[0].report is None or found[0].state != "done":
        raise MissingFileError(f"no finished audit of {digest!r}", hint="edgepriv risk list shows them")
    report = found[0].report
    click.echo(json.dumps(report) if as_json else f"{found[0].name}: {report['verdict']} - {report['reason']}")
    if report["verdict"] != "low leakage":
        raise RiskThresholdError(f"{found[0].name}: {report['verdict']}", hint="do not deploy it")


@risk.command()
@CONFIG
@click.argument("digest")
def retry(config_path: Path, digest: str) -> None:
    """Audit a given up or waiting model at once, by the beginning of its digest; the service may be running."""
    with _queue(config_path) as queue:
        job = queue.retry(digest.lower())
    click.echo(f"{job.digest.hex()[:12]} {job.name} is queued")


@risk.command()
@CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def rounds(config_path: Path, as_json: bool) -> None:
    """Show what the updates of each audited round give away, on canaries."""
    from edgepriv.risk.config import load_config
    from edgepriv.risk.round_watch import found_in

    rows = found_in(load_config(config_path).risk.state / "rounds")
    if as_json:
        click.echo(json.dumps({"schema": "edgepriv.risk-rounds/1", "rounds": rows}))
        return
    for row in rows:
        report = row["report"]
        if "error" in report:
            click.echo(f"round {row['round']}: not audited: {report['error']}")
            continue
        attack = report["attack"]
        bound = f"bound {report['leakage_bound']:.1f} dB (the prior {report['leakage_floor']:.1f})"
        found = f"attack PSNR {attack['psnr_db']:.1f} dB, IIP {attack['iip']:.2f}"
        click.echo(f"round {row['round']}: {report['verdict']}; {found}; {bound}; {report['seen']}")
    if not rows:
        click.echo("no round has been audited; [rounds] canaries of risk.toml turns it on")


def _jobs(config_path: Path) -> list[Job]:
    with _queue(config_path) as queue:
        return queue.listed()


@contextlib.contextmanager
def _queue(config_path: Path) -> Iterator[JobQueue]:
    from edgepriv.risk.config import load_config
    from edgepriv.risk.jobs import JobQueue

    config = load_config(config_path)
    path = config.risk.state / "jobs.db"
    if not path.is_file():
        raise MissingFileError(f"no risk service has run in {config.risk.state}")
    queue = JobQueue(path, max_jobs=config.audit.max_jobs)
    try:
        yield queue
    finally:
        queue.close()
