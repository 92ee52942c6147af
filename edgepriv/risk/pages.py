"""Metrics and reports over HTTP, read only, on the machine itself unless configured otherwise.

Paths: ``/metrics``, ``/healthz``, ``/reports`` (JSON list), ``/reports/<digest>.json`` and ``.html``,
``/reports/<digest>.<policy>.png``, ``/rounds`` (JSON list), ``/rounds/<number>.json`` and ``.html``.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from prometheus_client import generate_latest

if TYPE_CHECKING:
    from edgepriv.risk.service import RiskService

NAME = re.compile(r"/reports/([0-9a-f]{64}(?:\.[a-z0-9_-]{1,40})?\.(json|html|png))")
ROUND = re.compile(r"/rounds/([0-9]{1,18}\.(json|html))")
KINDS = {"json": "application/json", "html": "text/html; charset=utf-8", "png": "image/png"}


def listing(service: RiskService) -> list[dict[str, object]]:
    """Return all jobs as JSON values."""
    return [
        {
            "model": job.name,
            "digest": job.digest.hex(),
            "state": job.state,
            "error": job.error,
            "verdict": (job.report or {}).get("verdict"),
            "attempts": job.attempts,
        }
        for job in service.jobs.listed()
    ]


def answer(service: RiskService, path: str) -> tuple[int, str, bytes]:
    """Return status, content type and body for a path."""
    if path == "/metrics":
        return 200, "text/plain; version=0.0.4", generate_latest(service.metrics.registry)
    if path == "/healthz":
        return 200, "text/plain", b"ok\n"
    if path == "/reports":
        return 200, KINDS["json"], json.dumps(listing(service)).encode()
    if path == "/rounds":
        return 200, KINDS["json"], json.dumps(service.rounds.found()).encode()
    match = NAME.fullmatch(path) or ROUND.fullmatch(path)
    file = service.folder / path.split("/")[1] / match[1] if match else None
    if match is None or file is None or not file.is_file():
        return 404, "text/plain", b"no such page\n"
    return 200, KINDS[match[2]], file.read_bytes()


def serve(service: RiskService, host: str, port: int) -> ThreadingHTTPServer:
    """Serve in a thread; the caller shuts the returned server down."""

    class Handler(BaseHTTPRequestHandler):
        """Reads only; every answer forbids scripts."""

        def do_GET(self) -> None:
            """Answer one request."""
            status, kind, body = answer(service, self.path)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            policy = "default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'"
            self.send_header("Content-Security-Policy", policy)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Requests are not logged."""

    server = ThreadingHTTPServer((host, port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True, name="risk-pages").start()
    return server
