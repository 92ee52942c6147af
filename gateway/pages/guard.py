"""What every request meets first: a size limit, a rate limit, and the headers that every answer carries.

What is refused is logged with its client and path, at most `LOGGED_PER_MINUTE` times for each client.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException

from gateway.pages.access import Rate

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("gateway.pages")
LOGGED_PER_MINUTE = 60
MAX_FORM_BYTES = 16 << 10
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
        " form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # no-referrer would make browsers send "Origin: null" with our own forms
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, rate: Rate, *, secure: bool) -> None:
        self._app, self._rate, self._logged = app, rate, Rate(LOGGED_PER_MINUTE)
        extra = {"strict-transport-security": "max-age=31536000"} if secure else {}
        self._headers = [(k.encode(), v.encode()) for k, v in {**HEADERS, **extra}.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Limit, then pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = (scope.get("client") or ("?", 0))[0]
        if not self._rate.allow(client):
            self._note(client, scope, 429)
            await self._refuse(send, 429, b"Too many requests. Wait a minute.\n")
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > MAX_FORM_BYTES:
            self._note(client, scope, 413)
            await self._refuse(send, 413, b"The form is too large.\n")
            return
        await self._app(scope, self._counted(receive), self._with_headers(scope, send))

    def _note(self, client: str, scope: Scope, status: int) -> None:
        """Say in the log what was refused; the path as Python writes it, so that it cannot forge a line."""
        if self._logged.allow(client):
            log.warning("%s from %s refused: %d %r", scope["method"], client, status, scope["path"][:200])

    @staticmethod
    def _counted(receive: Receive) -> Receive:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_FORM_BYTES:
                raise HTTPException(413, "The form is too large.")
            return message

        return counted

    def _with_headers(self, scope: Scope, send: Send) -> Send:
        static = scope["path"].startswith("/static/")
        client = (scope.get("client") or ("?", 0))[0]

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] >= 400:
                    self._note(client, scope, message["status"])
                cache = b"private, max-age=3600" if static else b"no-store"
                headers: list[Any] = [
                    h for h in message["headers"] if h[0].lower() not in {b"server", b"cache-control"}
                ]
                message = {**message, "headers": [*headers, *self._headers, (b"cache-control", cache)]}
            await send(message)

        return sending

    async def _refuse(self, send: Send, status: int, text: bytes) -> None:
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode()), *self._headers]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text})
