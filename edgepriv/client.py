"""The gateway client: a recipient's or the risk service's own sealed session with a gateway, over MQTT.

Rules: what the gateway says is a claim. Whoever opens a frame checks its epoch record against the owner's trust list
and the frame against the record (`edgepriv.cipher`), so a lying gateway or broker can withhold frames but not forge or
swap them. Requests are repeated until they are answered or the time is over; downloads go in chunks, within the
broker's packet limit, and every answer is authenticated by the session.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv import primitives
from edgepriv.errors import AuthenticationError, EdgeprivError, ReplayError, TemporaryError, WireError
from edgepriv.mqtt import open_link
from edgepriv.wire import envelope, messages, topics
from edgepriv.wire.messages import Ack, Chunk, Fetch, Notice, Query, Reply
from edgepriv.wire.session import open_session
from edgepriv.wire.transfer import REF_BYTES, Download, chunk_bytes_for
from edgepriv.wire.trust import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from edgepriv.keys import Identity
    from edgepriv.mqtt import PahoLink, TlsFiles
    from edgepriv.wire.trust import TrustList

PAGE = 100
RESEND_S = 2.0
MAX_FRAME_BYTES = 256 << 20
_EMPTY: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """A sealed frame at the gateway. ``received``: Unix seconds; ``record``: SHA-256 of its epoch record."""

    id: int
    digest: bytes
    device: str
    counter: int
    size: int
    received: float
    record: bytes


class GatewayClient:
    """A session with one gateway; use it as a context manager.

    Example:
        >>> with GatewayClient(url, identity, trust, "gateway-main") as client:  # doctest: +SKIP
        ...     for frame in client.frames(device="dev-cam1"):
        ...         sealed, record = client.fetch(frame), client.epoch_record(frame.record)
    """

    def __init__(
        self,
        url: str,
        identity: Identity,
        trust: TrustList,
        gateway: str,
        *,
        shard: int = 0,
        tls: TlsFiles | None = None,
        username: str | None = None,
        password_file: Path | None = None,
        timeout_s: float = 30.0,
        link: PahoLink | None = None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        """Connect and open the session.

        Args:
            url: ``mqtt://host:port`` or ``mqtts://host:port``.
            identity: the recipient's or risk service's keys.
            trust: the verified trust list.
            gateway: full name of the gateway.
            shard: topic shard that the gateway serves.
            tls: PEM files for ``mqtts``.
            username: log-in at the broker, where it asks for one.
            password_file: file that holds the password.
            timeout_s: patience for each request.
            link: an open connection instead of a new one.
            on_wait: called several times a second while anything is awaited (a watchdog); what it raises ends the wait.

        Raises:
            UnavailableError: no broker; TemporaryError: the gateway does not answer; TrustError: not listed.
        """
        self.name, self.timeout_s, self._on_wait = identity.name, timeout_s, on_wait
        self._signed, self._session = open_session(
            identity, trust, gateway, seq=time.time_ns() // 1000, now=time.time()
        )
        self._epoch_topic, self._topic = topics.up(self.name, shard, "epoch"), topics.up(self.name, shard, "msg")
        self.link = link or open_link(url, self.name, tls=tls, username=username, password_file=password_file)
        self._records: dict[bytes, bytes] = {}
        self._replies: dict[bytes, Reply] = {}
        self._notices: dict[bytes, Notice] = {}
        self._chunks: list[Chunk] = []
        self._accepted = False
        try:
            self.link.subscribe(topics.down(self.name))
            self._await_broker()
            self._open()
        except BaseException:
            self.link.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect."""
        self.link.close()

    # --- what can be asked --------------------------------------------------------------------------------

    def frames(self, *, device: str | None = None, since: float = 0.0, after: int = 0) -> Iterator[StoredFrame]:
        """Frames that are addressed to this recipient, in the order of arrival.

        Args:
            device: only of this device (full name).
            since: only those received at or after this time, Unix seconds.
            after: only those with a larger ``id``: to go on where an earlier listing ended.
        """
        chosen = {"device": device} if device else _EMPTY
        while True:
            body = self.query("frames", after=after, since=since, limit=PAGE, **chosen)
            page = [_frame(row) for row in body.get("frames", [])]
            yield from page
            if not page or not body.get("more"):
                return
            after = page[-1].id

    def epoch_record(self, digest: bytes) -> bytes:
        """The signed epoch record with this SHA-256 (WireError where the gateway sends another)."""
        import hashlib

        if digest not in self._records:
            raw = self.query("epoch", digest=digest).get("record")
            if not isinstance(raw, bytes) or hashlib.sha256(raw).digest() != digest:
                raise WireError("the gateway sent another epoch record than it was asked for")
            self._records[digest] = raw
        return self._records[digest]

    def fetch(self, frame: StoredFrame) -> bytes:
        """A sealed frame's envelope; WireError where the gateway sends another one than it listed."""
        raw = self.fetch_object(frame.digest[:REF_BYTES], frame.size)
        if envelope.parse(raw).digest() != frame.digest:
            raise WireError("the gateway sent another frame than it was asked for")
        return raw

    def trust_above(self, version: int) -> bytes | None:
        """The gateway's trust list where it says that it has a newer one than ``version``; the caller judges it.

        Raises:
            WireError: the gateway says so in a wrong form, or refuses.
            TemporaryError: no answer in time.
        """
        match self.query("trust"):
            case {"version": int() as newest, "digest": bytes() as digest, "size": int() as size} if len(digest) == 32:
                if newest <= version:
                    return None
                return self.fetch_object(digest[:REF_BYTES], size, max_bytes=MAX_BYTES)
        raise WireError("the gateway does not say which trust list it has")

    def fetch_object(self, ref: bytes, size: int, *, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
        """Any object that the gateway holds for this party; the caller checks what it got.

        Raises:
            WireError: over ``max_bytes``, or the gateway refuses.
            TemporaryError: it did not come in time.
        """
        if not 0 < size <= max_bytes:
            raise WireError(f"an object of {size} bytes is over the limit of {max_bytes}")
        chunk_bytes = chunk_bytes_for(self.link.max_packet_bytes)
        download, data = Download(size, chunk_bytes), bytearray(size)
        self._notices.pop(ref, None)
        deadline = time.monotonic() + self.timeout_s
        while not download.complete:
            if time.monotonic() > deadline:
                raise TemporaryError("the gateway did not send the object in time", hint="try again")
            for first, count in download.wants(time.monotonic()):
                self._send(Fetch(ref, first, count, chunk_bytes))
            if self._take_chunks(ref, download, data, chunk_bytes):
                deadline = time.monotonic() + self.timeout_s
            if notice := self._notices.pop(ref, None):
                raise WireError(f"the gateway refuses: {notice.text}")
        return bytes(data)

    def _take_chunks(self, ref: bytes, download: Download, data: bytearray, chunk_bytes: int) -> bool:
        self._receive()
        taken, self._chunks = self._chunks, []
        for chunk in taken:
            if chunk.ref == ref and download.accept(chunk.index, len(chunk.data)):
                data[chunk.index * chunk_bytes : chunk.index * chunk_bytes + len(chunk.data)] = chunk.data
        return bool(taken)

    def query(self, what: str, **args: Any) -> dict[str, Any]:
        """Ask anything that `gateway.answers` documents; returns the reply's body.

        Raises:
            EdgeprivError: the gateway refused, with its reason.
            TemporaryError: no answer in time.
        """
        question = Query(primitives.random_bytes(8), what, args)
        deadline, sent = time.monotonic() + self.timeout_s, -RESEND_S
        while question.id not in self._replies:
            if time.monotonic() > deadline:
                raise TemporaryError("the gateway did not answer", hint="is it running, and is its name right?")
            if time.monotonic() - sent >= RESEND_S:
                self._send(question)
                sent = time.monotonic()
            self._receive()
        reply = self._replies.pop(question.id)
        body = reply.body if isinstance(reply.body, dict) else {}
        if not reply.ok:
            raise EdgeprivError(f"the gateway refuses: {body.get('error', 'no reason given')}")
        return body

    # --- the session --------------------------------------------------------------------------------------

    def _await_broker(self) -> None:
        deadline = time.monotonic() + self.timeout_s
        while not self.link.connected and time.monotonic() < deadline:
            self._on_wait()
            time.sleep(0.02)
        self.link.wait(0.0)

    def _open(self) -> None:
        deadline, sent = time.monotonic() + self.timeout_s, -RESEND_S
        while not self._accepted:
            if time.monotonic() > deadline:
                raise TemporaryError(
                    "the gateway did not accept the session", hint="is it running, and does its trust list name you?"
                )
            if time.monotonic() - sent >= RESEND_S:
                self.link.send(self._epoch_topic, self._signed.raw)
                sent = time.monotonic()
            self._receive()

    def _send(self, message: Any) -> None:
        self.link.send(self._topic, self._session.seal(self._topic, messages.encode(message)))

    def _receive(self) -> None:
        self._on_wait()
        for packet in self.link.wait_inbound(0.1):
            try:
                body = messages.decode(self._session.open(packet.topic, packet.payload))
            except (WireError, AuthenticationError, ReplayError):
                continue  # the broker may deliver anything; only what the session authenticates counts
            self._take(body)

    def _take(self, body: Any) -> None:
        if isinstance(body, Ack) and body.digest == self._signed.digest:
            self._accepted = body.outcome in {"stored", "duplicate"}
        elif isinstance(body, Reply):
            self._replies[body.id] = body
        elif isinstance(body, Chunk):
            self._chunks.append(body)
        elif isinstance(body, Notice) and isinstance(body.detail.get("ref"), bytes):
            self._notices[body.detail["ref"]] = body


def _frame(row: Any) -> StoredFrame:
    kinds = {"id": int, "digest": bytes, "device": str, "counter": int, "size": int, "received": float, "epoch": bytes}
    if not isinstance(row, dict) or any(type(row.get(name)) is not kind for name, kind in kinds.items()):
        raise WireError("the gateway's list of frames is malformed")
    return StoredFrame(
        row["id"], row["digest"], row["device"], row["counter"], row["size"], row["received"], row["epoch"]
    )
