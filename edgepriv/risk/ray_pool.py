"""Audits on a Ray cluster, the same interface as the pool of processes: one task a GPU where there are any.

``[audit] ray_address`` names the cluster (``auto`` for the one that this machine belongs to, ``HOST:6379``,
``ray://HOST:10001``); without it Ray is started on this machine alone, for ``workers`` tasks. What a task needs of this
machine's disk travels with it: the model's bytes (a round's weights), put into Ray's object store once. What does not:
edgepriv with its ``server`` and ``ray`` extras, and the auditor's own pictures (``probe``, ``canaries``, ``weights`` of
``[rounds]``), which must lie under the same path on every node. A worker that dies is not tried again by Ray: the queue
counts it.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import tempfile
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepriv.errors import MissingDependencyError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from edgepriv.risk.config import AuditSection

KNOCK_S = 5.0


class RayPool(Executor):
    """Tasks on the cluster. ``workers``: how many at a time it has room for, or as configured on this machine alone."""

    def __init__(self, settings: AuditSection) -> None:
        self._ray = _ray()
        address = settings.ray_address or os.environ.get("RAY_ADDRESS", "")
        self._gpus = 1 if settings.device.startswith("cuda") else 0
        self.workers, self._threads = settings.workers, max(1, settings.threads)
        processors = self.workers * self._threads
        options: dict[str, Any] = {"address": "local", "num_cpus": processors, "include_dashboard": False}
        try:
            _knock(address)
            self._ray.init(**({"address": address} if address else options), log_to_driver=False)
        except Exception as error:  # Ray raises many types; none of them is the model's fault
            raise UnavailableError(f"no Ray cluster at {address or 'this machine'}: {error}") from error
        if address:
            room = self._ray.cluster_resources().get("GPU" if self._gpus else "CPU", 1)
            self.workers = max(1, int(room) // (1 if self._gpus else self._threads))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start a task on the cluster; files that its arguments name go with it."""
        remote = self._ray.remote(num_gpus=self._gpus, num_cpus=self._threads, max_retries=0)(unpacked)
        carried = [self._ray.put(files_of(argument)) for argument in args]
        future: Future[Any] = remote.remote(fn, args, kwargs, *carried).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002 - Executor's
        """Leave the cluster; Ray ends the tasks of a driver that has left."""
        self._ray.shutdown()


def files_of(argument: Any) -> dict[str, tuple[str, bytes]]:
    """Name and bytes of each file that a task names, by the task's field."""
    if not dataclasses.is_dataclass(argument):
        return {}
    paths = {field.name: getattr(argument, field.name) for field in dataclasses.fields(argument)}
    return {
        name: (path.name, path.read_bytes())
        for name, path in paths.items()
        if isinstance(path, Path) and path.is_file()
    }


def unpacked(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *carried: Any) -> Any:
    """On the node: write what was carried to files of its own and run the task on those."""
    with tempfile.TemporaryDirectory(prefix="edgepriv-task-") as folder:
        own = []
        for number, (argument, files) in enumerate(zip(args, carried, strict=True)):
            place = Path(folder) / str(number)
            place.mkdir()
            for name, content in files.values():
                (place / name).write_bytes(content)
            named = {field: place / name for field, (name, _) in files.items()}
            own.append(dataclasses.replace(argument, **named) if named else argument)
        return fn(*own, **kwargs)


def _knock(address: str) -> None:
    """Whether anybody listens where the cluster should be (OSError, ValueError): Ray itself waits for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("executor = 'ray' needs Ray", hint="pip install 'edgepriv[ray]'") from error
    return ray
