"""A model of more than 2 GB: protected, delivered and run bit-exactly by external data (16 GB of memory)."""

import gc
import json
import resource

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from edgepriv.cli import root
from edgepriv.device import packing
from edgepriv.keys import Identity, load_identity
from edgepriv.selective_encryption import bundle_files
from edgepriv.selective_encryption.restore import open_carrier, open_level

LAYERS, WIDTH, GROUPS = 66, 2900, 100
WIDE, FIRST = [WIDTH, WIDTH, 1, 1], [WIDTH, WIDTH // GROUPS, 3, 3]


def write_model(folder):
    """A grouped 3x3 convolution and a stack of wide 1x1 ones, weights beside the graph; returns path and bytes."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(WIDTH * WIDTH, np.float32) * np.float32(np.sqrt(2 / WIDTH))
    tensors, nodes, before = [], [], "x"
    with (folder / "big.weights").open("wb") as file:
        for number in range(LAYERS + 1):
            dims = WIDE if number else FIRST
            count = int(np.prod(dims))
            tensor = TensorProto(name=f"w{number}", data_type=TensorProto.FLOAT, dims=dims)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "big.weights"), ("offset", file.tell()), ("length", 4 * count)):
                tensor.external_data.add(key=key, value=str(value))
            file.write(np.roll(base, 1 + 7 * number)[:count])
            tensors.append(tensor)
            shape = {} if number else {"pads": [1] * 4, "group": GROUPS}
            nodes.append(helper.make_node("Conv", [before, f"w{number}"], [f"c{number}"], **shape))
            nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
            before = f"r{number}"
        size = file.tell()
    info = helper.make_tensor_value_info
    shape = ["n", WIDTH, 2, 2]
    graph = helper.make_graph(
        nodes, "big", [info("x", TensorProto.FLOAT, shape)], [info(before, TensorProto.FLOAT, shape)], tensors
    )
    path = folder / "big.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path, size


def command(*words):
    result = CliRunner().invoke(root, [str(word) for word in words])
    assert result.exit_code == 0, result.output or repr(result.exception)
    gc.collect()
    return result.stdout


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["levels", "both"])
def test_a_model_over_2_gb_is_protected_delivered_and_run_exactly(tmp_path, mode):
    path, size = write_model(tmp_path)
    assert size > 2**31
    x = np.random.default_rng(1).standard_normal((1, WIDTH, 2, 2), np.float32)
    plain = ort.InferenceSession(str(path)).run(None, {"x": x})[0]
    device, out = Identity.new("device", "cam1"), tmp_path / "bundle"
    device.save(tmp_path / "cam1.key")
    flags = ("--share", "0.02", "--mode", mode, "--decoys", "dprm", "--out", out, "--json")
    report = json.loads(command("protect", path, *flags))
    assert report["selection"] == "magnitude"
    for leftover in tmp_path.glob("big.*"):
        leftover.unlink()
    permission = tmp_path / "permission"
    command(
        *("grant", "--model", out, "--level", 1, "--device", tmp_path / "cam1.key.pub"),
        *("--expires", "2099-01-01", "--out", permission),
    )
    issuer = load_identity(out / "owner" / "issuer.key")
    pinned = [issuer.public.ed25519]
    public = {p.name: p for p in out.iterdir() if p.is_file()}
    with (tmp_path / "delivery").open("wb") as stream:
        packing.write_delivery(stream, public, packing.Golden(x, plain), packing.Limits(), issuer)
    for sent in public.values():
        sent.unlink()
    packing.unpack(tmp_path / "delivery", tmp_path / "device")
    (tmp_path / "delivery").unlink()
    received, signed = bundle_files.read_manifest(tmp_path / "device", pinned)
    if mode == "levels":
        masked = open_carrier(received, bundle_files.read_stored(tmp_path / "device", received))
        assert not np.array_equal(masked.session(ort).run(None, {"x": x})[0], plain)
    stored = bundle_files.read_stored(tmp_path / "device", received)
    opened = open_level(signed, permission.read_bytes(), stored, device, pinned, now_s=received.issued_s)
    del stored
    restored = opened.session(ort).run(None, {"x": x})[0]
    assert np.array_equal(restored, plain)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{mode}: {size / 1e9:.2f} GB of weights, peak {peak:.1f} GB")
