"""The device's bench: shares that add up, a bottleneck by name, the CPU's best AEAD on both sides, real bytes."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from device_site import classifier
from PIL import Image

from edgepriv import primitives
from edgepriv.cli import root
from edgepriv.cli.device_bench import as_text
from edgepriv.device import bench
from edgepriv.device.capture import Frame
from edgepriv.device.infer import Inferer

STAGES = {"capture", "infer", "release", "seal", "spool"}


@pytest.fixture
def pictures(tmp_path):
    """Pictures of two sizes, none of them 640 by 480, the larger not first."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, shape in enumerate([(200, 300, 3), (400, 300, 3)]):
        pixels = np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def run(tmp_path, pictures, *flags):
    arguments = ["--model", classifier(tmp_path / "model"), "--source", pictures, "--frames", "8", *flags]
    result = CliRunner().invoke(root, ["device", "bench", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_share_of_each_stage_adds_up_and_the_bottleneck_is_named(tmp_path, pictures):
    document = json.loads(run(tmp_path, pictures, "--local-only", "--json"))
    assert document["schema"] == "edgepriv.device-bench/1"
    assert set(document) > {"fps", "bare_fps", "ratio_local", "ratio_end_to_end", "stages"}
    shares, stages = document["stage_share"], document["stages"]
    assert set(stages) == STAGES
    assert set(shares) == STAGES | {"rest"}
    assert sum(shares.values()) == pytest.approx(1, abs=0.001)
    for name, ms in stages.items():
        assert shares[name] == pytest.approx(ms / document["step_ms"], abs=0.001)
    assert document["bottleneck_stage"] == max(stages, key=stages.get)
    assert document["bottleneck"] == "device"
    assert document["ratio_end_to_end"] is None
    assert document["frame_bytes"] == (200 * 300 * 3 + 400 * 300 * 3) / 2
    text = as_text(document)
    assert f"bottleneck: {document['bottleneck_stage']}" in text
    assert text.count("%") == len(STAGES) + 1


def test_end_to_end_counts_the_bytes_that_were_stored(tmp_path, pictures):
    document = json.loads(run(tmp_path, pictures, "--json"))
    sealed = document["mb_per_s"] * 1e6 / document["fps_end_to_end"]
    smaller, larger = 200 * 300 * 3, 400 * 300 * 3
    assert smaller < sealed < larger + 500  # and not 640 x 480 x 3
    assert document["bottleneck"] in document["cpu_share"]
    assert sum(document["cpu_share"].values()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("has_aes", [True, False])
def test_the_bare_loop_uses_what_the_cpu_does_best(has_aes, tmp_path, monkeypatch):
    used = []

    class Watched:
        def seal_into(self, alg, *rest):
            used.append(alg)
            real.seal_into(alg, *rest)

    real = primitives.backend()
    monkeypatch.setattr(bench.cpu, "flags", lambda: frozenset({"aes"} if has_aes else ()))
    monkeypatch.setattr(bench.primitives, "backend", Watched)
    inferer = Inferer.from_file(classifier(tmp_path / "model"))
    frames = [Frame(np.zeros(shape, kind), 0.0, 0) for shape, kind in (((8, 8, 1), "u1"), ((9, 8, 1), "u2"))]
    loop = bench._bare_loop(inferer, bench.Repeated(frames), 9 * 8 * 2)
    loop()
    loop()
    assert used == [primitives.AES_GCM if has_aes else primitives.CHACHA] * 2
