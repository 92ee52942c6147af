"""The link to a broker: a small protocol that the simulator implements too, and paho behind it.

Rules: nothing blocks and nothing is queued without bound. ``send`` refuses (returns False) when the broker is away or
the window of unacknowledged packets is full; the caller's spool holds the backlog, never paho. ``receive`` drains a
bounded inbox; while it is full the network thread waits, so back-pressure reaches the broker. A packet above the
broker's announced maximum is refused here, because a broker answers it by closing the connection for ever.
Negotiates MQTT 5 and falls back to 3.1.1. Everything is QoS 1: what a broker acknowledges it may still lose, so what
counts are the gateway's own acknowledgements inside the sealed link.
"""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - the settings reader resolves the annotations
from typing import Any, Protocol
from urllib.parse import urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edgepriv.errors import ConfigError, KeyFileError, UnavailableError

DEFAULT_MAX_PACKET_BYTES = 262_144
UNSUPPORTED_VERSION = {0x01, 0x84}  # 3.1.1 and 5 wordings of the same refusal
MAX_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True)
class Inbound:
    """A packet that arrived."""

    topic: str
    payload: bytes


class Link(Protocol):
    """What the runtime, the gateway and the services need of a broker connection."""

    @property
    def connected(self) -> bool:
        """Whether packets can be sent now."""
        ...

    @property
    def generation(self) -> int:
        """Number of connections so far; a change means: announce yourself and send anew what is unacknowledged."""
        ...

    @property
    def max_packet_bytes(self) -> int:
        """Largest payload that ``send`` takes."""
        ...

    def subscribe(self, topic_filter: str) -> None:
        """Subscribe now and after each reconnect."""
        ...

    def send(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Hand a packet over; False when it cannot be taken now."""
        ...

    def receive(self, limit: int = 64) -> list[Inbound]:
        """Packets that have arrived, at most ``limit``."""
        ...

    def close(self) -> None:
        """Disconnect."""
        ...


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a mutual-TLS connection."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """``[broker]`` of every configuration file: where the broker is and how to log in."""

    url: str
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    username: str | None = None
    password_file: Path | None = None

    @property
    def tls(self) -> TlsFiles | None:
        """Files for ``mqtts``, or None."""
        return TlsFiles(self.ca, self.certificate, self.key) if self.ca else None


def open_link(
    url: str,
    client_id: str,
    *,
    tls: TlsFiles | None = None,
    username: str | None = None,
    password_file: Path | None = None,
    inflight: int = 20,
    inbox: int = 2000,
    max_packet_bytes: int = DEFAULT_MAX_PACKET_BYTES,
    clean: bool = True,
    will: tuple[str, bytes] | None = None,
) -> PahoLink:
    """Start a connection that keeps itself alive; returns at once, `PahoLink.wait` waits for the broker.

    Args:
        url: ``mqtt://host:port`` or ``mqtts://host:port``.
        client_id: the party's name; brokers tie it to the certificate.
        tls: files for ``mqtts``.
        username: for brokers with a password file.
        password_file: file that holds the password (never given by value).
        inflight: packets that may be unacknowledged.
        inbox: packets that may wait to be received.
        max_packet_bytes: own upper bound; the broker's announcement may lower it.
        clean: forget the session at the broker when the connection ends.
        will: topic and payload that the broker publishes when this party vanishes.

    Raises:
        ConfigError: the URL is not one of the two forms, or ``mqtts`` comes without a CA file.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"broker URL {url!r} has no valid port") from error
    if parts.scheme not in {"mqtt", "mqtts"} or not parts.hostname:
        raise ConfigError(f"broker URL {url!r} is not understood", hint="mqtt://host:1883 or mqtts://host:8883")
    if parts.scheme == "mqtts" and tls is None:
        raise ConfigError("mqtts needs a CA file", hint="set [broker] ca in the configuration")
    password = password_file.read_text().strip() if password_file else None
    return PahoLink(
        parts.hostname,
        port or (8883 if parts.scheme == "mqtts" else 1883),
        client_id,
        context=_context(tls) if parts.scheme == "mqtts" and tls else None,
        login=(username, password) if username else None,
        inflight=inflight,
        inbox=inbox,
        max_packet_bytes=max_packet_bytes,
        clean=clean,
        will=will,
    )


