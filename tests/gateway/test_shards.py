"""Three gateways, one round: partial sums of shards add to the sum of all, in any order, or without a dead shard."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from round_fleet import Fleet, fixed_trainer

from edgepriv.errors import ConfigError, DataError, WireError
from edgepriv.federated.fixed_point import Ring, decode_sum, quantise
from edgepriv.wire import message
from edgepriv.wire.update import decode_update, encode_header, encode_update, read_header
from gateway.shards import Partial, merge_partials

SIZE, EACH = 30, 5
ROOT = Path(__file__).resolve().parents[2]


def _deltas():
    rng = np.random.default_rng(5)
    return [rng.standard_normal(SIZE).astype(np.float32) for _ in range(3 * EACH)]


def _expected(deltas, chosen):
    ring = Ring(64, 10, 100.0, 4, 200)
    total, weight = np.zeros(SIZE, np.uint64), 0
    for i in chosen:
        total += quantise(deltas[i], 1 + i % 4, ring)
        weight += 1 + i % 4
    return (decode_sum(total, ring).astype(np.float32).astype(np.float64) / weight).astype(np.float32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, deltas, files = tmp_path_factory.mktemp("shards"), _deltas(), []
    base = {"w": np.zeros(SIZE, np.float32)}
    (folder / "base").write_bytes(encode_update(base, {"model": "m"}))
    for k in range(3):
        numbers = range(k * EACH, (k + 1) * EACH)
        trainers = [fixed_trainer({"w": deltas[i]}, 1 + i % 4) for i in numbers]
        fleet = Fleet(folder / f"gateway-{k}", trainers, first=k * EACH)
        if k == 1:
            fleet.hold = {"dev-007"}
        options = {"cohort": str(k), "publish": "partial", "max_weight": 4, "min_cohort": 3, "deadline_s": 30}
        fleet.open(fleet.plan(base, privacy="masked", **options))
        record = fleet.run()
        assert record.outcome == "done", record.reason
        assert record.result().model == b""
        files.append(fleet.conductor.model_path(record.after))
    return folder, deltas, files


def test_partial_sums_add_to_the_sum_of_all_in_any_order(shards):
    folder, deltas, files = shards
    wanted, digests = _expected(deltas, [i for i in range(15) if i != 7]), set()
    for order in permutations(files):
        digests.add(merge_partials(folder / "base", order, folder / "out").digest)
        new = decode_update((folder / "out").read_bytes(), max_bytes=1 << 20).tensors["w"]
        assert np.array_equal(new, wanted)
    assert len(digests) == 1


def test_a_dead_shard_sits_out(shards):
    folder, deltas, files = shards
    result = merge_partials(folder / "base", [files[0], files[2]], folder / "out")
    assert result.devices == 10
    new = decode_update((folder / "out").read_bytes(), max_bytes=1 << 20).tensors["w"]
    assert np.array_equal(new, _expected(deltas, [*range(5), *range(10, 15)]))


def test_a_shard_twice_another_base_or_other_bytes_are_refused(shards):
    folder, _, files = shards
    with pytest.raises(DataError, match="in two partial sums"):
        merge_partials(folder / "base", [files[0], files[0]], folder / "out")
    (folder / "other").write_bytes(encode_update({"w": np.ones(SIZE, np.float32)}))
    with pytest.raises(DataError, match="base weights"):
        merge_partials(folder / "other", files, folder / "out")
    with pytest.raises(WireError):
        merge_partials(folder / "base", [folder / "base"], folder / "out")


def test_the_command_merges(shards):
    folder, _, files = shards
    command = [sys.executable, "-m", "gateway", "rounds", "merge", "--json", "--base", str(folder / "base"), "--out"]
    done = subprocess.run(
        [*command, str(folder / "new"), *map(str, files)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert json.loads(done.stdout)["devices"] == 14


def test_rules_that_need_single_values_have_no_partial_sum(tmp_path):
    with pytest.raises(ConfigError, match="partial"):
        Fleet(tmp_path, []).plan({"w": np.zeros(3, np.float32)}, rule="median", publish="partial")


LIES = {
    "tensors that are none": ({"tensors": (7,)}, None),
    "tensors without a size": ({"tensors": (["w", [0]],)}, None),
    "no clip": ({"clip": 0.0}, None),
    "more survivors than devices": ({"survivors": 6}, None),
    "no survivors": ({"survivors": 0}, None),
    "fewer devices than are in it": ({"devices": 4}, None),
    "no devices": ({}, []),
    "a device twice": ({}, [["dev-000", 0]] * 5),
    "staleness below 0": ({}, [[f"dev-{i}", -1] for i in range(5)]),
    "names that are numbers": ({}, [[i, 0] for i in range(5)]),
    "rows that are none": ({}, 7),
}


def _altered(path, folder, changes, taken):
    with path.open("rb") as file:
        header, first = read_header(file.read(8), file.read, path.stat().st_size)
        file.seek(first)
        data = file.read()
    opened = dataclasses.replace(message.decode(header["meta"]["opened"]), **changes)
    meta = header["meta"] | {"opened": message.encode(opened)} | ({} if taken is None else {"taken": taken})
    (folder / "altered").write_bytes(encode_header(meta, header["tensors"]) + data)
    return folder / "altered"


def test_the_control_is_a_partial_sum_like_any_other(shards, tmp_path):
    path = _altered(shards[2][0], tmp_path, {}, None)
    with path.open("rb") as file:
        assert len(Partial(file, path).taken) == EACH


@pytest.mark.parametrize("lie", LIES)
def test_a_partial_sum_that_contradicts_itself_is_refused_and_nothing_stops(shards, tmp_path, lie):
    path = _altered(shards[2][0], tmp_path, *LIES[lie])
    with path.open("rb") as file, pytest.raises(WireError):
        Partial(file, path)
