"""``edgepriv device bench``: what the runtime costs beside a bare loop, alone and with broker and gateway."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from edgepriv.demo.processes import Children
    from edgepriv.demo.site import Site
    from edgepriv.device.capture import Frame
    from edgepriv.device.infer import Inferer

SCHEMA = "edgepriv.device-bench/1"
CACHED_FRAMES = 16


@click.command("bench")
@click.option("--model", type=click.Path(path_type=Path), help="ONNX file with its model.toml beside.")
@click.option("--config", type=click.Path(path_type=Path), help="Or a device.toml: its model, protected ones too.")
@click.option("--source", default="simulated", show_default=True, help="simulated, or a folder of pictures.")
@click.option("--frames", default=40, show_default=True, type=click.IntRange(8, 10_000), help="Frames of each turn.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 64), help="Threads of the model.")
@click.option("--end-to-end/--local-only", default=True, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def bench(
    model: Path | None, config: Path | None, source: str, frames: int, threads: int, end_to_end: bool, as_json: bool
) -> None:
    """Measure capture > infer > release > seal > spool against capture, resize, model and AEAD alone."""
    from edgepriv.demo.site import GATEWAY, make_site
    from edgepriv.device.bench import bench_config, measure

    path, inferer = _model(model, config)
    end_to_end = end_to_end and model is not None  # a device of the measurement's own site has no permission
    with tempfile.TemporaryDirectory(prefix="edgepriv-bench-") as name:
        folder = Path(name)
        site = make_site(folder, 1)
        pictures = captured(source, folder)
        click.echo("local: the runtime and the bare loop in turns", err=True)
        settings = bench_config(folder, path, gateway=GATEWAY, device="dev-1", threads=threads)
        local = measure(settings, pictures, frames_per_turn=frames, folder=folder, inferer=inferer)
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "fps": round(local.fps, 2),
            "bare_fps": round(local.bare_fps, 2),
            "ratio_local": round(local.ratio, 3),
            "ratio_end_to_end": None,
            "stages": local.stages_ms,
            "step_ms": local.step_ms,
            "stage_share": {name: round(share, 4) for name, share in local.shares.items()},
            "bottleneck_stage": local.bottleneck,
            "bottleneck": "device",  # alone there is no other process
            "frame_bytes": round(statistics.fmean(picture.pixels.nbytes for picture in pictures)),
            "threads": threads,
        }
        if end_to_end:
            click.echo("end to end: with broker and gateway on the same cores", err=True)
            seen = run_site(site, path, source, frames * 4, threads)
            seen["ratio_end_to_end"] = round(seen["fps_end_to_end"] / local.bare_fps, 3)
            document |= seen
    click.echo(json.dumps(document) if as_json else as_text(document))


def _model(model: Path | None, config: Path | None) -> tuple[Path, Inferer | None]:
    """The file to load, or the model that a device's configuration opens."""
    from edgepriv.device.config import load_config
    from edgepriv.device.protected import open_to_look

    if model is not None and config is None:
        return model.resolve(), None
    if config is None or model is not None:
        raise ConfigError("give --model or --config", hint="edgepriv device bench --help")
    settings = load_config(config)
    return settings.model.path, open_to_look(settings, time.time())


def captured(source: str, folder: Path) -> list[Frame]:
    """A few captured frames, kept in memory so that capture costs both loops the same."""
    from edgepriv.device.capture import open_source

    kind, options = source_options(source)
    opened = open_source(kind, options, folder=folder, clock=time.time)
    frames: list[Frame] = []
    while len(frames) < CACHED_FRAMES and (frame := opened.read()) is not None:
        frames.append(frame)
    opened.close()
    return frames


def source_options(source: str) -> tuple[str, dict[str, Any]]:
    """Kind and options of ``--source``."""
    if source == "simulated":
        return source, {"data": "digits"}
    return "directory", {"path": str(Path(source).resolve()), "loop": True}


