"""The spool: durable through SIGKILL, bounded, honest about what it drops, usable after damage."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import OrderedDict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgepriv.device.seal import SealedItem
from edgepriv.device.spool import Spool
from edgepriv.errors import ConfigError, StorageFullError, UnavailableError

EPOCH = bytes(32)


def item(number, size=100, kind="frame", epoch=EPOCH, round_number=0):
    payload = random.Random(number).randbytes(size)
    return SealedItem(kind, hashlib.sha256(payload).digest(), epoch, payload, round_number)


@pytest.fixture
def spool(tmp_path):
    made = Spool(tmp_path / "spool", max_bytes=10_000_000)
    yield made
    made.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "remove", "commit", "reopen", "crash"]),
            st.integers(0, 40),
            st.sampled_from([10, 20_000, 1_500_000]),
        ),
        max_size=40,
    )
)
def test_the_spool_is_a_dictionary_that_survives_reopening(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("spool")
    spool = Spool(folder, max_bytes=1 << 30)
    model, durable = OrderedDict(), OrderedDict()
    for what, number, size in steps:
        one = item(number, size)
        if what == "add":
            spool.add([one])
            model.setdefault(one.digest, one.payload)
        elif what == "remove":
            assert spool.remove(one.digest) == (model.pop(one.digest, None) is not None)
        elif what == "commit":
            spool.commit()
            durable = OrderedDict(model)
        elif what == "reopen":
            spool.close()
            durable = OrderedDict(model)
            spool = Spool(folder, max_bytes=1 << 30)
        else:  # what was not committed is gone
            spool._db.rollback()
            spool._db.close()
            spool._arena.close()
            model = OrderedDict(durable)
            spool = Spool(folder, max_bytes=1 << 30)
        assert [w.digest for w in spool.waiting(100)] == list(model)
        assert (spool.items, spool.stored_bytes) == (len(model), sum(map(len, model.values())))
        for digest, payload in model.items():
            assert spool.payload(digest) == payload
            assert spool.read_range(digest, 5, 7) == payload[5:12]
    spool.close()


CHILD = """
import sys, random
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_spool import item
from edgepriv.device.spool import Spool
spool = Spool(Path(sys.argv[1]), max_bytes=1 << 30)
start = spool.counters().get("written", 0)
for n in range(start, 100000):
    spool.add([item(n, 1_200_000 if n % 3 == 0 else 300)])
    spool.count("written")
    if n >= 6 and n % 4 == 0:
        spool.remove(item(n - 6, 1_200_000 if (n - 6) % 3 == 0 else 300).digest)
        spool.count("removed")
    if n % 2:
        spool.commit()
        print(n, flush=True)
