"""Read an ONNX graph into torch for the white-box detectors, from plain values that the child process parsed.

Rules: a stated list of operators (``SUPPORTED``); everything else is :class:`UnsupportedGraphError` and the audit stays
black box. :func:`import_graph` checks that the torch graph gives the same outputs as onnxruntime before anybody uses
it. No pickle, no code from the file.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgepriv.errors import DataError
from edgepriv.risk.reconstruction.graph_roles import (
    CHAINS,
    MEAN,
    ONE,
    PRODUCTS,
    TRAINED,
    VARIANCE,
    WEIGHT,
    ZERO,
    UnsupportedGraphError,
    read_roles,
)
from edgepriv.risk.reconstruction.model_worker import UnusableModelError, input_layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from edgepriv.risk.reconstruction.supplied_model import SuppliedModel

AGREEMENT = 1e-3


# what a graph that this reader misjudged can raise: a black-box audit is the answer to each
GRAPH_FAILURES = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


def _pair(attributes: dict[str, Any], key: str, default: int) -> list[int]:
    return [int(v) for v in attributes.get(key, [default, default])]


def _padded(x: torch.Tensor, attributes: dict[str, Any], fill: float = 0.0) -> torch.Tensor:
    if attributes.get("auto_pad", "NOTSET") not in {"NOTSET", "VALID"}:
        raise UnsupportedGraphError("automatic padding is not read")
    top, left, bottom, right = (int(v) for v in attributes.get("pads", [0, 0, 0, 0]))
    return functional.pad(x, (left, right, top, bottom), value=fill) if top + left + bottom + right else x


def _conv(i: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    bias = i[2] if len(i) > 2 else None
    strides, dilations = _pair(a, "strides", 1), _pair(a, "dilations", 1)
    return functional.conv2d(_padded(i[0], a), i[1], bias, strides, 0, dilations, int(a.get("group", 1)))


def _gemm(i: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    left = i[0].T if a.get("transA") else i[0]
    right = i[1].T if a.get("transB") else i[1]
    product = float(a.get("alpha", 1.0)) * (left @ right)
    return product + float(a.get("beta", 1.0)) * i[2] if len(i) > 2 else product


def _reshape(i: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    sizes = [
        i[0].shape[at] if size == 0 and not a.get("allowzero") else int(size) for at, size in enumerate(i[1].tolist())
    ]
    return i[0].reshape(len(i[0]), *sizes[1:]) if sizes and sizes[0] in {-1, 1} else i[0].reshape(sizes)


def _mean(i: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    axes = i[1].tolist() if len(i) > 1 else a.get("axes", list(range(1, i[0].ndim)))
    return i[0].mean(dim=[int(v) for v in axes], keepdim=bool(a.get("keepdims", 1)))


def _max_pool(i: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    return functional.max_pool2d(_padded(i[0], a, -math.inf), _pair(a, "kernel_shape", 1), _pair(a, "strides", 1))


def _average_pool(i: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    return functional.avg_pool2d(_padded(i[0], a), _pair(a, "kernel_shape", 1), _pair(a, "strides", 1))


def _clip(i: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    low = float(i[1]) if len(i) > 1 else float(a.get("min", -math.inf))
    high = float(i[2]) if len(i) > 2 else float(a.get("max", math.inf))
    return i[0].clamp(low, high)


SUPPORTED: dict[str, Callable[[list[torch.Tensor], dict[str, Any]], torch.Tensor]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": lambda i, _: i[0] @ i[1],
    "Add": lambda i, _: i[0] + i[1],
    "Sub": lambda i, _: i[0] - i[1],
    "Mul": lambda i, _: i[0] * i[1],
    "Div": lambda i, _: i[0] / i[1],
    "Relu": lambda i, _: functional.relu(i[0]),
    "LeakyRelu": lambda i, a: functional.leaky_relu(i[0], float(a.get("alpha", 0.01))),
    "Sigmoid": lambda i, _: torch.sigmoid(i[0]),
    "Tanh": lambda i, _: torch.tanh(i[0]),
    "Clip": _clip,
    "Flatten": lambda i, a: i[0].flatten(int(a.get("axis", 1))),
    "Reshape": _reshape,
    "Transpose": lambda i, a: i[0].permute([int(v) for v in a["perm"]]),
    "Concat": lambda i, a: torch.cat(i, int(a["axis"])),
    "GlobalAveragePool": lambda i, _: i[0].mean(dim=list(range(2, i[0].ndim)), keepdim=True),
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "ReduceMean": _mean,
    "Identity": lambda i, _: i[0],
    "Dropout": lambda i, _: i[0],
    "Softmax": lambda i, a: torch.softmax(i[0], int(a.get("axis", -1))),
    "LogSoftmax": lambda i, a: torch.log_softmax(i[0], int(a.get("axis", -1))),
}


START = {ZERO: 0.0, ONE: 1.0, MEAN: 0.0, VARIANCE: 1.0}


class ImportedNetwork(nn.Module):
    """An ONNX graph as a torch module: weights of convolutions, products and norms are its parameters.

    Args:
        graph: nodes, inputs and outputs as the child process gave them.
        weights: arrays by initializer name.
        factor: from pixels in [0, 1] to what the graph takes; every call applies it.

    Raises:
        UnsupportedGraphError: an operator is unknown, or something would survive a fresh draw (:mod:`graph_roles`).
    """

    def __init__(self, graph: dict[str, Any], weights: dict[str, NDArray[Any]], factor: float = 1.0) -> None:
        super().__init__()
        self._nodes: list[dict[str, Any]] = graph["nodes"]
        self._output: str = graph["outputs"][0]
        shape = graph["input_shape"]
        if len(graph["inputs"]) != 1 or graph["input_type"] != "float" or not shape:
            raise UnsupportedGraphError("only graphs with one float32 input are read")
        self._input: str = graph["inputs"][0]
        self.input_shape: list[int | str] = shape
        self.factor, self.opset = factor, int(graph["opset"])
        unknown = {node["op"] for node in self._nodes} - set(SUPPORTED) - set(CHAINS) - {"BatchNormalization"}
        if unknown:
            raise UnsupportedGraphError(f"operators outside the importer's list: {', '.join(sorted(unknown))}")
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
        self._roles = read_roles(self._nodes, tensors)
        self._slots: dict[str, str] = {}
        for at, (name, tensor) in enumerate(tensors.items()):
            self._slots[name] = f"t{at}"
            if self._roles.parts.get(name) in TRAINED:
                self.register_parameter(f"t{at}", nn.Parameter(tensor.float()))
            else:
                self.register_buffer(f"t{at}", tensor.float() if tensor.is_floating_point() else tensor)
        self._last_uses = self._find_last_uses()

    def _find_last_uses(self) -> list[list[str]]:
        """For each node the values that nothing after it needs."""
        last = {name: at for at, node in enumerate(self._nodes) for name in node["inputs"] if name != self._output}
        uses: list[list[str]] = [[] for _ in self._nodes]
        for name, at in last.items():
            uses[at].append(name)
        return uses

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the graph on pictures [n, c, h, w] in [0, 1] and return its first output [n, k]."""
        return self._run(x)[0].flatten(1)

    def values_of_a_picture(self, x: torch.Tensor) -> int:
        """Return how many numbers the graph computes for one of these pictures: what training it keeps in memory."""
        return self._run(x)[1] // len(x)

    def _is_constant(self, name: str) -> bool:
        return name in self._slots or name in self._roles.carried

    def first_weighted(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the first product or convolution is given for these pictures."""
        seen: list[torch.Tensor] = []
        self._run(x, seen)
        return seen[0]

    def _run(self, x: torch.Tensor, weighted: list[torch.Tensor] | None = None) -> tuple[torch.Tensor, int]:
        values: dict[str, torch.Tensor] = {name: getattr(self, slot) for name, slot in self._slots.items()}
        values[self._input] = self._laid_out(x if self.factor == 1.0 else x * self.factor)
        computed = 0
        for node, finished in zip(self._nodes, self._last_uses, strict=True):
            inputs = [values[name] for name in node["inputs"] if name]
            output = node["outputs"][0]
            if output in self._roles.carried:
                values[output] = CHAINS[node["op"]](inputs, node["attributes"])
            elif node["op"] == "BatchNormalization":
                values[output] = self._batch_norm(inputs, node["attributes"])
            elif node["op"] in SUPPORTED:
                values[output] = SUPPORTED[node["op"]](inputs, node["attributes"])
            else:
                raise UnsupportedGraphError(f"{node['op']} is read for weights only")
            if weighted is not None and node["op"] in PRODUCTS and output not in self._roles.carried:
                weighted += [values[name] for name in node["inputs"] if name and not self._is_constant(name)]
            computed += 0 if output in self._roles.carried else values[output].numel()
            for name in finished:
                values.pop(name, None)
        return values[self._output], computed

    def _laid_out(self, x: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = x.shape
        try:
            layout = input_layout(self.input_shape, (height, width, channels))
        except UnusableModelError as error:
            raise UnsupportedGraphError(str(error)) from error
        forms = {"nchw": x, "nhwc": x.permute(0, 2, 3, 1), "nhw": x[:, 0], "flat": x.permute(0, 2, 3, 1).reshape(n, -1)}
        return forms[layout]

    def _batch_norm(self, i: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
        epsilon = float(a.get("epsilon", 1e-5))
        out: torch.Tensor = functional.batch_norm(i[0], i[3], i[4], i[1], i[2], self.training, 0.1, epsilon)
        return out

    def reinitialise(self, seed: int) -> None:
        """Give every weight a fresh start, so that this architecture can be trained anew as an honest reference."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, slot in self._slots.items():
                part, tensor = self._roles.parts.get(name), getattr(self, slot)
                if part == WEIGHT:
                    bound = math.sqrt(3.0 / self._roles.fan_in[name])
                    tensor.copy_((torch.rand(tensor.shape, generator=generator) * 2 - 1) * bound)
                elif part is not None:
                    tensor.fill_(START[part])

    def _parameter(self, name: str) -> nn.Parameter | None:
        """Return the parameter behind a value: its own, or the one that is passed on to it."""
        made_by = {node["outputs"][0]: node for node in self._nodes}
        while name in self._roles.carried:
            name = made_by[name]["inputs"][0]
        found = getattr(self, self._slots[name]) if name in self._slots else None
        return found if isinstance(found, nn.Parameter) else None

    def last_parameters(self) -> list[nn.Parameter]:
        """Return the weight matrix of the last product of the graph, and its bias where it has one.

        Raises:
            UnsupportedGraphError: the graph ends in no product with a matrix of its own.
        """
        products = [
            n for n in self._nodes if n["op"] in {"Gemm", "MatMul"} and n["outputs"][0] not in self._roles.carried
        ]
        own = [n for n in products if any(self._parameter(name) is not None for name in n["inputs"][:2])]
        if not own:
            raise UnsupportedGraphError("the graph has no final matrix product")
        product = own[-1]
        names = list(product["inputs"])
        for node in self._nodes:
            if node["op"] == "Add" and product["outputs"][0] in node["inputs"]:
                names += node["inputs"]
        found = [self._parameter(name) for name in names if name]
        return [parameter for parameter in found if parameter is not None]

    def plain_graph(self) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
        """Return the nodes as plain values and the weights by name as they are now: what a writer needs."""
        return self._nodes, {name: getattr(self, slot).detach().numpy() for name, slot in self._slots.items()}

    @property
    def ends(self) -> tuple[str, str]:
        """Names of the input and of the output."""
        return self._input, self._output


def import_graph(model: SuppliedModel, images: NDArray[np.uint8]) -> ImportedNetwork:
    """Read a supplier's model into torch and check it against onnxruntime on some pictures.

    Raises:
        UnsupportedGraphError: it cannot be read, or does not give the same outputs.
    """
    pictures = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    try:
        network = ImportedNetwork(*model.graph(), factor=1.0 if model.scale is None else model.scale * 255).eval()
        with torch.no_grad():
            ours = network(pictures).numpy()
    except UnsupportedGraphError:
        raise
    except (DataError, *GRAPH_FAILURES) as error:
        raise UnsupportedGraphError(f"the graph cannot be read: {type(error).__name__}: {str(error)[:200]}") from error
    theirs = model.outputs(images)
    if ours.shape != theirs.shape or not _alike(ours, theirs):
        raise UnsupportedGraphError("the imported graph does not give onnxruntime's outputs")
    return network


def _alike(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> bool:
    return bool(np.abs(ours - theirs).max() <= AGREEMENT * max(1.0, float(np.abs(theirs).max())))
