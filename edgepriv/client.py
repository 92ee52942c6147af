"""A recipient's or service's authenticated conversation with a gateway, over MQTT: ask, list, fetch.

It opens a sealed link of its own (`edgepriv.wire.session`), so the broker reads nothing and forges nothing. Calls block
up to their time-out and raise; one client is one thread's. What it fetches is still sealed: opening is
`edgepriv.cipher`'s, with the recipient's key.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv.errors import EdgeprivError, RefusedError, TemporaryError, UnavailableError, WireError
from edgepriv.primitives import random_bytes
from edgepriv.wire import envelope, messages, topics
from edgepriv.wire.messages import Ack, Chunk, Fetch, Notice, Query, Reply
from edgepriv.wire.session import open_session
from edgepriv.wire.transfer import REF_BYTES, Download, chunk_bytes_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edgepriv.keys import Identity
    from edgepriv.mqtt import PahoLink
    from edgepriv.wire.trust import TrustList

CONNECT_S = 15.0
ANSWER_S = 20.0
RESEND_S = 2.0
MAX_FRAME_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class FrameInfo:
    """A stored frame: ``received`` in Unix seconds, ``size`` in bytes, ``epoch`` the digest of its record."""

    id: int
    digest: bytes
    device: str
    counter: int
    size: int
    received: float
    epoch: bytes


class GatewayClient:
    """One party's link to one gateway. Use as a context manager."""

    def __init__(
        self,
        link: PahoLink,
        identity: Identity,
        trust: TrustList,
        gateway: str,
        *,
        shard: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._link, self._name = link, identity.name
        now = clock()
        self._record, self._session = open_session(identity, trust, gateway, seq=int(now), now=now)
        self._up, self._epoch_topic = topics.up(self._name, shard, "msg"), topics.up(self._name, shard, "epoch")
        self._records: dict[bytes, bytes] = {}
        self.ignored = 0

    def __enter__(self) -> GatewayClient:  # noqa: PYI034 - Self needs Python 3.11
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()

    # --- asking -------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Connect and open the session.

        Raises:
            UnavailableError: no broker, or no gateway answers.
            RefusedError: the gateway does not accept this party.
        """
        self._link.subscribe(topics.down(self._name))
        self._link.wait(CONNECT_S)
        ack = self._await(
            lambda: self._link.send(self._epoch_topic, self._record.raw),
            lambda m: m if isinstance(m, Ack) and m.digest == self._record.digest else None,
            CONNECT_S,
        )
        if ack.outcome not in {"stored", "duplicate"}:
            raise RefusedError(f"the gateway refused this session: {ack.reason}")

    def query(self, what: str, **args: Any) -> Any:
        """Ask the gateway (see ``gateway/answers.py`` for the questions); returns the reply's body.

        Raises:
            RefusedError: the gateway says no, with its reason.
            UnavailableError: no answer in time.
        """
        question = Query(random_bytes(16), what, args)
        reply: Reply = self._await(
            lambda: self._send(question),
            lambda m: m if isinstance(m, Reply) and m.id == question.id else None,
            ANSWER_S,
        )
        if not reply.ok:
            raise RefusedError(f"the gateway refused: {reply.body.get('error', 'no reason given')}")
        return reply.body

    def frames(self, *, device: str | None = None, since: float = 0.0, after: int = 0) -> Iterator[FrameInfo]:
        """All stored frames that are addressed to this recipient, oldest first."""
        more = True
        while more:
            args: dict[str, Any] = {"after": after, "limit": 200, "since": since}
            if device is not None:
                args["device"] = device
            body = self.query("frames", **args)
            for row in body["frames"]:
                info = FrameInfo(**row)
                after = max(after, info.id)
                yield info
            more = bool(body["more"])

    def record(self, digest: bytes) -> bytes:
        """The signed epoch record of a frame (to be verified by who opens the frame)."""
        if digest not in self._records:
            self._records[digest] = bytes(self.query("epoch", digest=digest)["record"])
        return self._records[digest]

    def fetch_frame(self, info: FrameInfo) -> bytes:
        """A sealed frame's bytes; their digest is checked, opening authenticates them."""
        raw = self.fetch(info.digest[:REF_BYTES], info.size, max_bytes=MAX_FRAME_BYTES)
        if envelope.parse(raw).digest() != info.digest:
            raise WireError("the gateway sent another frame than the one that was asked for")
        return raw

    def fetch(self, ref: bytes, size: int, *, max_bytes: int, timeout_s: float = 60.0) -> bytes:
        """Pull an object by the first 16 bytes of its digest.

        Raises:
            WireError: larger than ``max_bytes``.
            RefusedError: withheld or unknown.
            TemporaryError: not complete in time.
        """
        if not 0 < size <= max_bytes:
            raise WireError(f"an object of {size} bytes is over the limit of {max_bytes}")
        chunk = chunk_bytes_for(self._link.max_packet_bytes)
        download, out = Download(size, chunk), bytearray(size)
        deadline = time.monotonic() + timeout_s
        while not download.complete:
            now = time.monotonic()
            if now > deadline:
                raise TemporaryError("the object did not arrive in time", hint="try again; the gateway may be busy")
            for first, count in download.wants(now):
                self._send(Fetch(ref, first, count, chunk))
            for message in self._receive(0.2):
                if isinstance(message, Notice) and message.detail.get("ref") == ref:
                    raise RefusedError(f"the gateway says: {message.text}")
                if (
                    isinstance(message, Chunk)
                    and message.ref == ref
                    and download.accept(message.index, len(message.data))
                ):
                    start = message.index * chunk
                    out[start : start + len(message.data)] = message.data
        return bytes(out)

    # --- the link -----------------------------------------------------------------------------------------

    def _send(self, message: Any) -> bool:
        return self._link.send(self._up, self._session.seal(self._up, messages.encode(message)))

    def _receive(self, timeout_s: float) -> list[Any]:
        """Messages that are authentic; what is not is counted and ignored."""
        out = []
        for packet in self._link.wait_inbound(timeout_s):
            try:
                out.append(messages.decode(self._session.open(packet.topic, packet.payload)))
            except EdgeprivError:
                self.ignored += 1  # forged, replayed or of an older session of this name
        return out

    def _await(self, send: Callable[[], Any], pick: Callable[[Any], Any], timeout_s: float) -> Any:
        """Send, and again every two seconds, until a message is picked."""
        deadline, sent_at = time.monotonic() + timeout_s, -1e9
        while time.monotonic() < deadline:
            if time.monotonic() - sent_at >= RESEND_S:
                sent_at = time.monotonic()
                send()
            for message in self._receive(0.2):
                if (found := pick(message)) is not None:
                    return found
        raise UnavailableError(
            "the gateway does not answer", hint="is it running, and is this party in its trust list?"
        )
