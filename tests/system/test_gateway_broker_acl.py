"""The shipped mosquitto.conf and ACLs under mutual TLS: what each party is denied to publish and to receive."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from gateway_site import MOSQUITTO, free_port
from patience import wait_for

from edgepriv.mqtt import TlsFiles, open_link
from edgepriv.primitives import x509

pytestmark = pytest.mark.system
DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy" / "mosquitto"


class Broker:
    """mosquitto under the shipped files; only paths and ports are changed."""

    def __init__(self, folder):
        self.folder, self.ports = folder, {"device": free_port(), "service": free_port()}
        now = time.time()
        self.cas = {name: x509.new_ca(f"{name} ca", now, 10) for name in ("device", "service")}
        for name, ca in self.cas.items():
            (folder / f"{name}-ca.crt").write_bytes(ca.certificate)
        server = x509.issue_server(self.cas["service"], "broker", ("127.0.0.1", "localhost"), now, 10)
        (folder / "broker.crt").write_bytes(server.certificate)
        (folder / "broker.key").write_bytes(server.key)
        text = (DEPLOY / "mosquitto.conf").read_text()
        text = text.replace("/etc/edgepriv/tls/", f"{folder}/").replace("/etc/mosquitto/", f"{DEPLOY}/")
        text = text.replace("/var/lib/mosquitto/", f"{folder}/").replace("persistence true", "persistence false")
        text = text.replace("listener 8883", f"listener {self.ports['device']} 127.0.0.1")
        text = text.replace("listener 8884", f"listener {self.ports['service']} 127.0.0.1")
        (folder / "mosquitto.conf").write_text(f"user root\n{text}")
        self.log = (folder / "mosquitto.log").open("wb")
        self.process = subprocess.Popen([MOSQUITTO, "-c", str(folder / "mosquitto.conf")], stderr=self.log)

    def login(self, name, ca="device", listener=None):
        now = time.time()
        key = x509.new_key()
        certificate = x509.issue(self.cas[ca], x509.new_request(key), name, now, 5)
        files = self.folder / f"{name}-{ca}.crt", self.folder / f"{name}-{ca}.key"
        files[0].write_bytes(certificate)
        files[1].write_bytes(key)
        files[1].chmod(0o600)
        tls = TlsFiles(self.folder / "service-ca.crt", *files)
        return open_link(f"mqtts://127.0.0.1:{self.ports[listener or ca]}", name, tls=tls)

    def close(self):
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


@pytest.fixture
def broker(tmp_path):
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    made = Broker(tmp_path)
    yield made
    made.close()


def connected(link):
    wait_for(lambda: link.connected, 15, f"no connection: {link.last_error}")
    return link


def heard(link, seconds=1.0):
    end, got = time.monotonic() + seconds, []
    while time.monotonic() < end:
        got += [p.topic for p in link.receive()]
        time.sleep(0.02)
    return got


def test_every_party_speaks_and_hears_what_is_its_own_and_nothing_else(broker):
    gateway = connected(broker.login("gateway-main", "service"))
    cam1, cam2 = connected(broker.login("dev-cam1")), connected(broker.login("dev-cam2"))
    alice, risk = connected(broker.login("op-alice", "service")), connected(broker.login("risk-lab", "service"))
    reader = connected(broker.login("reader-dashboard", "service"))
    everyone = [gateway, cam1, cam2, alice, risk, reader]
    gateway.subscribe("edgepriv/v1/+/up/0/#")
    for link in everyone[1:]:
        link.subscribe("edgepriv/#")
    time.sleep(0.5)
    allowed = {
        "edgepriv/v1/dev-cam1/up/0/msg": (cam1, [gateway]),
        "edgepriv/v1/op-alice/up/0/msg": (alice, [gateway]),
        "edgepriv/v1/risk-lab/up/0/epoch": (risk, [gateway]),
        "edgepriv/v1/dev-cam1/down/msg": (gateway, [cam1]),
        "edgepriv/v1/op-alice/down/msg": (gateway, [alice]),
        "edgepriv/v1/gateway-main/out/windows": (gateway, [reader]),
    }
    for topic, (sender, receivers) in allowed.items():
        assert sender.send(topic, b"x")
        for link in everyone:
            assert (topic in heard(link, 0.35)) == (link in receivers), (topic, everyone.index(link))
    denied = [
        (cam1, "edgepriv/v1/dev-cam2/up/0/msg"), (cam1, "edgepriv/v1/dev-cam2/down/msg"),
        (cam1, "edgepriv/v1/dev-cam1/down/msg"), (cam1, "edgepriv/v1/gateway-main/out/windows"),
        (alice, "edgepriv/v1/dev-cam1/up/0/msg"), (alice, "edgepriv/v1/dev-cam1/down/msg"),
        (risk, "edgepriv/v1/dev-cam1/down/msg"), (reader, "edgepriv/v1/gateway-main/out/windows"),
        (gateway, "edgepriv/v1/dev-cam1/up/0/msg"),
    ]  # fmt: skip
    for sender, topic in denied:
        sender.send(topic, b"forged")
    for link in everyone:
        assert heard(link, 0.3) == []
    for link in everyone:
        link.close()


def test_a_device_certificate_with_a_service_name_has_no_services_rights(broker):
    cam1 = connected(broker.login("dev-cam1"))
    cam1.subscribe("edgepriv/v1/dev-cam1/down/msg")
    thief = connected(broker.login("gateway-main", "device"))
    thief.subscribe("edgepriv/v1/+/up/0/#")
    time.sleep(0.4)
    thief.send("edgepriv/v1/dev-cam1/down/msg", b"forged")
    cam1.send("edgepriv/v1/dev-cam1/up/0/msg", b"secret")
    assert heard(cam1, 0.5) == []
    assert heard(thief, 0.5) == []
    refused = broker.login("op-eve", "device", listener="service")
    time.sleep(1.5)
    assert not refused.connected
    for link in (cam1, thief, refused):
        link.close()


def test_a_packet_above_the_limit_is_refused_before_it_is_sent(broker):
    cam1 = connected(broker.login("dev-cam1"))
    assert not cam1.send("edgepriv/v1/dev-cam1/up/0/msg", bytes(300_000))
    assert cam1.send("edgepriv/v1/dev-cam1/up/0/msg", bytes(200_000))
    cam1.close()
