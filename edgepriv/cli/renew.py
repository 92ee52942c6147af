"""``edgepriv renew``: a new certificate for the TLS key that this device has, before the old one runs out."""

from __future__ import annotations

import json
import ssl
import sys
import time
from pathlib import Path

import click

from edgepriv.errors import MissingDependencyError, MissingFileError, WireError

DUE_AFTER = 2 / 3  # of a certificate's life
DAY_S = 86_400


@click.command("renew")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=Path("/etc/edgepriv/keys"))
@click.option("--check", is_flag=True, help="Only say whether it is due: exit 0 when it is, 1 when not.")
@click.option("--now", "at_once", is_flag=True, help="Renew although it is not due.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def renew(folder: Path, check: bool, at_once: bool, as_json: bool) -> None:
    """Renew the certificate in FOLDER when two thirds of its life are over; a timer calls this every day.

    Keys stay as they are: the device proves by its identity key that it is itself. The server is the one that enrolled
    it (enrolment.url), under the CA that was pinned then (tls-ca.crt). A newer trust list comes along.
    """
    left, due = _due(folder)
    if check:
        _say(f"{left:.0f} days left, {'due' if due else 'not due'}", folder, left, renewed=False, as_json=as_json)
        sys.exit(0 if due else 1)
    if not due and not at_once:
        _say(f"{left:.0f} days left: not due yet", folder, left, renewed=False, as_json=as_json)
        return
    _exchange(folder)
    left, _ = _due(folder)
    _say(f"renewed, {left:.0f} days left", folder, left, renewed=True, as_json=as_json)


def _say(text: str, folder: Path, days: float, *, renewed: bool, as_json: bool) -> None:
    document = {"schema": "edgepriv.renew/1", "folder": str(folder), "days": round(days, 1), "renewed": renewed}
    click.echo(json.dumps(document) if as_json else text)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingFileError(
            f"cannot read {path}: {error.strerror}", hint="edgepriv enroll TOKEN_FILE makes it"
        ) from None


def _due(folder: Path) -> tuple[float, bool]:
    """Days left, and whether it is time."""
    try:
        from edgepriv.primitives import x509
    except ImportError as error:
        raise MissingDependencyError(
            "renewal needs the cryptography package", hint="pip install 'edgepriv[device]'"
        ) from error
    begins, ends = x509.valid_between(_read(folder / "tls.crt"))
    now = time.time()
    return (ends - now) / DAY_S, now - begins >= DUE_AFTER * (ends - begins)


def _exchange(folder: Path) -> None:
    """Ask the enrolment server, check its answer, and replace the certificate."""
    from edgepriv.cli.enroll import ask, keep
    from edgepriv.keys import load_identity, load_public
    from edgepriv.primitives import x509
    from edgepriv.wire import message
    from edgepriv.wire.enrolment import MAX_ANSWER_BYTES, USE_RENEW, EnrolAnswer, RenewRequest, renewal_bytes

    identity, owner = load_identity(folder / "device.key"), load_public(folder / "owner.key.pub")
    url, ca = _read(folder / "enrolment.url").decode("utf-8", "replace").strip(), _read(folder / "tls-ca.crt")
    request = x509.new_request(_read(folder / "tls.key"))
    proof = identity.sign(USE_RENEW, renewal_bytes(identity.name, request))
    body = message.encode(RenewRequest(identity.name, request, proof))
    verified = ssl.create_default_context(cadata=ca.decode("ascii", "replace"))
    raw = ask(url, verified, "POST", "/renew", body, limit=MAX_ANSWER_BYTES)
    answer = message.decode(raw, max_bytes=MAX_ANSWER_BYTES)
    if not isinstance(answer, EnrolAnswer) or answer.name != identity.name:
        raise WireError("the gateway's answer is not for this device")
    if x509.certificate_key(answer.certificate) != x509.request_key(request):
        raise WireError("the gateway's certificate is for another key")
    keep(answer, owner.ed25519, folder)
