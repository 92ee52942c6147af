"""Where audits run on this machine: each in a process of its own, so many at a time.

Rules: a worker that dies (memory, a crash in native code) takes nothing with it but its own task; a stop kills the
workers with everything that they started, at once; a worker ends when its service is killed. Workers ignore the
signals that a terminal or systemd sends to all processes: their service decides. Spawned, not forked: a forked child
would hold the service's sockets and keys.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepriv.errors import EdgeprivError

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

PR_SET_PDEATHSIG = 1
OUT_OF_MEMORY_SCORE = "800"


class WorkerDiedError(EdgeprivError):
    """The process of one task ended, or its work broke, without an answer."""


class ProcessPool(Executor):
    """At most ``workers`` processes at a time; what was submitted beyond waits."""

    def __init__(self, workers: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="audit")
        self._children: set[SpawnProcess] = set()
        self._lock, self._stopped = threading.Lock(), False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a function that can be imported, in a new process; the future raises `WorkerDiedError` where it dies."""
        return self._threads.submit(self._run, fn, args, kwargs)

    def _run(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reader, writer = self._context.Pipe(duplex=False)
        child = self._context.Process(target=_work, args=(writer, fn, args, kwargs))
        with self._lock:
            if self._stopped:
                raise CancelledError
            child.start()
            self._children.add(child)
        writer.close()
        try:
            broke, value = reader.recv()
        except (EOFError, OSError):
            child.join()
            raise WorkerDiedError(f"the worker ended with code {child.exitcode}") from None
        finally:
            reader.close()
            child.join()
            with self._lock:
                self._children.discard(child)
        if broke:
            raise WorkerDiedError(f"the work broke: {value}")
        return value

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """Kill the workers and forget what waits; ``wait``: until they are gone."""
        with self._lock:
            self._stopped = True
            for child in self._children:
                _kill(child)
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)


def _kill(child: SpawnProcess) -> None:
    """Kill a worker and, where it has begun to work, its own children with it."""
    if child.pid is not None and not wait([child.sentinel], timeout=0):
        with contextlib.suppress(ProcessLookupError):  # it leads no group yet, so it has started nothing
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()


def _work(writer: Connection, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # Linux: when memory is short this process goes first
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        Path("/proc/self/oom_score_adj").write_text(OUT_OF_MEMORY_SCORE)
    try:
        answer: tuple[bool, Any] = False, fn(*args, **kwargs)
    except Exception as error:  # whatever it is, the service goes on and counts it
        answer = True, f"{type(error).__name__}: {error}"[:400]
    writer.send(answer)
    writer.close()
