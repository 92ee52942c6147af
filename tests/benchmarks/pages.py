"""How fast are the operator pages with 10,000 devices and 500 rounds while a federated round runs?

The real daemon, the real pages process and mosquitto run; devices upload large updates in chunks all the while. Every
page is asked for in turn by one client; the 95th percentile over all answers counts, and the bytes of the first page
with everything it loads. Run: ``python tests/benchmarks/pages.py --json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gateway_site import Broker, Device, GatewayProcess, LiveParty, Site, free_port, wait_for  # noqa: E402

from edgepriv.wire import cbor  # noqa: E402
from edgepriv.wire.update import encode_update  # noqa: E402
from gateway import commands  # noqa: E402
from gateway.config import load  # noqa: E402
from gateway.daemon import open_store  # noqa: E402
from gateway.pages.access import Operators  # noqa: E402

PATHS = (
    "/",
    "/fleet",
    "/fleet?page=150",
    "/fleet?search=99",
    "/rounds",
    "/rounds?page=7",
    "/models",
    "/storage",
    "/alerts",
)
FIRST_PAGE = ("/", "/static/pages.css", "/static/live.js")


def fill(store, devices: int, rounds: int) -> None:
    """A store as a large site has it after a year."""
    now = time.time()
    status = {
        "at": now,
        "firmware": "0.1.0",
        "model": "gate",
        "model_digest": bytes(32),
        "level": 2,
        "trust_version": 3,
    }
    raw = cbor.encode({**status, "counters": {"queue_items": 3, "dropped_frames": 1, "certificate_days": 40}})
    names = [f"dev-{i:05d}" for i in range(devices)]
    record = {
        "participants": names[:100], "rejected": [[n, "late: the sum is closed"] for n in names[100:110]],
        "invited": 128, "population": 10_000, "after_bytes": 1, "participation": "all", "noise_multiplier": 1.0,
        "outcome": "done", "reason": "", "privacy": "masked", "noise": "distributed", "epsilon": 1.5, "delta": 1e-5,
        "model": "gate", "before": bytes(32), "after": bytes(32), "round": 0, "publish": "weights", "rule": "mean",
    }  # fmt: skip
    with store.batch():
        store.database.executemany(
            "INSERT INTO devices (party, first_seen, last_seen, epoch, status, status_at) VALUES (?, ?, ?, 0, ?, ?)",
            [(name, now - 9e6, now - i % 500, raw, now) for i, name in enumerate(names)],
        )
        store.database.executemany(
            "INSERT INTO rounds (number, state, record, snapshot, started, updated) VALUES (?, 'done', ?, NULL, ?, ?)",
            [
                (n, cbor.encode({**record, "round": n}), now - 1e6 + 60 * n, now - 1e6 + 60 * n + 42)
                for n in range(1, rounds + 1)
            ],
        )


class Uploads(threading.Thread):
    """Devices that upload their updates for as long as the measurement lasts."""

    def __init__(self, site: Site, megabytes: int) -> None:
        super().__init__(daemon=True)
        self.parties = [LiveParty(site, Device(site, name)) for name in site.devices]
        self.megabytes, self.stop, self.round = megabytes, threading.Event(), 0

    def run(self) -> None:
        rng = np.random.default_rng(0)
        while not self.stop.is_set():
            for party in self.parties:
                if self.round and not party.items:
                    raw = encode_update({"w": rng.standard_normal(self.megabytes << 18).astype(np.float32)})
                    offer = party.device.offer(raw, "update", self.round, 65_536)
                    party.add(offer.digest, lambda d=party.device, o=offer: d.seal(o))
                party.pump()
            time.sleep(0.001)


def measure(devices: int, rounds: int, seconds: float) -> dict[str, object]:
    """The document of the benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        site = Site(
            Path(folder), devices=[f"cam{i}" for i in range(1, 5)],
            pages={"tokens": "operators.toml", "port": port, "requests_per_minute": 1_000_000},
            rounds={"quorum": 4, "deadline_s": 3600.0, "clip": 1e6},
        )  # fmt: skip
        config = load(site.config_path)
        store = open_store(config)
        fill(store, devices, rounds)
        token = Operators(config.pages.tokens).add("ann", "operator")
        broker, daemon = Broker(site.folder, site.port), GatewayProcess(site)
        pages = subprocess.Popen(
            [sys.executable, "-m", "gateway", "pages", "--config", str(site.config_path)],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        uploads = Uploads(site, 8)
        try:
            return {**_run(site, store, uploads, port, token, seconds), "devices": devices, "rounds": rounds}
        finally:
            uploads.stop.set()
            pages.terminate()
            pages.wait(15)
            daemon.stop()
            broker.close()
            store.close()


def _run(site: Site, store, uploads: Uploads, port: int, token: str, seconds: float) -> dict[str, object]:
    for party in uploads.parties:
        wait_for(lambda p=party: p.pump() or p.device.acks, 20, "no session")
    weights = site.folder / "w.bin"
    weights.write_bytes(encode_update({"w": np.zeros(uploads.megabytes << 18, np.float32)}))
    time.sleep(1.5)
    for action, args in (("round-weights", {"path": str(weights), "model": "m"}), ("round-start", {})):
        result = commands.wait(store, commands.submit(store, "bench", action, args, time.time()), 30)
    uploads.round = int(result["round"])
    uploads.start()
    times: list[float] = []
    by_path: dict[str, list[float]] = {path: [] for path in PATHS}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        wait_for(lambda: _up(client), 20, "the pages do not start")
        client.post("/login", data={"token": token})
        first = sum(len(client.get(path).content) for path in FIRST_PAGE)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for path in PATHS:
                began = time.perf_counter()
                answer = client.get(path)
                times.append(1000 * (time.perf_counter() - began))
                by_path[path].append(times[-1])
                assert answer.status_code == 200, (path, answer.status_code)
    return {
        "schema": "edgepriv.bench-pages/1",
        "p50_ms": round(float(np.percentile(times, 50)), 1),
        "p95_ms": round(float(np.percentile(times, 95)), 1),
        "page_kb": round(first / 1000, 1),
        "by_page_p95_ms": {path: round(float(np.percentile(found, 95)), 1) for path, found in by_path.items()},
        "requests": len(times),
        "updates_taken": len([a for p in uploads.parties for a in p.device.acks.values()]) - len(uploads.parties),
        "cores": os.cpu_count(),
    }


def _up(client: httpx.Client) -> bool:
    try:
        return client.get("/login").status_code == 200
    except httpx.HTTPError:
        return False


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    document = measure(args.devices, args.rounds, args.seconds)
    print(json.dumps(document) if args.json else "\n".join(f"{k}: {v}" for k, v in document.items()))


if __name__ == "__main__":
    main()
