"""``edgepriv frames list|fetch``: a recipient's sealed frames at the gateway, opened here and nowhere else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.cli import LazyGroup, pinned_trust
from edgepriv.errors import ConfigError, EdgeprivError, MissingFileError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgepriv.cipher.cipher import FrameOpener
    from edgepriv.client import GatewayClient, StoredFrame
    from edgepriv.keys import Identity
    from edgepriv.wire.trust import TrustList

FILE = click.Path(path_type=Path, dir_okay=False)
OPENED = "opened before (--again opens it once more)"


def _site_options(command: Any) -> Any:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
        click.option("--since", default=0.0, help="Only frames received at or after this time (Unix seconds)."),
        click.option("--device", help="Only frames of this device (full name, as in dev-cam1)."),
        click.option("--timeout", "timeout_s", default=30.0, show_default=True, help="Seconds to wait for an answer."),
        click.option("--tls-key", type=FILE, help="PEM key for mqtts."),
        click.option("--certificate", type=FILE, help="PEM certificate for mqtts."),
        click.option("--ca", type=FILE, help="PEM CA certificate for mqtts."),
        click.option("--shard", default=0, show_default=True, help="Topic shard of the gateway."),
        click.option("--gateway", required=True, help="Full name of the gateway, as in gateway-main."),
        click.option("--broker", required=True, help="mqtt://host:1883 or mqtts://host:8883."),
        click.option("--trust", required=True, type=FILE, help="The owner's trust.cbor."),
        click.option("--owner", required=True, type=FILE, help="The owner's public key, pinned here."),
        click.option("--key", required=True, type=FILE, help="The recipient's private key."),
    ):
        command = option(command)
    return command


@click.group(cls=LazyGroup)
def frames() -> None:
    """List, fetch and open sealed frames as a recipient."""


@frames.command("list")
@_site_options
def list_(as_json: bool, **site: Any) -> None:
    """List the frames that are addressed to this recipient."""
    client, _, _ = _connect(site)
    with client:
        rows = [_row(frame) for frame in _listed(client, site)]
    _show(as_json, {"schema": "edgepriv.frames/1", "frames": rows}, [_line(row) for row in rows] or ["no frames"])


@frames.command("fetch")
@click.argument("digests", nargs=-1, metavar="[DIGEST]...")
@click.option("--all", "everything", is_flag=True, help="All frames that the list shows.")
@click.option("--open", "opened", is_flag=True, help="Open them and write images instead of sealed files.")
@click.option("--again", is_flag=True, help="Open frames that were opened before once more.")
@click.option("--opened", "memory", type=FILE, help="What was opened before.  [default: KEY.opened]")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder to write to.")
@_site_options
def fetch(
    digests: tuple[str, ...],
    everything: bool,
    opened: bool,
    again: bool,
    memory: Path | None,
    out: Path,
    as_json: bool,
    **site: Any,
) -> None:
    """Fetch frames by the beginning of their digest, or all of them; sealed files open with ``edgepriv open``.

    A frame is opened once: the gateway, or who holds its store, cannot serve an old picture as a new one.
    """
    if bool(digests) == everything:
        raise ConfigError("name digests, or give --all", hint="edgepriv frames list shows them")
    client, identity, trust = _connect(site)
    out.mkdir(parents=True, exist_ok=True)
    with client:
        wanted = [f for f in _listed(client, site) if everything or f.digest.hex().startswith(digests)]
        if not wanted:
            raise MissingFileError("no such frame", hint="edgepriv frames list shows them")
        openers = _Openers(identity, trust, memory or _beside(site["key"]), again=again) if opened else None
        rows = [_fetch_one(client, frame, out, openers) for frame in _shown(wanted)]
    failed = [row for row in rows if row["error"]]
    repeated = [row for row in rows if not row["error"] and not row["file"]]
    document = {
        "schema": "edgepriv.frames-fetch/1",
        "frames": [row for row in rows if row["file"]],
        "opened_before": repeated,
        "failed": failed,
    }
    lines = [f"{row['device']} {row['counter']}: {row['error'] or row['file'] or OPENED}" for row in rows]
    _show(as_json, document, lines)
    if failed:
        sys.exit(1)


class _Openers:
    """One opener for each epoch, so that a record is checked once."""

    def __init__(self, identity: Identity, trust: TrustList, memory: Path, *, again: bool) -> None:
        from edgepriv.cipher.opened import OpenedFrames

        self._identity, self._trust, self.opened = identity, trust, OpenedFrames(memory, again=again)
        self._made: dict[bytes, FrameOpener] = {}

    def of(self, digest: bytes, record: bytes) -> FrameOpener:
        """The opener of an epoch."""
        from edgepriv.cipher.cipher import FrameOpener

        if digest not in self._made:
            self._made[digest] = FrameOpener(record, self._identity, self._trust, opened=self.opened)
        return self._made[digest]


def _beside(key: Path) -> Path:
    return key.with_name(key.name + ".opened")


def _connect(site: dict[str, Any]) -> tuple[GatewayClient, Identity, TrustList]:
    from edgepriv.client import GatewayClient
    from edgepriv.keys import load_identity
    from edgepriv.mqtt import TlsFiles

    identity, trust = load_identity(site["key"]), pinned_trust.read(site["trust"], site["owner"])
    tls = TlsFiles(site["ca"], site["certificate"], site["tls_key"]) if site["ca"] else None
    client = GatewayClient(
        site["broker"], identity, trust, site["gateway"], shard=site["shard"], tls=tls, timeout_s=site["timeout_s"]
    )
    return client, identity, trust


def _listed(client: GatewayClient, site: dict[str, Any]) -> Iterator[StoredFrame]:
    return client.frames(device=site["device"], since=site["since"])


def _shown(frames_: list[StoredFrame]) -> Iterator[StoredFrame]:
    """With progress where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield from frames_
        return
    with click.progressbar(frames_, label="fetching", file=sys.stderr) as bar:
        yield from bar


