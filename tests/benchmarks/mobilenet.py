"""Writes a MobileNet-v1 (width 1.0, 224x224, 1000 classes) with random weights as ONNX: a real load, no download.

Layers as in arXiv 1704.04861 table 1, BatchNorm folded into the convolutions, as deployed models are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PLAN = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
CLASSES = 1000


def write_mobilenet(folder: Path, *, seed: int = 0) -> Path:
    """Write ``model.onnx`` and ``model.toml`` to a folder and return the model's path."""
    rng = np.random.default_rng(seed)
    nodes, weights, source = [], [], "image"

    def conv(source: str, inputs: int, outputs: int, side: int, stride: int, group: int) -> str:
        name = f"c{len(nodes)}"
        fan = inputs // group * side * side
        kernel = rng.normal(0, (2 / fan) ** 0.5, (outputs, inputs // group, side, side)).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"{name}.w"))
        weights.append(numpy_helper.from_array(np.zeros(outputs, np.float32), f"{name}.b"))
        pads = [side // 2] * 4
        nodes.append(
            helper.make_node(
                "Conv", [source, f"{name}.w", f"{name}.b"], [name], strides=[stride] * 2, pads=pads, group=group
            )
        )
        nodes.append(helper.make_node("Relu", [name], [f"{name}.r"]))
        return f"{name}.r"

    channels = 32
    source = conv(source, 3, channels, 3, 2, 1)
    for outputs, stride in PLAN:
        source = conv(source, channels, channels, 3, stride, channels)
        source = conv(source, channels, outputs, 1, 1, 1)
        channels = outputs
    head = rng.normal(0, 0.03, (CLASSES, channels)).astype(np.float32)
    weights += [
        numpy_helper.from_array(head, "head.w"),
        numpy_helper.from_array(np.zeros(CLASSES, np.float32), "head.b"),
    ]
    nodes += [
        helper.make_node("GlobalAveragePool", [source], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head.w", "head.b"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "mobilenet-v1",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 224, 224])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, CLASSES])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(model, path)
    labels = ", ".join(f'"{i}"' for i in range(CLASSES))
    (folder / "model.toml").write_text(
        'id = "mobilenet-v1"\ninput = "image"\nwidth = 224\nheight = 224\n'
        f'mean = [127.5]\nscale = [{1 / 127.5!r}]\nlogits = "logits"\nlabels = [{labels}]\n'
    )
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    print(write_mobilenet(parser.parse_args().out))
