"""The bench measures whole frames and keeps its schema; times are judged by tests/benchmarks/cipher_speed.py."""

import json

import numpy as np
from click.testing import CliRunner

from edgepriv import primitives
from edgepriv.cipher import bench
from edgepriv.cli import root
from edgepriv.wire import envelope as wire

NAMED = {"name", "aead_ms", "layers_ms", "mac_ms", "seal_ms", "open_ms", "seal_ratio", "open_ratio", "copy_ms"}


def test_the_bench_prints_its_schema_and_stays_within_the_memory_target():
    result = CliRunner().invoke(root, ["cipher", "bench", "--size", "VGA", "--rounds", "1", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["schema"] == "edgepriv.cipher-bench/1"
    (frame,) = document["frames"]
    assert set(frame) > NAMED | {"peak_extra_bytes"}
    assert frame["seal_ms"] > frame["aead_ms"] > 0
    assert frame["peak_extra_bytes"] <= 2 * frame["bytes"]
    assert set(frame["profiles"]) == {"aead", "flep3", "flep3-strong"}


def test_the_bench_has_words_for_people():
    result = CliRunner().invoke(
        root, ["cipher", "bench", "--size", "VGA", "--rounds", "1", "--alg", "chacha20-poly1305"]
    )
    assert result.exit_code == 0
    assert "AEAD alone" in result.stdout
    assert "seal_ms: DeviceEpoch.seal_view" in result.stdout


def test_what_is_timed_is_what_a_device_does():
    """Every timed seal draws an id of its own; without the MAC all else is there, and the recipient opens it."""
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    stand = bench.Stand(primitives.AES_GCM)
    for profile in wire.PROFILES:
        epoch, opener = stand.epoch(profile, mac=False)
        raws = [epoch.seal(image) for _ in range(3)]
        assert len({wire.parse(raw).mid for raw in raws}) == 3
        assert [wire.parse(raw).counter for raw in raws] == [0, 1, 2]
        assert all(raw[-16:] == bytes(16) for raw in raws)
        assert np.array_equal(opener.open(raws[2]).pixels, image)
        assert stand.epoch(profile)[0].seal(image)[-16:] != bytes(16)
    calls = bench._frame_calls(image, stand)
    assert {call.func.__name__ for name, call in calls.items() if name.startswith("seal")} == {"seal_view"}
