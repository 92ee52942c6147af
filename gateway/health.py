"""``/metrics``, ``/healthz`` and ``/readyz`` on a loopback port, from a thread of their own.

``/healthz`` says whether the work loop turns; ``/readyz`` whether the gateway can do its work now, with the reasons
where it cannot. Neither answers anything about a device.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Protocol

from edgepriv.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable


class Probe(Protocol):
    """What the server asks the daemon."""

    def metrics_text(self) -> bytes:
        """Prometheus exposition."""
        ...

    def health(self) -> dict[str, str]:
        """Failed checks of the process by name; empty when well."""
        ...

    def readiness(self) -> dict[str, str]:
        """Failed checks of the service by name; empty when ready."""
        ...


class HealthServer:
    """A small HTTP server that is read-only."""

    def __init__(self, probe: Probe, host: str, port: int) -> None:
        try:
            self._server = ThreadingHTTPServer((host, port), _handler(probe))
        except OSError as error:
            raise UnavailableError(
                f"cannot listen on {host}:{port}: {error.strerror}",
                hint=f"set another [http] port, or stop what has it: ss -ltnp 'sport = :{port}'",
            ) from error
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def _handler(probe: Probe) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "edgepriv-gateway", ""
        timeout = 5

        def do_GET(self) -> None:
            routes: dict[str, Callable[[], tuple[int, str, bytes]]] = {
                "/metrics": lambda: (200, "text/plain; version=0.0.4; charset=utf-8", probe.metrics_text()),
                "/healthz": lambda: _checks(probe.health()),
                "/readyz": lambda: _checks(probe.readiness()),
            }
            make = routes.get(self.path.split("?", 1)[0])
            status, kind, body = make() if make else (404, "text/plain", b"no such page\n")
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Probes come every few seconds; they are not logged."""

    return Handler


def _checks(failed: dict[str, str]) -> tuple[int, str, bytes]:
    body = json.dumps({"status": "ok" if not failed else "failed", "failed": failed}).encode() + b"\n"
    return (200 if not failed else 503), "application/json", body
