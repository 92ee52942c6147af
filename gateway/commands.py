"""How operators reach the daemon: commands are rows of the store, carried out by the work loop, answered in the row.

The command line and the pages are processes of their own and hold no key of the gateway. Every command that the daemon
answers is audited with who asked for it, also when it was refused.

Rules: a command that nobody waits for any more is not carried out: whoever asked takes it back when the time is over,
and the daemon refuses what it finds after that. What a command changes and its answer are one commit; the few that
work on files for long (`REPEATABLE`), and do no harm when they are done twice, are marked ``running`` first instead. A
store that fails leaves a command where it is, and it is done again within its time; a path of its own that fails is a
refusal.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from edgepriv.errors import EdgeprivError, StorageFullError, TemporaryError
from edgepriv.wire import cbor
from gateway.store import store_failed, unpack

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.store import Store

MAX_PER_TURN = 16
KEPT_S = 7 * 86_400
REPEATABLE = {"erase", "model-add", "round-weights", "round-reference"}
TOO_LATE = "the command came too late: nobody waits for it any more"
HINT = "is it running? edgepriv-gateway status"
Action: TypeAlias = "Callable[[dict[str, Any], str, float], dict[str, Any]]"


def submit(store: Store, actor: str, action: str, args: dict[str, Any], now: float, *, timeout_s: float = 0.0) -> int:
    """Ask the daemon for something, to be begun within ``timeout_s`` (0: whenever); returns the command's number."""
    rows = store.database.query(
        "INSERT INTO commands (at, actor, action, args, state, expires) VALUES (?, ?, ?, ?, 'new', ?) RETURNING id",
        (now, actor, action, cbor.encode(args), now + timeout_s if timeout_s else 0.0),
    )
    return int(rows[0][0])


def wait(store: Store, number: int, timeout_s: float) -> dict[str, Any]:
    """Wait for a command's result; one that was not begun when the time is over is taken back.

    Raises:
        TemporaryError: the daemon did not answer in time; the message says what became of the command.
        EdgeprivError: it refused.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(TemporaryError):  # a busy store is asked again
            if (result := _answer(store, number)) is not None:
                return result
        time.sleep(0.1)
    try:
        taken_back = store.database.execute(
            "UPDATE commands SET state = 'refused', result = ? WHERE id = ? AND state = 'new'",
            (cbor.encode({"error": TOO_LATE}), number),
        )
        if not taken_back and (result := _answer(store, number)) is not None:
            return result
    except (TemporaryError, StorageFullError) as error:
        text = f"the gateway did not answer, and command {number} could not be taken back ({error}): it is still queued"
        raise TemporaryError(f"{text}, and is refused unless it is begun in time", hint=HINT) from error
    if taken_back:
        raise TemporaryError("the gateway did not answer; the command was taken back, and nothing was done", hint=HINT)
    raise TemporaryError(f"the gateway is still at command {number}", hint=HINT)


def _answer(store: Store, number: int) -> dict[str, Any] | None:
    """The result of a command, or None where there is none yet; raises what it was refused for."""
    state, raw = store.database.query("SELECT state, result FROM commands WHERE id = ?", (number,))[0]
    result = dict(unpack(raw))
    if state == "refused":
        raise EdgeprivError(result.get("error", "refused"), hint=result.get("hint", ""))
    return result if state == "done" else None


class CommandQueue:
    """The daemon's side."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._actions: dict[str, tuple[Action, bool]] = {}

    def on(self, action: str, carry_out: Action, *, repeatable: bool = False) -> None:
        """Register an action: arguments, actor, time -> result.

        ``repeatable``: it works on files, outside the commit of its answer, and does no harm when it is done twice.
        """
        self._actions[action] = carry_out, repeatable or action in REPEATABLE

    def tick(self, now: float) -> int:
        """Carry out what waits; returns how many."""
        rows = self._store.database.query(
            "SELECT id, actor, action, args, expires FROM commands WHERE state IN ('new', 'running')"
            " ORDER BY id LIMIT ?",
            (MAX_PER_TURN,),
        )
        for number, actor, action, args, expires in rows:
            self._one(_Command(number, actor, action, unpack(args)), expires, now)
        return len(rows)

    def _one(self, command: _Command, expires: float, now: float) -> None:
        carry_out, repeatable = self._actions.get(command.action, (None, False))
        try:
            if carry_out is None:
                raise EdgeprivError(f"unknown command {command.action!r}")
            if expires and now > expires:
                raise TemporaryError(TOO_LATE)
            with contextlib.nullcontext() if repeatable else self._store.batch():
                if self._begun(command):
                    self._answered(command, "done", carry_out(command.args, command.actor, now), now)
        except (EdgeprivError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, OSError) as error:
            own = isinstance(error, OSError) and str(error.filename) in {str(value) for value in command.args.values()}
            if store_failed(error) and not own and str(error) != TOO_LATE:
                raise  # the command is carried out when the store is back, unless that is too late
            text = f"cannot read {error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            self._answered(command, "refused", {"error": text, "hint": getattr(error, "hint", "")}, now)

    def _begun(self, command: _Command) -> bool:
        """Whether it is the daemon's now; False where whoever asked has just taken it back."""
        sql = "UPDATE commands SET state = 'running' WHERE id = ? AND state IN ('new', 'running')"
        return bool(self._store.database.execute(sql, (command.number,)))

    def _answered(self, command: _Command, state: str, result: dict[str, Any], now: float) -> None:
        detail = {"state": state, "args": command.args, **_reason(result)}
        with self._store.batch():
            self._store.database.execute(
                "UPDATE commands SET state = ?, result = ? WHERE id = ?", (state, cbor.encode(result), command.number)
            )
            self._store.audit(command.actor, f"command-{command.action}", detail, now)
            self._store.database.execute(
                "DELETE FROM commands WHERE at < ? AND state IN ('done', 'refused')", (now - KEPT_S,)
            )


@dataclass(frozen=True, slots=True)
class _Command:
    number: int
    actor: str
    action: str
    args: dict[str, Any]


def _reason(result: dict[str, Any]) -> dict[str, Any]:
    return {"reason": result["error"]} if "error" in result else {}
