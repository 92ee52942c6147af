"""The main job through kills, a hostile broker and a stolen device: nothing lost, doubled, believed or opened."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from main_job import ROOT, Job
from patience import PATIENCE, wait_for

from edgepriv import datasets, keys, mqtt
from edgepriv.cipher.cipher import FrameOpener
from edgepriv.demo import site
from edgepriv.device.capture import open_source
from edgepriv.errors import EdgeprivError
from edgepriv.wire import messages, topics
from edgepriv.wire.epoch import commitment, read_epoch, unwrap_content
from edgepriv.wire.link import HEADER, MAGIC
from edgepriv.wire.messages import Ack
from edgepriv.wire.trust import read_trust

pytestmark = pytest.mark.system
ENDLESS = 5000  # more than a device captures before it is killed


@pytest.fixture
def job(tmp_path):
    made = Job(tmp_path, 2)
    yield made
    made.stop()


@pytest.mark.timeout(600)
def test_a_device_the_gateway_and_the_broker_killed_in_turn_lose_and_double_nothing(job):
    url = job.broker()
    job.gateway(url)
    small = job.device(0, url, frames=ENDLESS, size=(120, 160))
    large = job.device(1, url, frames=ENDLESS, interval_s=0.12)  # VGA frames travel in chunks
    starts, last = {small: 1, large: 1}, {3: (large, 24), 5: (small, 60)}
    for turn, victim in enumerate((small, "gateway", "broker", large, "gateway", small)):
        before = job.frames()
        wait_for(lambda: job.frames() >= before + 4, 40, f"no frame arrived before {victim} was killed")  # noqa: B023
        if victim in starts:
            wait_for(lambda: job.serves(victim, starts[victim]), 40, f"no frame of {victim} arrived")  # noqa: B023
            starts[victim] += 1
        job.kill(victim)
        time.sleep(0.3)
        if turn in last:
            job.last_frames(*last[turn])
        job.start(victim)
    reports = [job.wait_end(name, 90) for name in (small, large)]
    assert [r["pending"] for r in reports] == [0, 0]
    counters = [job.device_counters(name) for name in (small, large)]
    assert [c["epoch_seq"] for c in counters] == [3, 2]  # each process had an epoch of its own
    assert counters[0]["spooled_frames"] > 60  # the killed processes had accepted some too
    job.running.pop(small)
    job.running.pop(large)
    job.stop()
    job.assert_exactly_once()
    job.no_tracebacks()


class HostileBroker:
    """Two brokers with a man in the middle: devices on one, the gateway on the other, everything passes his hands."""

    def __init__(self, devices_url, gateway_url, names, seed):
        self.rng, self.names, self.hostile = random.Random(seed), names, True
        self.sides = {"up": mqtt.open_link(devices_url, "mitm-a"), "down": mqtt.open_link(gateway_url, "mitm-b")}
        for link in self.sides.values():
            link.wait(60)
        self.sides["up"].subscribe("edgepriv/v1/+/up/#")
        self.sides["down"].subscribe("edgepriv/v1/+/down/#")
        self.history = {"up": [], "down": []}
        self.later = []
        self.counts = dict.fromkeys(("dropped", "replayed", "swapped", "corrupted", "delayed", "forged"), 0)

    def pump(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            moved = sum(self._lane(lane) for lane in ("up", "down"))
            due = [one for one in self.later if one[0] <= time.monotonic()]
            for one in due:
                self.later.remove(one)
                self._put(*one[1:])
            if not moved:
                time.sleep(0.004)

    def pump_until(self, condition, timeout_s):
        deadline = time.monotonic() + PATIENCE * timeout_s
        while not condition():
            if time.monotonic() > deadline:
                return False
            self.pump(1)
        return True

    def busy(self, packets):
        return min(len(heard) for heard in self.history.values()) > packets

    def _lane(self, lane):
        packets = self.sides[lane].receive()
        for packet in packets:
            self.history[lane].append(packet)
            if self.hostile:
                self._meddle(lane, packet)
            else:
                self._put(lane, packet.topic, packet.payload)
        return len(packets)

    def _put(self, lane, topic, payload):
        far = self.sides["down" if lane == "up" else "up"]
        deadline = time.monotonic() + 5
        while not far.send(topic, payload) and time.monotonic() < deadline:
            time.sleep(0.002)

    def _meddle(self, lane, packet):
        what = self.rng.choices(
            ["pass", "drop", "delay", "corrupt", "swap", "replay", "forge", "reflect"], [50, 8, 10, 8, 6, 8, 6, 4]
        )[0]
        topic, payload = packet.topic, packet.payload
        if what == "drop":
            self.counts["dropped"] += 1
            return
        if what == "delay":
            self.counts["delayed"] += 1
            self.later.append((time.monotonic() + self.rng.random() * 3, lane, topic, payload))
            return
        if what == "corrupt":
            raw = bytearray(payload)
            raw[self.rng.randrange(len(raw))] ^= 1 << self.rng.randrange(8)
            self._put(lane, topic, bytes(raw[: self.rng.choice([len(raw), len(raw) // 2])]))
            self.counts["corrupted"] += 1
            return
        if what == "swap":
            other = self.names[1 - self.names.index(topic.split("/")[2])]
            self._put(lane, topic.replace(topic.split("/")[2], other), payload)
            self.counts["swapped"] += 1
        elif what == "replay":
            old = self.rng.choice(self.history[lane])
            self._put(lane, old.topic, old.payload)
            self.counts["replayed"] += 1
        elif what == "forge":
            self._forge(lane, topic, payload)
        elif what == "reflect":  # send a party its own words, or the gateway its own
            back = topics.down(topic.split("/")[2]) if lane == "up" else topics.up(topic.split("/")[2], 0, "msg")
            self._put("down" if lane == "up" else "up", back, payload)
            self.counts["forged"] += 1
        self._put(lane, topic, payload)

    def _forge(self, lane, topic, payload):
        """Acknowledgements for whatever was seen, bare and under the real epoch's header; epoch records cut short."""
        import hashlib

        name = topic.split("/")[2]
        ack = messages.encode(Ack(hashlib.sha256(payload).digest(), "stored", ""))
        header = payload[: HEADER.size] if payload[:4] == MAGIC else HEADER.pack(MAGIC, os.urandom(16), bytes(16), 1)
        for body in (ack, header + ack + os.urandom(16)):
            self._put("down", topics.down(name), body)
        self._put("up", topics.up(name, 0, "epoch"), payload)
        self._put("up", topics.up(name, 0, "msg"), ack)
        self.counts["forged"] += 4

    def replay_all(self):
        """Everything that was ever heard, once more and in another order."""
        for lane, heard in self.history.items():
            for packet in self.rng.sample(heard, min(len(heard), 250)):
                self._put(lane, packet.topic, packet.payload)

    def forge_for_each(self):
        """Forged acknowledgements for what each device has sent, in its session and in none."""
        for name in self.names:
            packet = next(p for p in reversed(self.history["up"]) if p.topic.split("/")[2] == name)
            self._forge("up", packet.topic, packet.payload)
        self.pump(1)

    def close(self):
        for link in self.sides.values():
            link.close()


