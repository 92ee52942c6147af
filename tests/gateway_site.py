"""A site for gateway tests: owner, keys, trust list, configuration, and parties that speak the wire."""

from __future__ import annotations

import dataclasses
import hashlib
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
import pytest
from patience import PATIENCE, wait_for

from edgepriv.cipher.epochs import DeviceEpoch
from edgepriv.keys import Identity
from edgepriv.mqtt import Inbound, open_link
from edgepriv.wire import envelope, messages, topics
from edgepriv.wire.messages import Ack, Chunk, Grant, Offer, Query, Reply
from edgepriv.wire.output import Output
from edgepriv.wire.session import open_session
from edgepriv.wire.transfer import chunk_count, from_ranges
from edgepriv.wire.trust import TrustList, sign_trust
from gateway.config import load
from gateway.daemon import Gateway, open_store

ROOT = Path(__file__).resolve().parent.parent
MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/sbin")


class MemoryLink:
    """A broker connection as two lists."""

    def __init__(self, max_packet_bytes=262_144):
        self.connected, self.generation, self.max_packet_bytes = True, 1, max_packet_bytes
        self.inbox, self.sent, self.filters = [], [], []
        self.refuse = False

    def subscribe(self, topic_filter):
        self.filters.append(topic_filter)

    def send(self, topic, payload, *, retain=False):
        if self.refuse or len(payload) > self.max_packet_bytes:
            return False
        self.sent.append(Inbound(topic, payload))
        return True

    def receive(self, limit=64):
        taken, self.inbox = self.inbox[:limit], self.inbox[limit:]
        return taken

    def close(self):
        self.connected = False


