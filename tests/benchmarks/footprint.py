"""What an edge install weighs: unpacked bytes, memory of a running device, CPU time of ``edgepriv --help``.

Installs ``edgepriv[device]`` and ``edgepriv[device,images]`` into fresh virtual environments with the constraints, and
runs a device with an int8 MobileNet-v1 (QDQ, made here from random weights) in the first. Byte-code is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LIMITS_MB = {"device": 165, "device_images": 185, "rss": 120}


def unpacked_mb(venv: Path) -> float:
    """Megabytes (10^6) of site-packages without byte-code and without pip itself."""
    total = 0
    for path in (next((venv / "lib").glob("python3*")) / "site-packages").rglob("*"):
        if path.is_file() and path.suffix != ".pyc" and path.relative_to(venv).parts[3].split("-")[0] != "pip":
            total += path.stat().st_size
    return total / 1e6


def install(folder: Path, extras: str, wheel: Path) -> Path:
    """A fresh environment with the built wheel."""
    venv = folder / extras.replace(",", "_")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    constraints = ROOT / "deploy" / "constraints.txt"
    command = [str(venv / "bin" / "pip"), "install", "-q", "--no-compile", "-c", str(constraints), f"{wheel}[{extras}]"]
    subprocess.run(command, check=True)
    return venv


def build_wheel(folder: Path) -> Path:
    """The wheel that users install."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], check=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # a stale copy of the sources would end up in the next wheel
    return next(folder.glob("edgepriv-*.whl"))


def quantised(folder: Path) -> Path:
    """MobileNet-v1 in int8 (QDQ, per channel), calibrated on noise: its speed and size are what counts here."""
    import numpy as np
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    sys.path.insert(0, str(Path(__file__).parent))
    from mobilenet import write_mobilenet

    source = write_mobilenet(folder / "float")

    class Noise(CalibrationDataReader):
        def __init__(self) -> None:
            rng = np.random.default_rng(0)
            self._rows = iter([{"image": rng.normal(0, 1, (1, 3, 224, 224)).astype(np.float32)} for _ in range(4)])

        def get_next(self):
            return next(self._rows, None)

    target = folder / "int8" / "model.onnx"
    target.parent.mkdir()
    quantize_static(
        str(source), str(target), Noise(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    (target.parent / "model.toml").write_text((source.parent / "model.toml").read_text())
    return target


def device_rss_mb(python: Path, model: Path, folder: Path) -> float:
    """Largest resident set of a device process after 40 VGA frames, in MiB."""
    import numpy as np
    from PIL import Image

    from edgepriv.demo.site import make_site, table

    site = make_site(folder / "site", 1)
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 256, (480, 640, 3), np.uint8)
        Image.fromarray(noise).save(pictures / f"{i}.png")
    text = table(
        "device",
        key="keys/dev-1.key",
        trust="trust.cbor",
        owner="keys/owner.key.pub",
        gateway="gateway-site",
        state="d",
    )
    text += table("broker", url="mqtt://127.0.0.1:9") + table("model", path=str(model))
    text += table("source", kind="directory", path=str(pictures), loop=True)
    text += table("run", frames=40, linger_s=1.0)
    config = site.folder / "device.toml"
    config.write_text(text)
    code = (
        "import sys; from pathlib import Path; from edgepriv.device.loop import run_device;"
        "r = run_device(Path(sys.argv[1])); assert r['counters']['accepted'] == 40, r;"
        "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    )
    done = subprocess.run([str(python), "-c", code, str(config)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout) / 1024  # VmHWM is this program's own; ru_maxrss would count its parent before exec


def help_cpu_ms(venv: Path) -> float:
    """CPU milliseconds of ``edgepriv --help``, the least of five runs."""
    best = 1e9
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([str(venv / "bin" / "edgepriv"), "--help"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return best * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="edgepriv-footprint-") as name:
        folder = Path(name)
        wheel = build_wheel(folder)
        device, images = install(folder, "device", wheel), install(folder, "device,images", wheel)
        model = quantised(folder)
        document = {
            "schema": "edgepriv.bench-footprint/1",
            "device_mb": round(unpacked_mb(device), 1),
            "device_images_mb": round(unpacked_mb(images), 1),
            "model_mb": round(model.stat().st_size / 1e6, 2),
            "device_rss_mib": round(device_rss_mb(images / "bin" / "python", model, folder), 1),
            "help_cpu_ms": round(help_cpu_ms(device), 1),
            "limits": LIMITS_MB,
            "seconds": round(time.monotonic() - begun, 1),
        }
    if arguments.json:
        print(json.dumps(document))
        return
    print(f"core + device: {document['device_mb']} MB, with images {document['device_images_mb']} MB")
    print(f"a device with an int8 MobileNet of {document['model_mb']} MB: {document['device_rss_mib']} MiB resident")
    print(f"edgepriv --help: {document['help_cpu_ms']} ms of CPU")


if __name__ == "__main__":
    main()
