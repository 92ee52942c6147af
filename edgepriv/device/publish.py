"""Stage 6, publish: from the spool to the gateway, as fast as the gateway acknowledges and no faster.

Rules: nothing is sent before the gateway has acknowledged the epoch record it needs; an item is sent again when no
acknowledgement came in time or the connection was made anew; an acknowledgement counts only when it names the SHA-256
of something that is in the spool. What does not fit one packet is offered and goes in the chunks that the gateway
grants. All state here is rebuilt from the spool after a crash.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgepriv.errors import WireError
from edgepriv.wire import envelope, messages, topics
from edgepriv.wire.messages import Ack, Chunk, FrameMessage, Grant, Offer
from edgepriv.wire.transfer import PACKET_OVERHEAD_BYTES, REF_BYTES, chunk_bytes_for, chunk_count, from_ranges

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgepriv.device.spool import Spool, Waiting
    from edgepriv.mqtt import Link
    from edgepriv.wire.link import LinkSession

log = logging.getLogger(__name__)
WINDOW_ITEMS = 32
WINDOW_BYTES = 4 << 20
MAX_UPLOADS = 4
RESEND_S = 10.0
FAILED_BACKOFF_S = 30.0
SILENCE_S = 30.0


@dataclass(slots=True)
class _Upload:
    """An offered item and the chunks that were granted and not yet sent."""

    digest: bytes
    size: int
    chunk_bytes: int
    granted: deque[int] = field(default_factory=deque)


class Publisher:
    """Sends what the spool holds. ``meta`` gives the offer's meta map of a round's update, or None: it stays here."""

    def __init__(
        self,
        spool: Spool,
        link: Link,
        session: Callable[[], LinkSession],
        *,
        party: str,
        shard: int,
        meta: Callable[[int], dict[str, Any] | None],
    ) -> None:
        self._spool, self._link, self._session, self._meta = spool, link, session, meta
        self._epoch_topic, self._topic = topics.up(party, shard, "epoch"), topics.up(party, shard, "msg")
        self._generation = -1
        self._known_epochs: set[bytes] = set()
        self._epoch_sent: dict[bytes, float] = {}
        self._heard, self._answered = 0.0, False
        self._in_flight: OrderedDict[bytes, tuple[float, int]] = OrderedDict()
        self._uploads: dict[bytes, _Upload] = {}
        self._after = 0
        self.sent = 0

    def epoch_known(self, digest: bytes) -> bool:
        """Whether the gateway has acknowledged this record, so that sealed messages under it can be opened there."""
        return digest in self._known_epochs

    def send_message(self, message: Any) -> bool:
        """Seal and send a message that needs no spool (status, round steps, requests); False: not now."""
        if not self._link.connected:
            return False
        return self._link.send(self._topic, self._session().seal(self._topic, messages.encode(message)))

    # --- sending ------------------------------------------------------------------------------------------

    def step(self, current_epoch: bytes, now: float) -> bool:
        """Send what may be sent now; True when something went out."""
        if not self._link.connected:
            return False
        if self._answered or self._link.generation != self._generation:
            self._answered, self._heard = False, now
        if self._link.generation != self._generation:
            self._generation = self._link.generation
            self._in_flight.clear()
            self._epoch_sent.clear()
            self._uploads.clear()
        before = self.sent
        if not self._announce(current_epoch, now):
            return self.sent != before
        self._send_chunks()
        self._send_items(now)
        return self.sent != before

    def _announce(self, epoch: bytes, now: float) -> bool:
        """Send an epoch record until it is acknowledged; True when it is."""
        if epoch in self._known_epochs:
            return True
        if now - self._epoch_sent.get(epoch, -1e9) >= RESEND_S:
            record = self._spool.epoch_record(epoch)
            if record is not None and self._link.send(self._epoch_topic, record):
                self._epoch_sent[epoch] = now
                self.sent += 1
        return False

    def _send_items(self, now: float) -> None:
        late = [digest for digest, (sent_at, _) in self._in_flight.items() if now - sent_at >= RESEND_S]
        for digest in late:  # lost, or dropped here since: it must not fill the window for ever
            del self._in_flight[digest]
            if (upload := self._uploads.get(digest[:REF_BYTES])) and not upload.granted:
                del self._uploads[digest[:REF_BYTES]]  # nor hold a place for which the gateway may have none
        if late and now - self._heard >= SILENCE_S:  # a gateway that lost its store cannot say so: announce anew
            self.forget_epochs()
            self._heard = now
        if len(self._in_flight) >= WINDOW_ITEMS:
            return
        limit, idle = WINDOW_ITEMS + len(self._in_flight), 0
        rows = self._spool.waiting(limit, after=self._after)
        for item in rows:
            if item.digest in self._in_flight:
                idle += 1
                continue
            flying = sum(size for _, size in self._in_flight.values())
            if len(self._in_flight) >= WINDOW_ITEMS or (flying and flying + item.size > WINDOW_BYTES):
                return
            if not self._announce(item.epoch, now):
                idle += 1
            elif not self._send_item(item, now):
                return
        # items of an epoch that the gateway does not take must not hold up those behind them
        self._after = rows[-1].id if idle == len(rows) == limit else 0

    def _send_item(self, item: Waiting, now: float) -> bool:
        if item.size + PACKET_OVERHEAD_BYTES > self._link.max_packet_bytes or item.kind == "update":
            return self._offer(item, now)
        payload = self._spool.payload(item.digest)
        if payload is None:
            return True
        if item.kind == "frame":
            if not _is_envelope(payload, item.digest):
                self._spool.remove(item.digest)
                self._spool.count("damaged_frames")
                return True
            done = self.send_message(FrameMessage(payload))
        else:
            done = self._link.send(self._topic, payload)
        if done:
            self._in_flight[item.digest] = (now, item.size)
            self.sent += 1
        return done

    def _offer(self, item: Waiting, now: float) -> bool:
        ref = item.digest[:REF_BYTES]
        if ref not in self._uploads and len(self._uploads) >= MAX_UPLOADS:
            return True
        size = chunk_bytes_for(self._link.max_packet_bytes)
        meta = self._meta(item.round) if item.kind == "update" else {}
        if meta is None:  # withdrawn, and the disk was too full to forget it
            return True
        offer = Offer(ref, item.kind, item.size, size, item.digest, item.round, now + 3600.0, meta)
        if not self.send_message(offer):
            return False
        self._uploads.setdefault(ref, _Upload(item.digest, item.size, size))
        self._in_flight[item.digest] = (now, 0)
        self.sent += 1
        return True

    def _send_chunks(self) -> None:
        for ref, upload in list(self._uploads.items()):
            while upload.granted:
                index = upload.granted[0]
                data = self._spool.read_range(upload.digest, index * upload.chunk_bytes, upload.chunk_bytes)
                if data is None:
                    del self._uploads[ref]
                    break
                if not self.send_message(Chunk(ref, index, data)):
                    return
                upload.granted.popleft()
                self.sent += 1

    # --- answers ------------------------------------------------------------------------------------------

    def on_grant(self, grant: Grant, now: float) -> None:
        """Queue the chunks that the gateway asks for (WireError when they lie outside the object)."""
        self._answered = True
        upload = self._uploads.get(grant.ref)
        if upload is None:
            return
        indices = from_ranges(grant.ranges, chunk_count(upload.size, upload.chunk_bytes))
        waiting = set(upload.granted)
        upload.granted.extend(i for i in dict.fromkeys(indices) if i not in waiting)
        self._in_flight[upload.digest] = (now, 0)  # it lives: no new offer is needed yet

    def on_ack(self, ack: Ack) -> str | None:
        """Act on an acknowledgement; returns what became of which kind, or None when it names nothing of ours."""
        self._answered = True
        if ack.digest in self._epoch_sent or self._spool.epoch_record(ack.digest) is not None:
            if ack.outcome in {"stored", "duplicate"}:
                self._known_epochs.add(ack.digest)
            else:
                log.error("the gateway refused an epoch record: %s", ack.reason)
                self._epoch_sent[ack.digest] = self._epoch_sent.get(ack.digest, 0.0) + FAILED_BACKOFF_S
            return f"epoch_{ack.outcome}"
        self._in_flight.pop(ack.digest, None)
        self._uploads.pop(ack.digest[:REF_BYTES], None)
        if ack.outcome == "conflict":
            self._spool.hold(ack.digest)
            return "conflict"
        if not self._spool.remove(ack.digest):
            return None
        if ack.outcome not in {"stored", "duplicate"}:
            log.warning("the gateway rejected an item for good: %s", ack.reason)
        return ack.outcome

    def forget_epochs(self) -> None:
        """The gateway does not know an epoch (it lost its store): announce all of them again."""
        self._known_epochs.clear()
        self._epoch_sent.clear()
        self._in_flight.clear()


def _is_envelope(raw: bytes, digest: bytes) -> bool:
    """Whether the bytes from the disk are still the envelope that was spooled (its MAC is the gateway's to check)."""
    try:
        return envelope.parse(raw).digest() == digest
    except WireError:
        return False
