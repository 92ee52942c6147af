"""``edgepriv model``: publish a protected model for delivery; verify, test, switch and roll back on a device."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.cli import LazyGroup
from edgepriv.errors import ConfigError, DataError, EdgeprivError, MissingFileError

if TYPE_CHECKING:
    from edgepriv.device.models import ModelStore
    from edgepriv.selective_encryption.manifest import Manifest

CONFIG = click.option(
    "--config", required=True, type=click.Path(path_type=Path), help="device.toml: keys, trust list and state folder."
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group(cls=LazyGroup)
def model() -> None:
    """Deliver protected models: publish (owner); pull, install, status, confirm, rollback (device)."""


@model.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--repository", required=True, type=click.Path(path_type=Path), help="Delivery repository to write.")
@click.option("--owner", "owner_key", required=True, type=click.Path(path_type=Path), help="The owner's key.")
@click.option(
    "--tuf-keys", type=click.Path(path_type=Path), help="Keys of the delivery roles; default: beside --owner's file."
)
@click.option("--data", required=True, help="Golden inputs come from this data set's test part.")
@click.option("--golden", default=16, show_default=True, help="How many golden inputs.")
@click.option("--min-accuracy", default=0.0, show_default=True, help="On the golden inputs, at the granted level.")
@click.option("--min-psnr-db", default=0.0, show_default=True, help="The same for a denoiser.")
@click.option("--max-latency-ms", default=60_000.0, show_default=True)
@click.option("--max-rss-mb", default=1_000_000.0, show_default=True)
@click.option(
    "--verdict", "verdicts", multiple=True, type=click.Path(path_type=Path), help="Signed verdict of a level."
)
@click.option(
    "--shipment", type=click.Path(path_type=Path), help="Also write one file for `edgepriv-gateway models add`."
)
@click.option(
    "--permission", "permissions", multiple=True, type=click.Path(path_type=Path), help="Goes with --shipment."
)
@AS_JSON
def publish(folder: Path, repository: Path, owner_key: Path, as_json: bool, **flags: Any) -> None:
    """Pack the protected model in FOLDER with golden inputs and sign delivery metadata for it."""
    from edgepriv.cli.protect_data import InputForm, load_samples
    from edgepriv.device import packing
    from edgepriv.device.shipments import SUFFIX
    from edgepriv.keys import load_identity
    from edgepriv.selective_encryption import bundle_files, delivery, tuf_keys

    owner = load_identity(owner_key)
    if owner.public.role != "owner":
        raise ConfigError(f"{owner_key} is the key of {owner.public.name}, not of an owner")
    keys = flags["tuf_keys"] or tuf_keys.default_path(owner_key)
    delivery.check_keys(repository, owner, keys, earlier=folder / "owner" / "tuf.json")
    own = folder / "owner" / "issuer.key"
    issuer = load_identity(own) if own.is_file() else owner
    paper, signed = bundle_files.read_manifest(folder, [issuer.public.ed25519])
    permissions = _permissions(flags["permissions"], paper, issuer.public.ed25519)
    samples = load_samples(
        flags["data"], InputForm.from_fields(paper.about.get("input", {})), split="test", limit=flags["golden"]
    )
    limits = packing.Limits(
        flags["min_accuracy"], flags["max_latency_ms"] / 1e3, int(flags["max_rss_mb"] * 1e6), flags["min_psnr_db"]
    )
    repository.mkdir(parents=True, exist_ok=True)
    fresh = repository / "new.part"
    with fresh.open("wb") as stream:
        packing.write_delivery(
            stream,
            {**_public_files(folder, paper), bundle_files.MANIFEST: signed},
            packing.Golden(samples.x, samples.y),
            limits,
            issuer,
            verdicts=_verdicts(flags["verdicts"], paper),
        )
    name = paper.name + SUFFIX
    now = dt.datetime.now(dt.timezone.utc)
    custom = {"version": paper.binding.version, "model_id": paper.binding.model_id.hex()}
    path = delivery.publish(repository, fresh, name, owner, keys, now=now, custom=custom)
    if flags["shipment"]:
        _ship(flags["shipment"], delivery.shipped_files(repository, name), permissions)
    report = {"schema": "edgepriv.model-publish/1", "target": name, "bytes": path.stat().st_size, "file": str(path)}
    text = f"{repository}: {name} version {paper.binding.version} is offered"
    click.echo(json.dumps({**report, **custom}) if as_json else text)


def _public_files(folder: Path, paper: Manifest) -> dict[str, Path]:
    """The bundle's public files and its ``model.toml``, small ones first."""
    names = [item.segment.name for item in paper.levels] + [paper.stored_name(entry) for entry in paper.files]
    files = {name: folder / name for name in ("model.toml", *names)}
    if not files["model.toml"].is_file():
        click.echo(f"{folder} has no model.toml: devices need one to run this model in their pipeline", err=True)
        del files["model.toml"]
    for path in files.values():
        if not path.is_file():
            raise MissingFileError(f"the bundle lacks {path.name}", hint="run edgepriv protect again")
    return files


