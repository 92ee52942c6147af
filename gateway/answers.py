"""Queries and fetches: what each role may ask of the gateway.

Queries (``what``: arguments -> body of the reply):

``frames`` (recipient): ``after`` id, ``limit``, optional ``device``, ``since`` -> ``{"frames": [{"id", "digest",
"device", "counter", "size", "received", "epoch"}], "more"}``; only frames that are addressed to the asking key.
``epoch`` (recipient): ``digest`` -> ``{"record"}``, the signed bytes, which the recipient checks itself.
``trust`` (all): -> ``{"version", "digest", "size"}``; the list itself is fetched by its digest.
``models`` (device, risk): -> ``{"models": [...]}`` as `gateway.models` offers them to this party.
``verdict`` (risk): ``verdict`` -> ``{"accepted", "model"}``.
``windows`` (risk): optional ``since`` -> ``{"windows": [...], "models": [{"digest", "class", "count"}]}``, aggregated
outputs as they are published, and counts by the digest of the model that ran.
``rounds`` (risk): optional ``after`` number -> ``{"rounds": [...]}``, ended rounds without a report, oldest first, as
`gateway.round_audits` describes them; their weights are fetched by ``before``.
``report`` (risk): ``kind`` (``round``), ``subject`` (the round's number), ``report`` (a map of figures such as
``accuracy`` and ``leakage_bound``) -> ``{"accepted"}``: kept beside the round's record and shown with it. Of kind
``model`` (device): ``subject`` the model's SHA-256 in hex, ``report`` ``{"good", "reason"}``: moves its rollout.

A fetch is answered by chunks. Frames go to their recipients only; a device gets models and global weights.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Protocol

from edgepriv.errors import EdgeprivError, TrustError, WireError
from edgepriv.wire import cbor
from edgepriv.wire.messages import Fetch, Notice, Query, Reply
from gateway import outputs, query_args, round_audits
from gateway.store import store_failed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gateway.downlink import Downlink
    from gateway.roster import Roster
    from gateway.sessions import Session
    from gateway.store import Store

MAX_LISTED = 200
MODEL = "model"
DAY_S = 86_400
REPORT_KINDS = {"round"}
MAX_REPORT_BYTES = 64 << 10


class ModelsPort(Protocol):
    """What queries need of the models."""

    def offers(self, party: str, role: str, now: float) -> list[dict[str, Any]]:
        """Models that a party may fetch now."""
        ...

    def withheld(self, ref: bytes, party: str, role: str, now: float) -> str:
        """Why a party may not fetch a model's object now; empty where it may."""
        ...

    def take_verdict(self, raw: bytes, sender: str, now: float) -> dict[str, Any]:
        """Check and keep a verdict of the risk service."""
        ...

    def take_report(self, digest: bytes, device: str, *, good: bool, reason: str, now: float) -> None:
        """A device says how a model does."""
        ...


