"""An ONNX model as a trainable torch module: one path for selecting and for attacking, whatever the model came from.

Rules: a stated list of operators, everything else is `UnsupportedModelError` (a training-free score then serves);
float weights become parameters under their initializer's name, so that positions found here are positions in the
file; no code from the file, no pickle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn import functional

from edgepriv.errors import DataError
from edgepriv.selective_encryption.select import compute

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Attributes = dict[str, Any]
Inputs = list[Any]


class UnsupportedModelError(DataError):
    """The model has an operator that cannot be trained through here; a training-free score still works."""


class Network(nn.Module):
    """A runnable copy of an ONNX graph.

    Args:
        model: a normalised ``onnx.ModelProto``.
        extra_norm: put a fresh BatchNorm behind every convolution (what an attacker does to a folded model).
    """

    def __init__(self, model: Any, *, extra_norm: bool = False) -> None:
        super().__init__()
        self.weights = nn.ParameterDict()
        self.norms = nn.ModuleDict()
        self.frozen_norms = False
        self._fixed: dict[str, torch.Tensor] = {}
        self._steps: list[tuple[str, list[str], str, Attributes]] = []
        self._input = next(i.name for i in model.graph.input if i.name not in _names(model))
        self._output = model.graph.output[0].name
        self._load(model)
        for node in model.graph.node:
            self._add(node, extra_norm=extra_norm)
        self.to(compute.device())
        self._fixed = {name: value.to(compute.device()) for name, value in self._fixed.items()}

    def _load(self, model: Any) -> None:
        trainable = {
            name
            for node in model.graph.node
            for name in node.input
            if node.op_type in {"Conv", "Gemm", "MatMul", "Add", "Mul", "PRelu"}
        }
        for tensor in model.graph.initializer:
            value = torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
            value = value.float() if value.is_floating_point() else value
            if tensor.name in trainable and value.is_floating_point() and value.numel() > 1:
                self._parameter(tensor.name, value)
            else:
                self._fixed[tensor.name] = value

    def _parameter(self, name: str, value: torch.Tensor) -> None:
        if value.ndim == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        self.weights[_key(name)] = nn.Parameter(value)

    def _add(self, node: Any, *, extra_norm: bool) -> None:
        kind, inputs = node.op_type, list(node.input)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if kind == "DequantizeLinear" and inputs[0] in self._fixed and self._fixed[inputs[0]].ndim > 1:
            value = _dequantize([self._fixed[name] for name in inputs], attributes)
            self._parameter(inputs[0], value)  # by the stored weight's name: rows are rows of the file
            self._steps.append(("Identity", inputs[:1], node.output[0], {}))
            return
        if kind == "BatchNormalization":
            self.norms[_key(node.output[0])] = self._norm(inputs, attributes)
            inputs = inputs[:1]
        elif kind not in OPERATORS:
            raise UnsupportedModelError(f"operator {kind} cannot be trained through")
        self._steps.append((kind, inputs, node.output[0], attributes))
        if kind == "Conv" and extra_norm:
            channels = self.weights[_key(inputs[1])].shape[0]
            made = node.output[0] + ".before_norm"
            self._steps[-1] = (kind, inputs, made, attributes)
            self.norms[_key(node.output[0])] = nn.BatchNorm2d(channels)
            self._steps.append(("BatchNormalization", [made], node.output[0], {}))

    def _norm(self, inputs: list[str], attributes: Attributes) -> nn.BatchNorm2d:
        scale, shift, mean, var = (self._fixed[name] for name in inputs[1:5])
        norm = nn.BatchNorm2d(len(scale), eps=attributes.get("epsilon", 1e-5))
        with torch.no_grad():
            norm.weight.copy_(scale)
            norm.bias.copy_(shift)
        norm.running_mean, norm.running_var = mean.clone(), var.clone()
        return norm

    def weight(self, name: str) -> nn.Parameter:
        """The parameter of one initializer."""
        parameter: nn.Parameter = self.weights[_key(name)]
        return parameter

    def rows(self, name: str, units: int) -> torch.Tensor:
        """One initializer as [units, unit_size], the layout of the file (a copy)."""
        return self.weight(name).detach().contiguous(memory_format=torch.contiguous_format).reshape(units, -1).clone()

    def set_rows(self, name: str, rows: torch.Tensor) -> None:
        """Write weights given as [units, unit_size]."""
        with torch.no_grad():
            self.weight(name).copy_(rows.reshape(self.weight(name).shape))

    def forward(self, x: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Run the graph; ``weights`` replaces some initializers for this call (gates, masks)."""
        values: dict[str, Any] = {self._input: x}
        for kind, names, output, attributes in self._steps:
            inputs = [self._value(name, values, weights) for name in names]
            if kind == "BatchNormalization":
                values[output] = self.norms[_key(output)](inputs[0])
            else:
                values[output] = OPERATORS[kind](inputs, attributes)
        result: torch.Tensor = values[self._output]
        return result

    def _value(self, name: str, values: dict[str, Any], weights: Mapping[str, torch.Tensor] | None) -> Any:
        if not name:
            return None
        if name in values:
            return values[name]
        if weights is not None and name in weights:
            return weights[name]
        key = _key(name)
        return self.weights[key] if key in self.weights else self._fixed[name]

    def train(self, mode: bool = True) -> Network:
        """As usual, but BatchNorm stays in evaluation while ``frozen_norms`` is set."""
        super().train(mode)
        if self.frozen_norms:
            self.norms.eval()
        return self


