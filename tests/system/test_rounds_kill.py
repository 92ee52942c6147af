"""SIGKILL of a device, the gateway and the broker at random points of federated rounds, all of them the real thing.

Each round must end: with the right sum over exactly the devices that its record names, or aborted with a reason.
Five rounds by default, fifty with ``-m full``; every other round is masked.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgepriv import datasets
from edgepriv.demo.processes import free_port
from edgepriv.demo.site import GATEWAY, make_site
from edgepriv.device.capture import open_source
from edgepriv.device.infer import Inferer
from edgepriv.federated.head import BIAS, WEIGHT, new_head, train_head
from edgepriv.federated.local_recipe import head_recipe
from edgepriv.wire.update import decode_update, encode_update
from firmware_sim.fleet import MODEL

ROOT = Path(__file__).resolve().parents[2]
MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
DEVICES, FRAMES = 4, 12
RECIPE = {"learning_rate": 0.1, "batch_size": 4, "epochs": 3}
pytestmark = [pytest.mark.system, pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")]


class Farm:
    """Broker, gateway and devices as processes that can be killed and started again."""

    def __init__(self, folder: Path):
        self.folder, self.port, self.processes = folder, free_port(), {}
        self.site = make_site(folder, DEVICES)
        self.log = (folder / "all.log").open("wb")
        (folder / "mosquitto.conf").write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nmax_packet_size 262144\n"
        )
        broker = f"mqtt://127.0.0.1:{self.port}"
        training = "".join(f"{k} = {v}\n" for k, v in RECIPE.items())
        self.site.config(GATEWAY).write_text(
            f'[gateway]\nidentity = "keys/{GATEWAY}.key"\nowner = "keys/owner.key.pub"\ntrust = "trust.cbor"\n'
            f'state = "gateway"\n[broker]\nurl = "{broker}"\n[http]\nport = 0\n[store]\nmin_free_bytes = 1\n[rounds]\n'
            'model = "pixels"\nquorum = 2\nmin_cohort = 2\ndeadline_s = 12.0\njoin_s = 5.0\nstep_s = 6.0\nclip = 20.0\n'
            f"max_weight = 20\nresend_s = 1.0\nactive_s = 3600.0\n[rounds.training]\n{training}"
        )
        self.data, self.rows = datasets.load("digits", split="all"), {}
        for index, name in enumerate(self.site.devices):
            self.rows[name] = list(range(index * 50, index * 50 + FRAMES))
            self._write_device(name, broker)
        self.features = {name: self._features(rows) for name, rows in self.rows.items()}
        for name in ("broker", "gateway", *self.site.devices):
            self.start(name)

    def _write_device(self, name, broker):
        self.site.config(name).write_text(
            f'[device]\nkey = "keys/{name}.key"\ntrust = "trust.cbor"\nowner = "keys/owner.key.pub"\n'
            f'gateway = "{GATEWAY}"\nstate = "{name}"\n[broker]\nurl = "{broker}"\n[model]\npath = "{MODEL}"\n'
            f'[source]\nkind = "simulated"\ndata = "digits"\nrows = {self.rows[name]}\nseed = 1\n'
            f"[rounds]\nmin_cohort = 2\n[run]\nframes = {FRAMES}\nlinger_s = 100000.0\n"
        )

    def _features(self, rows):
        options = {"data": "digits", "rows": rows, "seed": 1}
        source, infer = (
            open_source("simulated", options, folder=self.folder, clock=lambda: 0.0),
            Inferer.from_file(MODEL, threads=1),
        )
        return np.stack([infer(source.read()).features for _ in rows])

    def start(self, name):
        command = {
            "broker": [MOSQUITTO, "-c", str(self.folder / "mosquitto.conf")],
            "gateway": [sys.executable, "-m", "gateway", "run", "--config", str(self.site.config(GATEWAY))],
        }.get(name) or [sys.executable, "-m", "edgepriv", "device", "run", "--config", str(self.site.config(name))]
        self.processes[name] = subprocess.Popen(command, cwd=ROOT, stdout=self.log, stderr=self.log)

    def kill(self, name):
        self.processes[name].kill()
        self.processes[name].wait()

    def gateway(self, *args, tries=20):
        command = [sys.executable, "-m", "gateway", *args, "--config", str(self.site.config(GATEWAY)), "--json"]
        for _ in range(tries):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
            if done.returncode == 0:
                return json.loads(done.stdout)
            time.sleep(0.5)
        raise AssertionError(done.stderr)

    def status(self):
        try:
            return json.loads((self.folder / "gateway" / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def wait(self, condition, seconds, text):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, text
            time.sleep(0.2)

    def ready(self):
        """Everybody is connected and every device has seen its frames."""
        since = time.time()
        self.wait(lambda: (s := self.status()).get("at", 0) > since and s["connected"], 30, "the gateway is not ready")
        wanted = DEVICES * FRAMES
        self.wait(lambda: self.status()["store"]["outputs"] >= wanted, 40, "the devices' outputs did not arrive")

    def settle(self):
        """Until no new output has arrived for a while, so that every device has all its examples."""
        last, since, deadline = -1, time.monotonic(), time.monotonic() + 30
        while time.monotonic() < deadline and time.monotonic() - since < 6:
            outputs = self.status().get("store", {}).get("outputs", 0)
            if outputs != last:
                last, since = outputs, time.monotonic()
            time.sleep(0.5)

    def close(self):
        for name in self.processes:
            self.kill(name)
        self.log.close()

    def expected(self, base, names, number):
        recipe, total, weight = head_recipe(**RECIPE), {k: np.zeros(v.shape) for k, v in base.items()}, 0
        for name in names:
            labels = self.data.labels[self.rows[name]]
            delta = train_head(base, self.features[name], labels, recipe, seed=number)
            total = {k: total[k] + FRAMES * delta[k] for k in total}
            weight += FRAMES
        return {k: base[k] + total[k] / weight for k in base}


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    made = Farm(tmp_path_factory.mktemp("farm"))
    try:
        yield made
    finally:
        made.close()


def _round_with_a_kill(farm, seed):
    rng = random.Random(seed)
    weights = farm.folder / "weights.epu"
    if not weights.exists():
        farm.ready()
        weights.write_bytes(encode_update(new_head(10, 64), {"model": "pixels"}))
        farm.gateway("rounds", "weights", str(weights), "--model", "pixels")
    privacy = "masked" if seed % 2 else "clear"
    number = farm.gateway("rounds", "start", "--set", f"privacy={privacy}")["round"]
    time.sleep(rng.uniform(0, 2.5))
    victim = rng.choice(["gateway", "broker", *farm.site.devices])
    farm.kill(victim)
    time.sleep(rng.uniform(0, 1.0))
    farm.start(victim)
    farm.wait(lambda: _ended(farm, number), 60, f"round {number} ({privacy}, {victim} killed) did not end")
    if victim in farm.site.devices:  # a restarted device sees its frames again; the next round waits for all of them
        farm.settle()
    return farm.gateway("rounds", "show", str(number)), victim


def _ended(farm, number):
    return farm.gateway("rounds", "show", str(number))["state"] in {"done", "aborted"}


def _check(farm, record):
    if record["state"] == "aborted":
        assert record["reason"]
        return
    models = farm.folder / "gateway" / "rounds" / "models"
    before, after = (
        decode_update((models / record[key]).read_bytes(), max_bytes=1 << 20).tensors for key in ("before", "after")
    )
    wanted = farm.expected(before, record["participants"], record["round"])
    assert len(set(record["participants"])) == len(record["participants"]) >= 2
    assert np.allclose(after[WEIGHT], wanted[WEIGHT], atol=2e-3)
    assert np.allclose(after[BIAS], wanted[BIAS], atol=2e-3)


@pytest.mark.timeout(400)
def test_five_rounds_with_a_kill_each_end_right_or_with_a_reason(farm):
    records = [_round_with_a_kill(farm, seed) for seed in range(5)]
    for record, _ in records:
        _check(farm, record)
    assert any(record["state"] == "done" for record, _ in records)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_fifty_rounds_with_a_kill_each_end_right_or_with_a_reason(farm):
    outcomes = []
    for seed in range(50):
        record, victim = _round_with_a_kill(farm, 100 + seed)
        outcomes.append((record["round"], record["privacy"], victim, record["state"], len(record["participants"])))
        print(outcomes[-1], flush=True)
        _check(farm, record)