"""


def test_a_process_killed_at_random_moments_loses_nothing_that_was_committed(tmp_path):
    rng, folder = random.Random(5), tmp_path / "spool"
    said = -1
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True
        )
        lines = 0
        while lines < rng.randrange(1, 12):
            said = int(child.stdout.readline())
            lines += 1
        time.sleep(rng.random() * 0.05)
        child.send_signal(signal.SIGKILL)
        rest = child.communicate()[0].split()
        said = int(rest[-1]) if rest else said
        spool = Spool(folder, max_bytes=1 << 30)
        written, removed = spool.counters()["written"], spool.counters().get("removed", 0)
        assert written >= said + 1
        gone = {n - 6 for n in range(written) if n >= 6 and n % 4 == 0}
        assert removed == len(gone)
        expected = [item(n, 1_200_000 if n % 3 == 0 else 300) for n in range(written) if n not in gone]
        assert [w.digest for w in spool.waiting(100_000)] == [one.digest for one in expected]
        assert all(spool.payload(one.digest) == one.payload for one in expected)
        spool.close()


def test_the_oldest_frames_go_first_then_the_oldest_outputs_and_every_drop_is_counted(tmp_path):
    spool = Spool(tmp_path, max_bytes=1000)
    record, output = item(0, 90, "epoch"), item(1, 100, "output")
    spool.add([record, output])
    frames = [item(n, 200) for n in range(2, 8)]
    for frame in frames:
        spool.add([frame])
    assert [w.digest for w in spool.waiting(99)] == [output.digest, *(f.digest for f in frames[2:])]
    assert spool.counters()["dropped_frames"] == 2
    big = item(9, 880)
    spool.add([big])
    assert [w.digest for w in spool.waiting(99)] == [big.digest]
    assert spool.counters()["dropped_frames"] == 6
    assert spool.counters()["dropped_outputs"] == 1
    assert spool.epoch_record(record.digest) == record.payload
    spool.close()


def test_an_update_of_a_round_and_an_epoch_record_are_never_dropped(tmp_path):
    spool = Spool(tmp_path, max_bytes=1000)
    spool.add([item(0, 900, "update", round_number=3), item(1, 50, "epoch")])
    with pytest.raises(StorageFullError):
        spool.add([item(2, 200)])
    assert [w.kind for w in spool.waiting(9)] == ["update"]
    spool.remove_round(4)
    assert spool.pending() == 1
    spool.remove_round(3)
    assert spool.pending() == 0
    spool.close()


def test_refuse_refuses_the_new_item_whole_and_keeps_the_old(tmp_path):
    spool = Spool(tmp_path, max_bytes=1000, drop="refuse")
    spool.add([item(1, 600)])
    with pytest.raises(StorageFullError) as caught:
        spool.add([item(2, 100), item(3, 600)])
    assert caught.value.hint
    assert [w.digest for w in spool.waiting(9)] == [item(1, 600).digest]
    assert spool.counters()["spooled_frames"] == 1
    spool.add([item(4, 5000, "epoch")])  # always taken: without it nothing can be emptied
    spool.close()


def test_rows_are_bounded_too(tmp_path):
    spool = Spool(tmp_path, max_bytes=1 << 20, max_rows=5)
    for n in range(9):
        spool.add([item(n)])
    assert spool.items == 5
    assert spool.counters() == {"dropped_frames": 4, "spooled_frames": 9}
    spool.close()


def test_a_record_stays_as_long_as_an_item_needs_it(spool):
    old, new = item(0, 60, "epoch"), item(1, 60, "epoch")
    frame = item(2, epoch=old.digest)
    spool.add([old, new, frame])
    spool.drop_finished_epochs(new.digest)
    assert spool.epoch_record(old.digest)
    spool.remove(frame.digest)
    spool.drop_finished_epochs(new.digest)
    assert spool.epoch_record(old.digest) is None
    assert spool.epoch_record(new.digest)


def test_a_held_item_stays_and_is_not_sent(spool):
    spool.add([item(1), item(2)])
    spool.hold(item(1).digest)
    assert [w.digest for w in spool.waiting(9)] == [item(2).digest]
    assert (spool.pending(), spool.items) == (1, 2)


def test_numbers_that_must_not_repeat_do_not_repeat_after_a_crash(tmp_path):
    spool = Spool(tmp_path, max_bytes=1000)
    assert [spool.next_value("epoch_seq") for _ in range(3)] == [1, 2, 3]
    spool._db.rollback()
    spool._db.close()
    again = Spool(tmp_path, max_bytes=1000)
    assert again.next_value("epoch_seq") == 4
    again.close()


@pytest.mark.parametrize("damage", [b"no database at all" * 100, b""])
def test_a_damaged_database_is_set_aside_and_the_device_goes_on(tmp_path, damage):
    spool = Spool(tmp_path, max_bytes=1 << 20)
    spool.add([item(n, 3000) for n in range(50)])
    spool.close()
    path = tmp_path / "spool.db"
    raw = bytearray(path.read_bytes())
    raw[:100] = damage[:100] or bytes(raw[:100])
    if not damage:
        raw[4096 : 4096 * 4] = random.Random(1).randbytes(4096 * 3)
    path.write_bytes(raw)
    again = Spool(tmp_path, max_bytes=1 << 20)
    assert again.counters()["spool_recreated"] == 1
    assert (tmp_path / "spool.damaged").is_file()
    again.add([item(99, 70_000)])
    again.commit()
    assert again.payload(item(99, 70_000).digest) == item(99, 70_000).payload
    again.close()


def test_a_database_that_cannot_be_opened_now_is_not_set_aside(tmp_path):
    spool = Spool(tmp_path / "spool", max_bytes=1 << 20)
    spool.close()
    path = tmp_path / "spool" / "spool.db"
    path.rename(tmp_path / "kept")
    path.mkdir()
    with pytest.raises(UnavailableError):
        Spool(tmp_path / "spool", max_bytes=1 << 20)
    assert path.is_dir()


def test_bytes_that_a_repair_cut_off_are_counted_and_the_rest_goes_on(tmp_path):
    spool = Spool(tmp_path, max_bytes=1 << 30)
    spool.add([item(1, 50_000), item(2, 50_000), item(3, 50)])
    spool.close()
    os.truncate(tmp_path / "arena.bin", 60_000)
    again = Spool(tmp_path, max_bytes=1 << 30)
    assert [w.digest for w in again.waiting(9)] == [item(1, 50_000).digest, item(3, 50).digest]
    assert again.counters()["damaged_frames"] == 1
    again.close()


def test_an_unknown_drop_policy_is_refused(tmp_path):
    with pytest.raises(ConfigError):
        Spool(tmp_path, max_bytes=1, drop="newest")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder, leave):
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (folder / "filler").write_bytes(bytes(max(0, free - leave)))


@pytest.mark.parametrize("size", [300, 100_000])
def test_a_full_disk_refuses_new_items_and_loses_no_old_one(small_disk, size):
    spool = Spool(small_disk / "spool", max_bytes=1 << 30, drop="refuse")
    kept = [item(n, size) for n in range(5)]
    spool.add(kept)
    spool.commit()
    fill(small_disk, 0)
    refused = 0
    for n in range(1000, 1400):
        try:
            spool.add([item(n, size)])
            spool.commit()
            kept.append(item(n, size))
        except StorageFullError:
            refused += 1
    assert refused
    try:
        spool.next_value("epoch_seq")
    except StorageFullError:
        refused += 1
    spool.close()
    (small_disk / "filler").unlink()
    again = Spool(small_disk / "spool", max_bytes=1 << 30, drop="refuse")
    assert [w.digest for w in again.waiting(9999)] == [one.digest for one in kept]
    assert all(again.payload(one.digest) == one.payload for one in kept)
    again.add([item(2000, size)])
    again.commit()
    again.close()


def test_opening_on_a_full_disk_sets_nothing_aside(small_disk):
    spool = Spool(small_disk / "spool", max_bytes=1 << 30)
    spool.add([item(n, 2000) for n in range(5)])
    spool.close()
    fill(small_disk, 0)
    with contextlib.suppress(StorageFullError, UnavailableError):
        Spool(small_disk / "spool", max_bytes=1 << 30).close()
    assert not (small_disk / "spool" / "spool.damaged").exists()
    (small_disk / "filler").unlink()
    again = Spool(small_disk / "spool", max_bytes=1 << 30)
    assert again.pending() == 5
    again.close()


def test_a_file_size_limit_is_a_full_disk(tmp_path):
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_spool import item\n"
        "from edgepriv.device.spool import Spool\n"
        "from edgepriv.errors import StorageFullError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
        "spool, kept = Spool(Path(sys.argv[1]), max_bytes=1 << 30), 0\n"
        "for n in range(60):\n"
        "    try:\n"
        "        spool.add([item(n, 100_000)]); spool.commit(); kept += 1\n"
        "    except StorageFullError: pass\n"
        "spool.close(); print(kept)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spool = Spool(tmp_path, max_bytes=1 << 30)
    assert spool.pending() == int(done.stdout)
    assert 0 < spool.pending() < 60
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 2_000_000
    spool.close()


def test_the_counters_survive_and_roll_back_with_their_items(tmp_path):
    spool = Spool(tmp_path, max_bytes=1 << 20)
    spool.add([item(1)])
    spool.commit()
    spool.add([item(2)])
    assert spool.counters()["spooled_frames"] == 2
    spool._db.close()  # the process ends here
    again = Spool(tmp_path, max_bytes=1 << 20)
    assert again.counters()["spooled_frames"] == 1
    assert again.items == 1
    again.close()


def test_rows_that_wait_in_memory_are_seen_by_every_reader(tmp_path):
    """The same random life twice: one spool is read after every step, the other at commits only; both end alike."""
    read, unread = Spool(tmp_path / "a", max_bytes=400_000), Spool(tmp_path / "b", max_bytes=400_000)
    rng, known = random.Random(7), [item(0)]
    for number in range(1, 160):
        kind = rng.choice(["frame", "frame", "frame", "output", "update"])
        made = item(number, rng.choice([100, 17_000, 60_000 if kind == "frame" else 300]), kind, round_number=number)
        known.append(made)
        removed = rng.choice(known).digest if rng.random() < 0.3 else b""
        for spool in (read, unread):
            spool.add([made])
            if removed:
                spool.remove(removed)
            if number % 7 == 0:
                spool.commit()
        read.waiting(999)
    for spool in (read, unread):
        spool.commit()
        rows = spool.waiting(999)
        assert len(rows) > 5
        assert spool.items == len(rows)
        assert spool.stored_bytes == sum(row.size for row in rows) <= 400_000
        assert all(hashlib.sha256(spool.payload(row.digest)).digest() == row.digest for row in rows)
    assert [row.digest for row in read.waiting(999)] == [row.digest for row in unread.waiting(999)]
    assert read.counters()["dropped_frames"] == unread.counters()["dropped_frames"] > 5
    spaces = [sum(size for _, size in spool._arena._free) for spool in (read, unread)]
    assert spaces[0] == spaces[1]
    read.close()
    unread.close()


def test_an_item_that_is_there_already_takes_no_room(tmp_path):
    spool = Spool(tmp_path, max_bytes=1 << 20)
    small, large = item(1), item(2, 50_000)
    spool.add([small, large])
    spool.add([large, small, item(3)])
    spool.commit()
    spool.add([large])
    assert [row.digest for row in spool.waiting(9)] == [small.digest, large.digest, item(3).digest]
    assert (spool.items, spool.stored_bytes) == (3, 50_200)
    assert spool.counters()["spooled_frames"] == 3
    spool.commit()
    assert spool._arena._end - sum(size for _, size in spool._arena._free) == 53_248  # one extent, whole pages
    assert spool.payload(large.digest) == large.payload
    spool.close()
