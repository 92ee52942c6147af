"""The real daemon and mosquitto as processes: one day's work, kills in the middle of it, and a clean stop."""

from __future__ import annotations

import hashlib
import json
import random
import time
import urllib.error
import urllib.request

import pytest
from gateway_site import Broker, Device, GatewayProcess, LiveParty, Recipient, Site, frame_digest
from patience import wait_for

from edgepriv.wire.messages import Fetch, FrameMessage

pytestmark = pytest.mark.system


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    broker, gateway = Broker(tmp_path, made.port), GatewayProcess(made)
    made.broker, made.daemon = broker, gateway
    yield made
    if gateway.process.poll() is None:
        assert gateway.stop() == 0, gateway.text()
    gateway.log.close()
    broker.close()
    assert "Traceback" not in gateway.text(), gateway.text()


def work(device, party, count, *, side=40, large_every=5):
    """Frames (some in chunks) and outputs; returns the digests that must arrive."""
    frames = []
    for index in range(count):
        output = device.seal(device.output(label=index % 3))
        party.add(hashlib.sha256(output.payload).digest(), output)
        raw = device.frame(side=320 if index % large_every == large_every - 1 else side)
        if len(raw) > 100_000:
            offer = device.offer(raw, chunk_bytes=65_536)
            party.add(offer.digest, lambda offer=offer: device.seal(offer))
        else:
            party.add(frame_digest(raw), lambda raw=raw: device.seal(FrameMessage(raw)))
        frames.append(frame_digest(raw))
    return frames


def get(site, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{site.http_port}{path}", timeout=5) as answer:
        return answer.read().decode()


def test_frames_and_outputs_are_stored_aggregated_published_and_fetched(site):
    device = Device(site)
    party = LiveParty(site, device)
    watcher = LiveParty(site, Recipient(site, "op-bob"))
    watcher.link.subscribe("edgepriv/v1/gateway-main/out/#")
    frames = work(device, party, 10)
    party.run(30)
    assert {a.outcome for a in device.acks.values()} == {"stored"}
    status = json.loads(site.cli("status", "--json").stdout)
    assert status["running"]
    rows = json.loads(site.cli("outputs", "--json", "--since", "1h", "--by", "device,class").stdout)["rows"]
    assert {(r["device"], r["class"], r["count"]) for r in rows} == {
        ("dev-cam1", 0, 4), ("dev-cam1", 1, 3), ("dev-cam1", 2, 3),
    }  # fmt: skip
    published = []
    deadline = time.monotonic() + 100
    while sum(w["count"] for w in published) < 10 and time.monotonic() < deadline:
        for packet in watcher.link.receive():
            if packet.topic.endswith("/out/windows"):
                published += json.loads(packet.payload)["windows"]
        time.sleep(0.1)
    assert sum(w["count"] for w in published) == 10
    alice = Recipient(site, "op-alice")
    reader = LiveParty(site, alice)
    wait_for(lambda: reader.pump() or len(alice.acks) == 1, 10, "no session")
    question = alice.query("frames")
    reader.link.send(question.topic, question.payload)
    wait_for(lambda: reader.pump() or alice.other, 10, "no reply")
    listed = [row["digest"] for row in alice.reply().body["frames"]]
    assert sorted(listed) == sorted(frames)
    fetch = alice.seal(Fetch(listed[0][:16], 0, 16, 65_536))
    reader.link.send(fetch.topic, fetch.payload)
    wait_for(lambda: reader.pump() or alice.objects, 10, "no chunk")
    text = get(site, "/metrics")
    assert 'edgepriv_gateway_messages_total{kind="output",outcome="stored"} 10.0' in text
    assert json.loads(get(site, "/readyz"))["status"] == "ok"
    assert json.loads(get(site, "/healthz"))["status"] == "ok"
    with pytest.raises(urllib.error.HTTPError):
        get(site, "/../etc/passwd")
    for link in (party, watcher, reader):
        link.close()


def test_a_gateway_and_a_broker_killed_at_random_moments_lose_and_double_nothing(site):
    rng = random.Random(7)
    devices = [Device(site, name) for name in site.devices]
    parties = [LiveParty(site, device) for device in devices]
    wanted = {d.name: work(d, p, 12) for d, p in zip(devices, parties, strict=True)}
    for victim in ("gateway", "broker", "gateway", "gateway"):
        end = time.monotonic() + rng.uniform(0.05, 0.8)
        while time.monotonic() < end:
            for party in parties:
                party.pump()
        target = site.daemon if victim == "gateway" else site.broker
        target.kill()
        target.start()
    for party in parties:
        party.run(60)
        party.close()
    for device in devices:
        assert {a.outcome for a in device.acks.values()} <= {"stored", "duplicate"}
    assert site.daemon.stop() == 0
    database = site.gateway().store.database
    stored = database.query("SELECT party, digest FROM frames")
    assert sorted((p, bytes(d)) for p, d in stored) == sorted((n, d) for n, ds in wanted.items() for d in ds)
    assert database.query("SELECT count(*) FROM outputs") == [(24,)]
    assert database.query("SELECT sum(count) FROM windows") == [(24,)]
    assert database.query("SELECT count(*) FROM transfers") == [(0,)]
    site.close()


def test_a_second_gateway_on_the_same_state_refuses_to_start(site):
    wait_for((site.folder / "state" / "status.json").exists, 15, "the gateway did not start")
    done = site.cli("run", check=False)
    assert done.returncode == 75
    assert "another gateway runs" in done.stderr
