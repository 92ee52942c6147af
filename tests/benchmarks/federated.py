"""Federated rounds through a real broker and the real gateway daemon: peak memory, CPU, time, and is the sum exact.

    python tests/benchmarks/federated.py --json [--devices 32] [--parameters 11000000] [--flower PYTHON] [--quick]

Peaks are VmHWM summed over the gateway's process tree, and the broker's. ``cpu_s`` is gateway tree + broker; the
devices are a load generator of their own (`federated_load.py`), whose CPU is ``load_cpu_s``. Every device pulls the
global weights and sends an update of its own random values; masks are on in the first run. ``sum_exact``: the new
global weights are compared with numpy, bit for bit. ``disk_without_uploads_mb``: the peak of all but the open uploads
(sums, weights, database), to be held against ``model_mb``. ``--flower PYTHON``: one that has flwr, numpy, psutil.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from federated_load import LAYERS, WEIGHT, delta_of  # noqa: E402

from edgepriv.federated.fixed_point import Ring, decode_sum, quantise  # noqa: E402
from edgepriv.federated.privacy import clip_update  # noqa: E402
from edgepriv.keys import Identity  # noqa: E402
from edgepriv.wire.trust import TrustList, sign_trust  # noqa: E402
from edgepriv.wire.update import decode_update, encode_update  # noqa: E402

CLIP, FRACTION_BITS = 1.0, 16
MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Watch(threading.Thread):
    """Peak memory (VmHWM), CPU seconds and bytes on disk of processes, sampled."""

    def __init__(self, roots: dict[str, int], folder: Path) -> None:
        super().__init__(daemon=True)
        self.roots, self.folder, self.stop = roots, folder, threading.Event()
        self.peaks: dict[tuple[str, int], float] = {}
        self.cpu: dict[tuple[str, int], float] = {}
        self.disk_peak = self.sums_peak = 0

    def run(self) -> None:
        while not self.stop.is_set():
            for name, pid in self.roots.items():
                self._sample(name, pid)
            total, staged = folder_bytes(self.folder), folder_bytes(self.folder / "blobs")
            self.disk_peak = max(self.disk_peak, total)
            self.sums_peak = max(self.sums_peak, total - staged)
            self.stop.wait(0.1)

    def _sample(self, name: str, pid: int) -> None:
        try:
            tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            for process in tree:
                status = Path(f"/proc/{process.pid}/status").read_text()
                hwm = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
                times = process.cpu_times()
                self.peaks[name, process.pid] = hwm / 1024
                self.cpu[name, process.pid] = times.user + times.system
        except (psutil.Error, OSError, StopIteration):
            return

    def peak_mb(self, name: str) -> float:
        return round(sum(v for (n, _), v in self.peaks.items() if n == name), 1)

    def cpu_s(self, *names: str) -> float:
        return round(sum(v for (n, _), v in self.cpu.items() if n in names), 2)


def folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue
    return total


def make_site(folder: Path, devices: int, port: int, options: dict[str, object]) -> list[str]:
    (folder / "keys").mkdir(parents=True)
    names = [f"dev-{i:04d}" for i in range(devices)]
    owner = Identity.new("owner", "owner")
    owner.save(folder / "keys" / "owner.key")
    parties = []
    for role, name in [("gateway", "gateway-site"), *(("device", n) for n in names)]:
        identity = Identity.new(role, name)
        identity.save(folder / "keys" / f"{name}.key")
        parties.append(identity.public)
    now = int(time.time())
    (folder / "trust.cbor").write_bytes(sign_trust(TrustList(1, now, now + 86_400, tuple(parties)), owner))
    rounds = "".join(f"{k} = {json.dumps(v)}\n" for k, v in options.items())
    (folder / "gateway.toml").write_text(
        '[gateway]\nidentity = "keys/gateway-site.key"\nowner = "keys/owner.key.pub"\ntrust = "trust.cbor"\n'
        f'state = "state"\n[broker]\nurl = "mqtt://127.0.0.1:{port}"\n[http]\nport = 0\n'
        f'[store]\nmin_free_bytes = 1\nmax_bytes = 40000000000\n[log]\nlevel = "warning"\n[rounds]\n{rounds}'
    )
    (folder / "mosquitto.conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nmax_packet_size 262144\n"
        "max_inflight_messages 100\nmax_queued_messages 1000\nmax_queued_bytes 67108864\npersistence false\n"
    )
    return names


def gateway(folder: Path, *args: str) -> dict[str, object]:
    command = [sys.executable, "-m", "gateway", *args, "--config", str(folder / "gateway.toml"), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise SystemExit(f"{args}: {done.stdout}{done.stderr}")
    return dict(json.loads(done.stdout))


def expected(base: dict[str, np.ndarray], taken: list[int], bits: int, devices: int) -> dict[str, np.ndarray]:
    """What numpy says the new weights are, layer by layer."""
    ring = Ring(bits, FRACTION_BITS, CLIP, WEIGHT, devices)
    totals = {n: np.zeros(v.shape, ring.dtype) for n, v in base.items()}
    for index in taken:
        update = clip_update(delta_of(index, {n: v.shape for n, v in base.items()}), CLIP)
        for name, value in update.items():
            totals[name] += quantise(value, WEIGHT, ring)
    mean = {
        n: decode_sum(t, ring).astype(np.float32).astype(np.float64) / (WEIGHT * len(taken)) for n, t in totals.items()
    }
    return {n: (base[n] + mean[n]).astype(np.float32) for n in base}


def measure(
    devices: int, parameters: int, *, masked: bool, loaders: int = 2, timeout_s: float = 900
) -> dict[str, object]:
    """One round."""
    work = Path(tempfile.mkdtemp(prefix="edgepriv-bench-"))
    port, children = free_port(), []
    options: dict[str, object] = {
        "model": "bench", "privacy": "masked" if masked else "clear", "quorum": devices, "min_cohort": 2,
        "deadline_s": timeout_s, "join_s": 120.0, "step_s": 120.0, "stall_s": 60.0, "clip": CLIP, "max_weight": WEIGHT,
        "fraction_bits": FRACTION_BITS, "uploads_at_once": 4, "active_s": 900.0, "max_update_bytes": 1 << 30,
        "resend_s": 15.0,
    }  # fmt: skip
    try:
        site = work / "site"
        names = make_site(site, devices, port, options)
        per = -(-parameters // LAYERS)
        rng = np.random.default_rng(0)
        base = {f"l{i}": rng.standard_normal(per).astype(np.float32) for i in range(LAYERS)}
        (work / "weights.epu").write_bytes(encode_update(base))
        children.append(
            broker := subprocess.Popen([MOSQUITTO, "-c", str(site / "mosquitto.conf")], stderr=subprocess.DEVNULL)
        )
        time.sleep(0.5)
        log = (work / "gateway.log").open("w")
        run = [sys.executable, "-m", "gateway", "run", "--config", str(site / "gateway.toml")]
        children.append(daemon := subprocess.Popen(run, cwd=ROOT, stdout=log, stderr=log))
        loads = []
        for part in range(min(loaders, devices)):
            chosen = names[part::loaders]
            loads.append(_loader(work, site, port, chosen, part))
        children += loads
        watch = Watch({"gateway": daemon.pid, "broker": broker.pid}, site / "state")
        watch.start()
        _wait_for_devices(site, devices)
        gateway(site, "rounds", "weights", str(work / "weights.epu"), "--model", "bench")
        began = time.monotonic()
        gateway(site, "rounds", "start")
        outs = [json.loads(p.communicate(timeout=timeout_s)[0]) for p in loads]
        seconds = time.monotonic() - began
        record = gateway(site, "rounds", "show", "1")
        time.sleep(1.0)
        watch.stop.set()
        watch.join()
        return {
            "devices": devices, "parameters": per * LAYERS, "masked": masked, "outcome": record["state"],
            "participants": len(record["participants"]), "gateway_peak_mb": watch.peak_mb("gateway"),
            "broker_peak_mb": watch.peak_mb("broker"), "disk_peak_mb": round(watch.disk_peak / 2**20, 1),
            "disk_without_uploads_mb": round(watch.sums_peak / 2**20, 1),
            "model_mb": round(4 * per * LAYERS / 2**20, 1),
            "cpu_s": watch.cpu_s("gateway", "broker"), "gateway_cpu_s": watch.cpu_s("gateway"),
            "load_cpu_s": round(sum(o["cpu_s"] for o in outs), 2), "seconds": round(seconds, 2),
            "sum_exact": _exact(site, record, base, names),
        }  # fmt: skip
    finally:
        for child in children:
            child.kill()
            child.wait()
        shutil.rmtree(work, ignore_errors=True)


def _loader(work: Path, site: Path, port: int, chosen: list[str], part: int) -> subprocess.Popen[str]:
    command = [
        sys.executable, str(HERE / "federated_load.py"), str(site), str(work / f"load{part}"),
        f"mqtt://127.0.0.1:{port}", ",".join(chosen),
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)


def _wait_for_devices(site: Path, devices: int) -> None:
    deadline = time.monotonic() + 180
    while _status(site).get("devices") != devices:
        if time.monotonic() > deadline:
            raise SystemExit("the devices did not come up")
        time.sleep(0.5)


def _status(site: Path) -> dict[str, object]:
    """What the daemon writes every two seconds."""
    try:
        return dict(json.loads((site / "state" / "status.json").read_text()))
    except (OSError, ValueError):
        return {}


def _exact(site: Path, record: dict[str, object], base: dict[str, np.ndarray], names: list[str]) -> bool:
    if record["state"] != "done":
        return False
    path = next(p for p in (site / "state").rglob(str(record["after"])))
    new = decode_update(path.read_bytes(), max_bytes=1 << 31).tensors
    taken = [names.index(n) for n in record["participants"]]
    wanted = expected(base, taken, 64, len(names))
    return all(np.array_equal(new[n], wanted[n]) for n in base)


def flower(python: str, devices: int, parameters: int) -> dict[str, object] | None:
    """The same work through flwr (`flower_round.py`), in an environment that has it."""
    command = [python, str(HERE / "flower_round.py"), "--clients", str(devices), "--parameters", str(parameters)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--devices", type=int)
    parser.add_argument("--parameters", type=int)
    parser.add_argument("--clear", action="store_true", help="without masks")
    parser.add_argument("--flower", metavar="PYTHON")
    parser.add_argument("--quick", action="store_true", help="small sizes: a smoke test")
    args = parser.parse_args()
    if args.devices or args.parameters:
        plan = [(args.devices or 32, args.parameters or 11_000_000, not args.clear)]
    elif args.quick:
        plan = [(4, 200_000, True), (4, 200_000, False)]
    else:
        plan = [(32, 11_000_000, True), (8, 2_000_000, False), (128, 2_000_000, False), (1000, 25_000, False)]
    document = {"schema": "edgepriv.bench-federated/1", "runs": [], "flower": None}
    for devices, parameters, masked in plan:
        print(f"{devices} devices x {parameters} parameters, masked {masked} ...", file=sys.stderr)
        document["runs"].append(measure(devices, parameters, masked=masked))
        print(json.dumps(document["runs"][-1]), file=sys.stderr)
    if args.flower:
        document["flower"] = flower(args.flower, plan[0][0], plan[0][1])
    print(json.dumps(document, indent=None if args.json else 2))


if __name__ == "__main__":
    main()
