"""What happens to a packet: authenticate, check, store, and only then acknowledge.

Rules.
 1. A packet gives exactly one outcome: a stored item, a counted duplicate, a counted rejection, or "not now". Any
    bytes at all are safe to hand in.
 2. The topic's party, the session's party and the trust list must agree for every packet.
 3. Replies are collected while a batch runs and handed over only after its transaction was committed. Where the
    commit fails nothing was promised, and everything comes again.
 4. A refusal that can be undone by repeating (unknown epoch, store full) is never acknowledged. A refusal that is
    final (malformed inside a sealed message, over a limit) is acknowledged as ``rejected``.
 5. What an acknowledgement names: epoch records by the SHA-256 of their bytes, outputs by the SHA-256 of the sealed
    message as received, frames by `Envelope.digest`. A frame that cannot even be parsed is named by its SHA-256.
"""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from edgepriv.errors import AuthenticationError, EdgeprivError, ReplayError, TrustError, WireError
from edgepriv.wire import envelope as frames
from edgepriv.wire import link, messages, topics
from edgepriv.wire.messages import Ack, Chunk, Fetch, FrameMessage, Notice, Offer, Query, Reply, RoundMessage, Status
from edgepriv.wire.output import Output, check_output
from gateway.outputs import Windows
from gateway.sessions import Session, UnknownEpochError
from gateway.store import CONFLICT, DUPLICATE, STORED, StoreLimitError
from gateway.transfers import FRAME, PARTIAL, UPDATE, Transfer

if TYPE_CHECKING:
    from pathlib import Path

    from edgepriv.mqtt import Inbound
    from gateway.presence import Presence
    from gateway.roster import Roster
    from gateway.sessions import Sessions
    from gateway.store import EpochRow, Store
    from gateway.transfers import Transfers

NOTICE_EVERY_S = 30.0
SPEAKING_NOTICE_S = 300.0  # to a party whose epoch is known: what names another one is most likely forged
MAX_REJECTION_REASON = 200


class RoundsPort(Protocol):
    """What ingest hands to the federated rounds."""

    def offered(self, party: str, offer: Offer, now: float) -> None:
        """A device offers an update."""
        ...

    def progressed(self, party: str, digest: bytes, now: float) -> None:
        """A chunk of an update arrived."""
        ...

    def uploaded(self, transfer: Transfer, path: Path, now: float) -> None:
        """An update is complete, its digest right and its file durable."""
        ...

    def stepped(self, party: str, message: RoundMessage, now: float) -> None:
        """A device sent a step of a round."""
        ...

    def flush(self) -> None:
        """The batch is about to be committed: save the rounds that it changed."""
        ...


class Answers(Protocol):
    """What ingest asks for queries and fetches."""

    def query(self, session: Session, role: str, query: Query, now: float) -> Reply:
        """Answer a query."""
        ...

    def fetch(self, session: Session, role: str, fetch: Fetch, now: float) -> Notice | None:
        """Begin to send an object, or say why not."""
        ...


@dataclass(frozen=True, slots=True)
class Handled:
    """What became of a packet, for the log and the metrics."""

    party: str
    kind: str
    outcome: str
    reason: str = ""
    size: int = 0


