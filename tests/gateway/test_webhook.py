"""A webhook's thread lives on whatever its receiver answers."""

from __future__ import annotations

import socket
import threading

import pytest
from patience import wait_for

from gateway.webhook import Webhook

GARBAGE = {
    "no status line": b"\x16\x03\x01 this is no HTTP\r\n\r\n",
    "hangs up": b"",
    "a body cut short": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nonly this",
    "an endless header line": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
    "a strange length": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
}


class RawReceiver:
    """Answers each connection with the next of ``answers``, and 204 once they are used up."""

    def __init__(self, *answers):
        self.answers, self.bodies = list(answers), []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/hook"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                received = b""
                while b"}" not in received and (more := connection.recv(65_536)):
                    received += more
                self.bodies.append(received.partition(b"\r\n\r\n")[2])
                connection.sendall(self.answers.pop(0) if self.answers else b"HTTP/1.1 204 No Content\r\n\r\n")

    def close(self):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_a_failure_that_is_tried_again(answer):
    receiver = RawReceiver(answer)
    hook = Webhook(receiver.url)
    hook.put({"n": 1})
    wait_for(lambda: hook.posted == 1, 10, f"not posted: {hook.last_error}")
    hook.put({"n": 2})
    wait_for(lambda: hook.posted == 2, 10, "the thread is gone")
    hook.close()
    receiver.close()
    assert receiver.bodies == [b'{"n":1}', b'{"n":1}', b'{"n":2}']
    assert (hook.failed, hook.dropped) == (1, 0)
    assert hook.last_error


def test_a_document_that_nobody_foresaw_is_dropped_and_the_next_one_is_posted(monkeypatch):
    receiver, post = RawReceiver(), Webhook._post

    def broken(self, body):
        if b"bad" in body:
            raise RuntimeError("nobody foresaw this")
        post(self, body)

    monkeypatch.setattr(Webhook, "_post", broken)
    hook = Webhook(receiver.url)
    hook.put({"n": "bad"})
    hook.put({"n": 2})
    wait_for(lambda: hook.posted == 1, 10, "the thread is gone")
    hook.close()
    receiver.close()
    assert receiver.bodies == [b'{"n":2}']
    assert (hook.failed, hook.dropped, hook.last_error) == (1, 1, "RuntimeError: nobody foresaw this")