class Desk:
    """Answers parties out of the store."""

    def __init__(self, store: Store, roster: Roster, downlink: Downlink, models: ModelsPort) -> None:
        self._store, self._roster, self._downlink, self._models = store, roster, downlink, models
        self.weights: Callable[[bytes], tuple[Path, int] | None] | None = None
        self._table: dict[str, tuple[set[str], Callable[..., Any]]] = {
            "frames": ({"recipient"}, self._frames),
            "epoch": ({"recipient"}, self._epoch),
            "trust": ({"device", "recipient", "risk"}, self._trust),
            "models": ({"device", "risk"}, self._offers),
            "verdict": ({"risk"}, self._verdict),
            "windows": ({"risk"}, self._windows),
            "rounds": ({"risk"}, self._rounds),
            "report": ({"risk", "device"}, self._report),
        }

    def add(self, what: str, roles: set[str], answer: Callable[[Session, str, dict[str, Any], float], Any]) -> None:
        """Let another part of the gateway answer a kind of query."""
        self._table[what] = (roles, answer)

    def query(self, session: Session, role: str, query: Query, now: float) -> Reply:
        """Answer a query; a refusal is a reply with ``ok`` false and the reason."""
        roles, answer = self._table.get(query.what, (set(), None))
        if answer is None or role not in roles:
            return Reply(query.id, ok=False, body={"error": f"a {role} cannot ask for {query.what[:40]!r}"})
        try:
            return Reply(query.id, ok=True, body=answer(session, role, query.args, now))
        except (EdgeprivError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            if store_failed(error):
                raise  # no answer: the whole batch is done again when the store is back
            text = str(error) if isinstance(error, EdgeprivError) else "the query's arguments are not valid"
            return Reply(query.id, ok=False, body={"error": text[:300]})

    def fetch(self, session: Session, role: str, fetch: Fetch, now: float) -> Notice | None:
        """Begin to send an object, or say why not."""
        detail: dict[str, Any] = {"ref": fetch.ref}
        if len(fetch.ref) != 16:
            return Notice("unknown-object", "a reference has 16 bytes", detail)
        found = self._find(session, role, fetch.ref, now)
        if isinstance(found, str):
            return Notice("withheld", found, detail)
        if found is None:
            return Notice("unknown-object", "there is no such object for this party", detail)
        if not self._downlink.serve(session.party, fetch, *found):
            return Notice("bad-fetch", "the range or chunk size does not fit, or too many fetches are open", detail)
        return None

    def _find(self, session: Session, role: str, ref: bytes, now: float) -> Any:
        if ref == hashlib.sha256(self._roster.raw).digest()[:16]:
            return self._roster.raw, len(self._roster.raw)
        if role == "recipient":
            return self._store.frame_content(ref, self._roster.party(session.party, now).key_id)
        if self.weights is not None and (found := self.weights(ref)):
            return found
        if found := self._store.object_content(ref, MODEL):
            return self._models.withheld(ref, session.party, role, now) or found
        return None

    # --- queries ------------------------------------------------------------------------------------------

    def _frames(self, session: Session, _role: str, args: dict[str, Any], now: float) -> Any:
        key_id = self._roster.party(session.party, now).key_id
        limit = min(max(query_args.whole(args, "limit", 100), 1), MAX_LISTED)
        rows = self._store.frames_for(
            key_id,
            after=query_args.whole(args, "after", 0),
            limit=limit,
            party=query_args.text(args, "device") if args.get("device") is not None else None,
            since=query_args.number(args, "since", 0.0),
        )
        listed = [
            {
                "id": r.id, "digest": r.digest, "device": r.party, "counter": r.counter, "size": r.size,
                "received": r.received, "epoch": r.record,
            }
            for r in rows
        ]  # fmt: skip
        return {"frames": listed, "more": len(rows) == limit}

    def _epoch(self, session: Session, _role: str, args: dict[str, Any], now: float) -> Any:
        row = self._store.epoch_by_digest(query_args.raw(args, "digest"))
        if row is None or row.closed:
            raise WireError("no such epoch record")
        key_id = self._roster.party(session.party, now).key_id
        addressed = self._store.database.query(
            "SELECT 1 FROM epoch_recipients WHERE epoch = ? AND key_id = ?", (row.id, key_id)
        )
        if not addressed:
            raise TrustError("this epoch is not addressed to you")
        return {"record": row.raw}

    def _trust(self, _session: Session, _role: str, _args: dict[str, Any], _now: float) -> Any:
        raw = self._roster.raw
        return {"version": self._roster.trust.version, "digest": hashlib.sha256(raw).digest(), "size": len(raw)}

    def _offers(self, session: Session, role: str, _args: dict[str, Any], now: float) -> Any:
        return {"models": self._models.offers(session.party, role, now)}

    def _verdict(self, session: Session, _role: str, args: dict[str, Any], now: float) -> Any:
        return self._models.take_verdict(query_args.raw(args, "verdict"), session.party, now)

    def _windows(self, _session: Session, _role: str, args: dict[str, Any], now: float) -> Any:
        since = query_args.number(args, "since", now - DAY_S)
        database = self._store.database
        return {"windows": outputs.recent(database, since=since), "models": outputs.by_model(database, since=since)}

    def _rounds(self, _session: Session, _role: str, args: dict[str, Any], _now: float) -> Any:
        after = query_args.whole(args, "after", -1)
        return {"rounds": round_audits.waiting(self._store.database, self.weights, after=after)}

    def _report(self, session: Session, role: str, args: dict[str, Any], now: float) -> Any:
        kind, subject = query_args.text(args, "kind"), query_args.text(args, "subject")
        report = query_args.table(args, "report")
        if role == "device":
            if kind != "model" or type(report.get("good")) is not bool:
                raise WireError("a device reports on models, good or not")
            digest, reason = bytes.fromhex(subject), str(report.get("reason", ""))
            self._models.take_report(digest, session.party, good=report["good"], reason=reason, now=now)
            return {"accepted": True}
        raw = cbor.encode(report)
        if kind not in REPORT_KINDS or len(subject) > 64 or len(raw) > MAX_REPORT_BYTES:
            raise WireError("a report of an unknown kind, or too large")
        round_audits.keep(self._store.database, kind, subject, session.party, now, raw)
        return {"accepted": True}