class Ingest:
    """Handles batches of packets; the daemon sends what `take_replies` gives after each commit."""

    def __init__(
        self,
        store: Store,
        roster: Roster,
        sessions: Sessions,
        transfers: Transfers,
        presence: Presence,
        answers: Answers,
        *,
        rounds: RoundsPort | None,
        window_s: int,
        max_frame_bytes: int,
    ) -> None:
        self._store, self._roster, self._sessions, self._transfers = store, roster, sessions, transfers
        self._presence, self._answers, self.rounds = presence, answers, rounds
        self._windows = Windows(store.database, window_s)
        self._max_frame_bytes = max_frame_bytes
        self._replies: list[tuple[str, Any]] = []
        self._noticed: dict[tuple[str, str], float] = {}
        self._authentic: dict[str, float] = {}  # when each party last spoke under an epoch that is known

    def handle(self, packets: list[Inbound], now: float) -> list[Handled]:
        """Handle a batch in one transaction; an exception means that nothing of it was stored."""
        handled: list[Handled] = []
        try:
            with self._store.batch():
                handled = [self._one(packet, now) for packet in packets]
                self._windows.flush()
                if self.rounds:
                    self.rounds.flush()
        except BaseException:
            self._windows.discard()
            self._replies = []
            raise
        return handled

    def take_replies(self) -> list[tuple[str, Any]]:
        """Replies of what was committed; each is given once."""
        replies, self._replies = self._replies, []
        return replies

    # --- one packet ---------------------------------------------------------------------------------------

    def _one(self, packet: Inbound, now: float) -> Handled:
        party, size = "?", len(packet.payload)
        try:
            topic = topics.parse_up(packet.topic)
            party = topic.party
            role = self._roster.party(party, now).role
            if topic.lane == "epoch":
                return self._epoch(party, packet.payload, now)
            return self._sealed(packet, party, role, now)
        except StoreLimitError as error:
            self._notice(party, Notice("store-full", str(error), {}), now)
            return Handled(party, "item", "not-acknowledged", "store-full", size)
        except (WireError, AuthenticationError, TrustError) as error:
            if isinstance(error, UnknownEpochError):
                self._notice(party, Notice("unknown-epoch", "send the record of this epoch again", {}), now)
            return Handled(party, "packet", "rejected", reason_of(error), size)

    def _epoch(self, party: str, raw: bytes, now: float) -> Handled:
        session, outcome = self._sessions.accept(raw, party, now)
        self._presence.heard(party, session.row.id, now)
        self._authentic[party] = now
        self._reply(party, Ack(session.signed.digest, outcome, ""))
        return Handled(party, "epoch", outcome, size=len(raw))

    def _sealed(self, packet: Inbound, party: str, role: str, now: float) -> Handled:
        session = self._sessions.by_epoch(link.epoch_of(packet.payload))
        if session.party != party:
            raise AuthenticationError("a message on another party's topic")
        body = messages.decode(session.link.open(packet.topic, packet.payload))
        self._authentic[party] = now
        self._presence.heard(party, session.row.id, now)
        if not isinstance(body, Output):  # an output is repeated byte for byte, also by a later process
            self._sessions.alive(session)
        kind = type(body).__name__.lower()
        outcome, reason = self._dispatch(body, session, role, packet.payload, now)
        return Handled(party, kind, outcome, reason, len(packet.payload))

    def _dispatch(self, body: Any, session: Session, role: str, raw: bytes, now: float) -> tuple[str, str]:
        if isinstance(body, Query):
            answer = self._answers.query(session, role, body, now)
            self._reply(session.party, answer)
            return ("answered", "") if answer.ok else ("refused", "query")
        if isinstance(body, Fetch):
            return self._fetch(session, role, body, now)
        partial = isinstance(body, Offer) and body.what == PARTIAL
        if role != ("gateway" if partial else "device") and not (role == "gateway" and isinstance(body, Chunk)):
            raise WireError(f"a {role} does not send this kind of message")
        match body:
            case Output():
                return self._output(session, body, raw, now)
            case FrameMessage():
                return self._frame_message(session, body, now)
            case Offer():
                return self._offer(session, body, now)
            case Chunk():
                return self._chunk(session, body, now)
            case Status():
                self._presence.status(session.party, body, now)
                self._name_trust(session.party, body.trust_version)
                return "noted", ""
            case RoundMessage() if self.rounds:
                self.rounds.stepped(session.party, body, now)
                return "noted", ""
        raise WireError("this kind of message does not travel up")

    # --- items --------------------------------------------------------------------------------------------

    def _output(self, session: Session, output: Output, raw: bytes, now: float) -> tuple[str, str]:
        digest = hashlib.sha256(raw).digest()
        try:
            check_output(output)
        except WireError as error:
            return self._refuse(session.party, digest, error)
        outcome = self._store.add_output(session.row, digest, output, now)
        if outcome == STORED:
            self._windows.add(session.party, output, now)
        self._reply(session.party, Ack(digest, outcome, ""))
        return outcome, ""

    def _frame_message(self, session: Session, body: FrameMessage, now: float) -> tuple[str, str]:
        party = session.party
        try:
            row, counter, digest = self._verified(party, memoryview(body.envelope), now)
        except UnknownEpochError:
            raise
        except (WireError, AuthenticationError) as error:
            return self._refuse(party, _named(body.envelope), error)
        size = len(body.envelope)
        outcome = self._store.add_frame(row, counter, digest, size, now, path=None, data=body.envelope)
        self._answer_frame(party, digest, outcome)
        return outcome, ""

    def _verified(self, party: str, raw: memoryview, now: float) -> tuple[EpochRow, int, bytes]:
        """Epoch, counter and digest of an envelope that this party sent; raises what is wrong with it."""
        envelope = frames.parse(raw, max_bytes=self._max_frame_bytes)
        epoch = self._sessions.by_record(envelope.epoch_digest)
        if epoch.party != party:
            raise AuthenticationError("a frame of another device")
        frames.verify_for_gateway(envelope, epoch.link, epoch.signed, self._roster.party(party, now))
        found = epoch.row, envelope.counter, envelope.digest()
        envelope.ciphertext.release()
        envelope.raw.release()
        return found

    def _answer_frame(self, party: str, digest: bytes, outcome: str) -> None:
        self._reply(party, Ack(digest, outcome, "the counter was used" if outcome == CONFLICT else ""))

    def _offer(self, session: Session, offer: Offer, now: float) -> tuple[str, str]:
        if offer.what == FRAME and self._store.has_frame(offer.digest):
            self._reply(session.party, Ack(offer.digest, DUPLICATE, ""))
            return DUPLICATE, ""
        try:
            if offer.what in {UPDATE, PARTIAL} and self.rounds:
                self.rounds.offered(session.party, offer, now)
            else:
                self._transfers.offer(session.party, offer, now)
        except WireError as error:
            return self._refuse(session.party, offer.digest, error)
        transfer = self._transfers.get(session.party, offer.ref)
        if transfer and transfer.incoming.have.full:  # all was there when the gateway was killed, or before its record
            return self._completed(transfer, now)
        return "noted", ""

    def _chunk(self, session: Session, chunk: Chunk, now: float) -> tuple[str, str]:
        transfer, full = self._transfers.chunk(session.party, chunk, now)
        if transfer.what == UPDATE and self.rounds:
            self.rounds.progressed(session.party, transfer.digest, now)
        return self._completed(transfer, now) if full else ("noted", "")

    def _completed(self, transfer: Transfer, now: float) -> tuple[str, str]:
        if transfer.what == FRAME:
            return self._frame_upload(transfer, now)
        try:
            path = self._transfers.complete(transfer)
        except WireError as error:
            return self._refuse(transfer.party, transfer.digest, error)
        if path is None:
            return "restarted", ""
        if self.rounds:
            self.rounds.uploaded(transfer, path, now)
        return STORED, ""

    def _frame_upload(self, transfer: Transfer, now: float) -> tuple[str, str]:
        """Judge a staged frame by its own MAC or signature, which says all that one more hash would."""
        found: list[tuple[EpochRow, int]] = []

        def valid(path: Path) -> bool:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as staged:
                view = memoryview(staged)
                try:
                    row, counter, digest = self._verified(transfer.party, view, now)
                except UnknownEpochError:
                    raise
                except (WireError, AuthenticationError):
                    return False
                finally:
                    view.release()
            found.append((row, counter))
            return digest == transfer.digest

        try:
            path = self._transfers.complete(transfer, valid=valid)
        except UnknownEpochError:
            raise
        except WireError as error:
            return self._refuse(transfer.party, transfer.digest, error)
        if path is None:
            return "restarted", ""
        row, counter = found[-1]
        size = transfer.incoming.size
        outcome = self._store.add_frame(row, counter, transfer.digest, size, now, path=transfer.path, data=None)
        self._answer_frame(transfer.party, transfer.digest, outcome)
        if outcome == STORED:
            self._transfers.detach(transfer)
        else:
            self._transfers.drop(transfer)
        return outcome, ""

    # --- replies ------------------------------------------------------------------------------------------

    def _fetch(self, session: Session, role: str, fetch: Fetch, now: float) -> tuple[str, str]:
        if notice := self._answers.fetch(session, role, fetch, now):
            self._reply(session.party, notice)
            return "refused", notice.code
        return "served", ""

    def _refuse(self, party: str, digest: bytes, error: EdgeprivError) -> tuple[str, str]:
        """Refuse an item of an authenticated device for good."""
        if isinstance(error, ReplayError):
            return "rejected", reason_of(error)
        self._reply(party, Ack(digest, "rejected", str(error)[:MAX_REJECTION_REASON]))
        return "rejected", reason_of(error)

    def _reply(self, party: str, message: Any) -> None:
        self._replies.append((party, message))

    def _name_trust(self, party: str, version: int) -> None:
        """Tell a device that a newer trust list is here to fetch; the owner's signature on it decides, not we."""
        trust, raw = self._roster.trust, self._roster.raw
        if version < trust.version:
            detail = {"version": trust.version, "digest": hashlib.sha256(raw).digest(), "size": len(raw)}
            self._reply(party, Notice("trust-list", "a newer trust list is here", detail))

    def _notice(self, party: str, notice: Notice, now: float) -> None:
        """Tell a party something, not more often than it can act on it."""
        key = (party, notice.code)
        speaks = notice.code == "unknown-epoch" and now - self._authentic.get(party, 0.0) < NOTICE_EVERY_S
        if now - self._noticed.get(key, 0.0) >= (SPEAKING_NOTICE_S if speaks else NOTICE_EVERY_S):
            self._noticed[key] = now
            self._reply(party, notice)


def _named(raw: bytes) -> bytes:
    """How a refused envelope is named in its refusal."""
    try:
        return frames.parse(raw).digest()
    except WireError:
        return hashlib.sha256(raw).digest()


def reason_of(error: EdgeprivError) -> str:
    """The label of a rejection in logs and metrics: the class of the error, in words."""
    if isinstance(error, UnknownEpochError):
        return "unknown-epoch"
    names = {
        ReplayError: "replay",
        AuthenticationError: "not-authentic",
        TrustError: "not-trusted",
        WireError: "malformed",
    }
    return next((name for kind, name in names.items() if isinstance(error, kind)), "other")
