"""A shard's end of rounds over several gateways: it asks its root, runs its part, and brings one partial sum.

Towards the root this gateway is a party like a device: its session is opened by a signed record that wraps a link key
to the root, everything is sealed, the partial sum goes up in chunks that the root grants, and weights come down in
chunks that this gateway asks for. No state of its own is stored: what is to be done follows from the round's record in
the store and from the root's answer, so a killed shard goes on where its durable files are, or sits the round out.

A store that fails is no reason to sit out: the root is told from memory that this shard lives, and the part is begun,
or goes on, when the store is back. Where it stays away for as long as the round gives its devices (``deadline_s``,
from when the round was heard of or the store began to fail), this shard sits out and says why.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv import primitives
from edgepriv.errors import AuthenticationError, EdgeprivError, ReplayError, WireError
from edgepriv.wire import messages, topics
from edgepriv.wire.messages import Ack, Chunk, Fetch, Grant, Notice, Offer, Query, Reply
from edgepriv.wire.session import open_session
from edgepriv.wire.transfer import REF_BYTES, Download, chunk_bytes_for, chunk_count, from_ranges
from gateway.aggregate import digest_of
from gateway.root import QUESTION, shard_plan
from gateway.store import STORE_FAILED
from gateway.transfers import PARTIAL

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgepriv.keys import Identity
    from edgepriv.mqtt import Inbound, Link
    from gateway.roster import Roster
    from gateway.round_driver import RoundDriver

log = logging.getLogger("gateway.uplink")
ASK_S = 1.0
AGAIN_S = 5.0
MAX_WEIGHTS_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Told:
    """The round that the root runs (0: none), when it was first heard of, and the time that its devices have."""

    round: int = 0
    at: float = 0.0
    patience_s: float = 0.0


class Uplink:
    """Steppable, like the devices' runtime: no thread and no clock of its own."""

    def __init__(
        self,
        identity: Identity,
        roster: Roster,
        rounds: RoundDriver,
        link: Link,
        *,
        root: str,
        shard: int,
        clock: Callable[[], float],
    ) -> None:
        self._identity, self._roster, self._rounds, self._link = identity, roster, rounds, link
        self.root, self._shard, self._clock = root, shard, clock
        self.name, self.topic = identity.name, topics.down(identity.name)
        self._up = topics.up(self.name, shard, "msg")
        self._generation, self._known = -1, False
        self._at = {"record": -AGAIN_S, "ask": -ASK_S, "offer": -AGAIN_S}
        self._refused: tuple[int, str] = (0, "")
        self._told = Told()
        self._said: dict[str, Any] = {"round": 0, "state": "new", "reason": "", "last": 0}
        self._away: tuple[float, float] | None = None  # first and last failure of the store
        self._taken: set[bytes] = set()
        self._granted: deque[int] = deque()
        self._offered: tuple[bytes, Path, int] | None = None
        self._download: tuple[dict[str, Any], Download, Path, int] | None = None
        self._open()
        link.subscribe(self.topic)

    def _open(self) -> None:
        now = self._clock()
        self._signed, self._session = open_session(
            self._identity, self._roster.trust, self.root, seq=int(now * 1e6), now=now
        )

    # --- once a turn --------------------------------------------------------------------------------------

    def step(self, now: float) -> None:
        """Send what is due and what the link takes; never waits."""
        if self._away and now - self._away[1] >= AGAIN_S:
            self._away = None  # while it fails, a turn like this one comes right after a failure
        if not self._introduced(now):
            return
        if self._due("ask", ASK_S, now):
            self._ask()
        self._bring(now)
        self._fetch(now)

    def _introduced(self, now: float) -> bool:
        """Whether the root knows this session; else its record is sent when that is due."""
        if not self._link.connected:
            return False
        if self._link.generation != self._generation:
            self._generation, self._known = self._link.generation, False
            self._granted.clear()
            self._at = dict.fromkeys(self._at, -AGAIN_S)
        if not self._known and self._due("record", AGAIN_S, now):
            self._link.send(topics.up(self.name, self._shard, "epoch"), self._signed.raw)
        return self._known

    def _due(self, what: str, every_s: float, now: float) -> bool:
        if 0 <= now - self._at[what] < every_s:
            return False
        self._at[what] = now
        return True

    def _send(self, message: Any) -> bool:
        return self._link.send(self._up, self._session.seal(self._up, messages.encode(message)))

    def _ask(self) -> None:
        number, state, reason = self._doing()
        self._say({"round": number, "state": state, "reason": reason, "last": self._rounds.last_number()})

    def _say(self, args: dict[str, Any]) -> None:
        self._said = args
        self._send(Query(primitives.random_bytes(8), QUESTION, args))

    def _doing(self) -> tuple[int, str, str]:
        """The latest part of this shard and how it stands."""
        number, state, reason = self._rounds.latest_part()
        out = self._refused[0] > number or (self._refused[0] == number and state == "running")
        return (self._refused[0], "out", self._refused[1]) if out else (number, state, reason)

    # --- while the store is away --------------------------------------------------------------------------

    def store_failed(self, error: Exception, packets: list[Inbound], now: float) -> None:
        """A turn could not be stored: what the root says is heard, and answered from memory; see the module."""
        self._away = (self._away[0] if self._away else now), now
        for packet in (one for one in packets if one.topic == self.topic):
            with contextlib.suppress(WireError, AuthenticationError, ReplayError):
                self._overhear(packet, now)
        told = self._told
        if told.round and now >= max(told.at, self._away[0]) + told.patience_s:
            self._refuse(told.round, error)
        if self._introduced(now) and self._due("ask", ASK_S, now):
            number, reason = self._refused
            out = number and number >= self._said["round"]
            self._say({**self._said, "round": number, "state": "out", "reason": reason} if out else self._said)

    def _overhear(self, packet: Inbound, now: float) -> None:
        match messages.decode(self._session.open(packet.topic, packet.payload)):
            case Ack(digest) if digest == self._signed.digest:
                self._known = True
            case Notice("unknown-epoch"):
                self._known = False
            case Reply(_, ok, answer) if ok and isinstance(answer, dict):
                self._hear(answer, now)

    def _refuse(self, number: int, error: Exception) -> None:
        if self._refused[0] < number:
            log.warning("round %d of the root: this shard sits out: its store failed for too long", number)
            self._refused = number, f"its store failed until the round's deadline: {error}"[:200]

    # --- what arrives -------------------------------------------------------------------------------------

    def take(self, packet: Inbound, now: float) -> None:
        """Handle a packet on this gateway's downlink; anything that the session does not open is dropped."""
        try:
            body = messages.decode(self._session.open(packet.topic, packet.payload))
            self._dispatch(body, now)
        except (WireError, AuthenticationError, ReplayError) as error:
            log.debug("a packet on the downlink was dropped: %s", error)

    def _dispatch(self, body: Any, now: float) -> None:
        match body:
            case Ack(digest) if digest == self._signed.digest:
                self._known = True
            case Ack(digest, outcome, reason) if self._offered and digest == self._offered[0]:
                self._answered(digest, outcome, reason)
            case Notice(code) if code == "unknown-epoch":
                self._known = False
            case Reply(_, ok, answer) if ok and isinstance(answer, dict):
                self._answer(answer, now)
            case Reply(_, _, answer):
                log.warning("the root refuses: %s", answer.get("error") if isinstance(answer, dict) else "no reason")
            case Grant(ref, ranges) if self._offered and ref == self._offered[0][:REF_BYTES]:
                waiting = set(self._granted)
                size = chunk_bytes_for(self._link.max_packet_bytes)
                wanted = from_ranges(ranges, chunk_count(self._offered[2], size))
                self._granted.extend(i for i in wanted if i not in waiting)
                self._at["offer"] = now
            case Chunk():
                self._chunk(body)

    def _answer(self, answer: dict[str, Any], now: float) -> None:
        head, told = self._hear(answer, now)
        running = self._told.round if answer.get("part") != "out" else 0
        self._rounds.leave_part(running, now)
        if head and head.get("digest") != self._rounds.head().get("digest"):
            self._want(head)
        elif told and running > self._doing()[0]:
            self._begin(told, running, now)

    def _hear(self, answer: dict[str, Any], now: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """The weights in force and the running round, of an answer of the root."""
        head, told = answer.get("head") or {}, answer.get("round") or {}
        number, patience_s = (told.get("round"), told.get("deadline_s")) if isinstance(told, dict) else (None, None)
        good = type(number) is int and type(patience_s) in {int, float}
        if not isinstance(head, dict) or (told and not good):
            raise WireError("the root's answer is malformed")
        if self._told.round != (number or 0):
            self._told = Told(number or 0, now, patience_s or 0.0)
        return head, told

    def _begin(self, told: dict[str, Any], number: int, now: float) -> None:
        try:
            devices = self._rounds.active_devices(now)
            plan = shard_plan(told, self.name, self._rounds.settings, len(devices))
            self._rounds.open_part(plan, devices, now)
        except STORE_FAILED as error:
            if now >= self._told.at + self._told.patience_s:
                self._refuse(number, error)
            raise  # the gateway goes on from what is stored, and the root is asked again
        except (EdgeprivError, TypeError, ValueError, KeyError) as error:
            log.warning("round %d of the root: this shard sits out: %s", number, error)
            self._refused = number, str(error)[:200]

    # --- the partial sum ----------------------------------------------------------------------------------

    def _bring(self, now: float) -> None:
        """Offer the partial sum of the latest part until the root has taken or refused it."""
        found = self._rounds.partial()
        if found is None or found[1] in self._taken:
            self._offered = None
            return
        number, digest, path, size = found
        chunk = chunk_bytes_for(self._link.max_packet_bytes)
        if self._offered is None or self._offered[0] != digest:
            self._offered, self._at["offer"] = (digest, path, size), -AGAIN_S
            self._granted.clear()
        if not self._granted and self._due("offer", AGAIN_S, now):
            self._send(Offer(digest[:REF_BYTES], PARTIAL, size, chunk, digest, number, now + 3600.0, {}))
        while self._granted:
            with path.open("rb", buffering=0) as file:
                file.seek(self._granted[0] * chunk)
                data = file.read(chunk)
            if not self._send(Chunk(digest[:REF_BYTES], self._granted[0], data)):
                return
            self._granted.popleft()

    def _answered(self, digest: bytes, outcome: str, reason: str) -> None:
        if outcome not in {"stored", "duplicate"}:
            log.warning("the root refused this shard's partial sum: %s", reason)
        self._taken.add(digest)
        if self._offered:
            self._offered[1].unlink(missing_ok=True)
        self._offered = None
        self._granted.clear()

    # --- weights ------------------------------------------------------------------------------------------

    def _want(self, head: dict[str, Any]) -> None:
        digest, size = head.get("digest"), head.get("size")
        if not isinstance(digest, bytes) or len(digest) != 32 or type(size) is not int:
            raise WireError("the root's answer is malformed")
        if not 0 < size <= MAX_WEIGHTS_BYTES:
            raise WireError(f"weights of {size} bytes are over the limit")
        path = self._rounds.conductor.model_path(digest)
        if path.exists():
            self._rounds.adopt(head)
        elif self._download is None or self._download[0]["digest"] != digest:
            part = path.with_name(f"{path.name}.part")
            part.write_bytes(b"")
            chunk = chunk_bytes_for(self._link.max_packet_bytes)
            self._download = head, Download(size, chunk), part, chunk

    def _fetch(self, now: float) -> None:
        if self._download is None:
            return
        head, download, _, chunk = self._download
        for first, count in download.wants(now):
            if not self._send(Fetch(head["digest"][:REF_BYTES], first, count, chunk)):
                return

    def _chunk(self, body: Chunk) -> None:
        if self._download is None or body.ref != self._download[0]["digest"][:REF_BYTES]:
            return
        head, download, part, chunk = self._download
        if not download.accept(body.index, len(body.data)):
            return
        with part.open("r+b") as file:
            file.seek(body.index * chunk)
            file.write(body.data)
        if not download.complete:
            return
        self._download = None
        if digest_of(part) != head["digest"]:
            part.unlink()
            raise WireError("the root sent other weights than it named")
        part.replace(self._rounds.conductor.model_path(head["digest"]))
        self._rounds.adopt(head)