def test_a_hostile_broker_loses_doubles_and_fools_nothing(job):
    front, back = job.broker("front"), job.broker("back")
    job.gateway(back)
    names = [
        job.device(0, front, frames=40, size=(120, 160), interval_s=0.1, rounds=True),
        job.device(1, front, frames=15, interval_s=0.3, rounds=True),
    ]
    broker = HostileBroker(front, back, names, seed=11)
    assert broker.pump_until(lambda: broker.busy(60) and min(broker.counts.values()) > 3, 45), broker.counts
    broker.forge_for_each()  # by chance alone one of them might have been spared
    broker.hostile = False
    assert broker.pump_until(lambda: all(job.sent_all(name) for name in names), 45)
    job.gateway_cli("rounds", "weights", str(job.folder / "weights.epu"), "--model", "backbone")
    started = job.gateway_cli("rounds", "start")["round"]
    assert broker.pump_until(lambda: job.gateway_cli("rounds", "show", str(started)).get("outcome"), 45)
    record = job.gateway_cli("rounds", "show", str(started))
    assert record["outcome"] == "done"
    assert sorted(record["participants"]) == sorted(names)
    rounds = job.store("SELECT number, state FROM rounds")
    up_before = len(broker.history["up"])
    broker.replay_all()
    broker.pump(4)
    status = job.gateway_cli("status")["totals"]
    assert job.store("SELECT number, state FROM rounds") == rounds
    answers = [p for p in broker.history["up"][up_before:] if p.topic.endswith("/epoch")]
    assert answers == []  # nobody was talked into announcing an epoch again
    job.stop()
    reports = [json.loads(job.log(name).strip().splitlines()[-1])["counters"] for name in names]
    broker.close()
    for report in reports:
        assert report["down_forged"] > 0
        assert report["down_replayed"] > 0
        assert not {"acked_rejected", "acked_conflict", "dropped_frames"} & report.keys(), report
    assert status["output_duplicate"] > 0
    assert sum(count for key, count in status.items() if key.startswith("rejected_")) > 20
    assert not [key for key in status if "conflict" in key]
    assert {p for (p,) in job.store("SELECT DISTINCT party FROM epochs")} == set(names)
    job.assert_exactly_once()
    job.no_tracebacks()


