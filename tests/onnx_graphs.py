"""Small ONNX graphs made node by node, for tests of what opens a supplier's file."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write(path, nodes, inputs, outputs, weights=()):
    made = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(v, k) for k, v in weights])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(path))
    return path


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def flat_model(path, *, batch="batch", tail=(), kind=TensorProto.FLOAT, k=10, weights=()):
    matrix = np.random.default_rng(0).normal(size=(64, k)).astype(np.float32)
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"]), *tail]
    name = tail[-1].output[0] if tail else "y"
    return write(
        path,
        nodes,
        [value("x", TensorProto.FLOAT, [batch, 1, 8, 8])],
        [value(name, kind, None)],
        [("w", matrix), *weights],
    )