def _names(model: Any) -> set[str]:
    return {tensor.name for tensor in model.graph.initializer}


def _key(name: str) -> str:
    """A name that torch accepts as a parameter's."""
    return "w_" + name.replace(".", "__").replace("/", "_s_").replace(":", "_c_")


def _pads(x: torch.Tensor, a: Attributes, fill: float = 0.0) -> torch.Tensor:
    if a.get("auto_pad", b"NOTSET") not in {b"NOTSET", b"VALID"}:
        raise UnsupportedModelError("automatic padding is not read")
    top, left, bottom, right = a.get("pads", [0, 0, 0, 0])
    return functional.pad(x, (left, right, top, bottom), value=fill) if top + left + bottom + right else x


def _conv(i: Inputs, a: Attributes) -> torch.Tensor:
    if i[1].ndim != 4:
        raise UnsupportedModelError("only two-dimensional convolutions are read")
    top, left, bottom, right = a.get("pads", [0, 0, 0, 0])
    even = top == bottom and left == right and a.get("auto_pad", b"NOTSET") == b"NOTSET"
    x, padding = (i[0], (top, left)) if even else (_pads(i[0], a), (0, 0))
    bias = i[2] if len(i) > 2 else None
    return functional.conv2d(x, i[1], bias, a.get("strides", 1), padding, a.get("dilations", 1), int(a.get("group", 1)))


def _gemm(i: Inputs, a: Attributes) -> torch.Tensor:
    left, right = (i[0].T if a.get("transA") else i[0]), (i[1].T if a.get("transB") else i[1])
    out = a.get("alpha", 1.0) * (left @ right)
    result: torch.Tensor = out + a.get("beta", 1.0) * i[2] if len(i) > 2 and i[2] is not None else out
    return result


def _max_pool(i: Inputs, a: Attributes) -> torch.Tensor:
    x = _pads(i[0], a, float("-inf"))
    ceil = bool(a.get("ceil_mode", 0))
    return functional.max_pool2d(x, a["kernel_shape"], a.get("strides", 1), ceil_mode=ceil)


def _average_pool(i: Inputs, a: Attributes) -> torch.Tensor:
    if any(a.get("pads", [0])) and not a.get("count_include_pad"):
        raise UnsupportedModelError("average pooling that excludes its padding is not read")
    return functional.avg_pool2d(_pads(i[0], a), a["kernel_shape"], a.get("strides", 1))


def _reshape(i: Inputs, a: Attributes) -> torch.Tensor:
    sizes = [i[0].shape[k] if s == 0 and not a.get("allowzero") else s for k, s in enumerate(i[1].tolist())]
    if sizes and sizes[0] == 1 and len(i[0]) != 1:
        sizes[0] = len(i[0])  # exported with a batch of one
    out: torch.Tensor = i[0].reshape(sizes)
    return out


def _axes(i: Inputs, a: Attributes) -> list[int]:
    if len(i) > 1 and i[1] is not None:
        return [int(v) for v in i[1].tolist()]
    return [int(v) for v in a.get("axes", [])]


def _reduce_mean(i: Inputs, a: Attributes) -> torch.Tensor:
    axes = _axes(i, a) or list(range(i[0].ndim))
    out: torch.Tensor = i[0].mean(axes, keepdim=bool(a.get("keepdims", 1)))
    return out


def _clip(i: Inputs, a: Attributes) -> torch.Tensor:
    low = i[1] if len(i) > 1 else a.get("min")
    high = i[2] if len(i) > 2 else a.get("max")
    return torch.clamp(i[0], None if low is None else float(low), None if high is None else float(high))


