"""Server-sent events: one small document a second, made once for everybody who listens."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from gateway.pages import formats
from gateway.pages.access import SESSION_S, Operator, Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.requests import Request

    from gateway.pages.figures import Figures

EVERY_S = 1.0
HEARTBEAT_S = 15.0
MAX_LISTENERS = 50


class Live:
    """Makes the events; ``id`` counts changes, so a listener that comes back gets only what is newer."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._made_at, self._text, self._id = 0.0, "", 0
        self._lock = asyncio.Lock()
        self._by_certificate: dict[str, Session] = {}
        self.listeners = 0

    def response(self, request: Request, allowed: Callable[[], bool]) -> Response:
        """The stream for one listener; it ends when ``allowed`` says no: logged out, removed, or the log-in expired."""
        if self.listeners >= MAX_LISTENERS:
            return PlainTextResponse("too many listeners\n", status_code=503)
        last = request.headers.get("last-event-id", "")
        seen = int(last) if last.isascii() and last.isdigit() and len(last) < 12 else -1
        return StreamingResponse(self._stream(request, seen, allowed), media_type="text/event-stream")

    async def _stream(self, request: Request, seen: int, allowed: Callable[[], bool]) -> AsyncIterator[str]:
        self.listeners += 1
        beat = time.monotonic()
        try:
            yield "retry: 3000\n\n"
            while not await request.is_disconnected():
                if not allowed():
                    yield "event: ended\ndata: {}\n\n"
                    return
                number, text = await self._current()
                if number != seen:
                    seen, beat = number, time.monotonic()
                    yield f"id: {number}\ndata: {text}\n\n"
                elif time.monotonic() - beat > HEARTBEAT_S:
                    beat = time.monotonic()
                    yield ": still here\n\n"
                await asyncio.sleep(EVERY_S)
        finally:
            self.listeners -= 1

    async def _current(self) -> tuple[int, str]:
        async with self._lock:
            if time.monotonic() - self._made_at >= EVERY_S * 0.9:
                text = json.dumps(await run_in_threadpool(self._document))
                self._made_at = time.monotonic()
                if text != self._text:
                    self._text, self._id = text, self._id + 1
            return self._id, self._text

    def _document(self) -> dict[str, Any]:
        style, words = formats.state(self._figures.status())
        overview = self._figures.overview()
        running = self._figures.running()
        if running:
            running["seconds"] = int(running["seconds"])
        return {
            "state": {"style": style, "text": words},
            "signature": overview["signature"],
            "alerts": len(overview["alerts"]),
            "round": running,
            **self._figures.fleet_counts(),
        }

    def certificate_session(self, operator: Operator) -> Session:
        """The session of somebody whose certificate logs in: one for each name, as long as the process runs."""
        known = self._by_certificate.get(operator.name)
        if known is None or known.role != operator.role or known.expires <= time.time():
            csrf = secrets.token_urlsafe(24)
            known = Session(operator.name, operator.role, csrf, time.time() + SESSION_S)
            self._by_certificate[operator.name] = known
        return known
