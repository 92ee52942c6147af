"""The bit ledger: one budget a scene, on disk before it is allowed, refusing whenever in doubt."""

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.device.ledger import SceneLedger, difference_hash
from edgepriv.errors import ConfigError, DataError


@dataclass
class Shot:
    pixels: np.ndarray
    at: float


def scene(seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 1))
    return np.kron(coarse, np.ones((20, 20, 1))).astype(np.uint8)


def ledger(path, **options):
    return SceneLedger(path / "ledger.db", **{"bits_per_scene": 10.0, "window_s": 2.0, **options})


def test_frames_of_one_moment_share_a_budget(tmp_path):
    book = ledger(tmp_path)
    assert book.allow(Shot(scene(1), 100.0), 4)
    assert book.allow(Shot(scene(2), 101.0), 4)
    assert not book.allow(Shot(scene(3), 101.9), 4)
    assert book.allow(Shot(scene(4), 103.0), 4)
    assert book.refused == 1


def test_a_scene_that_is_shown_again_later_has_no_new_budget(tmp_path):
    book = ledger(tmp_path)
    assert book.allow(Shot(scene(1), 0.0), 8)
    first = book.scene_id
    noisy = np.clip(scene(1).astype(int) + np.random.default_rng(0).integers(-3, 4, scene(1).shape), 0, 255)
    assert book.allow(Shot(scene(2), 1000.0), 8)
    assert book.scene_id != first
    assert not book.allow(Shot(noisy.astype(np.uint8), 5000.0), 8)
    assert book.scene_id == first


def test_alternating_scenes_and_a_clock_that_jumps_win_nothing(tmp_path):
    book = ledger(tmp_path, window_s=1.0)
    allowed = [book.allow(Shot(scene(i % 2), 10.0 * (-1) ** i * i), 5) for i in range(12)]
    assert sum(allowed) == 4


def test_every_charged_frame_of_a_scene_is_remembered_not_only_the_first(tmp_path):
    book = ledger(tmp_path, window_s=60.0)
    assert book.allow(Shot(scene(1), 0.0), 4)
    assert book.allow(Shot(scene(2), 30.0), 4)
    first = book.scene_id
    assert not book.allow(Shot(scene(2), 40.0), 4)
    assert not book.allow(Shot(scene(2), 61.0), 4)
    book.close()
    again = ledger(tmp_path, window_s=60.0)  # durable: the file alone says so
    assert not again.allow(Shot(scene(2), 1000.0), 4)
    assert again.scene_id == first
    assert again.allow(Shot(scene(3), 2000.0), 4)


def test_what_was_never_charged_is_not_remembered_against_a_scene(tmp_path):
    book = ledger(tmp_path, window_s=60.0)
    assert book.allow(Shot(scene(1), 0.0), 9)
    assert not book.allow(Shot(scene(2), 30.0), 4)
    assert book.allow(Shot(scene(2), 100.0), 4)


def test_a_scene_with_too_many_looks_is_refused_and_stays_so_after_a_restart(tmp_path):
    book = ledger(tmp_path, window_s=60.0, max_looks=3)
    assert [book.allow(Shot(scene(i), float(i)), 1) for i in range(5)] == [True, True, True, False, False]
    assert book.allow(Shot(scene(0), 6.0), 1)  # a look that is remembered takes no place
    book.close()
    again = ledger(tmp_path, window_s=60.0, max_looks=3)
    assert not again.allow(Shot(scene(7), 8.0), 1)
    assert again.spent(again.scene_id) == 4.0


def test_the_ledger_of_an_older_release_still_knows_its_scenes(tmp_path):
    old = sqlite3.connect(tmp_path / "ledger.db")
    old.execute(
        "CREATE TABLE scenes (seq INTEGER PRIMARY KEY AUTOINCREMENT, id BLOB UNIQUE NOT NULL, started REAL NOT NULL,"
        " hash TEXT, spent REAL NOT NULL)"
    )
    row = (b"12345678", 5.0, f"{difference_hash(scene(1)):016x}", 9.5)
    old.execute("INSERT INTO scenes (id, started, hash, spent) VALUES (?, ?, ?, ?)", row)
    old.commit()
    old.close()
    book = ledger(tmp_path)
    assert not book.allow(Shot(scene(1), 9000.0), 1)
    assert book.scene_id == b"12345678"


