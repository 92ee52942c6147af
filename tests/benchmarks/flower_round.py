"""One round of the same work through Flower: its real SuperLink and ServerApp, and a loader that plays the clients.

    PYTHON_WITH_FLWR tests/benchmarks/flower_round.py --clients 32 --parameters 11000000

Needs an environment of its own with ``flwr numpy psutil`` (written for flwr 1.41; the loader speaks its private fleet
API and must be rechecked at each upgrade). Every client answers with arrays of its own, because Flower's object store
is content-addressed and would send equal ones once. Prints one JSON line: peak MB and CPU seconds of the server side,
the loader apart. Telemetry is off, everything lies in a temporary folder, insecure loopback HTTP.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

SERVER = """
import json, time
import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

class Timed(FedAvg):
    log = []
    def configure_train(self, *args, **kwargs):
        self.began = time.time()
        return super().configure_train(*args, **kwargs)
    def aggregate_train(self, number, replies):
        replies = list(replies)
        out = super().aggregate_train(number, replies)
        errors = sum(m.has_error() for m in replies)
        self.log.append({"n": len(replies), "errors": errors, "seconds": time.time() - self.began})
        return out

@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    per = int(config["params"]) // int(config["layers"])
    rng = np.random.default_rng(0)
    names = [f"l{i}" for i in range(int(config["layers"]))]
    arrays = ArrayRecord({n: Array(rng.standard_normal(per, dtype=np.float32)) for n in names})
    clients = int(config["clients"])
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=1, timeout=900)
    with open(config["out"], "w") as file:
        json.dump(strategy.log, file)
"""
CLIENT = """
from flwr.clientapp import ClientApp
app = ClientApp()
"""
PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "roundbench"
version = "1.0.0"
description = "benchmark"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>={version},<2.0"]
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "bench"
fab-format-version = 1
flwr-version-target = "{version}"
[tool.flwr.app.components]
serverapp = "roundbench.server_app:app"
clientapp = "roundbench.client_app:app"
[tool.flwr.app.config]
clients = 4
params = 1000
layers = 20
out = "out.json"
"""


class Sampler(threading.Thread):
    """Peak of the summed RSS, and CPU seconds, of a process tree."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root, self.stop = psutil.Process(root), threading.Event()
        self.peaks: dict[int, float] = {}
        self.cpu: dict[int, float] = {}

    def run(self) -> None:
        while not self.stop.wait(0.05):
            with contextlib.suppress(psutil.Error):
                for process in [self.root, *self.root.children(recursive=True)]:
                    self._sample(process)

    def _sample(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.Error, OSError, StopIteration):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            self.peaks[process.pid] = next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) / 1024
            times = process.cpu_times()
            self.cpu[process.pid] = times.user + times.system


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def write_app(work: Path, port: int) -> Path:
    version, app = importlib.metadata.version("flwr"), work / "app"
    (app / "roundbench").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT.format(version=version))
    (app / "LICENSE").write_text("benchmark only\n")
    for name, text in (("__init__", ""), ("server_app", SERVER), ("client_app", CLIENT)):
        (app / "roundbench" / f"{name}.py").write_text(text)
    (work / "home").mkdir()
    (work / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    return app


def measure(args: argparse.Namespace) -> dict[str, object]:
    work, port, tools = Path(tempfile.mkdtemp(prefix="flower-")), free_port(), Path(sys.executable).parent
    env = {**os.environ, "FLWR_HOME": str(work / "home"), "HOME": str(work), "FLWR_TELEMETRY_ENABLED": "0",
           "FLWR_DISABLE_UPDATE_CHECK": "1", "PATH": f"{tools}:{os.environ['PATH']}"}  # fmt: skip
    app, out, started = write_app(work, port), work / "out.json", []

    def start(name: str, command: list[str]) -> subprocess.Popen[bytes]:
        log = (work / f"{name}.log").open("w")
        started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=work, start_new_session=True))
        return started[-1]

    try:
        link = start("superlink", [str(tools / "flower-superlink"), "--insecure",
                                   "--disable-runtime-dependency-installation", "--host", "127.0.0.1",
                                   "--port", str(port)])  # fmt: skip
        sampler = Sampler(link.pid)
        sampler.start()
        _wait_for(port)
        load = start("load", [sys.executable, __file__, "--load", str(port), "--clients", str(args.clients)])
        loader = Sampler(load.pid)
        loader.start()
        time.sleep(3)
        config = f'clients={args.clients} params={args.parameters} layers=20 out="{out}"'
        subprocess.run([str(tools / "flwr"), "run", str(app), "bench", "--run-config", config], env=env, cwd=work,
                       check=True, capture_output=True, timeout=120)  # fmt: skip
        deadline = time.monotonic() + args.limit
        while not out.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(0.5)
        sampler.stop.set(), loader.stop.set()
        log = json.loads(out.read_text()) if out.exists() else []
        return {
            "version": importlib.metadata.version("flwr"), "clients": args.clients, "parameters": args.parameters,
            "peak_mb": round(sum(sampler.peaks.values()), 1), "cpu_s": round(sum(sampler.cpu.values()), 2),
            "load_cpu_s": round(sum(loader.cpu.values()), 2), "seconds": round(log[0]["seconds"], 2) if log else None,
            "errors": log[0]["errors"] if log else None, "finished": bool(log),
        }  # fmt: skip
    finally:
        _end(started)
        shutil.rmtree(work, ignore_errors=True)


def _wait_for(port: int) -> None:
    for _ in range(300):
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)


def _end(started: list[subprocess.Popen[bytes]]) -> None:
    """End what was started; flwr starts tasks in sessions of their own, so descendants are listed first."""
    family = []
    for process in started:
        with contextlib.suppress(psutil.Error):
            family += psutil.Process(process.pid).children(recursive=True)
    for process in reversed(started):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGTERM)
    time.sleep(1)
    for child in [*family, *(psutil.Process(p.pid) for p in started if p.poll() is None)]:
        with contextlib.suppress(psutil.Error):
            child.kill()
    for process in started:
        process.wait()


def load(port: int, clients: int) -> None:
    """Speak the SuperNode side for all clients."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
    from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
    from flwr.supernode.fleet_http_connection import http_request_response

    slots = threading.Semaphore(4)

    def node(number: int) -> None:
        with http_request_response(f"127.0.0.1:{port}", True) as connection:
            _, receive, send, _, _, pull, push, confirm = connection
            while True:
                received = receive()
                if received is None:
                    time.sleep(0.2)
                    continue
                meta, tree = received
                run = meta.metadata.run_id
                with slots:
                    message = pull_and_inflate_object_from_tree(
                        tree, lambda o, run=run: pull(run, o), lambda o, run=run: confirm(run, o), return_type=Message
                    )
                    message.metadata.__dict__["_message_id"] = tree.object_id
                    arrays = {k: Array(v.numpy() + np.float32(number)) for k, v in message.content["arrays"].items()}
                    metrics = MetricRecord({"num-examples": 10.0})
                    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
                    reply = Message(content=content, reply_to=message)
                    reply.metadata.__dict__["_message_id"] = reply.object_id
                    objects = get_all_nested_objects(reply)
                    ids, session = send(reply, get_object_tree(reply), 0.1)
                    push_objects(
                        objects, lambda o, c, run=run, s=session: push(run, s, o, c), object_ids_to_push=set(ids)
                    )

    threads = [threading.Thread(target=node, args=(n,), daemon=True) for n in range(clients)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--parameters", type=int, default=11_000_000)
    parser.add_argument("--limit", type=float, default=400)
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.load, args.clients)
    else:
        print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
