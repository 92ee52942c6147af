"""The demo's child processes: each is the product's own command, with its log in a file, and all of them end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from edgepriv.errors import TemporaryError, UnavailableError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

GRACE_S = 10.0
SBIN = "/usr/sbin"
MOSQUITTO_CONF = """\
listener {port} 127.0.0.1
allow_anonymous true
set_tcp_nodelay true
max_packet_size 262144
max_inflight_messages 20
max_queued_messages 1000
max_queued_bytes 67108864
persistence false
log_type error
log_type warning
"""
AMQTT = """\
import asyncio, signal
from amqtt.broker import Broker
async def main():
    broker = Broker({{"listeners": {{"default": {{"type": "tcp", "bind": "127.0.0.1:{port}"}}}},
        "plugins": {{"amqtt.plugins.authentication.AnonymousAuthPlugin": {{"allow_anonymous": True}}}}}})
    await broker.start()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await broker.shutdown()
asyncio.run(main())
"""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass(slots=True)
class Child:
    """A running process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    out: IO[bytes]


@dataclass(slots=True)
class Children:
    """All child processes; leaving the ``with`` block stops them in reverse order, and a SIGTERM leaves it."""

    folder: Path
    children: list[Child] = field(default_factory=list)
    _before: Any = None
    _starting: bool = False
    _killed: bool = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there may a handler be set
            self._before = signal.signal(signal.SIGTERM, self._interrupt)  # a kill stops them all as Ctrl-C does
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.stop_all()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self._killed and not isinstance(value, KeyboardInterrupt):
            raise KeyboardInterrupt from value  # foreign code turned the interrupt into an error of its own

    def start(self, name: str, command: list[str]) -> Child:
        """Start a process in a session of its own, so that Ctrl-C reaches it only through us."""
        log = self.folder / f"{name}.log"
        out = log.open("wb")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._starting = True  # a kill in here would forget the child
        try:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )
            child = Child(name, process, log, out)
            self.children.append(child)
        finally:
            self._starting = False
        if self._killed:
            raise KeyboardInterrupt
        return child

    def _interrupt(self, _number: int, _frame: object) -> None:
        self._killed = True
        if not self._starting:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise TemporaryError with the end of the log when a process has died, KeyboardInterrupt after a kill."""
        if self._killed:
            raise KeyboardInterrupt
        for child in self.children:
            if child.process.poll() not in (None, 0):
                tail = child.log.read_text(errors="replace")[-800:]
                raise TemporaryError(
                    f"{child.name} ended with code {child.process.returncode}:\n{tail}", hint=f"its log: {child.log}"
                )

    def stop(self, child: Child) -> None:
        """Ask one process to end; after the grace time it is killed."""
        if child.process.poll() is None:
            child.process.send_signal(signal.SIGTERM)
            try:
                child.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        child.out.close()

    def stop_all(self) -> None:
        """Stop what runs, devices before the gateway and the broker last."""
        for child in reversed(self.children):
            if child.process.poll() is None and child is not self.children[0]:
                child.process.send_signal(signal.SIGTERM)
        for child in reversed(self.children):
            self.stop(child)
        self.children.clear()


def python_command(*arguments: str) -> list[str]:
    """A command of this very installation."""
    return [sys.executable, "-m", *arguments]


def start_broker(children: Children, kind: str) -> tuple[str, str]:
    """Start mosquitto where it is installed, else the embedded amqtt; returns its URL and name.

    Args:
        children: where the process is kept.
        kind: ``auto``, ``mosquitto`` or ``amqtt``.

    Raises:
        UnavailableError: the broker does not come up.
    """
    port = free_port()
    binary = shutil.which("mosquitto") or shutil.which("mosquitto", path=SBIN)
    if kind in {"auto", "mosquitto"} and binary:
        conf = children.folder / "mosquitto.conf"
        conf.write_text(MOSQUITTO_CONF.format(port=port))
        children.start("broker", [binary, "-c", str(conf)])
        name = "mosquitto"
    elif kind == "mosquitto":
        raise UnavailableError("mosquitto is not installed", hint="apt install mosquitto, or --broker amqtt")
    else:
        children.start("broker", [sys.executable, "-c", AMQTT.format(port=port)])
        name = "amqtt (MQTT 3.1.1 only, for the demo)"
    wait_for_port(port, children)
    return f"mqtt://127.0.0.1:{port}", name


def wait_for_port(port: int, children: Children, timeout_s: float = 20.0) -> None:
    """Wait until somebody listens."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        children.check()
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise UnavailableError(f"nothing listens on port {port}", hint=f"see the logs in {children.folder}")
