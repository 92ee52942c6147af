"""Enrolment: one-time tokens, and a CA that gives devices their certificate for the broker's door.

Renewal: an enrolled device proves by its identity key that it is itself, and gets a new certificate for the *same* TLS
key; other keys need a new token. A copied request therefore gains nobody anything.

Rules: a token is bound to one device name and lives 24 hours at most; only the SHA-256 of its secret is stored.
Consuming it and writing the device's row are one transaction. The same token with the same keys returns the same
certificate (a reply was lost); with other keys it is refused and counted as an alarm. The CA ignores what a request
calls itself. What a device may say is decided by the owner's list: the public keys collected here are for the owner
to sign, and nothing here believes them. It runs as a process of its own, so that the daemon never holds the CA's key.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

from edgepriv import files, primitives
from edgepriv.errors import AuthenticationError, RefusedError, TrustError, WireError
from edgepriv.keys import PublicIdentity, full_name
from edgepriv.primitives import x509
from edgepriv.wire.enrolment import (
    ID_BYTES,
    MAX_LIFETIME_S,
    SECRET_BYTES,
    USE,
    USE_RENEW,
    EnrolAnswer,
    EnrolRequest,
    RenewRequest,
    Token,
    proof_bytes,
    renewal_bytes,
)
from gateway.database import SqliteDatabase

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

log = logging.getLogger("gateway.enrol")

CA_DAYS, DEVICE_DAYS, SERVER_DAYS = 3650, 365, 30
YOUNG_S = 3600.0
_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS tokens (
        id BLOB PRIMARY KEY, secret_hash BLOB NOT NULL, device TEXT NOT NULL, created REAL NOT NULL,
        expires INTEGER NOT NULL, revoked INTEGER NOT NULL DEFAULT 0, keys BLOB, certificate BLOB,
        alarms INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE IF NOT EXISTS devices (
        name TEXT PRIMARY KEY, token BLOB NOT NULL, ed25519 BLOB NOT NULL, x25519 BLOB NOT NULL,
        certificate BLOB NOT NULL, enrolled REAL NOT NULL)""",
)


