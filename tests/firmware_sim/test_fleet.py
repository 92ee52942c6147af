"""The fleet simulator: the real runtime, seeded faults, and one small scenario against the real gateway."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgepriv.device import loop
from edgepriv.device.runtime import DeviceRuntime
from edgepriv.errors import ConfigError, MissingFileError
from edgepriv.mqtt import Inbound
from firmware_sim import fleet
from firmware_sim.network import Hub, VirtualLink
from firmware_sim.scenario import SHIPPED, NetworkSection, load_scenario

ROOT = Path(__file__).resolve().parents[2]
MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")


class Wire:
    """A shared connection that keeps what is sent."""

    connected, generation, max_packet_bytes = True, 1, 262_144

    def __init__(self):
        self.sent, self.inbox = [], []

    def subscribe(self, topic_filter):
        pass

    def send(self, topic, payload, *, retain=False):
        self.sent.append(Inbound(topic, payload))
        return True

    def receive(self, limit=64):
        taken, self.inbox = self.inbox, []
        return taken

    def close(self):
        pass


def _link(**faults):
    wire, now = Wire(), [0.0]
    hub = Hub([wire])
    options = {"bytes_per_s": faults.pop("bytes_per_s", 0.0)}
    link = VirtualLink(hub, "dev-1", NetworkSection(**faults), seed=3, clock=lambda: now[0], **options)
    return link, wire, hub, now


def test_device_and_simulator_run_the_same_step():
    assert fleet.assemble is sys.modules["edgepriv.device.start"].assemble
    runs = {
        "runtime.step()": inspect.getsource(loop.run_device),
        "runtime.step() ": inspect.getsource(fleet.Worker.turn),
    }
    assert all(call.strip() in source for call, source in runs.items())
    for name in ("fleet", "network", "stage", "clock"):
        tree = ast.parse((ROOT / "firmware_sim" / f"{name}.py").read_text())
        classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
        assert not any(
            base.id == DeviceRuntime.__name__ for c in classes for base in c.bases if isinstance(base, ast.Name)
        )


@pytest.mark.parametrize("name", [p.stem for p in SHIPPED.glob("*.toml")])
def test_shipped_scenarios_are_valid(name):
    assert load_scenario(Path(name)).fleet.devices <= 1000


def test_an_unknown_scenario_names_the_shipped_ones():
    with pytest.raises(MissingFileError) as caught:
        load_scenario(Path("nowhere"))
    assert "smoke" in caught.value.hint


def test_a_share_above_one_is_refused(tmp_path):
    (tmp_path / "s.toml").write_text("[network]\ndrop = 1.5\n")
    with pytest.raises(ConfigError, match=r"0\.\.1"):
        load_scenario(tmp_path / "s.toml")


def test_the_same_seed_chooses_the_same_devices():
    scenario = load_scenario(Path("attackers"))
    assert fleet.chosen(scenario, "attack", 0.2) == fleet.chosen(scenario, "attack", 0.2)
    assert len(fleet.chosen(scenario, "attack", 0.2)) == 8


def test_a_good_network_changes_nothing():
    link, wire, hub, _ = _link()
    assert link.send("t", b"abc")
    wire.inbox = [Inbound("edgepriv/v1/dev-1/down/msg", b"x"), Inbound("edgepriv/v1/dev-2/down/msg", b"y")]
    assert hub.pump(0.0)
    assert [p.payload for p in wire.sent] == [b"abc"]
    assert [p.payload for p in link.receive()] == [b"x"]


def test_faults_lose_repeat_and_alter_about_as_often_as_asked():
    link, wire, _, _ = _link(drop=0.2, duplicate=0.1, corrupt=0.3)
    for _ in range(2000):
        link.send("t", bytes(8))
    altered = sum(p.payload != bytes(8) for p in wire.sent) / len(wire.sent)
    assert 0.85 < len(wire.sent) / 2000 < 0.91
    assert 0.26 < altered < 0.34


def test_delays_reorder_and_then_everything_arrives():
    link, wire, _, now = _link(delay_s=1.0)
    for i in range(50):
        link.send("t", bytes([i]))
    assert not wire.sent
    now[0] = 2.0
    link.receive()
    order = [p.payload[0] for p in wire.sent]
    assert sorted(order) == list(range(50))
    assert order != list(range(50))


def test_a_slow_link_refuses_until_bytes_come_back():
    link, _, _, now = _link(bytes_per_s=1000.0)
    sent = 0
    while link.send("t", bytes(1000)):
        sent += 1
    now[0] += 5
    assert link.send("t", bytes(1000))
    assert sent <= 71


def test_a_partition_ends_with_a_new_generation_and_a_vanished_device_stays_away():
    link, _, _, _ = _link()
    link.cut(off=True)
    assert not link.connected
    assert not link.send("t", b"x")
    link.cut(off=False)
    assert link.connected
    assert link.generation == 2
    link.vanish()
    assert not link.connected


def _smoke(out):
    return [sys.executable, "-m", "firmware_sim.cli", "run", "smoke", "--json", "--devices", "6", "--out", str(out)]


@pytest.mark.system
@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
def test_the_smoke_scenario_runs_against_the_real_gateway(tmp_path):
    done = subprocess.run(_smoke(tmp_path / "o"), cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["schema"] == "edgepriv.sim/1"
    assert told["outputs"]["stored"] == told["outputs"]["accepted"] == 120
    assert [r["participants"] for r in told["rounds"]] == [6, 6]
    assert told["rounds"][-1]["accuracy"] > 0.25


def _processes_of(folder):
    """Command lines that name the folder: broker, gateway and workers all do."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


@pytest.mark.system
@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
def test_a_simulator_that_is_terminated_leaves_nothing_running(tmp_path):
    out = tmp_path / "o"
    running = subprocess.Popen(_smoke(out), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(_processes_of(out)) < 4:  # itself, broker, gateway, a worker
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline, _processes_of(out)
        time.sleep(0.1)
    running.terminate()
    running.communicate(timeout=240)
    assert running.returncode == 130
    assert _processes_of(out) == []