def test_memory_and_file_agree_through_forgetting(tmp_path):
    book = ledger(tmp_path, max_scenes=5, window_s=1.5)
    allowed = [book.allow(Shot(scene(i % 9), float(i)), 1) for i in range(60)]
    book.close()
    other = ledger(tmp_path, max_scenes=5, window_s=1.5)
    assert any(allowed)
    assert other._seen._ids == book._seen._ids
    pairs = [sorted(zip(b._seen._owners.tolist(), b._seen._looks.tolist(), strict=True)) for b in (book, other)]
    assert pairs[0] == pairs[1]


def test_the_budget_outlives_the_process_and_a_kill(tmp_path):
    code = """
import sys, os, signal, numpy as np
from pathlib import Path
from edgepriv.device.ledger import SceneLedger
book = SceneLedger(Path(sys.argv[1]), bits_per_scene=10.0, window_s=2.0)
print(book.charge(b"12345678", 9.0), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "ledger.db"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False, cwd=os.getcwd()
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.strip() == "True"
    book = ledger(tmp_path)
    assert book.spent(b"12345678") == 9.0
    assert not book.charge(b"12345678", 2.0)
    assert book.charge(b"12345678", 1.0)


def test_a_ledger_that_cannot_be_written_refuses(tmp_path):
    book = ledger(tmp_path)
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    book._database.execute("PRAGMA busy_timeout = 50")
    other.execute("BEGIN EXCLUSIVE")
    assert not book.allow(Shot(scene(1), 0.0), 1)
    assert not book.charge(b"12345678", 1)
    other.execute("COMMIT")
    assert book.charge(b"12345678", 1)
    book.close()
    assert not book.charge(b"12345678", 1)


def test_a_damaged_file_stops_releases_instead_of_starting_afresh(tmp_path):
    (tmp_path / "ledger.db").write_bytes(b"not a database at all" * 400)
    with pytest.raises(DataError, match="cannot be used"):
        ledger(tmp_path)
    assert (tmp_path / "ledger.db").read_bytes().startswith(b"not a database")


@pytest.mark.parametrize("bits", [float("nan"), float("inf"), -1.0])
def test_bits_that_are_no_amount_are_refused(tmp_path, bits):
    assert not ledger(tmp_path).charge(b"12345678", bits)


def test_a_budget_that_is_no_amount_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError):
        ledger(tmp_path, bits_per_scene=0.0)


def test_only_so_many_scenes_are_remembered(tmp_path):
    book = ledger(tmp_path, max_scenes=10, window_s=0.0)
    for i in range(40):
        book.allow(Shot(scene(i), float(i)), 1)
    assert book._database.execute("SELECT count(*) FROM scenes").fetchone()[0] <= 10


@given(st.lists(st.floats(0, 6), max_size=30))
@settings(max_examples=25, deadline=None)
def test_the_sum_of_what_is_allowed_never_passes_the_budget(tmp_path_factory, amounts):
    book = ledger(tmp_path_factory.mktemp("l"))
    allowed = sum(bits for bits in amounts if book.charge(b"12345678", bits))
    assert allowed <= 10.0 + 1e-6


def test_the_hash_takes_pictures_of_any_size_and_kind():
    for shape, kind in (
        ((1, 1, 1), np.uint8),
        ((8, 8, 1), np.uint8),
        ((480, 640, 3), np.uint16),
        ((33, 9, 3), np.float32),
    ):
        assert 0 <= difference_hash(np.ones(shape, kind)) < 2**64
    brighter = np.clip(scene(5).astype(int) + 20, 0, 255).astype(np.uint8)
    assert (difference_hash(scene(5)) ^ difference_hash(brighter)).bit_count() <= 6
    assert (difference_hash(scene(5)) ^ difference_hash(scene(6))).bit_count() > 6