class Enrolment:
    """The CA and the tokens of one gateway, in a folder of mode 0700."""

    def __init__(self, folder: Path, *, clock: Callable[[], float], broker_ca: bytes = b"") -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder, self._clock, self._broker_ca = folder, clock, broker_ca
        self._db = SqliteDatabase(folder / "enrolment.sqlite")
        (folder / "enrolment.sqlite").chmod(0o600)
        self._db.script(_SCHEMA)
        self.ca = self._load_ca()

    def _load_ca(self) -> x509.KeyAndCertificate:
        """Read the CA, or make it on first use: its key first, so that a crash in between leaves no orphan."""
        key_path, certificate_path = self._folder / "ca.key", self._folder / "ca.crt"
        if certificate_path.is_file():
            return x509.KeyAndCertificate(key_path.read_bytes(), certificate_path.read_bytes())
        made = x509.new_ca("edgepriv device CA", self._clock(), CA_DAYS)
        files.replace(key_path, made.key, mode=0o600)
        files.replace(certificate_path, made.certificate, mode=0o644)
        return made

    def server_certificate(self, hosts: tuple[str, ...]) -> x509.KeyAndCertificate:
        """A short-lived certificate for the enrolment server; made anew at each start."""
        return x509.issue_server(self.ca, "edgepriv enrolment", hosts, self._clock(), SERVER_DAYS)

    def new_token(
        self, device: str, url: str, owner: PublicIdentity, *, lifetime_s: int, replace: bool = False
    ) -> Token:
        """Make a token for one device.

        Raises:
            ConfigError: not a name. RefusedError: over 24 hours, or the device is enrolled and not to be replaced.
        """
        if not 0 < lifetime_s <= MAX_LIFETIME_S:
            raise RefusedError("a token lives 24 hours at most")
        if not url.startswith("https://"):
            raise RefusedError("enrolment needs an https:// address")
        name, now = full_name("device", device), self._clock()
        if self._db.query("SELECT 1 FROM devices WHERE name = ?", (name,)) and not replace:
            raise RefusedError(f"{name} is enrolled", hint="--replace gives a replaced device new keys")
        token = Token(
            id=primitives.random_bytes(ID_BYTES),
            secret=primitives.random_bytes(SECRET_BYTES),
            device=name,
            url=url,
            ca_digest=x509.fingerprint(self.ca.certificate),
            owner_ed25519=owner.ed25519,
            owner_x25519=owner.x25519,
            expires=int(now + lifetime_s),
        )
        self._db.execute(
            "INSERT INTO tokens (id, secret_hash, device, created, expires) VALUES (?, ?, ?, ?, ?)",
            (token.id, _hash(token.secret), name, now, token.expires),
        )
        return token

    def revoke(self, token_id: bytes) -> bool:
        """Make an unused token useless; False when there is none."""
        changed = self._db.execute("UPDATE tokens SET revoked = 1 WHERE id = ? AND keys IS NULL", (token_id,))
        return changed > 0

    def enrol(self, request: EnrolRequest, trust: bytes = b"") -> EnrolAnswer:
        """Consume a token and issue the device's certificate, once.

        Raises:
            AuthenticationError: no such token, a wrong secret, a wrong proof, or used with other keys.
            TrustError: the token has expired.
            WireError: not a certificate request.
        """
        keys = _hash(x509.request_key(request.request) + request.ed25519 + request.x25519)
        self._check_proof(request)
        with self._db.transaction():
            row = self._token(request)
            if row["keys"] is not None and primitives.equal(bytes(row["keys"]), keys):
                return self._answer(row["device"], bytes(row["certificate"]), trust)
            if row["keys"] is None:
                self._check_age(row)
                return self._answer(row["device"], self._consume(row, request, keys), trust)
            self._db.execute("UPDATE tokens SET alarms = alarms + 1 WHERE id = ?", (request.token_id,))
        log.error("ALARM: the used token %s of %s came again with other keys", request.token_id.hex(), row["device"])
        raise AuthenticationError("this token was used by another key; tell whoever gave it to you")

    def renew(self, request: RenewRequest, trust: bytes = b"", *, revoked: Collection[str] = ()) -> EnrolAnswer:
        """A new certificate for the key that an enrolled device has already; a very young one is given again.

        Raises:
            AuthenticationError: not enrolled, revoked, a wrong proof, or another TLS key.
            WireError: not a certificate request.
        """
        with self._db.transaction():
            rows = self._db.query("SELECT ed25519, certificate FROM devices WHERE name = ?", (request.name,))
            identity, current = (bytes(rows[0][0]), bytes(rows[0][1])) if rows else (bytes(32), b"")
            primitives.verify(identity, USE_RENEW, renewal_bytes(request.name, request.request), request.proof)
            if request.name in revoked:
                raise AuthenticationError(f"{request.name} is revoked")
            if x509.request_key(request.request) != x509.certificate_key(current):
                raise AuthenticationError("renewal keeps the TLS key; other keys need a new token")
            if self._clock() - x509.valid_between(current)[0] > YOUNG_S + x509.SKEW_S:
                current = x509.issue(self.ca, request.request, request.name, self._clock(), DEVICE_DAYS)
                self._db.execute("UPDATE devices SET certificate = ? WHERE name = ?", (current, request.name))
        return self._answer(request.name, current, trust)

    def _answer(self, name: str, certificate: bytes, trust: bytes) -> EnrolAnswer:
        return EnrolAnswer(name, certificate, self.ca.certificate, self._broker_ca, trust)

    def _check_proof(self, request: EnrolRequest) -> None:
        if len(request.ed25519) != 32 or len(request.x25519) != 32:
            raise WireError("a public key has 32 bytes")
        message = proof_bytes(request.token_id, request.request, request.ed25519, request.x25519)
        primitives.verify(request.ed25519, USE, message, request.proof)

    def _token(self, request: EnrolRequest) -> dict[str, Any]:
        """The token's row, if the secret is right; one error for a wrong id and a wrong secret."""
        columns = ("secret_hash", "device", "expires", "revoked", "keys", "certificate")
        rows = self._db.query(f"SELECT {', '.join(columns)} FROM tokens WHERE id = ?", (request.token_id,))  # noqa: S608 - fixed names
        row: dict[str, Any] = {"secret_hash": bytes(32), "revoked": 1}
        if rows:
            row = dict(zip(columns, rows[0], strict=True))
        if not primitives.equal(bytes(row["secret_hash"]), _hash(request.secret)) or row["revoked"]:
            raise primitives.not_authentic()
        return row

    def _check_age(self, row: dict[str, Any]) -> None:
        if row["expires"] <= self._clock():
            raise TrustError("the enrolment token has expired", hint="ask for a new one: edgepriv-gateway token new")

    def _consume(self, row: dict[str, Any], request: EnrolRequest, keys: bytes) -> bytes:
        now = self._clock()
        certificate = x509.issue(self.ca, request.request, row["device"], now, DEVICE_DAYS)
        self._db.execute(
            "UPDATE tokens SET keys = ?, certificate = ? WHERE id = ?", (keys, certificate, request.token_id)
        )
        self._db.execute(
            "INSERT OR REPLACE INTO devices (name, token, ed25519, x25519, certificate, enrolled)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (row["device"], request.token_id, request.ed25519, request.x25519, certificate, now),
        )
        return certificate

    def devices(self) -> list[PublicIdentity]:
        """Public keys of enrolled devices, for the owner to sign."""
        rows = self._db.query("SELECT name, ed25519, x25519 FROM devices ORDER BY name")
        return [PublicIdentity("device", str(n), bytes(e), bytes(x)) for n, e, x in rows]

    def tokens(self) -> list[dict[str, Any]]:
        """All tokens without their secrets."""
        now = self._clock()
        rows = self._db.query("SELECT id, device, expires, revoked, keys, alarms FROM tokens ORDER BY created")
        return [
            {"id": bytes(i).hex(), "device": str(d), "expires": int(e), "alarms": int(a), "state": _state(e, r, k, now)}
            for i, d, e, r, k, a in rows
        ]

    def close(self) -> None:
        """Close the store."""
        self._db.close()


def _state(expires: Any, revoked: Any, keys: Any, now: float) -> str:
    if keys is not None:
        return "used"
    if revoked:
        return "revoked"
    return "open" if expires > now else "expired"


def _hash(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()