def _fetch_one(client: GatewayClient, frame: StoredFrame, out: Path, openers: _Openers | None) -> dict[str, Any]:
    """One frame to one file; what is wrong with a frame is told and the others go on."""
    row = {**_row(frame), "file": "", "error": ""}
    try:
        if openers and not openers.opened.again and openers.opened.knows(frame.record, frame.counter):
            return row  # not fetched again; whatever comes under another number is judged when it is opened
        raw, record = client.fetch(frame), client.epoch_record(frame.record)
        row["file"] = (
            _write_opened(raw, frame, record, out, openers) if openers else _write_sealed(raw, frame, record, out)
        )
    except EdgeprivError as error:
        row["error"] = str(error)
    return row


def _write_sealed(raw: bytes, frame: StoredFrame, record: bytes, out: Path) -> str:
    from edgepriv.cipher import container

    name = f"{_name(frame)}.sealed"
    (out / name).write_bytes(container.pack(record, raw))
    return name


def _write_opened(raw: bytes, frame: StoredFrame, record: bytes, out: Path, openers: _Openers) -> str:
    from edgepriv.cli.seal import _fits_png, write_picture

    picture = openers.of(frame.record, record).open(raw)
    if picture.pixels is None:
        suffix = f".{picture.codec}" if picture.codec.isalnum() else ".bin"
    else:
        suffix = ".png" if _fits_png(picture.pixels) else ".npy"
    name = _name(frame) + suffix
    write_picture(picture, out / name)
    return name


def _name(frame: StoredFrame) -> str:
    """A file name that is unique and made of checked parts only."""
    device = "".join(c for c in frame.device if c.isalnum() or c == "-")
    return f"{device}-{frame.record.hex()[:8]}-{frame.counter:06d}"


def _row(frame: StoredFrame) -> dict[str, Any]:
    return {
        "device": frame.device,
        "counter": frame.counter,
        "bytes": frame.size,
        "received": frame.received,
        "digest": frame.digest.hex(),
    }


def _line(row: dict[str, Any]) -> str:
    return f"{row['digest'][:12]}  {row['device']}  {row['counter']:6d}  {row['bytes']:9d} bytes"


def _show(as_json: bool, document: dict[str, Any], lines: list[str]) -> None:
    click.echo(json.dumps(document) if as_json else "\n".join(lines))
