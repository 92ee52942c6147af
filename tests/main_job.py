"""The main job as processes for the system tests: a site of the demo, real broker, gateway and devices."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from device_site import classifier
from patience import PATIENCE, wait_for

from edgepriv.demo import processes, site
from edgepriv.federated.head import new_head
from edgepriv.wire.update import encode_update

ROOT = Path(__file__).resolve().parent.parent
MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/sbin")
LABELS = [str(i) for i in range(10)]
TOML = (
    f'id = "backbone"\nwidth = 8\nheight = 8\ncolour = "gray"\nfeatures = "features"\nlabels = {json.dumps(LABELS)}\n'
)


class Job:
    """Processes by name; `kill` is SIGKILL, `start` starts (again) with the same command and log."""

    def __init__(self, folder: Path, devices: int):
        if MOSQUITTO is None:
            pytest.skip("mosquitto is not installed")
        self.folder = folder
        self.place = site.make_site(folder, devices)
        self.model = classifier(folder / "model", TOML, bias=(0.0,) * 10)
        head = new_head(10, 64)
        (folder / "weights.epu").write_bytes(encode_update(head))
        self.commands, self.running, self.killed, self.wanted = {}, {}, {}, {}

    def broker(self, name="broker"):
        port = processes.free_port()
        conf = self.folder / f"{name}.conf"
        conf.write_text(processes.MOSQUITTO_CONF.format(port=port))
        self.add(name, [MOSQUITTO, "-c", str(conf)])
        wait_for(lambda: _listens(port), 10, "mosquitto does not listen")
        return f"mqtt://127.0.0.1:{port}"

    def gateway(self, url):
        weights = self.folder / "weights.epu"
        port = processes.free_port()
        config = site.write_gateway(self.place, url, port=port, weights=weights, devices=len(self.place.devices))
        self.add("gateway", processes.python_command("gateway", "run", "--config", str(config)))

    def device(self, index, url, *, frames, interval_s=0.05, size=None, rounds=False, linger_s=100_000.0):
        name = self.place.devices[index]
        self.wanted[name] = frames
        config = site.write_device(
            self.place, name, url, model=self.model, data="digits", rows=list(range(index, 1000)), seed=index,
            frames=frames, masked=False,
        )  # fmt: skip
        text = config.read_text().replace("linger_s = 100000.0", f"linger_s = {linger_s}\ninterval_s = {interval_s}")
        if size:
            text = text.replace('kind = "simulated"', f'kind = "simulated"\nheight = {size[0]}\nwidth = {size[1]}')
        if not rounds:
            text = text.replace("[rounds]", "[rounds]\ntake_part = false")
        config.write_text(text)
        self.add(name, processes.python_command("edgepriv", "device", "run", "--config", str(config), "--json"))
        return name

    def last_frames(self, name, frames):
        """From its next start on the device ends by itself, after so many frames."""
        config = self.place.config(name)
        text, changed = re.subn(r"(?m)^frames = \d+$", f"frames = {frames}", config.read_text())
        assert changed == 1
        config.write_text(text)
        self.wanted[name] = frames

    def add(self, name, command):
        self.commands[name] = command
        self.start(name)

    def start(self, name):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                self.commands[name], stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
            )

    def kill(self, name):
        process = self.running.pop(name)
        assert process.poll() is None, f"{name} had ended with {process.returncode}: {self.log(name)[-2000:]}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        if name in self.place.devices:
            self.killed.setdefault(name, set()).update(self.durable(name))

    def durable(self, name):
        """Digests of what a device's spool holds."""
        with sqlite3.connect(self.folder / name / "spool" / "spool.db", timeout=10) as db:
            rows = db.execute("SELECT digest FROM items WHERE kind != 'epoch'").fetchall()
        db.close()
        return {row[0] for row in rows}

    def wait_end(self, name, timeout_s):
        """The device's own report, once it has sent everything and ended by itself."""
        code = self.running[name].wait(PATIENCE * timeout_s)
        assert code == 0, self.log(name)[-3000:]
        return json.loads(self.log(name).strip().splitlines()[-1])

    def stop(self):
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        for process in self.running.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running.clear()

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def no_tracebacks(self):
        for name in self.commands:
            assert "Traceback" not in self.log(name), f"{name}: {self.log(name)[-3000:]}"

    # --- what is durable ----------------------------------------------------------------------------------

    def store(self, query):
        with sqlite3.connect(f"file:{self.folder}/gateway/gateway.db?mode=ro", uri=True, timeout=10) as db:
            rows = db.execute(query).fetchall()
        db.close()
        return rows

    def frames(self, epoch=None):
        """How many frames the gateway has stored, in all or of one of its epochs."""
        where = "" if epoch is None else f" WHERE epoch = {epoch}"
        try:
            return self.store(f"SELECT count(*) FROM frames{where}")[0][0]
        except sqlite3.OperationalError:
            return 0  # the gateway has not made its store yet

    def epochs(self, name):
        """The epochs that the gateway knows of a device, oldest first: one for each of its processes."""
        try:
            return [row[0] for row in self.store(f"SELECT id FROM epochs WHERE party = '{name}' ORDER BY seq")]
        except sqlite3.OperationalError:
            return []

    def serves(self, name, process):
        """Whether frames of a device's process (1: its first one) have arrived."""
        known = self.epochs(name)
        return len(known) == process and self.frames(known[-1]) > 0

    def device_counters(self, name):
        with sqlite3.connect(self.folder / name / "spool" / "spool.db", timeout=10) as db:
            found = dict(db.execute("SELECT name, value FROM counters"))
            found["waiting"] = db.execute("SELECT count(*) FROM items WHERE kind != 'epoch'").fetchone()[0]
        db.close()
        return found

    def sent_all(self, name):
        """Whether a device has captured all its frames and has nothing left to send."""
        counters = self.device_counters(name)
        return counters["waiting"] == 0 and counters.get("spooled_frames", 0) >= self.wanted[name]

    def gateway_cli(self, *args):
        config = str(self.place.config(site.GATEWAY))
        command = [sys.executable, "-m", "gateway", *args, "--config", config, "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.strip().splitlines()[-1])

    def assert_exactly_once(self):
        """The store has what the devices' durable counters and spools say that they accepted, each thing once.

        A process that was killed may have sent a little more than it had made durable; that is stored too, once.
        """
        for name in self.place.devices:
            counters = self.device_counters(name)
            assert counters["waiting"] == 0
            assert not any(key.startswith(("dropped", "damaged", "spool_recreated")) for key in counters), counters
            for table, kind in (("frames", "spooled_frames"), ("outputs", "spooled_outputs")):
                rows = self.store(f"SELECT epoch, counter FROM {table} WHERE party = '{name}' ORDER BY epoch, counter")
                assert len(rows) == len(set(rows)) >= counters[kind], (name, table)
                assert name in self.killed or len(rows) == counters[kind], (name, table, len(rows), counters)
                last = [counter for epoch, counter in rows if epoch == rows[-1][0]]
                assert last == list(range(len(last)))  # the process that ended by itself: none lost, none invented
            stored = {row[0] for table in ("frames", "outputs") for row in self.store(f"SELECT digest FROM {table}")}
            assert self.killed.get(name, set()) <= stored
        outputs = self.store("SELECT count(*) FROM outputs")[0][0]
        assert self.store("SELECT sum(count) FROM windows") == [(outputs,)]
        assert self.store("SELECT count(*) FROM transfers") == [(0,)]


def _listens(port):
    import socket

    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
