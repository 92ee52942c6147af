"""``edgepriv enroll``: turn a one-time token into keys, a certificate and the pinned owner."""

from __future__ import annotations

import hashlib
import http.client
import json
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from edgepriv import files
from edgepriv.errors import (
    AuthenticationError,
    ConfigError,
    KeyFileError,
    MissingDependencyError,
    MissingFileError,
    TrustError,
    UnavailableError,
    WireError,
)

if TYPE_CHECKING:
    from edgepriv.keys import Identity
    from edgepriv.wire.enrolment import EnrolAnswer, Token

TIMEOUT_S = 20.0


@click.command("enroll")
@click.argument("token_file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder for all files.")
@click.option("--json", "as_json", is_flag=True)
def enroll(token_file: Path, out: Path, as_json: bool) -> None:
    """Enrol this device with TOKEN_FILE.

    Writes device.key (identity), tls.key and tls.crt (transport), tls-ca.crt, enrolment.url (for `edgepriv renew`),
    owner.key.pub (pinned) and, where the gateway has them, broker-ca.crt and trust.cbor. Safe to repeat with the same
    folder when a reply was lost.
    """
    from edgepriv.wire.enrolment import read_token

    try:
        token = read_token(token_file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise MissingFileError(f"cannot read the token {token_file}: {reason}") from None
    if token.expires <= time.time():
        raise TrustError("the enrolment token has expired", hint="ask for a new one: edgepriv-gateway token new")
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    _pin_owner(token, out)
    identity, tls_key = _keys(token, out)
    answer = _exchange(token, identity, tls_key)
    keep(answer, token.owner_ed25519, out)
    files.replace(out / "enrolment.url", token.url.encode() + b"\n", mode=0o644)
    document = {"schema": "edgepriv.enroll/1", "name": token.device, "out": str(out), "trust": bool(answer.trust)}
    click.echo(
        json.dumps(document)
        if as_json
        else f"{token.device} is enrolled. The owner now signs {out / 'device.key.pub'}: edgepriv owner sign"
    )


def _pin_owner(token: Token, out: Path) -> None:
    """Write the owner's public key, or check that the one that lies here is the same."""
    from edgepriv.keys import load_public

    path = out / "owner.key.pub"
    if not path.is_file():
        path.write_text(token.owner.to_text())
    elif load_public(path) != token.owner:
        raise KeyFileError(f"{path} pins another owner than the token", hint="enrol into an empty folder")


def _keys(token: Token, out: Path) -> tuple[Identity, bytes]:
    """The device's identity and its TLS key: those that lie here, else new ones."""
    from edgepriv.keys import Identity, load_identity

    try:
        from edgepriv.primitives import x509
    except ImportError as error:
        raise MissingDependencyError(
            "enrolment needs the cryptography package", hint="pip install 'edgepriv[device]'"
        ) from error
    path, tls_path = out / "device.key", out / "tls.key"
    if not path.is_file():
        Identity.new("device", token.device).save(path)
    identity = load_identity(path)
    if identity.name != token.device:
        raise ConfigError(f"{path} is the key of {identity.name}, the token is for {token.device}")
    if not tls_path.is_file():
        files.replace(tls_path, x509.new_key(), mode=0o600)
    return identity, tls_path.read_bytes()


def _exchange(token: Token, identity: Identity, tls_key: bytes) -> EnrolAnswer:
    """Check the CA against the token, then send the secret to a server that this CA vouches for."""
    from edgepriv.primitives import equal, x509
    from edgepriv.wire import message
    from edgepriv.wire.enrolment import MAX_ANSWER_BYTES, USE, EnrolAnswer, EnrolRequest, proof_bytes

    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    ca = _der(ask(token.url, unverified, "GET", "/ca", None, limit=16 << 10))
    if not equal(hashlib.sha256(ca).digest(), token.ca_digest):
        raise AuthenticationError(
            "the server's CA is not the one in the token; the secret was not sent",
            hint="somebody may be between this device and its gateway; check the address",
        )
    request, public = x509.new_request(tls_key), identity.public
    proof = identity.sign(USE, proof_bytes(token.id, request, public.ed25519, public.x25519))
    body = message.encode(EnrolRequest(token.id, token.secret, request, public.ed25519, public.x25519, proof))
    # Trust exactly the bytes that were hashed: the text they came in may hold more certificates.
    verified = ssl.create_default_context(cadata=ca)
    raw = ask(token.url, verified, "POST", "/enrol", body, limit=MAX_ANSWER_BYTES)
    answer = message.decode(raw, max_bytes=MAX_ANSWER_BYTES)
    if not isinstance(answer, EnrolAnswer) or answer.name != token.device or _der(answer.ca) != ca:
        raise WireError("the gateway's answer is not for this device")
    return answer


def ask(url: str, context: ssl.SSLContext, method: str, path: str, body: bytes | None, *, limit: int) -> bytes:
    """One HTTPS request to the enrolment server.

    Raises:
        AuthenticationError, TrustError, WireError: its certificate does not fit, or it refuses.
        UnavailableError: nobody answers.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPSConnection(
        parts.hostname or "", parts.port or 443, context=context, timeout=TIMEOUT_S
    )
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        answer = response.read(limit + 1)
    except ssl.SSLCertVerificationError as error:
        raise AuthenticationError(f"the server's certificate does not fit: {error.verify_message}") from None
    except (OSError, http.client.HTTPException) as error:
        raise UnavailableError(f"no enrolment server at {url}: {error}", hint="try again later") from None
    finally:
        connection.close()
    if response.status != 200:
        raise _refusal(response.status, answer)
    if len(answer) > limit:
        raise WireError("the enrolment server's answer is over its limit")
    return answer


def _refusal(status: int, answer: bytes) -> Exception:
    try:
        said = str(json.loads(answer[:2000])["error"])[:200]
    except (ValueError, KeyError, TypeError):
        said = f"status {status}"
    kinds: dict[int, type[Exception]] = {403: AuthenticationError, 410: TrustError}
    return kinds.get(status, WireError)(f"the gateway refused: {said}")


def _der(pem: bytes) -> bytes:
    """The first certificate of a PEM text, or nothing."""
    try:
        return ssl.PEM_cert_to_DER_cert(pem.decode("ascii").strip())
    except (ValueError, UnicodeDecodeError):
        return b""


def keep(answer: EnrolAnswer, owner_ed25519: bytes, out: Path) -> None:
    """Write what was received; the trust list only if the pinned owner signed it and it is newer than the one here."""
    from edgepriv.wire.trust import read_trust

    files.replace(out / "tls.crt", answer.certificate, mode=0o644)
    files.replace(out / "tls-ca.crt", ssl.DER_cert_to_PEM_cert(_der(answer.ca)).encode(), mode=0o644)
    if answer.broker_ca:
        files.replace(out / "broker-ca.crt", answer.broker_ca, mode=0o644)
    if answer.trust:
        newer = read_trust(answer.trust, owner_ed25519, now=time.time())
        if newer.version > _version_of(out / "trust.cbor", owner_ed25519):
            files.replace(out / "trust.cbor", answer.trust, mode=0o644)


def _version_of(path: Path, owner_ed25519: bytes) -> int:
    """Version of the list that lies here; -1 where there is none, or one that the owner did not sign."""
    from edgepriv.wire.trust import read_trust

    try:
        return read_trust(path.read_bytes(), owner_ed25519, now=0.0).version
    except (OSError, TrustError):
        return -1
