"""The bench measures whole frames and keeps its schema; times are judged by tests/benchmarks/cipher_speed.py."""

import json

from click.testing import CliRunner

from edgepriv.cli import root

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