class Site:
    """Keys and files of one site under ``folder``; ``clock`` is what an in-process gateway sees."""

    def __init__(self, folder: Path, devices=("cam1", "cam2"), **settings):
        self.folder, self.settings, self.gateways = folder, settings, []
        folder.mkdir(parents=True, exist_ok=True)
        self.owner = Identity.new("owner", "owner")
        self.owner.save(folder / "owner.key")
        self.keys = {}
        for role, name in (
            ("gateway", "main"), ("recipient", "alice"), ("recipient", "bob"), ("risk", "lab"),
            *(("device", d) for d in devices),
        ):  # fmt: skip
            identity = Identity.new(role, name)
            identity.save(folder / f"{identity.name}.key")
            self.keys[identity.name] = identity
        self.version, self.now, self.revoked = 0, time.time(), ()
        self.policy = {"*": {"recipients": ["op-alice"]}}
        self.write_trust()
        self.port, self.http_port = free_port(), free_port()
        self.write_config()

    @property
    def devices(self):
        return [n for n in self.keys if n.startswith("dev-")]

    def trust_list(self):
        return TrustList(
            version=self.version, issued=int(self.now) - 10, expires=int(self.now) + 86_400,
            parties=tuple(k.public for k in self.keys.values()), revoked=self.revoked, policy=self.policy,
        )  # fmt: skip

    def write_trust(self, **changes):
        self.version += 1
        self.trust = dataclasses.replace(self.trust_list(), **changes)
        fresh = self.folder / "trust.new"
        fresh.write_bytes(sign_trust(self.trust, self.owner))
        fresh.replace(self.folder / "trust.cbor")
        self.trust = dataclasses.replace(
            self.trust, digest=hashlib.sha256((self.folder / "trust.cbor").read_bytes()).digest()
        )

    def write_config(self):
        sections = {
            "gateway": {
                "identity": "gateway-main.key", "owner": "owner.key.pub", "trust": "trust.cbor", "state": "state",
            },
            "broker": {"url": f"mqtt://127.0.0.1:{self.port}"},
            "store": {"min_free_bytes": 1},
            "outputs": {"window_s": 10, "grace_s": 0.2, "publish_every_s": 0.2},
            "http": {"port": self.http_port},
            "models": {}, "ingest": {}, "rounds": {}, "alerts": {}, "pages": {},
        }  # fmt: skip
        for name, values in self.settings.items():
            sections.setdefault(name, {}).update(values)
        self.config_path = self.folder / "gateway.toml"
        self.config_path.write_text("\n".join(_toml(n, v) for n, v in sections.items()))

    def gateway(self, link=None):
        config = load(self.config_path)
        made = Gateway(config, link or MemoryLink(), open_store(config), clock=lambda: self.now)
        self.gateways.append(made)
        return made

    def close(self):
        for gateway in self.gateways:
            gateway.link.connected = False
            gateway.close()

    def cli(self, *args, check=True):
        command = [sys.executable, "-m", "gateway", *args, "--config", str(self.config_path)]
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=240)
        if check and done.returncode:
            raise AssertionError(f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done


def _toml(name, values):
    def text(value):
        if isinstance(value, bool):
            return str(value).lower()
        return f'"{value}"' if isinstance(value, (str, Path)) else repr(value)

    return "\n".join([f"[{name}]", *(f"{k} = {text(v)}" for k, v in values.items()), ""])


def frame_digest(raw):
    """What an acknowledgement of a frame names."""
    return envelope.parse(raw).digest()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Device:
    """A device of the tests: seals with the real cipher, answers grants, remembers acknowledgements."""

    def __init__(self, site: Site, name="dev-cam1", *, seq=1, **epoch):
        self.site, self.name, self.identity = site, name, site.keys[name]
        self.seq = seq
        self.acks, self.notices, self.other, self.grants = {}, [], [], []
        self.objects = {}
        self.uploads = {}
        self.new_epoch(**epoch)

    def new_epoch(self, **epoch):
        self.epoch = DeviceEpoch.open(
            self.identity, self.site.trust, "gateway-main", seq=self.seq, now=self.site.now, **epoch
        )
        self.seq += 1
        self.session = self.epoch.session
        self.outputs = 0

    @property
    def topic(self):
        return topics.up(self.name, 0, "msg")

    def record(self):
        return Inbound(topics.up(self.name, 0, "epoch"), self.epoch.signed.raw)

    def seal(self, message):
        return Inbound(self.topic, self.session.seal(self.topic, messages.encode(message)))

    def frame(self, side=12, value=None):
        pixels = np.random.default_rng(value).integers(0, 256, (side, side, 3)).astype(np.uint8)
        return bytes(self.epoch.seal(pixels))

    def output(self, label=3, *, at=None, task="classify", policy="argmax", decimals=0, values=None, model="m1"):
        counter, self.outputs = self.outputs, self.outputs + 1
        rows = tuple(values) if values is not None else ([label, 0],)
        return Output(
            counter=counter, at=self.site.now if at is None else at, model=model, model_digest=bytes(32), task=task,
            policy=policy, bits=3.3, decimals=decimals, scene=b"", values=rows,
        )  # fmt: skip

    def offer(self, raw, what="frame", number=0, chunk_bytes=4096, **changes):
        digest = frame_digest(raw) if what == "frame" else hashlib.sha256(raw).digest()
        self.uploads[digest[:16]] = (raw, chunk_bytes)
        offer = Offer(digest[:16], what, len(raw), chunk_bytes, digest, number, self.site.now + 3600, {})
        return dataclasses.replace(offer, **changes)

    def take(self, packets):
        """Open what came down; returns packets to send up (granted chunks)."""
        up = []
        for packet in packets:
            if packet.topic != topics.down(self.name):
                continue
            body = messages.decode(self.session.open(packet.topic, packet.payload))
            if isinstance(body, Ack):
                self.acks[body.digest] = body
            elif isinstance(body, messages.Notice):
                self.notices.append(body)
            elif isinstance(body, Chunk):
                self.objects.setdefault(body.ref, {})[body.index] = body.data
            elif isinstance(body, Grant):
                self.grants.append(body)
                raw, size = self.uploads[body.ref]
                wanted = from_ranges(body.ranges, chunk_count(len(raw), size))
                up += [self.seal(Chunk(body.ref, i, raw[i * size : (i + 1) * size])) for i in wanted]
            else:
                self.other.append(body)
        return up


class Recipient(Device):
    """A party without frames."""

    def new_epoch(self):
        self.signed, self.session = open_session(
            self.identity, self.site.trust, "gateway-main", seq=self.seq, now=self.site.now
        )
        self.seq += 1

    def record(self):
        return Inbound(topics.up(self.name, 0, "epoch"), self.signed.raw)

    def query(self, what, **args):
        return self.seal(Query(os.urandom(8), what, args))

    def reply(self):
        return [m for m in self.other if isinstance(m, Reply)][-1]


def exchange(gateway, device, *packets, turns=12):
    """Send packets and let both sides talk until nothing moves; returns the number of turns."""
    link = gateway.link
    link.inbox += packets
    for _ in range(turns):
        gateway.step()
        down, link.sent = link.sent, []
        up = device.take(down)
        link.inbox += up
        if not up and not down and not link.inbox:
            break


class Broker:
    """A mosquitto of its own; `kill` and `start` keep the port."""

    def __init__(self, folder: Path, port: int, lines=()):
        if MOSQUITTO is None:
            pytest.skip("mosquitto is not installed")
        self.config = folder / "mosquitto.conf"
        self.config.write_text(
            "\n".join([f"listener {port} 127.0.0.1", "allow_anonymous true", "set_tcp_nodelay true",
                       "max_packet_size 262144", "persistence false", *lines, ""])
        )  # fmt: skip
        self.port, self.process = port, None
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [MOSQUITTO, "-c", str(self.config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(lambda: _listening(self.port), 10, "mosquitto does not listen")

    def kill(self):
        self.process.kill()
        self.process.wait()

    close = kill


class GatewayProcess:
    """The real daemon as a child; made, it listens. `start` after a `kill` does not wait for it."""

    def __init__(self, site: Site):
        self.site, self.process = site, None
        self.log = (site.folder / "gateway.log").open("ab")
        self.start()
        self.ready()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "run", "--config", str(self.site.config_path)],
            cwd=ROOT, stdout=self.log, stderr=self.log,
        )  # fmt: skip

    def ready(self):
        """Wait until it has its store and heeds signals: it listens after both."""
        up = lambda: _listening(self.site.http_port) or self.process.poll() is not None
        wait_for(up, 60, f"the gateway does not start: {self.text()}")
        assert self.process.poll() is None, self.text()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self):
        self.ready()
        self.process.terminate()
        code = self.process.wait(60)
        self.log.close()
        return code

    def text(self):
        return (self.site.folder / "gateway.log").read_text()


