"""How operators reach the daemon: commands are rows of the store, carried out by the work loop, answered in the row.

The command line and the pages are processes of their own and hold no key of the gateway. Every command is audited
with who asked for it, also when it was refused.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from edgepriv.errors import EdgeprivError, TemporaryError
from edgepriv.wire import cbor
from gateway.store import store_failed, unpack

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.store import Store

MAX_PER_TURN = 16
KEPT_S = 7 * 86_400


def submit(store: Store, actor: str, action: str, args: dict[str, Any], now: float) -> int:
    """Ask the daemon for something; returns the command's number."""
    rows = store.database.query(
        "INSERT INTO commands (at, actor, action, args, state) VALUES (?, ?, ?, ?, 'new') RETURNING id",
        (now, actor, action, cbor.encode(args)),
    )
    return int(rows[0][0])


def wait(store: Store, number: int, timeout_s: float) -> dict[str, Any]:
    """Wait for a command's result.

    Raises:
        TemporaryError: the daemon did not answer in time.
        EdgeprivError: it refused.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        state, raw = store.database.query("SELECT state, result FROM commands WHERE id = ?", (number,))[0]
        result = dict(unpack(raw))
        if state == "done":
            return result
        if state == "refused":
            raise EdgeprivError(result.get("error", "refused"), hint=result.get("hint", ""))
        time.sleep(0.1)
    raise TemporaryError("the gateway did not answer", hint="is it running? edgepriv-gateway status")


class CommandQueue:
    """The daemon's side."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._actions: dict[str, Callable[[dict[str, Any], str, float], dict[str, Any]]] = {}

    def on(self, action: str, carry_out: Callable[[dict[str, Any], str, float], dict[str, Any]]) -> None:
        """Register an action: arguments, actor, time -> result."""
        self._actions[action] = carry_out

    def tick(self, now: float) -> int:
        """Carry out what waits; returns how many."""
        rows = self._store.database.query(
            "SELECT id, actor, action, args FROM commands WHERE state = 'new' ORDER BY id LIMIT ?", (MAX_PER_TURN,)
        )
        for number, actor, action, args in rows:
            self._one(number, actor, action, unpack(args), now)
        return len(rows)

    def _one(self, number: int, actor: str, action: str, args: dict[str, Any], now: float) -> None:
        carry_out = self._actions.get(action)
        try:
            if carry_out is None:
                raise EdgeprivError(f"unknown command {action!r}")
            state, result = "done", carry_out(args, actor, now)
        except (EdgeprivError, KeyError, TypeError, ValueError) as error:
            if store_failed(error):
                raise  # the command is carried out when the store is back
            state, result = "refused", {"error": str(error), "hint": getattr(error, "hint", "")}
        with self._store.batch():
            self._store.database.execute(
                "UPDATE commands SET state = ?, result = ? WHERE id = ?", (state, cbor.encode(result), number)
            )
            self._store.audit(actor, f"command-{action}", {"state": state, "args": args, **_reason(result)}, now)
            self._store.database.execute("DELETE FROM commands WHERE at < ? AND state <> 'new'", (now - KEPT_S,))


def _reason(result: dict[str, Any]) -> dict[str, Any]:
    return {"reason": result["error"]} if "error" in result else {}