def _verdicts(paths: tuple[Path, ...], paper: Manifest) -> dict[str, bytes]:
    """Name each verdict after the level whose bytes it speaks of."""
    from edgepriv.wire import cbor, delivery

    found = {}
    for path in paths:
        raw = _read(path, "verdict")
        try:
            body, _ = cbor.decode(raw, max_bytes=delivery.MAX_VERDICT_BYTES)
            digest = cbor.decode_map(body, max_bytes=delivery.MAX_VERDICT_BYTES).get("model")
        except (EdgeprivError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a verdict") from error
        level = next((item.level for item in paper.levels if item.digest == digest), None)
        if level is None:
            raise ConfigError(
                f"{path} speaks of other bytes than any level of this model", hint="audit a level's bytes"
            )
        found[delivery.verdict_name(level)] = raw
    return found


def _permissions(paths: tuple[Path, ...], paper: Manifest, issuer: bytes) -> dict[str, bytes]:
    """Permissions by the name under which their device looks for them."""
    from edgepriv.device.shipments import permission_name
    from edgepriv.selective_encryption.manifest import decode_permission

    found = {}
    for path in paths:
        raw = _read(path, "permission")
        permission = decode_permission(raw, [issuer])
        if permission.binding != paper.binding:
            raise ConfigError(
                f"{path} is for another model or version", hint="edgepriv grant makes one for this bundle"
            )
        found[permission_name(permission.device)] = raw
    return found


def _read(path: Path, what: str) -> bytes:
    if not path.is_file():
        raise MissingFileError(f"no such {what}: {path}")
    return path.read_bytes()


def _ship(path: Path, repository: dict[str, Path], permissions: dict[str, bytes]) -> None:
    from edgepriv.wire import delivery

    with path.open("wb") as stream:
        delivery.write(stream, delivery.SHIPMENT, {**permissions, **repository})


@model.command()
@CONFIG
@click.option("--repository", required=True, type=click.Path(path_type=Path), help="Repository that was fetched.")
@click.option("--name", required=True, help="Name of the model.")
@click.option("--permission", type=click.Path(path_type=Path), help="Permission for this device and version.")
@click.option("--confirm", "confirm_now", is_flag=True, help="End the trial at once when the self-test passes.")
@AS_JSON
def pull(config: Path, repository: Path, name: str, permission: Path | None, confirm_now: bool, as_json: bool) -> None:
    """Verify the metadata, stage, check, self-test and switch; on any failure the running model stays."""
    from edgepriv.device import shipments
    from edgepriv.selective_encryption import delivery

    store, owner = _store(config)
    raw = _read(permission, "permission") if permission is not None else None
    floor = store.state.floor_s
    path, _ = delivery.pull(repository, name + shipments.SUFFIX, owner, store.folder / "tuf", now_s=floor)
    measured = shipments.install_file(path, store, raw, name)
    if confirm_now:
        store.confirm()
    _show(shipments.outcome(store, None, measured), as_json=as_json)


@model.command()
@CONFIG
@click.argument("shipment", type=click.Path(path_type=Path))
@click.option("--permission", type=click.Path(path_type=Path), help="Used where the shipment has none for this device.")
@click.option("--name", default="", help="Refuse a shipment of any other model; default: [model] follow, if it is set.")
@AS_JSON
def install(config: Path, shipment: Path, permission: Path | None, name: str, as_json: bool) -> None:
    """Install SHIPMENT, which `publish --shipment` wrote, as the runtime does; `confirm` ends the trial."""
    from edgepriv.device import shipments
    from edgepriv.device.config import load_config

    store, owner = _store(config)
    name = name or load_config(config).model.follow
    try:
        raw = _read(permission, "permission") if permission is not None else None
        measured = shipments.install_shipment(shipment, store, owner, raw, model=name)
    except EdgeprivError as error:
        if as_json:
            _show(shipments.outcome(store, error, None), as_json=True)
        raise
    _show(shipments.outcome(store, None, measured), as_json=as_json)


def _show(report: dict[str, Any], *, as_json: bool) -> None:
    document = {"schema": "edgepriv.model-status/1", **report}
    click.echo(json.dumps(document) if as_json else _text(document))


@model.command()
@CONFIG
@AS_JSON
def status(config: Path, as_json: bool) -> None:
    """Say what runs and why other models were refused."""
    _show(_store(config)[0].report(), as_json=as_json)


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
    """Return to the last good model; refused where there is none that may run, and the running one stays."""
    store, _ = _store(config)
    store.roll_back(reason)
    click.echo(_text(store.report()))


def _store(path: Path) -> tuple[ModelStore, bytes]:
    """The model store of a device's configuration, and the pinned owner key."""
    import time

    from edgepriv.device import protected
    from edgepriv.device.config import load_config
    from edgepriv.keys import load_identity, load_public
    from edgepriv.trust_file import TrustFile

    config = load_config(path)
    identity, owner = load_identity(config.device.key), load_public(config.device.owner).ed25519
    versions = config.device.state / "trust-version"
    config.device.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    listed = TrustFile(config.device.trust, config.device.owner, versions, clock=time.time).current()
    trust = protected.device_trust(config, identity, listed)
    return protected.store_of(config.device.state, identity, trust, lambda line: click.echo(line, err=True)), owner


def _text(report: dict[str, Any]) -> str:
    lines = ["no model is installed"]
    if report["digest"]:
        trial = ", on trial" if report["trial"] else ""
        lines = [f"{report['model']} version {report['version']} runs{trial} ({report['digest'][:12]})"]
    lines += [f"  refused {name[:12]}: {reason}" for name, reason in report["refused"].items()]
    return "\n".join(lines)
