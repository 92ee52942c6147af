"""New versions of the followed model by way of the gateway, which can deliver them and can neither make nor choose one.

The device asks which models it is offered, fetches the newest one of the followed id by its digest, has it installed by
a one-shot process (`edgepriv model install`: metadata, signatures, verdict, self-test, switch), opens it, and tells the
gateway how that went until the gateway has said that it knows. What was refused is not tried again; what failed for a
reason that may pass (no room, a clock that made the metadata expire, a process that was killed) is tried again, later
each time and `MAX_TRIES` times at most, and only then reported as refused.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from edgepriv import files, primitives
from edgepriv.device.packing import MAX_DELIVERY_BYTES
from edgepriv.errors import WireError
from edgepriv.wire.messages import Query, Reply

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgepriv.device.fetch import Fetcher
    from edgepriv.device.models import ModelStore

log = logging.getLogger(__name__)
RESEND_S = 30.0
MAX_KEPT = 32
INSTALL_S = 3600.0
RETRY_S, MAX_RETRY_S, MAX_TRIES = 60.0, 6 * 3600.0, 12


class Installer(Protocol):
    """Installs one shipment beside the running model."""

    def start(self, shipment: Path) -> None:
        """Begin."""
        ...

    def poll(self) -> dict[str, Any] | None:
        """The report when it is done: ``installed``, ``reason``, ``again`` (it may pass), ``attempt``."""
        ...


class ProcessInstaller:
    """`edgepriv model install` as a child, which refuses any model but the one that ``config`` follows.

    Its memory and libraries are gone when it ends.
    """

    def __init__(self, config: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._child: subprocess.Popen[bytes] | None = None
        self._began = 0.0

    def start(self, shipment: Path) -> None:
        """See Installer."""
        command = [sys.executable, "-m", "edgepriv", "model", "install", str(shipment), "--config", str(self._config)]
        self._child = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._began = self._clock()

    def poll(self) -> dict[str, Any] | None:
        """See Installer."""
        child = self._child
        if child is None:
            return None
        if child.poll() is None:
            if self._clock() - self._began > INSTALL_S:
                child.kill()
            return None
        self._child = None
        text = child.communicate()[0]
        try:
            report: dict[str, Any] = json.loads(text)
        except ValueError:
            reason = f"the installation ended with code {child.returncode}"
            report = {"installed": False, "reason": reason, "again": True}
        return report


@dataclass(frozen=True, slots=True)
class Tried:
    """One delivery that was tried: the gateway's digest, the store's name of the attempt (delivery and permission),
    how it went, whether it was told, and how often it failed for a reason that may pass.
    """

    object: str
    delivery: str = ""
    good: bool | None = None
    reason: str = ""
    told: bool = False
    tries: int = 0

    @property
    def waits(self) -> bool:
        """Whether it is to be tried again."""
        return self.good is None and not self.delivery


class ModelUpdates:
    """Follows one model id at the gateway."""

    def __init__(
        self,
        follow: str,
        store: Callable[[], ModelStore],
        fetcher: Fetcher,
        send: Callable[[Any], bool],
        installer: Installer,
        *,
        every_s: float,
    ) -> None:
        self._follow, self._store, self._fetcher, self._send = follow, store, fetcher, send
        self.installer, self._every_s = installer, every_s
        self._path = store().folder / "tried.json"
        self._tried = self._read()
        self._asked, self._question, self._now = -1e18, b"", 0.0
        self._later: dict[str, float] = {}
        self._wanted: tuple[bytes, int] | None = None
        self._installing: str = ""
        self._told_at, self._telling = -1e18, (b"", "")
        self.settle()

    # --- durable memory -----------------------------------------------------------------------------------

    def _read(self) -> dict[str, Tried]:
        try:
            return {row["object"]: Tried(**row) for row in json.loads(self._path.read_text())}
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def _note(self, tried: Tried) -> None:
        self._tried.pop(tried.object, None)
        self._tried[tried.object] = tried
        kept = list(self._tried.values())[-MAX_KEPT:]
        self._tried = {one.object: one for one in kept}
        files.replace(self._path, json.dumps([asdict(one) for one in kept]).encode())

    def settle(self) -> None:
        """Learn from the store how an installed delivery did: confirmed, or rolled back and why."""
        store = self._store()
        state, running = store.state, store.current
        for one in [one for one in self._tried.values() if one.delivery]:
            reason = state.refused.get(one.delivery, "")
            here = one.delivery in {running.attempt, running.name}
            if ":" not in one.delivery and not here:  # noted by an older edgepriv, without the permission
                same = [why for name, why in state.refused.items() if name.partition(":")[0] == one.delivery]
                reason = "".join(same[-1:])
            if reason and one.good is not False:
                self._note(replace(one, good=False, reason=reason, told=False))
            elif not reason and one.good is not True and here and not state.trial:
                self._note(replace(one, good=True, reason="", told=False))

    # --- steps --------------------------------------------------------------------------------------------

    def step(self, now: float) -> bool:
        """Ask, fetch, install, tell; True when another model was installed and is to be opened."""
        self._now = now
        self._ask(now)
        self._tell(now)
        if self._installing:
            return self._installed()
        if self._wanted is None:
            return False
        path = self._fetcher.want(*self._wanted, max_bytes=MAX_DELIVERY_BYTES)
        if path is not None:
            self._installing, self._wanted = self._wanted[0].hex(), None
            self.installer.start(path)
        return False

    def _ask(self, now: float) -> None:
        if now - self._asked >= self._every_s and not self._installing:
            question = Query(primitives.random_bytes(8), "models", {})
            if self._send(question):
                self._asked, self._question = now, question.id

    def _installed(self) -> bool:
        report = self.installer.poll()
        if report is None:
            return False
        name, self._installing = self._installing, ""
        installed, reason = report.get("installed") is True, str(report.get("reason", "no reason given"))
        tries = self._tried.get(name, Tried(name)).tries + 1
        if not installed and report.get("again") is True and tries < MAX_TRIES:
            pause = min(RETRY_S * 2 ** (tries - 1), MAX_RETRY_S)
            log.warning("the delivery %s is tried again in %.0f s: %s", name[:12], pause, reason)
            self._later[name] = self._now + pause
            self._note(Tried(name, reason=reason, tries=tries))
            return False  # and its file stays
        self._fetcher.discard(bytes.fromhex(name))
        if installed:
            self._note(Tried(name, str(report.get("attempt", ""))))
        else:
            log.error("the delivery %s was refused: %s", name[:12], reason)
            self._note(Tried(name, good=False, reason=reason))
        return installed

    def _tell(self, now: float) -> None:
        """Report what the gateway has not acknowledged, one at a time."""
        due = next((one for one in self._tried.values() if one.good is not None and not one.told), None)
        if due is None or now - self._told_at < RESEND_S:
            return
        report = {"good": due.good, "reason": due.reason[:200]}
        query = Query(primitives.random_bytes(8), "report", {"kind": "model", "subject": due.object, "report": report})
        if self._send(query):
            self._told_at, self._telling = now, (query.id, due.object)

    def on_reply(self, reply: Reply) -> None:
        """Take an answer; others' answers are ignored, a malformed one is a WireError."""
        if reply.id == self._question:
            self._question = b""
            self._choose(reply)
        elif reply.id == self._telling[0]:
            one = self._tried.get(self._telling[1])
            self._telling, self._told_at = (b"", ""), -1e18
            if one is not None:  # a refusal is final too: the gateway does not know this model any more
                self._note(replace(one, told=True))

    def _choose(self, reply: Reply) -> None:
        models = reply.body.get("models") if reply.ok and isinstance(reply.body, dict) else None
        if not isinstance(models, list):
            raise WireError("the gateway's list of models is malformed")
        newest = self._newest(models)
        if self._installing:
            return
        for one in [one for one in self._tried.values() if one.waits]:
            if newest is None or one.object != newest[0].hex():
                del self._tried[one.object]
                self._fetcher.discard(bytes.fromhex(one.object))
        if self._wanted is not None and self._wanted != newest:
            self._fetcher.drop(self._wanted[0])
        self._wanted = newest if newest is not None and self._due(newest[0].hex()) else None

    def _newest(self, models: list[Any]) -> tuple[bytes, int] | None:
        """Digest and size of the newest delivery of the followed model; no other one counts."""
        for model in reversed(models):
            match model:
                case {"id": str() as name, "digest": bytes() as digest, "size": int() as size}:
                    if name == self._follow and len(digest) == 32:
                        return (digest, size) if 0 < size <= MAX_DELIVERY_BYTES else None
                case _:
                    raise WireError("the gateway's list of models is malformed")
        return None

    def _due(self, name: str) -> bool:
        """Whether a delivery is to be tried now."""
        one = self._tried.get(name)
        return one is None or (one.waits and self._now >= self._later.get(name, -1e18))

    @property
    def counters(self) -> dict[str, int]:
        """For the status message."""
        found = [one.good for one in self._tried.values()]
        return {"models_installed": found.count(True), "models_refused": found.count(False)}