def _context(tls: TlsFiles) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(tls.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if tls.certificate:
            context.load_cert_chain(str(tls.certificate), str(tls.key) if tls.key else None)
    except OSError as error:  # an SSLError too: missing, unreadable, not PEM, or a key of another certificate
        files = ", ".join(str(path) for path in (tls.ca, tls.certificate, tls.key) if path)
        raise KeyFileError(
            f"cannot use the TLS files {files}: {error.strerror or error}", hint="see [broker]"
        ) from None
    return context


class PahoLink:
    """`Link` over paho-mqtt with one network thread of its own."""

    def __init__(
        self,
        host: str,
        port: int,
        client_id: str,
        *,
        context: ssl.SSLContext | None,
        login: tuple[str, str | None] | None,
        inflight: int,
        inbox: int,
        max_packet_bytes: int,
        clean: bool,
        will: tuple[str, bytes] | None,
    ) -> None:
        self._where, self._client_id, self._context, self._login = (host, port), client_id, context, login
        self._inflight, self._own_limit, self._clean, self._will = inflight, max_packet_bytes, clean, will
        self._inbox: queue.Queue[Inbound] = queue.Queue(inbox)
        self._filters: list[str] = []
        self._pending: set[int] = set()
        self._early: set[int] = set()  # acknowledged, and not pending yet; no lock: paho calls back holding its own
        self._lock = threading.Lock()
        self._generation, self._connected, self._limit = 0, False, max_packet_bytes
        self._version = MQTTProtocolVersion.MQTTv5
        self._jitter = random.Random()  # its own: a program that seeds `random` keeps its sequence
        self.last_error = ""
        self._stop, self._ended = threading.Event(), threading.Event()
        self._client = self._make()
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{client_id}", daemon=True)
        self._thread.start()

    # --- Link ---------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """See Link."""
        return self._connected

    @property
    def generation(self) -> int:
        """See Link."""
        return self._generation

    @property
    def max_packet_bytes(self) -> int:
        """See Link."""
        return self._limit

    @property
    def in_flight(self) -> int:
        """Packets that the broker has not acknowledged."""
        return len(self._pending)

    def subscribe(self, topic_filter: str) -> None:
        """See Link."""
        with self._lock:
            if topic_filter not in self._filters:
                self._filters.append(topic_filter)
        if self._connected:
            self._client.subscribe(topic_filter, qos=1)

    def send(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """See Link."""
        if not self._connected or len(self._pending) >= self._inflight or len(payload) > self._limit:
            return False
        with self._lock:
            info = self._client.publish(topic, payload, qos=1, retain=retain)
            if info.rc != paho.MQTT_ERR_SUCCESS:
                return False
            self._pending.add(info.mid)
            if info.mid in self._early:  # acknowledged before this line was reached
                self._settled(info.mid)
        return True

    def receive(self, limit: int = 64) -> list[Inbound]:
        """See Link."""
        out: list[Inbound] = []
        with contextlib.suppress(queue.Empty):
            while len(out) < limit:
                out.append(self._inbox.get_nowait())
        return out

    def wait_inbound(self, timeout_s: float) -> list[Inbound]:
        """Block until a packet arrives or the time is over; then as `receive`."""
        try:
            first = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return []
        return [first, *self.receive()]

    def wait(self, timeout_s: float) -> None:
        """Wait for the broker, or raise UnavailableError with the last reason."""
        deadline = time.monotonic() + timeout_s
        while not self._connected:
            if time.monotonic() > deadline:
                host, port = self._where
                raise UnavailableError(
                    f"no broker at {host}:{port}: {self.last_error or 'no answer'}",
                    hint="start it, or check the URL, the certificate and the ACL",
                )
            time.sleep(0.02)

    def close(self) -> None:
        """See Link."""
        self._stop.set()
        with contextlib.suppress(Exception):  # the connection may be half open; it ends either way
            self._client.disconnect()
        self._ended.set()
        self._thread.join(timeout=5)

    # --- paho ---------------------------------------------------------------------------------------------

    def _make(self) -> paho.Client:
        five = self._version == MQTTProtocolVersion.MQTTv5
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            protocol=self._version,
            clean_session=None if five else self._clean,
        )
        client.max_inflight_messages_set(self._inflight)
        client.max_queued_messages_set(self._inflight)
        if self._context:
            client.tls_set_context(self._context)
        if self._login:
            client.username_pw_set(*self._login)
        if self._will:
            client.will_set(self._will[0], self._will[1], qos=1)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_socket_open = _no_delay
        return client

    def _run(self) -> None:
        backoff = 0.2
        while not self._stop.is_set():
            before = self._generation
            try:
                extra: dict[str, Any] = {}
                if self._version == MQTTProtocolVersion.MQTTv5:
                    extra["clean_start"] = self._clean
                self._ended.clear()
                self._client.connect(*self._where, keepalive=30, **extra)
                # paho's own thread, not loop_forever in ours: else publish() writes to the socket beside the network
                # thread, and two packets that are sent in parts end up mixed
                self._client.loop_start()
                self._ended.wait()
                self._client.loop_stop()
            except (OSError, ValueError) as error:
                self.last_error = str(error)
            self._connected = False
            if self._stop.is_set():
                return
            backoff = 0.2 if self._generation != before else min(backoff * 2, MAX_BACKOFF_S)
            self._stop.wait(self._jitter.uniform(0.05, backoff))
            with self._lock:
                self._early.clear()
                self._pending.clear()  # the spool sends again what the gateway has not acknowledged
                self._client = self._make()

    def _on_connect(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, properties: Any) -> None:
        code = getattr(reason, "value", reason)
        if code in UNSUPPORTED_VERSION and self._version == MQTTProtocolVersion.MQTTv5:
            self._version = MQTTProtocolVersion.MQTTv311
            client.disconnect()
            self._ended.set()
            return
        if code != 0:
            self.last_error = str(reason)
            client.disconnect()
            self._ended.set()
            return
        announced = getattr(properties, "MaximumPacketSize", None)
        self._limit = min(self._own_limit, announced - 512) if announced else self._own_limit
        with self._lock:
            filters = list(self._filters)
        for topic_filter in filters:
            client.subscribe(topic_filter, qos=1)
        self._generation += 1
        self._connected = True

    def _on_disconnect(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self._connected = False
        if getattr(reason, "value", reason) not in {0, None}:
            self.last_error = str(reason)
            if "protocol version" in self.last_error.lower() and self._version == MQTTProtocolVersion.MQTTv5:
                self._version = MQTTProtocolVersion.MQTTv311
        client.disconnect()  # ends paho's loop, so that reconnects go through our own back-off
        self._ended.set()

    def _on_message(self, _client: paho.Client, _data: Any, packet: paho.MQTTMessage) -> None:
        inbound = Inbound(packet.topic, bytes(packet.payload))
        while not self._stop.is_set():
            try:
                self._inbox.put(inbound, timeout=0.5)
                return
            except queue.Full:
                continue  # the reader is behind: waiting here lets TCP slow the broker down

    def _on_publish(self, _client: paho.Client, _data: Any, mid: int, _reason: Any, _properties: Any) -> None:
        self._early.add(
            mid
        )  # before the look at what is pending, as `send` adds before it looks here: one of us sees it
        if mid in self._pending:
            self._settled(mid)

    def _settled(self, mid: int) -> None:
        self._pending.discard(mid)
        self._early.discard(mid)


def _no_delay(_client: paho.Client, _data: Any, sock: Any) -> None:
    """Small windows stall 40 ms each without TCP_NODELAY."""
    with contextlib.suppress(OSError, AttributeError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
