"""The process around the runtime: signals, pace, the watchdog and the end."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from edgepriv.device.config import load_config
from edgepriv.device.start import start_device
from edgepriv.errors import TemporaryError
from edgepriv.mqtt import Inbound  # noqa: TC001 - the offline link below is a real Link
from edgepriv.notify import Notifier

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

IDLE_S = 0.005


def run_device(config: Path) -> dict[str, Any]:
    """Run until a signal, or until the frames asked for are acknowledged; returns counters and what still waits."""
    harden_process()
    lock = lock_state(load_config(config).device.state)
    runtime = start_device(config)
    stop = _stop_on_signals()
    notifier = Notifier()
    notifier.ready()
    done_since: float | None = None
    while not stop:
        if not runtime.step():
            time.sleep(IDLE_S)
        notifier.alive()
        if runtime.capturing:
            continue
        done_since = done_since or time.monotonic()
        waited = time.monotonic() - done_since
        if runtime.stages.spool.pending() == 0 and waited > 1 and not runtime.config.rounds.take_part:
            break
        if waited > runtime.config.run.linger_s:
            break
    notifier.stopping()
    report = {
        "schema": "edgepriv.device-run/1",
        "device": runtime.name,
        "counters": {**runtime.counters, **runtime.stages.spool.counters()},
        "pending": runtime.stages.spool.pending(),
    }
    runtime.finish()
    os.close(lock)
    return report


def lock_state(state: Path) -> int:
    """Keep a second process from the same state folder; returns the descriptor that holds the lock.

    Raises:
        TemporaryError: another process runs this device.
    """
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise TemporaryError(f"{state} is in use by another process", hint="stop the other device first") from error
    return descriptor


def harden_process() -> None:
    """No core dumps: they would hold the epoch's keys."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _stop_on_signals() -> list[int]:
    """A list that a SIGTERM or SIGINT fills."""
    stop: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        stop.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return stop


class OfflineLink:
    """A link that never connects: for checks that must not touch the network."""

    connected, generation, max_packet_bytes = False, 0, 262_144

    def subscribe(self, topic_filter: str) -> None:
        """See Link."""

    def send(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:  # noqa: ARG002
        """See Link."""
        return False

    def receive(self, limit: int = 64) -> list[Inbound]:  # noqa: ARG002
        """See Link."""
        return []

    def close(self) -> None:
        """See Link."""


def check_device(config: Path) -> None:
    """Build everything that `run_device` would, without a broker; raises what is wrong."""
    start_device(config, link=OfflineLink()).finish()
