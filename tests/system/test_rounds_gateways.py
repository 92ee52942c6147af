"""Three gateways and a root, four daemons on one mosquitto: each runs its own cohorts and publishes one partial sum.

Shards a, b and c serve devices of their own; b keeps its state in PostgreSQL where that is installed. The root starts
the round, adds what the shards bring over MQTT, and everybody gets its weights. Sums are compared with numpy bit for
bit over the devices that the root's record names.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from gateway_site import Broker, Postgres, free_port
from patience import wait_for

from edgepriv.federated.fixed_point import Ring, decode_sum, quantise
from edgepriv.federated.privacy import clip_update
from edgepriv.keys import Identity
from edgepriv.wire.trust import TrustList, sign_trust
from edgepriv.wire.update import decode_update, encode_update

ROOT = Path(__file__).resolve().parents[2]
LOAD = ROOT / "tests" / "benchmarks" / "federated_load.py"
sys.path.insert(0, str(LOAD.parent))
from federated_load import WEIGHT, delta_of  # noqa: E402

SHARDS = {"gateway-a": (0, 6), "gateway-b": (1, 3), "gateway-c": (2, 3)}
SHAPES = {"w": (300, 100), "b": (100,)}
CLIP, BITS = 1.0, 16
pytestmark = pytest.mark.system


class Farm:
    """One broker, a root, three shards and their devices, all of them processes."""

    def __init__(self, folder, url_file):
        self.folder, self.port, self.processes = folder, free_port(), {}
        self.results, self.devices = [], {}
        (folder / "keys").mkdir()
        self._keys()
        self.broker = Broker(folder, self.port)
        self._config("gateway-root", 9, 'shards = ["gateway-a", "gateway-b", "gateway-c"]\nquorum = 4', None)
        for name, (shard, _) in SHARDS.items():
            self._config(
                name, shard, 'root = "gateway-root"\nroot_shard = 9', url_file if name == "gateway-b" else None
            )
        self.weights = folder / "weights.epu"
        base = np.random.default_rng(0)
        self.base = {n: base.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
        self.weights.write_bytes(encode_update(self.base))
        self.log = (folder / "gateways.log").open("wb")
        for name in ("gateway-root", *SHARDS):
            self.start(name)
        for name in SHARDS:
            self._start_devices(name)

    def _keys(self):
        owner, parties, first = Identity.new("owner", "owner"), [], 0
        owner.save(self.folder / "keys" / "owner.key")
        named = [("gateway", "gateway-root"), *(("gateway", n) for n in SHARDS)]
        for name, (_, count) in SHARDS.items():
            self.devices[name] = [f"dev-{i:04d}" for i in range(first, first + count)]
            named += [("device", n) for n in self.devices[name]]
            first += count
        for role, name in named:
            identity = Identity.new(role, name)
            identity.save(self.folder / "keys" / f"{name}.key")
            parties.append(identity.public)
        now = int(time.time())
        trust = TrustList(1, now, now + 86_400, tuple(parties))
        (self.folder / "trust.cbor").write_bytes(sign_trust(trust, owner))

    def _config(self, name, shard, rounds, url_file):
        store = f'url_file = "{url_file}"\n' if url_file else ""
        (self.folder / f"{name}.toml").write_text(
            f'[gateway]\nidentity = "keys/{name}.key"\nowner = "keys/owner.key.pub"\ntrust = "trust.cbor"\n'
            f'state = "{name}"\nshard = {shard}\n[broker]\nurl = "mqtt://127.0.0.1:{self.port}"\n[http]\nport = 0\n'
            f'[store]\nmin_free_bytes = 1\n{store}[rounds]\nprivacy = "masked"\nmin_cohort = 2\nmax_cohort = 3\n'
            f"clip = {CLIP}\nfraction_bits = {BITS}\nmax_weight = {WEIGHT}\ndeadline_s = 15.0\njoin_s = 6.0\n"
            f"step_s = 6.0\nresend_s = 0.5\nactive_s = 600.0\nshard_silence_s = 5.0\n{rounds}\n"
        )

    def start(self, name):
        command = [sys.executable, "-m", "gateway", "run", "--config", str(self.folder / f"{name}.toml")]
        self.processes[name] = subprocess.Popen(command, cwd=ROOT, stdout=self.log, stderr=self.log)

    def kill(self, name):
        self.processes[name].kill()
        self.processes[name].wait()

    def _start_devices(self, gateway):
        command = [
            sys.executable, str(LOAD), str(self.folder), str(self.folder / f"load-{gateway}"),
            f"mqtt://127.0.0.1:{self.port}", ",".join(self.devices[gateway]), "--gateway", gateway, "--shard",
            str(SHARDS[gateway][0]), "--stay",
        ]  # fmt: skip
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.processes[f"load-{gateway}"] = process
        threading.Thread(target=self._read, args=(process,), daemon=True).start()

    def _read(self, process):
        with process.stdout:
            for line in process.stdout:
                self.results.append(json.loads(line))

    def cli(self, name, *args, check=True):
        command = [sys.executable, "-m", "gateway", *args, "--config", str(self.folder / f"{name}.toml"), "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0 or not check, done.stderr
        return json.loads(done.stdout) if done.returncode == 0 else done

    def status(self, name):
        try:
            return json.loads((self.folder / name / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def ready(self):
        for name, (_, count) in SHARDS.items():
            wait_for(lambda n=name, c=count: self.status(n).get("devices") == c, 40, f"{name} has not all its devices")
        wait_for(lambda: self.status("gateway-root").get("connected"), 30, "the root is not connected")

    def round(self, meanwhile=lambda: None):
        number = self.cli("gateway-root", "rounds", "start")["round"]
        meanwhile()
        wait_for(lambda: self._state(number) in {"done", "aborted"}, 60, f"round {number} did not end")
        return self.cli("gateway-root", "rounds", "show", str(number))

    def _state(self, number):
        time.sleep(0.3)
        return self.cli("gateway-root", "rounds", "show", str(number))["state"]

    def model(self, digest):
        return decode_update(
            (self.folder / "gateway-root/rounds/models" / digest).read_bytes(), max_bytes=1 << 24
        ).tensors

    def check(self, record):
        """The new weights are exactly the old ones and the mean over the devices that the record names."""
        ring, base = Ring(64, BITS, CLIP, WEIGHT, 64), self.model(record["before"])
        totals = {n: np.zeros(s, ring.dtype) for n, s in SHAPES.items()}
        for name in record["participants"]:
            update = clip_update(delta_of(int(name.removeprefix("dev-")), SHAPES), CLIP)
            for key, value in update.items():
                totals[key] += quantise(value, WEIGHT, ring)
        weight = np.float64(WEIGHT * len(record["participants"]))
        new = self.model(record["after"])
        for key, total in totals.items():
            mean = decode_sum(total, ring).astype(np.float32) / weight
            assert np.array_equal(new[key], (base[key] + mean).astype(np.float32))

    def of(self, *gateways):
        return sorted(d for g in gateways for d in self.devices[g])

    def close(self):
        for name in self.processes:
            self.kill(name)
        self.broker.close()
        self.log.close()


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gateways")
    try:
        postgres = Postgres(folder)
    except pytest.skip.Exception:
        postgres = None
    made = Farm(folder, postgres and postgres.url_file)
    try:
        yield made
    finally:
        made.close()
        if postgres:
            postgres.close()


def _parts(record):
    return {name: (state, count) for name, state, _, count in record["parts"]}


@pytest.mark.timeout(240)
def test_three_gateways_bring_partial_sums_to_a_root_over_mqtt_and_a_killed_one_goes_on_or_sits_out(farm):
    farm.ready()
    farm.cli("gateway-root", "rounds", "weights", str(farm.weights), "--model", "m")
    first = farm.round()
    assert first["state"] == "done", first["reason"]
    assert _parts(first) == {"gateway-a": ("done", 6), "gateway-b": ("done", 3), "gateway-c": ("done", 3)}
    assert first["participants"] == farm.of(*SHARDS)
    farm.check(first)
    shard = farm.cli("gateway-a", "rounds", "show", str(first["round"]))
    assert (shard["publish"], len(shard["parts"]), len(shard["participants"])) == ("partial", 2, 6)
    adopted = {(r["device"], r["round"]) for r in farm.results if r["adopt"] == first["after"]}
    wait_for(
        lambda: {r["device"] for r in farm.results if r["adopt"] == first["after"]} == set(farm.of(*SHARDS)),
        20, f"not all devices heard of the weights: {adopted}",
    )  # fmt: skip
    refused = farm.cli("gateway-a", "rounds", "start", check=False)
    assert "shard of gateway-root" in refused.stderr

    def kill_and_start():
        time.sleep(1.0)
        farm.kill("gateway-b")
        time.sleep(0.5)
        farm.start("gateway-b")

    second = farm.round(kill_and_start)
    assert second["state"] == "done", second["reason"]
    assert second["before"] == first["after"]
    assert set(farm.of("gateway-a", "gateway-c")) <= set(second["participants"])
    farm.check(second)

    farm.kill("gateway-c")
    third = farm.round()
    assert third["state"] == "done", third["reason"]
    assert _parts(third)["gateway-c"] == ("out", 0)
    assert "was not heard" in next(why for name, _, why, _ in third["parts"] if name == "gateway-c")
    assert third["participants"] == farm.of("gateway-a", "gateway-b")
    farm.check(third)
