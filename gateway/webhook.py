"""Posting JSON documents to a URL from a thread of its own, so that a slow receiver never slows ingest.

Rules: the queue is bounded; when it is full the oldest document is dropped and counted (the store still has it). A
failed post is tried again with growing pauses, and a document that cannot be posted at all is dropped and counted:
nothing that a receiver answers ends the thread. With a secret file each post carries
``X-Edgepriv-Signature: sha256=<HMAC-SHA256 of the body>``. Redirects are not followed.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import logging
import threading
import urllib.error
import urllib.request
from collections import deque
from typing import TYPE_CHECKING, Any

from edgepriv.errors import KeyFileError

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("gateway.webhook")
MAX_ATTEMPTS = 6
MAX_PAUSE_S = 30.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


class Webhook:
    """One receiver with its queue and its thread."""

    def __init__(self, url: str, *, secret: Path | None = None, timeout_s: float = 10.0, queue: int = 100) -> None:
        self._url, self._timeout_s = url, timeout_s
        self._key = _read_secret(secret) if secret else None
        self._queue: deque[bytes] = deque(maxlen=queue)
        self._wake, self._stop = threading.Event(), threading.Event()
        self.dropped = self.posted = self.failed = 0
        self.last_error = ""
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def put(self, document: dict[str, Any]) -> None:
        """Queue a document; never blocks."""
        if len(self._queue) == self._queue.maxlen:
            self.dropped += 1
        self._queue.append(json.dumps(document, separators=(",", ":")).encode())
        self._wake.set()

    @property
    def waiting(self) -> int:
        """Documents that wait."""
        return len(self._queue)

    def close(self, timeout_s: float = 2.0) -> None:
        """Send what is queued for at most ``timeout_s``, then stop."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._queue:
                self._deliver_or_drop(self._queue.popleft())
            if self._stop.is_set():
                return

    def _deliver_or_drop(self, body: bytes) -> None:
        try:
            self._deliver(body)
        except Exception as error:  # the thread outlives whatever one document meets
            log.exception("a webhook document is dropped")
            self.last_error = f"{type(error).__name__}: {error}"
            self.failed += 1
            self.dropped += 1

    def _deliver(self, body: bytes) -> None:
        pause = 0.5
        for _ in range(MAX_ATTEMPTS):
            try:
                self._post(body)
                self.posted += 1
                return
            except (OSError, ValueError, http.client.HTTPException) as error:
                self.last_error = f"{type(error).__name__}: {error}"
                self.failed += 1
            if self._stop.wait(pause):
                break
            pause = min(pause * 2, MAX_PAUSE_S)
        self.dropped += 1

    def _post(self, body: bytes) -> None:
        request = urllib.request.Request(self._url, data=body, method="POST")  # noqa: S310 - scheme checked in config
        request.add_header("Content-Type", "application/json")
        if self._key:
            request.add_header(
                "X-Edgepriv-Signature", "sha256=" + hmac.new(self._key, body, hashlib.sha256).hexdigest()
            )
        with self._opener.open(request, timeout=self._timeout_s) as answer:
            answer.read(1024)


def _read_secret(path: Path) -> bytes:
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise KeyFileError(f"cannot read the webhook's secret {path}: {error.strerror}") from None
    if len(secret) < 16:
        raise KeyFileError(f"{path} holds fewer than 16 bytes", hint="openssl rand -hex 32 > FILE; chmod 600 FILE")
    return secret
