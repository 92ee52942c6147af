"""The gateway's end of every party's sealed link.

A party opens a session by a signed epoch record, which wraps the link key to this gateway. Link keys are never
stored: after a restart the record is read from the store and unwrapped again. What is sent to a party goes under its
*current* session, because an item of an older epoch may be repeated by a device that has restarted and forgotten that
epoch's key. Current is the newest record (by the party's own sequence or clock, so that neither a lost sequence nor a
clock that jumped back hides it), or the session of the last message that only a running process can have sealed. A
hostile broker that replays old bytes can at most delay answers until the party's next message.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepriv.errors import AuthenticationError, ReplayError, TrustError, WireError
from edgepriv.wire.allowed import Allowed
from edgepriv.wire.epoch import SignedEpoch, read_epoch, unwrap_link
from edgepriv.wire.link import LinkSession
from gateway.store import CONFLICT, DUPLICATE, EpochRow

if TYPE_CHECKING:
    from edgepriv.keys import Identity
    from gateway.roster import Roster
    from gateway.store import Store

MAX_CACHED = 8192


class UnknownEpochError(WireError):
    """A message of an epoch whose record has not arrived; the party repeats both."""


@dataclass(slots=True)
class Session:
    """An open session: the stored record, its parsed form and the link."""

    row: EpochRow
    signed: SignedEpoch
    link: LinkSession

    @property
    def party(self) -> str:
        """The party's full name."""
        return self.row.party


class Sessions:
    """Finds sessions by epoch, by record and by party; a bounded cache over the store."""

    def __init__(self, identity: Identity, roster: Roster, store: Store) -> None:
        self._identity, self._roster, self._store = identity, roster, store
        self._cache: OrderedDict[bytes, Session] = OrderedDict()
        self._current: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._cache)

    def accept(self, raw: bytes, party: str, now: float) -> tuple[Session, str]:
        """Take an epoch record that arrived on ``party``'s topic.

        Returns:
            The session and ``stored`` or ``duplicate``.

        Raises:
            WireError: malformed, another party's topic, or a closed epoch.
            ReplayError: the epoch id was used with another record.
            AuthenticationError: not signed by the party, or not for this gateway.
            TrustError: the party is unknown or revoked, or the owner's policy does not permit such a record.
        """
        signed = read_epoch(raw, self._roster.trust)
        record = signed.record
        if record.party != party:
            raise WireError("an epoch record on another party's topic")
        self._check_policy(signed, now)
        link = LinkSession(unwrap_link(record, self._identity), record.epoch_id, party, side="gateway")
        outcome = self._store.add_epoch(signed, now)
        row = self._store.epoch(record.epoch_id)
        if outcome == CONFLICT or row is None:
            raise ReplayError("an epoch id was used for two records")
        if row.closed:
            raise WireError("the epoch is older than what this gateway keeps")
        session = self._remember(Session(row, signed, link))
        newest = self._current.get(party) or self._newest(party)
        if newest is None or _is_newer(row, newest.row, first_time=outcome != DUPLICATE):
            self._current[party] = session
        return session, outcome

    def _check_policy(self, signed: SignedEpoch, now: float) -> None:
        """Refuse a new record that no recipient may open: the device keeps its frames, the rejection is counted."""
        record = signed.record
        if self._roster.party(record.party, now).role != "device" or record.max_frames == 0:
            return  # a session without frames has nothing that a recipient would open
        refusal = Allowed.by_policy(self._roster.trust.policy_for(record.party)).refusal(record)
        if refusal and self._store.epoch(record.epoch_id) is None:
            raise TrustError(f"the owner's policy for {record.party} does not permit {refusal}")

    def by_epoch(self, epoch_id: bytes) -> Session:
        """The session of an epoch, or UnknownEpochError."""
        if session := self._cache.get(epoch_id):
            self._cache.move_to_end(epoch_id)
            return session
        return self._load(self._store.epoch(epoch_id))

    def by_record(self, digest: bytes) -> Session:
        """The session that a frame's header binds, or UnknownEpochError."""
        row = self._store.epoch_by_digest(digest)
        return self.by_epoch(row.epoch_id) if row else self._load(None)

    def current(self, party: str) -> Session | None:
        """The session under which to speak to a party, or None."""
        if session := self._current.get(party):
            return session
        newest = self._newest(party)
        if newest is not None:
            self._current[party] = newest
        return newest

    def _newest(self, party: str) -> Session | None:
        rows = self._store.database.query(
            "SELECT epoch_id FROM epochs WHERE party = ? AND closed = 0"
            " ORDER BY seq DESC, created DESC, id DESC LIMIT 1",
            (party,),
        )
        try:
            return self.by_epoch(bytes(rows[0][0])) if rows else None
        except (WireError, AuthenticationError, TrustError):
            return None

    def alive(self, session: Session) -> None:
        """A message that is never repeated came under this session: its process runs."""
        self._current[session.party] = session

    def forget(self) -> None:
        """Drop the caches (after a failed transaction: they may name what was rolled back)."""
        self._cache.clear()
        self._current.clear()

    def _load(self, row: EpochRow | None) -> Session:
        if row is None or row.closed:
            raise UnknownEpochError("no record of this epoch")
        signed = read_epoch(row.raw, self._roster.trust)
        link = LinkSession(unwrap_link(signed.record, self._identity), row.epoch_id, row.party, side="gateway")
        return self._remember(Session(row, signed, link))

    def _remember(self, session: Session) -> Session:
        """Cache a session; an open one is kept, so that its sequence numbers never start again under one salt."""
        known = self._cache.get(session.row.epoch_id)
        if known is not None:
            return known
        self._cache[session.row.epoch_id] = session
        while len(self._cache) > MAX_CACHED:
            _, old = self._cache.popitem(last=False)
            if self._current.get(old.party) is old:
                del self._current[old.party]
        return session


def _is_newer(row: EpochRow, than: EpochRow, *, first_time: bool) -> bool:
    """By sequence or clock; of two sessions of the same second the one that arrived later."""
    if row.seq > than.seq or row.created > than.created:
        return True
    return first_time and (row.seq, row.created) == (than.seq, than.created)