def test_nothing_on_a_killed_devices_disk_opens_a_frame_and_the_recipients_key_opens_all(job):
    url = job.broker()
    job.gateway(url)
    name = job.device(0, url, frames=500, size=(120, 160), interval_s=0.05)
    wait_for(lambda: job.frames() >= 12, 40, "no frames arrived")
    job.kill(name)
    time.sleep(0.5)
    job.stop()
    place, folder = job.place, job.folder
    trust = read_trust(place.trust.read_bytes(), keys.load_public(place.owner).ed25519, now=time.time())
    ((record, epoch_row),) = job.store("SELECT raw, id FROM epochs")
    signed = read_epoch(bytes(record), trust)
    frames = job.store(f"SELECT envelope, counter FROM frames WHERE epoch = {epoch_row} ORDER BY counter")
    assert len(frames) >= 12

    # positive control: the recipient opens each one, and sees what the camera saw
    recipient = keys.load_identity(place.key(site.RECIPIENT))
    opener = FrameOpener(bytes(record), recipient, trust)
    options = {"data": "digits", "rows": list(range(1000)), "seed": 0, "height": 120, "width": 160}
    source = open_source("simulated", options, folder=folder, clock=time.time)
    for envelope, _ in frames:
        assert np.array_equal(opener.open(bytes(envelope)).pixels, source.read().pixels)

    ck = unwrap_content(signed.record, recipient)

    def opens(raw):
        """Whether any 32 bytes of a file are the content key that the record commits to."""
        party, epoch_id, wanted = signed.record.party, signed.record.epoch_id, signed.record.commitment
        return any(commitment(raw[i : i + 32], party, epoch_id) == wanted for i in range(len(raw) - 31))

    assert opens(b"x" * 100 + ck + b"y" * 50)
    files = [path for path in (folder / name).rglob("*") if path.is_file()] + [place.key(name)]
    assert any(path.name == "spool.db" for path in files)
    for path in files:
        assert not opens(path.read_bytes()[:300_000]), path
        with pytest.raises(EdgeprivError):
            FrameOpener(bytes(record), keys.load_identity(path), trust)


def run_demo(tmp_path, *extra):
    command = [
        sys.executable, "-m", "edgepriv", "demo", "--frames", "6", "--rounds", "2", "--devices", "2", "--json",
        "--out", str(tmp_path / "demo"), *extra,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.strip().splitlines()[-1])
    assert document["schema"] == "edgepriv.demo/1"
    frames, outputs, federated = document["frames"], document["outputs"], document["federated"]
    assert frames == {"captured": 12, "stored": 12, "lost": 0, "opened_identical": 12}
    assert (outputs["released"], outputs["aggregated"], outputs["policy"]) == (12, 12, "argmax")
    assert outputs["bits_per_inference"] == pytest.approx(np.log2(10), abs=1e-3)
    assert (federated["rounds"], federated["devices"]) == (2, 2)
    assert 0 <= federated["accuracy_before"] <= 1
    assert 0 <= federated["accuracy_after"] <= 1
    for model in document["models"]:
        assert {"id", "leakage", "verdict"} <= model.keys()
    report = (tmp_path / "demo" / os.path.basename(document["report"])).read_text()
    assert report.lstrip().startswith("<!")
    assert "<script" not in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    return document


@pytest.mark.timeout(600)
@pytest.mark.parametrize("broker", ["mosquitto", "amqtt"])
def test_the_demo_runs_with_both_brokers(job, tmp_path, broker):
    digits = datasets.load(
        "digits", limit=500
    )  # a third of the pictures: the training of the backbone is not the point
    (tmp_path / "some").mkdir()
    np.savez(tmp_path / "some" / "release.npz", images=digits.images, labels=digits.labels)
    run_demo(tmp_path, "--broker", broker, "--data", str(tmp_path / "some"))


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_demo_runs_on_mnist(job, tmp_path, data_dir):
    run_demo(tmp_path, "--data", str(data_dir / "mnist"))
