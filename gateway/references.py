"""Trusted reference updates of the rule fltrust: taken with a good signature, used with the weights they name.

Whom the gateway believes: the parties in ``[rounds] references`` (a risk service, or a canary device), by default every
risk service in the owner's list. The statement is stored beside its update and checked again when a round starts, so
that a revoked sender's reference is not used any more.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from edgepriv.errors import ConfigError, DataError, EdgeprivError, RefusedError, TrustError
from edgepriv.federated.layout import Layout
from edgepriv.wire.reference import Reference, read_reference
from edgepriv.wire.update import decode_update
from gateway import query_args

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.round_driver import RoundDriver
    from gateway.sessions import Session
    from gateway.store import Store

META = "rounds_reference"
MAX_BYTES = 1 << 30
HINT = "edgepriv federated reference makes one, edgepriv-gateway rounds reference hands it in"


class References:
    """The one reference that the next round may use."""

    def __init__(self, rounds: RoundDriver, store: Store) -> None:
        self._rounds, self._store = rounds, store

    @property
    def senders(self) -> tuple[str, ...]:
        """Full names in ``[rounds] references``."""
        return sender_names(self._rounds.settings)

    def add(self, statement: bytes, raw: bytes, now: float) -> dict[str, Any]:
        """Take a signed reference update.

        Raises:
            EdgeprivError: not signed by who may, not for the weights in force, or not an update of them.
        """
        head, found = self._rounds.newest_head(), self._read(statement, now)
        if not head or found.base != head["digest"]:
            raise RefusedError("the reference is for other weights than those in force", hint="make it anew")
        if hashlib.sha256(raw).digest() != found.update:
            raise DataError("the update is not the one that was signed")
        weights = decode_update(self._rounds.conductor.model_path(found.base).read_bytes(), max_bytes=MAX_BYTES).tensors
        layout = Layout([name, list(array.shape)] for name, array in weights.items())
        layout.flatten(decode_update(raw, max_bytes=MAX_BYTES).tensors)
        self._rounds.conductor.add_model(raw)
        kept = {"statement": statement, "update": found.update, "base": found.base, "sender": found.sender}
        with self._store.batch():
            self._store.set_meta(META, kept)
        return {"base": found.base, "update": found.update, "sender": found.sender}

    def add_files(self, update: Path, statement: Path, now: float) -> dict[str, Any]:
        """As `add`, from files."""
        try:
            return self.add(statement.read_bytes(), update.read_bytes(), now)
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}") from None

    def current(self, base: bytes, now: float) -> Reference:
        """The reference for these weights, checked again.

        Raises:
            RefusedError: there is none, or it is no longer good.
        """
        kept = self._store.meta(META) or {}
        if kept.get("base") != base:
            raise RefusedError("the rule fltrust needs a signed reference update for these weights", hint=HINT)
        try:
            return self._read(bytes(kept["statement"]), now)
        except EdgeprivError as error:
            raise RefusedError(f"the reference update is no longer good: {error}", hint=HINT) from error

    def kept(self) -> set[bytes]:
        """Digests of updates that must not be deleted."""
        kept = self._store.meta(META) or {}
        return {bytes(kept["update"])} if kept else set()

    def answer(self, session: Session, _role: str, args: dict[str, Any], now: float) -> dict[str, Any]:
        """Query ``reference``: without arguments the weights in force, with ``statement`` and ``update`` takes them."""
        if not args:
            head = self._rounds.newest_head()
            return {k: head[k] for k in ("digest", "size", "model") if k in head}
        statement = query_args.raw(args, "statement")
        if self._read(statement, now).sender != session.party:
            raise TrustError("a reference of another party")
        return self.add(statement, query_args.raw(args, "update"), now)

    def _read(self, statement: bytes, now: float) -> Reference:
        return read_reference(statement, self._rounds.trust, senders=self.senders, now=now)


def sender_names(settings: dict[str, Any]) -> tuple[str, ...]:
    """Names in ``[rounds] references``; ConfigError where they are none."""
    names = settings.get("references", ())
    if not isinstance(names, (list, tuple)) or not all(
        isinstance(n, str) and n.startswith(("risk-", "dev-")) for n in names
    ):
        raise ConfigError("[rounds] references is a list of names", hint='references = ["risk-lab", "dev-canary"]')
    return tuple(names)