def run_site(site: Site, model: Path, source: str, frames: int, threads: int) -> dict[str, Any]:
    """Broker, gateway and one device as processes: frames a second that reach the gateway's store, CPU shares."""
    from edgepriv.demo import processes
    from edgepriv.demo import site as sites

    logs = site.folder / "logs"
    logs.mkdir()
    with processes.Children(logs) as children:
        url, broker = processes.start_broker(children, "auto")
        config = sites.write_gateway(site, url, port=processes.free_port(), weights=None, devices=1)
        children.start("gateway", processes.python_command("gateway", "run", "--config", str(config)))
        device = write_device(site, url, model, source, frames, threads)
        children.start("device", processes.python_command("edgepriv", "device", "run", "--config", str(device)))
        stored, sealed, span, cpu = watch(children, site, frames)
    total = sum(cpu.values()) or 1.0
    return {
        "fps_end_to_end": round(stored / span, 2),
        "mb_per_s": round(sealed / span / 1e6, 2),
        "broker": broker,
        "cpu_share": {name: round(seconds / total, 3) for name, seconds in cpu.items()},
        "bottleneck": max(cpu, key=lambda name: cpu[name]),
    }


def write_device(site: Site, url: str, model: Path, source: str, frames: int, threads: int) -> Path:
    """The device's configuration file."""
    from edgepriv.demo.site import GATEWAY, table

    kind, options = source_options(source)
    text = table(
        "device", key="keys/dev-1.key", trust="trust.cbor", owner="keys/owner.key.pub", gateway=GATEWAY, state="dev-1"
    )
    text += table("broker", url=url) + table("model", path=str(model), threads=threads)
    text += table("source", kind=kind, **options) + table("rounds", take_part=False)
    text += table("run", frames=frames, linger_s=600.0)
    path = site.folder / "dev-1.toml"
    path.write_text(text)
    return path


def watch(children: Children, site: Site, frames: int) -> tuple[int, int, float, dict[str, float]]:
    """From the first stored frame to the last: frames, their bytes, seconds, CPU seconds of each process."""
    path = site.folder / "gateway" / "gateway.db"
    pids = {child.name: child.process.pid for child in children.children}
    first, before = 0.0, {}
    begun_with, deadline = (0, 0), time.monotonic() + 60 + frames
    while time.monotonic() < deadline:
        children.check()
        stored, sealed = _stored(path)
        if stored and not first:
            first, before, begun_with = time.monotonic(), {n: cpu_seconds(p) for n, p in pids.items()}, (stored, sealed)
        if stored >= frames:
            break
        time.sleep(0.02)
    cpu = {name: cpu_seconds(pid) - before.get(name, 0.0) for name, pid in pids.items()}
    return stored - begun_with[0], sealed - begun_with[1], time.monotonic() - first, cpu


def _stored(path: Path) -> tuple[int, int]:
    """How many frames the gateway's store holds, and their bytes."""
    import sqlite3

    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
            count, size = db.execute("SELECT count(*), coalesce(sum(size), 0) FROM frames").fetchone()
    except sqlite3.OperationalError:
        return 0, 0
    return int(count), int(size)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def as_text(document: dict[str, Any]) -> str:
    """The result for a person."""
    shares = document["stage_share"]
    lines = [
        f"runtime {document['fps']} frames/s, bare {document['bare_fps']} frames/s: ratio {document['ratio_local']}",
        f"a step takes {document['step_ms']} ms: "
        + ", ".join(f"{k} {v} ms ({shares[k]:.1%})" for k, v in document["stages"].items())
        + f", rest {shares['rest']:.1%}; bottleneck: {document['bottleneck_stage']}",
    ]
    if document["ratio_end_to_end"] is not None:
        lines.append(
            f"end to end {document['fps_end_to_end']} frames/s, {document['mb_per_s']} MB/s, ratio "
            f"{document['ratio_end_to_end']}; shares of the CPU: "
            + ", ".join(f"{name} {share:.1%}" for name, share in document["cpu_share"].items())
            + f"; bottleneck: {document['bottleneck']}"
        )
    return "\n".join(lines)
