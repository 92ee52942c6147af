"""``edgepriv model``: publish a protected model for delivery; fetch, verify, test, switch and roll back on a device."""

from __future__ import annotations

import datetime as dt
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.errors import ConfigError, MissingFileError

if TYPE_CHECKING:
    from edgepriv.device.models import ModelStore

CONFIG = click.option(
    "--config", required=True, type=click.Path(path_type=Path), help="device.toml: keys, trust list and state folder."
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group()
def model() -> None:
    """Deliver protected models: publish (owner); pull, status, confirm, rollback (device)."""


@model.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--repository", required=True, type=click.Path(path_type=Path), help="Delivery repository to write.")
@click.option("--owner", "owner_key", required=True, type=click.Path(path_type=Path), help="The owner's key.")
@click.option("--data", required=True, help="Golden inputs come from this data set's test part.")
@click.option("--golden", default=16, show_default=True, help="How many golden inputs.")
@click.option("--min-accuracy", default=0.0, show_default=True, help="On the golden inputs, at the granted level.")
@click.option("--max-latency-ms", default=60_000.0, show_default=True)
@click.option("--max-rss-mb", default=1_000_000.0, show_default=True)
@click.option("--verdict", type=click.Path(path_type=Path), help="The risk service's signed verdict.")
@AS_JSON
def publish(folder: Path, repository: Path, owner_key: Path, as_json: bool, **flags: Any) -> None:
    """Pack the protected model in FOLDER with golden inputs and sign delivery metadata for it."""
    from edgepriv.device.models import Limits, pack
    from edgepriv.keys import load_identity
    from edgepriv.selective_encryption import bundle_files, delivery

    owner = load_identity(owner_key)
    own = folder / "owner" / "issuer.key"
    issuer = load_identity(own) if own.is_file() else owner
    paper, signed = bundle_files.read_manifest(folder, [issuer.public.ed25519])
    stored = bundle_files.read_stored(folder, paper)
    files = {**{name: bytes(content) for name, content in stored.items()}, bundle_files.MANIFEST: signed}
    limits = Limits(flags["min_accuracy"], flags["max_latency_ms"] / 1e3, int(flags["max_rss_mb"] * 1e6))
    verdict = flags["verdict"].read_bytes() if flags["verdict"] else None
    raw = pack(files, _golden(paper, flags["data"], flags["golden"]), limits, issuer, verdict=verdict)
    name = f"{paper.name}.delivery"
    now = dt.datetime.now(dt.timezone.utc)
    custom = {"version": paper.binding.version, "model_id": paper.binding.model_id.hex()}
    path = delivery.publish(repository, raw, name, owner, folder / "owner" / "tuf.json", now=now, custom=custom)
    report = {"schema": "edgepriv.model-publish/1", "target": name, "bytes": len(raw), "file": str(path), **custom}
    click.echo(json.dumps(report) if as_json else f"{repository}: {name} version {paper.binding.version} is offered")


def _golden(paper: Any, data: str, count: int) -> tuple[Any, Any]:
    from edgepriv.cli.protect_data import InputForm, load_samples

    form = InputForm.from_fields(paper.about.get("input", {}))
    if form.task != "classify":
        raise ConfigError(
            "golden inputs are made for classifiers", hint="pack other deliveries by edgepriv.device.models"
        )
    samples = load_samples(data, form, split="test", limit=count)
    return samples.x, samples.y


@model.command()
@CONFIG
@click.option("--repository", required=True, type=click.Path(path_type=Path), help="Repository that was fetched.")
@click.option("--name", required=True, help="Name of the model.")
@click.option("--permission", type=click.Path(path_type=Path), help="Permission for this device and version.")
@click.option("--confirm", "confirm_now", is_flag=True, help="End the trial at once when the self-test passes.")
@AS_JSON
def pull(config: Path, repository: Path, name: str, permission: Path | None, confirm_now: bool, as_json: bool) -> None:
    """Verify the metadata, stage, check, self-test and switch; on any failure the running model stays."""
    from edgepriv.device import protected
    from edgepriv.selective_encryption import delivery

    store, owner = _store(config)
    if permission is not None and not permission.is_file():
        raise MissingFileError(f"no such permission: {permission}", hint="ask the owner: edgepriv grant")
    path, _ = delivery.pull(repository, f"{name}.delivery", owner, store.folder / "tuf")
    store.recover()
    raw = permission.read_bytes() if permission else None
    measured = store.install(path, raw, protected.runner, clock=time.perf_counter, rss=protected.resident_bytes)
    if confirm_now:
        store.confirm()
    report = {
        "schema": "edgepriv.model-status/1",
        **store.report(),
        "accuracy": measured.accuracy,
        "latency_ms": round(1e3 * measured.latency_s, 3),
    }
    click.echo(json.dumps(report) if as_json else _text(report))


@model.command()
@CONFIG
@AS_JSON
def status(config: Path, as_json: bool) -> None:
    """Say what runs and why other models were refused."""
    report = {"schema": "edgepriv.model-status/1", **_store(config)[0].report()}
    click.echo(json.dumps(report) if as_json else _text(report))


@model.command()
@CONFIG
def confirm(config: Path) -> None:
    """End the trial after a health pass: older versions are refused from now on."""
    store, _ = _store(config)
    store.confirm()
    click.echo(_text(store.report()))


@model.command()
@CONFIG
@click.option("--reason", required=True, help="Stored and reported.")
def rollback(config: Path, reason: str) -> None:
    """Return to the last good model."""
    store, _ = _store(config)
    store.roll_back(reason)
    click.echo(_text(store.report()))


def _store(path: Path) -> tuple[ModelStore, bytes]:
    """The model store of a device's configuration, and the pinned owner key."""
    from edgepriv.device import protected
    from edgepriv.device.config import load_config
    from edgepriv.keys import load_identity, load_public
    from edgepriv.trust_file import TrustFile

    config = load_config(path)
    identity, owner = load_identity(config.device.key), load_public(config.device.owner).ed25519
    versions = config.device.state / "trust-version"
    config.device.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    listed = TrustFile(config.device.trust, config.device.owner, versions, clock=time.time).current()
    trust = protected.trust_of(listed, owner, listed.policy_for(identity.name))
    return protected.store_of(config.device.state, identity, trust, lambda line: click.echo(line, err=True)), owner


def _text(report: dict[str, Any]) -> str:
    lines = ["no model is installed"]
    if report["digest"]:
        trial = ", on trial" if report["trial"] else ""
        lines = [f"{report['model']} version {report['version']} runs{trial} ({report['digest'][:12]})"]
    lines += [f"  refused {name[:12]}: {reason}" for name, reason in report["refused"].items()]
    return "\n".join(lines)