class Postgres:
    """A PostgreSQL server of its own in ``folder``, as the user postgres where the tests run as root."""

    def __init__(self, folder: Path):
        binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        if not binaries:
            pytest.skip("PostgreSQL is not installed")
        self.bin, self.port = binaries[-1], free_port()
        self.data = Path(tempfile.mkdtemp(prefix="edgepriv-pg-"))
        if os.getuid() == 0:
            shutil.chown(self.data, "postgres")
        self._run("initdb", "-D", str(self.data / "db"), "-A", "trust", "-U", "edgepriv", "--no-sync")
        self._server(
            "-w", "-l", str(self.data / "log"), "-o",
            f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.data}", "start",
        )  # fmt: skip
        self.url_file = folder / "database.url"
        self.url_file.write_text(f"postgresql://edgepriv@127.0.0.1:{self.port}/postgres\n")

    def _run(self, name, *args):
        prefix = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        subprocess.run([*prefix, str(self.bin / name), *args], check=True, capture_output=True, timeout=240, cwd="/tmp")

    def _server(self, *args):
        self._run("pg_ctl", "-D", str(self.data / "db"), *args)

    def reset(self):
        import psycopg

        with psycopg.connect(self.url_file.read_text().strip(), autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")

    def close(self):
        self._server("-m", "immediate", "stop")
        shutil.rmtree(self.data, ignore_errors=True)


class PagesServer:
    """The pages on a real port, served by uvicorn in a thread."""

    def __init__(self, app, port=None):
        import uvicorn

        self.port = port or free_port()
        config = uvicorn.Config(
            app, host="127.0.0.1", port=self.port, http="h11", ws="none", lifespan="off", log_config=None,
            server_header=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.port}"
        wait_for(lambda: self.server.started, 10, "the pages do not start")

    def close(self):
        self.server.should_exit = True
        self.thread.join(10)


class LiveParty:
    """A test party on a real broker, repeating what is not acknowledged like a device's publisher does."""

    def __init__(self, site: Site, device: Device, *, repeat_s=1.0):
        self.site, self.device, self.repeat_s = site, device, repeat_s
        self.link = open_link(f"mqtt://127.0.0.1:{site.port}", device.name)
        self.link.subscribe(topics.down(device.name))
        self.items = {}  # digest -> packets to repeat
        self._sent = {}
        self._queue = []

    def add(self, digest, packet):
        self.items[digest] = packet

    def pump(self):
        self._queue += self.device.take(self.link.receive())
        now = time.monotonic()
        record = self.device.record()
        known = hashlib.sha256(record.payload).digest() in self.device.acks
        if not known:
            if now - self._sent.get("epoch", -9) > self.repeat_s and self.link.send(record.topic, record.payload):
                self._sent["epoch"] = now
            return
        while self._queue and self.link.send(self._queue[0].topic, self._queue[0].payload):
            self._queue.pop(0)
        for digest, packet in list(self.items.items()):
            if digest in self.device.acks:
                del self.items[digest]
            elif now - self._sent.get(digest, -9) > self.repeat_s:
                made = packet() if callable(packet) else packet
                if self.link.send(made.topic, made.payload):
                    self._sent[digest] = now

    def run(self, timeout_s, until=None):
        deadline = time.monotonic() + PATIENCE * timeout_s
        while (until() if until else not self.items) is False or (until is None and self.items):
            if time.monotonic() > deadline:
                raise AssertionError(f"{len(self.items)} items were not acknowledged")
            self.pump()
            time.sleep(0.005)

    def close(self):
        self.link.close()


def _listening(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
