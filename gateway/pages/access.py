"""Who may use the pages: operators, sessions, CSRF tokens and rates. No password is ever set for anybody.

Operators are added by ``edgepriv-gateway operators add``, which prints a random token of 32 bytes once and keeps its
SHA-256 (a random token needs no slow hash). A session is a random id in memory: it cannot be forged and ends with
the process. With a client CA the name in the certificate logs in; the role still comes from the operators' file.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepriv import files
from edgepriv.errors import ConfigError, KeyFileError
from edgepriv.settings import read_toml

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROLES = ("viewer", "operator")
NAME = re.compile(r"[a-z0-9-]{1,48}")
SESSION_S = 8 * 3600
MAX_SESSIONS = 1000
MAX_CLIENTS = 10_000
LOGINS_PER_MINUTE = 10


@dataclass(frozen=True, slots=True)
class Operator:
    """Somebody who may log in."""

    name: str
    role: str
    token_sha256: str


@dataclass(frozen=True, slots=True)
class Session:
    """A log-in: ``csrf`` must come back with each change."""

    name: str
    role: str
    csrf: str
    expires: float


class Operators:
    """The operators' file, read again when it changes."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._stamp = path, (0, 0)
        self._known: dict[str, Operator] = {}

    def all(self) -> list[Operator]:
        """Everybody; empty where there is no file, so that a fresh install lets nobody in."""
        if self._path is None or not self._path.is_file():
            return []
        stat = self._path.stat()
        if (stat.st_mtime_ns, stat.st_size) != self._stamp:
            self._known = _read(self._path)
            self._stamp = (stat.st_mtime_ns, stat.st_size)
        return list(self._known.values())

    def by_token(self, token: str) -> Operator | None:
        """Whose token it is; compares with every one in constant time."""
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        found = [o for o in self.all() if hmac.compare_digest(o.token_sha256, digest)]
        return found[0] if found else None

    def by_name(self, name: str) -> Operator | None:
        """The operator of a verified certificate's name."""
        return next((o for o in self.all() if o.name == name), None)

    def add(self, name: str, role: str) -> str:
        """Add or replace an operator; returns the token, which is kept nowhere."""
        if self._path is None:
            raise ConfigError("[pages] tokens names no file", hint='tokens = "operators.toml"')
        if role not in ROLES or not NAME.fullmatch(name):
            raise ConfigError("a role is viewer or operator, a name is 1 to 48 of a-z, 0-9 and -")
        token = secrets.token_urlsafe(32)
        known = {o.name: o for o in self.all()}
        known[name] = Operator(name, role, hashlib.sha256(token.encode()).hexdigest())
        self._write(list(known.values()))
        return token

    def remove(self, name: str) -> bool:
        """Take somebody out; open sessions end at their next request."""
        kept = [o for o in self.all() if o.name != name]
        gone = len(kept) != len(self._known)
        if gone:
            self._write(kept)
        return gone

    def _write(self, operators: list[Operator]) -> None:
        assert self._path is not None  # noqa: S101 - callers checked; tells the type checker
        text = "".join(f'[{o.name}]\nrole = "{o.role}"\ntoken_sha256 = "{o.token_sha256}"\n\n' for o in operators)
        files.replace(self._path, text.encode(), mode=0o600)
        self._stamp = (0, 0)


def _read(path: Path) -> dict[str, Operator]:
    if path.stat().st_mode & 0o077:
        raise KeyFileError(f"{path} can be read by others", hint=f"chmod 600 {path}")
    known = {}
    for name, row in read_toml(path).items():
        if not isinstance(row, dict) or row.get("role") not in ROLES or len(str(row.get("token_sha256", ""))) != 64:
            raise ConfigError(f"{path}: {name!r} is not an operator", hint="edgepriv-gateway operators add")
        known[name] = Operator(name, row["role"], row["token_sha256"])
    return known


class Sessions:
    """Open sessions by id; bounded, the oldest goes first."""

    def __init__(self, operators: Operators, clock: Callable[[], float] = time.time) -> None:
        self._operators, self._clock = operators, clock
        self._open: OrderedDict[str, Session] = OrderedDict()

    def begin(self, operator: Operator) -> tuple[str, Session]:
        """A new session and its id."""
        key = secrets.token_urlsafe(32)
        session = Session(operator.name, operator.role, secrets.token_urlsafe(24), self._clock() + SESSION_S)
        self._open[key] = session
        while len(self._open) > MAX_SESSIONS:
            self._open.popitem(last=False)
        return key, session

    def find(self, key: str) -> Session | None:
        """The session of a cookie, where its operator is still listed with the same role."""
        session = self._open.get(key)
        if session is None:
            return None
        operator = self._operators.by_name(session.name)
        if session.expires <= self._clock() or operator is None or operator.role != session.role:
            self._open.pop(key, None)
            return None
        return session

    def end(self, key: str) -> None:
        """Log out."""
        self._open.pop(key, None)


class Rate:
    """At most ``per_minute`` requests for each client address, in a sliding minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._seen: OrderedDict[str, deque[float]] = OrderedDict()

    def allow(self, client: str) -> bool:
        """Count a request; False where it is one too many."""
        now = self._clock()
        times = self._seen.setdefault(client, deque())
        self._seen.move_to_end(client)
        while len(self._seen) > MAX_CLIENTS:
            self._seen.popitem(last=False)
        while times and now - times[0] > 60:
            times.popleft()
        if len(times) >= self._per_minute:
            return False
        times.append(now)
        return True