def _per_axis(value: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    shape = [1] * x.ndim
    shape[axis] = -1
    return value.reshape(shape) if value.numel() > 1 else value.reshape(())


def _dequantize(i: Inputs, a: Attributes) -> torch.Tensor:
    axis = a.get("axis", 1)
    scale = _per_axis(i[1].float(), i[0], axis)
    zero = _per_axis(i[2].float(), i[0], axis) if len(i) > 2 and i[2] is not None else 0.0
    result: torch.Tensor = (i[0].float() - zero) * scale
    return result


def _quantize(i: Inputs, a: Attributes) -> torch.Tensor:
    """Quantised values as floats; the rounding is straight-through for gradients."""
    axis = a.get("axis", 1)
    low, high = (-128, 127) if len(i) > 2 and i[2] is not None and i[2].dtype == torch.int8 else (0, 255)
    zero = _per_axis(i[2].float(), i[0], axis) if len(i) > 2 and i[2] is not None else 0.0
    scaled = i[0] / _per_axis(i[1].float(), i[0], axis) + zero
    result: torch.Tensor = scaled.clamp(low, high) + (scaled.round() - scaled).detach()
    return result


def _squeeze(i: Inputs, a: Attributes) -> torch.Tensor:
    out = i[0]
    for axis in sorted(_axes(i, a), reverse=True):
        out = out.squeeze(axis)
    result: torch.Tensor = out
    return result


def _unsqueeze(i: Inputs, a: Attributes) -> torch.Tensor:
    out = i[0]
    for axis in sorted(_axes(i, a)):
        out = out.unsqueeze(axis)
    result: torch.Tensor = out
    return result


OPERATORS: dict[str, Callable[[Inputs, Attributes], Any]] = {
    "Add": lambda i, _: i[0] + i[1],
    "Sub": lambda i, _: i[0] - i[1],
    "Mul": lambda i, _: i[0] * i[1],
    "Div": lambda i, _: i[0] / i[1],
    "AveragePool": _average_pool,
    "BatchNormalization": lambda i, _: i[0],
    "Cast": lambda i, a: i[0].long() if a["to"] in {6, 7} else i[0].float(),
    "Clip": _clip,
    "Concat": lambda i, a: torch.cat(i, a["axis"]),
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Dropout": lambda i, _: i[0],
    "Elu": lambda i, a: functional.elu(i[0], a.get("alpha", 1.0)),
    "Flatten": lambda i, a: i[0].flatten(a.get("axis", 1)),
    "Gather": lambda i, a: torch.index_select(i[0], a.get("axis", 0), i[1].reshape(-1)).reshape(i[1].shape),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda i, _: i[0].mean((2, 3), keepdim=True),
    "GlobalMaxPool": lambda i, _: i[0].amax((2, 3), keepdim=True),
    "HardSigmoid": lambda i, a: torch.clamp(i[0] * a.get("alpha", 0.2) + a.get("beta", 0.5), 0, 1),
    "HardSwish": lambda i, _: functional.hardswish(i[0]),
    "Identity": lambda i, _: i[0],
    "LeakyRelu": lambda i, a: functional.leaky_relu(i[0], a.get("alpha", 0.01)),
    "LogSoftmax": lambda i, a: functional.log_softmax(i[0], a.get("axis", -1)),
    "MatMul": lambda i, _: i[0] @ i[1],
    "MaxPool": _max_pool,
    "Pad": lambda i, a: functional.pad(i[0], _pad_list(i, a)),
    "QuantizeLinear": _quantize,
    "ReduceMean": _reduce_mean,
    "Relu": lambda i, _: functional.relu(i[0]),
    "Reshape": _reshape,
    "Shape": lambda i, _: torch.tensor(i[0].shape),
    "Sigmoid": lambda i, _: torch.sigmoid(i[0]),
    "Softmax": lambda i, a: functional.softmax(i[0], a.get("axis", -1)),
    "Squeeze": _squeeze,
    "Tanh": lambda i, _: torch.tanh(i[0]),
    "Transpose": lambda i, a: i[0].permute(a["perm"]),
    "Unsqueeze": _unsqueeze,
}


def _pad_list(i: Inputs, a: Attributes) -> list[int]:
    if a.get("mode", b"constant") != b"constant":
        raise UnsupportedModelError("only constant padding is read")
    pads = i[1].tolist() if len(i) > 1 else a["pads"]
    half = len(pads) // 2
    return [int(p) for k in reversed(range(half)) for p in (pads[k], pads[k + half])]
