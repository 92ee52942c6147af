"""``edgepriv doctor``: check this device and say how to mend what is wrong."""

from __future__ import annotations

import base64
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgepriv.doctor import OK, SKIPPED, WARNING, Finding

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgepriv.device.config import DeviceConfig

DEFAULT_CONFIG = Path("/etc/edgepriv/device.toml")
UNIT = "edgepriv-device.service"
# The smallest model that runs on a picture: mean of each colour of an 8x8 image (ONNX opset 17, IR version 8).
TINY_MODEL = base64.b64decode(
    "CAgSADplChkKAXgSAXAiEUdsb2JhbEF2ZXJhZ2VQb29sCg8KAXASAXkiB0ZsYXR0ZW4SBXByb2JlWhsKAXgSFgoUCAESEAoCCAEKAggDCgIICAoC"
    "CAhiEwoBeRIOCgwIARIICgIIAQoCCANCBAoAEBE="
)


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=DEFAULT_CONFIG,
    show_default=True,
    help="The device's configuration; without it only the machine is checked.",
)
@click.option("--no-network", is_flag=True, help="Do not connect to the broker.")
@click.option("--no-camera", is_flag=True, help="Do not open the camera.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(config_path: Path, no_network: bool, no_camera: bool, as_json: bool) -> None:
    """Check clock, disk, keys, certificate, broker, crypto, inference and camera; exit 1 where something fails.

    While the device runs, its camera and its place at the broker are its own: these two are not checked then.
    """
    from edgepriv import doctor as checks
    from edgepriv.device.config import load_config

    config = load_config(config_path) if config_path != DEFAULT_CONFIG or config_path.is_file() else None
    if config is not None and config_path == DEFAULT_CONFIG and not config.device.key.exists():
        config = None  # as the package left it: nothing is enrolled yet
    found = [
        checks.guarded(*check) for check in _checks(config, config_path, network=not no_network, camera=not no_camera)
    ]
    text, code = checks.show("device", found, as_json=as_json)
    click.echo(text)
    sys.exit(code)


def _checks(
    config: DeviceConfig | None, path: Path, *, network: bool, camera: bool
) -> list[tuple[str, Callable[[], Finding], str]]:
    from edgepriv import doctor as checks

    state = config.device.state if config else Path("/var/lib")
    machine: list[tuple[str, Callable[[], Finding], str]] = [
        ("clock", checks.clock, ""),
        ("disk", partial(checks.disk, state), ""),
        ("crypto", checks.crypto, "pip install 'edgepriv[device]'"),
        ("onnxruntime", _onnxruntime, "pip install onnxruntime; on a Jetson with the GPU: its own build"),
    ]
    if config is None:
        text = f"{path} names no key that is here" if path.is_file() else f"none at {path}"
        remedy = "edgepriv enroll TOKEN_FILE --out /etc/edgepriv/keys, then fill it in"
        skipped = Finding("configuration", SKIPPED, f"{text}: only the machine was checked", remedy)
        return [*machine, ("configuration", lambda: skipped, "")]
    keys = [config.device.key, config.broker.key, config.broker.password_file]
    running = checks.in_use(state, UNIT)
    busy = "the device runs and has the {}; to check it here: systemctl stop edgepriv-device" if running else ""
    camera_skipped = busy.format("camera") or ("" if camera else "not asked for")
    broker_skipped = busy.format("connection") or ("" if network else "not asked for")
    return [
        *machine,
        ("key files", partial(checks.private_files, keys), ""),
        ("certificate", partial(checks.certificate, config.broker.certificate, now=time.time()), "is it PEM?"),
        ("trust list", partial(_trust, config), "fetch the owner's newest trust.cbor"),
        ("model", partial(_model, config), "set [model] path; model.toml stands beside the model"),
        (
            "camera",
            partial(_camera, config, path, skipped=camera_skipped),
            "check [source]; is the camera plugged in and free?",
        ),
        (
            "broker",
            partial(_broker, config, skipped=broker_skipped),
            "is the broker up, and do its ACL and CA know this device?",
        ),
    ]


def _onnxruntime() -> Finding:
    """Which build is there, and does it compute? A provider that is listed may still not run."""
    import importlib.metadata

    import numpy as np

    from edgepriv.device.capture import Frame
    from edgepriv.device.infer import Inferer, ModelSpec

    builds = {
        d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if _is_runtime(d.metadata["Name"])
    }
    inferer = Inferer(TINY_MODEL, ModelSpec(id="probe", width=8, height=8, labels=("r", "g", "b")))
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :, 1] = 255
    logits = inferer(Frame(pixels, time.time(), 0)).logits
    if not np.allclose(logits, [0, 1, 0], atol=1e-3):
        return Finding("onnxruntime", "failed", f"a known inference gave {logits.tolist()}", "reinstall onnxruntime")
    text = ", ".join(f"{name} {version}" for name, version in sorted(builds.items())) or "a build without a package"
    if len(builds) > 1:
        return Finding("onnxruntime", WARNING, f"two builds overwrite each other: {text}", "pip uninstall one of them")
    return Finding("onnxruntime", OK, f"{text}; a real inference is right")


def _is_runtime(name: str | None) -> bool:
    return bool(name) and str(name).lower().startswith("onnxruntime")


def _trust(config: DeviceConfig) -> Finding:
    from edgepriv import doctor as checks

    device, now = config.device, time.time()
    trust = checks.trusted(device.key, device.owner, device.trust, role="device", now=now)
    trust.party(config.device.gateway, "gateway")
    days = (trust.expires - now) / 86_400
    remedy = "" if days > 14 else "the owner signs a new one: edgepriv owner sign"
    return Finding("trust list", WARNING if remedy else OK, f"version {trust.version}, {days:.0f} days left", remedy)


def _model(config: DeviceConfig) -> Finding:
    import numpy as np

    from edgepriv.device.capture import Frame
    from edgepriv.device.protected import open_to_look

    inferer = open_to_look(config, time.time())
    spec = inferer.spec
    began = time.perf_counter()
    inferer(Frame(np.zeros((spec.height, spec.width, 3), np.uint8), time.time(), 0))
    level = f", level {inferer.level} in memory" if inferer.level else ""
    text = f"{spec.id}{level} runs in {1000 * (time.perf_counter() - began):.1f} ms (first inference)"
    days = (inferer.expires_s - time.time()) / 86_400
    if inferer.expires_s and days < 7:
        return Finding("model", WARNING, f"{text}; its permission expires in {days:.1f} days", "edgepriv grant")
    return Finding("model", OK, text)


def _camera(config: DeviceConfig, path: Path, *, skipped: str) -> Finding:
    from edgepriv.device.capture import open_source

    if skipped:
        return Finding("camera", SKIPPED, skipped)
    options = {k: v for k, v in config.source.items() if k != "kind"}
    kind = str(config.source.get("kind", ""))
    source = open_source(kind, options, folder=path.resolve().parent, clock=time.time)
    try:
        frame = source.read()
    finally:
        source.close()
    if frame is None:
        return Finding("camera", WARNING, f"{kind} gives no frame now", "is there something to read?")
    height, width = frame.pixels.shape[:2]
    return Finding("camera", OK, f"{kind} gives {width} x {height} pixels")


def _broker(config: DeviceConfig, *, skipped: str) -> Finding:
    from edgepriv import doctor as checks
    from edgepriv.keys import load_identity

    if skipped:
        return Finding("broker", SKIPPED, skipped)
    b = config.broker
    name = load_identity(config.device.key).name
    return checks.broker(b.url, name, tls=b.tls, username=b.username, password_file=b.password_file)
