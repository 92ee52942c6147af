"""Tell systemd how a daemon does: ready, alive, stopping. Nothing happens outside systemd."""

from __future__ import annotations

import os
import socket
import time


class Notifier:
    """Call `alive` from the work loop, never from a thread of its own: a stuck loop must miss its watchdog."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._every_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
        self._last = 0.0

    def ready(self) -> None:
        """The daemon serves."""
        self._send("READY=1")

    def alive(self) -> None:
        """The loop turned once more; sent at half the watchdog's interval at most."""
        now = time.monotonic()
        if self._every_s and now - self._last >= self._every_s:
            self._last = now
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The daemon ends on purpose."""
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(address)
            sock.sendall(text.encode())
