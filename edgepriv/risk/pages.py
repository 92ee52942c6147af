"""Metrics and reports over HTTP, read only, on the machine itself unless configured otherwise.

Paths: ``/`` (the page to begin with), ``/metrics``, ``/healthz``, ``/reports`` (JSON list), ``/reports/<digest>.json``
and ``.html``, ``/reports/<digest>.<policy>.png``, ``/rounds`` (JSON list), ``/rounds/<number>.json`` and ``.html``,
``/releases`` (JSON list), ``/releases/<name>/card.json`` and ``.html``. A release's card is shown when its directory,
or the card alone, is copied to ``releases/<name>`` in the service's state folder.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from prometheus_client import generate_latest

from edgepriv.errors import UnavailableError
from edgepriv.risk.drift import drift_in, drift_of
from edgepriv.risk.index_page import index_html

if TYPE_CHECKING:
    from pathlib import Path

    from edgepriv.risk.service import RiskService

NAME = re.compile(r"/reports/([0-9a-f]{64}(?:\.[a-z0-9_-]{1,40})?\.(json|html|png))")
CARD = re.compile(r"/releases/([a-z0-9][a-z0-9._-]{0,63}/card\.(json|html))")
ROUND = re.compile(r"/rounds/([0-9]{1,18}\.(json|html))")
KINDS = {"json": "application/json", "html": "text/html; charset=utf-8", "png": "image/png"}


def listing(service: RiskService) -> list[dict[str, object]]:
    """Return all jobs as JSON values, with the drift of their released outputs where enough was seen."""
    rows = drift_in(service.folder)
    return [
        {
            "model": job.name,
            "digest": job.digest.hex(),
            "state": job.state,
            "error": job.error,
            "verdict": (job.report or {}).get("verdict") if job.state == "done" else None,
            "before": (job.report or {}).get("verdict") if job.state != "done" else None,
            "attempts": job.attempts,
            "drift": drift_of(rows, job.digest, job.name),
        }
        for job in service.jobs.listed()
    ]


def releases(folder: Path) -> list[dict[str, object]]:
    """Return the cards in the state folder: name of the directory, recommendation, noise; unreadable ones say so."""
    found: list[dict[str, object]] = []
    for path in sorted(folder.glob("releases/*/card.json")):
        if not CARD.fullmatch(f"/releases/{path.parent.name}/card.json"):
            continue
        try:
            card = json.loads(path.read_text())
            row = {key: card.get(key) for key in ("recommendation", "records", "released", "noise_ratio", "claim")}
        except (OSError, ValueError, AttributeError) as error:
            row = {"recommendation": f"the card cannot be read: {error}"}
        found.append({"name": path.parent.name, **row})
    return found


def answer(service: RiskService, path: str) -> tuple[int, str, bytes]:
    """Return status, content type and body for a path."""
    if path == "/":
        page = index_html(
            service.jobs.listed(), service.rounds.found(), releases(service.folder), drift_in(service.folder)
        )
        return 200, KINDS["html"], page.encode()
    if path == "/releases":
        return 200, KINDS["json"], json.dumps(releases(service.folder)).encode()
    if path == "/metrics":
        return 200, "text/plain; version=0.0.4", generate_latest(service.metrics.registry)
    if path == "/healthz":
        return 200, "text/plain", b"ok\n"
    if path == "/reports":
        return 200, KINDS["json"], json.dumps(listing(service)).encode()
    if path == "/rounds":
        return 200, KINDS["json"], json.dumps(service.rounds.found()).encode()
    match = NAME.fullmatch(path) or ROUND.fullmatch(path) or CARD.fullmatch(path)
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
            self.send_header("Content-Security-Policy", policy + "; base-uri 'none'; form-action 'none'")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Requests are not logged."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise UnavailableError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            hint=f"set another [http] port, or stop what has it: ss -ltnp 'sport = :{port}'",
        ) from None
    threading.Thread(target=server.serve_forever, daemon=True, name="risk-pages").start()
    return server
