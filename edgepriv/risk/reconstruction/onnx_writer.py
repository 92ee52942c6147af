"""Write a classifier as ONNX: opset 17, IR version 8, dynamic batch axis, only standard operators.

Rules: a stated list of layers, weights stored as they are (no folding), dropout left out as at inference; anything else
is refused by name. Small enough to read, which a file that an auditor opens should be.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn

from edgepriv.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from edgepriv.risk.reconstruction.onnx_reader import ImportedNetwork

OPSET, IR_VERSION = 17, 8
OPERATORS = {operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.truediv: "Div"}


class _Writer:
    """Collects nodes and weights while the traced graph is walked."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}

    def weight(self, name: str, value: torch.Tensor) -> str:
        self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(value.detach().cpu().numpy()), name)
        return name

    def emit(self, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{op}_{len(self.nodes)}", **attributes))

    def node(self, node: fx.Node) -> None:
        inputs = [argument.name for argument in node.args if isinstance(argument, fx.Node)]
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            self.weight(node.name, getattr(self._network.get_submodule(owner), leaf))
        elif node.op == "call_function" and node.target in OPERATORS:
            self.emit(OPERATORS[node.target], inputs, node.name)
        elif node.op == "call_module":
            self.layer(self._network.get_submodule(str(node.target)), inputs[0], node.name)
        elif node.op not in {"placeholder", "output"}:
            raise DataError(f"cannot write {node.op} {node.target} as ONNX")

    def layer(self, layer: nn.Module, source: str, name: str) -> None:
        if isinstance(layer, nn.Conv2d):
            inputs = [source, self.weight(f"{name}.weight", layer.weight)]
            if layer.bias is not None:
                inputs.append(self.weight(f"{name}.bias", layer.bias))
            pads = [int(p) for p in layer.padding] * 2
            self.emit("Conv", inputs, name, strides=list(layer.stride), pads=pads, group=layer.groups)
        elif isinstance(layer, nn.BatchNorm2d):
            parts = {"weight": layer.weight, "bias": layer.bias, "mean": layer.running_mean, "var": layer.running_var}
            inputs = [
                source,
                *(self.weight(f"{name}.{key}", value) for key, value in parts.items() if value is not None),
            ]
            self.emit("BatchNormalization", inputs, name, epsilon=layer.eps)
        elif isinstance(layer, nn.Linear):
            inputs = [source, self.weight(f"{name}.weight", layer.weight), self.weight(f"{name}.bias", layer.bias)]
            self.emit("Gemm", inputs, name, transB=1)
        elif isinstance(layer, nn.AvgPool2d):
            side = int(layer.kernel_size) if isinstance(layer.kernel_size, int) else int(layer.kernel_size[0])
            self.emit("AveragePool", [source], name, kernel_shape=[side, side], strides=[side, side])
        elif type(layer) in {nn.ReLU, nn.Flatten, nn.Sigmoid, nn.Identity, nn.Dropout}:
            simple = {nn.ReLU: "Relu", nn.Flatten: "Flatten", nn.Sigmoid: "Sigmoid"}
            self.emit(simple.get(type(layer), "Identity"), [source], name)
        else:
            raise DataError(f"cannot write the layer {type(layer).__name__} as ONNX")


def write_onnx(network: nn.Module, shape: tuple[int, int, int], outputs: int, path: Path) -> None:
    """Write a classifier's inference graph.

    Input ``image`` [batch, c, h, w] float32 in [0, 1], output ``logits`` [batch, outputs].

    Raises:
        DataError: the network has a layer that this writer does not know.
    """
    was_training = network.training
    network.eval()
    graph = fx.Tracer().trace(network)
    writer = _Writer(network)
    renamed = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            renamed[node.name] = "image"
        elif node.op == "output":
            renamed[node.args[0].name] = "logits"
        writer.node(node)
    for item in writer.nodes:
        item.input[:] = [renamed.get(name, name) for name in item.input]
        item.output[:] = [renamed.get(name, name) for name in item.output]
    height, width, channels = shape
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", channels, height, width])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", outputs])
    made = helper.make_graph(writer.nodes, "classifier", [image], [logits], list(writer.weights.values()))
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="edgepriv")
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    network.train(was_training)


def write_imported(network: ImportedNetwork, path: Path) -> None:
    """Write an imported graph with its present weights: the same nodes, names and opset, dynamic batch axis.

    The file is made from plain values, so nothing of the supplier's file but its standard operators comes along.
    """
    nodes, weights = network.plain_graph()
    source, result = network.ends
    made_nodes = [helper.make_node(n["op"], n["inputs"], n["outputs"], **n["attributes"]) for n in nodes]
    shape = ["batch", *(None if isinstance(side, str) else side for side in network.input_shape[1:])]
    inputs = [helper.make_tensor_value_info(source, TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info(result, TensorProto.FLOAT, ["batch", "outputs"])]
    constants = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()]
    made = helper.make_graph(made_nodes, "classifier", inputs, outputs, constants)
    model = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", network.opset)], producer_name="edgepriv harden"
    )
    model.ir_version = max(IR_VERSION, helper.find_min_ir_version_for(list(model.opset_import)))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
