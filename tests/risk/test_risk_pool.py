"""Workers that die, and a stop while they work: nobody else's audit is lost, and nothing is left running."""

import math
import os
import signal
import subprocess
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from edgepriv.risk.config import AuditSection
from edgepriv.risk.pool import ProcessPool, WorkerDiedError
from edgepriv.risk.ray_pool import files_of, unpacked
from edgepriv.risk.worker import AuditTask

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def pool():
    made = ProcessPool(2)
    yield made
    made.shutdown()


def children_of(pid):
    """Processes that this one has started and that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def gone(pids):
    return not any(Path(f"/proc/{pid}/stat").exists() for pid in pids)


def wait_for(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def test_a_worker_that_dies_takes_nothing_with_it_and_the_next_one_works(pool):
    slow = pool.submit(time.sleep, 2.0)
    dead, killed = pool.submit(os._exit, 7), pool.submit(os.abort)
    with pytest.raises(WorkerDiedError, match="code 7"):
        dead.result(60)
    with pytest.raises(WorkerDiedError, match=f"code {-signal.SIGABRT}"):
        killed.result(60)
    assert pool.submit(math.factorial, 5).result(60) == 120
    assert slow.result(60) is None


def test_work_that_breaks_says_how(pool):
    with pytest.raises(WorkerDiedError, match="ValueError"):
        pool.submit(math.sqrt, -1).result(60)


def test_a_stop_ends_workers_and_what_they_started_at_once(pool, tmp_path):
    marker = tmp_path / "pid"
    script = f"echo $$ > {marker}; exec sleep 600"
    busy = pool.submit(subprocess.call, ["/bin/sh", "-c", script])
    pool.submit(time.sleep, 600)
    waits = pool.submit(time.sleep, 600)
    assert wait_for(lambda: marker.exists() and marker.read_text().strip())
    grandchild, workers = int(marker.read_text()), children_of(os.getpid())
    began = time.monotonic()
    pool.shutdown(wait=True)
    assert time.monotonic() - began < 15
    assert wait_for(lambda: gone([grandchild]), 10)
    assert not set(workers) & {pid for pid in children_of(os.getpid()) if "sleep" in command(pid)}
    assert waits.cancelled()
    with pytest.raises((WorkerDiedError, CancelledError)):
        busy.result(5)


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_workers_leave_the_signals_of_a_terminal_to_their_service(pool):
    asked = pool.submit(signal.getsignal, signal.SIGTERM), pool.submit(signal.getsignal, signal.SIGINT)
    assert [one.result(60) for one in asked] == [signal.SIG_IGN, signal.SIG_IGN]
    assert pool.submit(os.getpgrp).result(60) != os.getpgrp()


def test_a_task_carries_the_files_that_it_names(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"the bytes")
    task = AuditTask(file, AuditSection("digits"), (), "gate")
    carried = files_of(task)
    file.unlink()
    assert unpacked(lambda one: (one.model.read_bytes(), one.name), (task,), {}, carried) == (b"the bytes", "gate")
    assert unpacked(len, ("four",), {}, files_of("four")) == 4
