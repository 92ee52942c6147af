"""The HTTPS side of enrolment: ``GET /ca`` gives the CA's certificate, ``POST /enrol`` and ``/renew`` take CBOR.

A device fetches the CA without verifying anything, compares its digest with the token's, and sends its secret only over
a second connection that this CA vouches for. Bodies, time and the number of connections are bounded.
"""

from __future__ import annotations

import json
import logging
import ssl
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from edgepriv.errors import AuthenticationError, EdgeprivError, TrustError, UnavailableError, WireError
from edgepriv.wire import message
from edgepriv.wire.enrolment import MAX_REQUEST_BYTES, EnrolAnswer, EnrolRequest, RenewRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from edgepriv.primitives.x509 import KeyAndCertificate
    from gateway.enrol import Enrolment

log = logging.getLogger("gateway.enrol")

TIMEOUT_S = 10.0
MAX_CONNECTIONS = 32
_STATUS: tuple[tuple[type[EdgeprivError], int], ...] = ((WireError, 400), (AuthenticationError, 403), (TrustError, 410))


class EnrolServer(ThreadingHTTPServer):
    """Serves one `Enrolment`; ``trust`` returns the trust list's bytes, ``revoked`` the names that it revokes."""

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        enrolment: Enrolment,
        hosts: tuple[str, ...],
        trust: Callable[[], bytes],
        revoked: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self.enrolment, self.trust, self.revoked = enrolment, trust, revoked
        self._context = _context(enrolment.server_certificate(hosts))
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        try:
            super().__init__(address, _Handler)
        except (OSError, OverflowError) as error:
            raise UnavailableError(
                f"cannot listen on {address[0]}:{address[1]}: {getattr(error, 'strerror', None) or error}",
                hint=f"give another --listen, or stop what has it: ss -ltnp 'sport = :{address[1]}'",
            ) from None

    def get_request(self) -> tuple[Any, Any]:
        """Accept, and leave the handshake to the connection's own thread, so that nobody can hold up the others."""
        connection, address = super().get_request()
        connection.settimeout(TIMEOUT_S)
        return self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the connection, or close it when too many are open."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection; whatever a client does ends here."""
        try:
            request.do_handshake()
            super().process_request_thread(request, client_address)
        except OSError as error:
            log.info("enrolment connection from %s ended: %s", client_address[0], error)
            self.shutdown_request(request)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - given by the base class
        """Log what a connection raised; one line, no traceback for what a client can cause."""
        log.info("enrolment connection from %s ended: %s", client_address[0], sys.exc_info()[1])


class _Handler(BaseHTTPRequestHandler):
    server: EnrolServer
    timeout = TIMEOUT_S
    server_version, sys_version = "edgepriv", ""

    def do_GET(self) -> None:
        """Give the CA's certificate."""
        if self.path == "/ca":
            self._answer(200, "application/x-pem-file", self.server.enrolment.ca.certificate)
        else:
            self._answer(404, "application/json", b'{"error":"not found"}')

    def do_POST(self) -> None:
        """Enrol or renew."""
        try:
            answer = self._carry_out()
        except EdgeprivError as error:
            status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
            log.warning("enrolment from %s refused (%d): %s", self.client_address[0], status, error)
            self._answer(status, "application/json", json.dumps({"error": str(error), "hint": error.hint}).encode())
            return
        log.info("%s: %s from %s", self.path, answer.name, self.client_address[0])
        self._answer(200, "application/cbor", message.encode(answer))

    def _carry_out(self) -> EnrolAnswer:
        length, served = self.headers.get("Content-Length", ""), self.server
        if not length.isdecimal() or int(length) > MAX_REQUEST_BYTES:
            raise WireError("not an enrolment request")
        request = message.decode(self.rfile.read(int(length)), max_bytes=MAX_REQUEST_BYTES)
        if self.path == "/enrol" and isinstance(request, EnrolRequest):
            return served.enrolment.enrol(request, served.trust())
        if self.path == "/renew" and isinstance(request, RenewRequest):
            return served.enrolment.renew(request, served.trust(), revoked=served.revoked())
        raise WireError("not an enrolment request")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Nothing: enrolments and refusals are logged above, with their reason."""


def _context(server: KeyAndCertificate) -> ssl.SSLContext:
    """A TLS 1.2+ server context; the key touches the disk for a moment because the ssl module takes files only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:  # mode 0600
        file.write(server.key + server.certificate)
        file.flush()
        context.load_cert_chain(file.name)
    return context
