"""Which tensors of a supplier's graph are drawn afresh for an honest reference, and that nothing of his stays behind.

Rules: a tensor is followed through nodes that only pass constants on (``CHAINS``) to every place where it meets the
picture. Weights of products, convolutions and norms, what is added to a product, large summands and long vectors of
factors are drawn afresh. Anything else of his that meets the picture stays as it is, so it must be small: at most
``MAX_KEPT`` values along one axis a tensor and ``MAX_KEPT_IN_ALL`` in the whole graph, numbers in attributes included.
A graph that keeps more is refused, because its "honest references" would carry the supplier's own weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from edgepriv.errors import DataError

WEIGHT, ZERO, ONE, MEAN, VARIANCE = "weight", "zero", "one", "mean", "variance"
TRAINED = frozenset({WEIGHT, ZERO, ONE})
PARTS: dict[str, dict[int, str]] = {
    "Conv": {1: WEIGHT, 2: ZERO},
    "Gemm": {0: WEIGHT, 1: WEIGHT, 2: ZERO},
    "MatMul": {0: WEIGHT, 1: WEIGHT},
    "BatchNormalization": {1: ONE, 2: ZERO, 3: MEAN, 4: VARIANCE},
}
LARGE = {("Add", 0): ZERO, ("Add", 1): ZERO, ("Sub", 0): ZERO, ("Sub", 1): ZERO, ("Div", 1): ONE}
PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
CARRIERS = frozenset({"Identity", "Transpose", "Reshape", "Flatten", "Dropout"})
SHAPES = frozenset({("Reshape", 1), ("ReduceMean", 1)})  # inputs that say how, not what
MAX_KEPT, MAX_KEPT_IN_ALL = 64, 256
FLOAT_TYPES = {1: torch.float32, 10: torch.float16, 11: torch.float64}
WHOLE_TYPES = {6: torch.int32, 7: torch.int64}


class UnsupportedGraphError(DataError):
    """The graph uses something this importer does not read; a black-box audit still works."""


@dataclass(slots=True)
class Roles:
    """What each constant of a graph is for.

    Attributes:
        parts: initializer -> how it is drawn afresh.
        fan_in: initializer -> number of values that one output sums over, for weights.
        carried: values that are constants passed on: by nodes of ``CHAINS`` alone.
    """

    parts: dict[str, str] = field(default_factory=dict)
    fan_in: dict[str, int] = field(default_factory=dict)
    carried: set[str] = field(default_factory=set)


def _cast(i: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    kinds = FLOAT_TYPES if i[0].is_floating_point() else FLOAT_TYPES | WHOLE_TYPES
    if int(a.get("to", 0)) not in kinds:
        raise UnsupportedGraphError("a weight is cast to a type that cannot be trained")
    return i[0].to(kinds[int(a["to"])])


def _reshaped(i: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    sizes = [int(size) for size in i[1].tolist()]
    return i[0].reshape([i[0].shape[at] if s == 0 and not a.get("allowzero") else s for at, s in enumerate(sizes)])


def _axes(i: list[torch.Tensor], a: dict[str, Any]) -> list[int]:
    return [int(v) for v in (i[1].tolist() if len(i) > 1 else a.get("axes", []))]


def _unsqueezed(i: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    out, rank = i[0], i[0].ndim + len(_axes(i, a))
    for axis in sorted(axis % rank for axis in _axes(i, a)):
        out = out.unsqueeze(axis)
    return out


def _squeezed(i: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    return i[0].squeeze(tuple(_axes(i, a))) if _axes(i, a) else i[0].squeeze()


def _flattened(i: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
    rows = 1
    for side in i[0].shape[: int(a.get("axis", 1))]:
        rows *= int(side)
    return i[0].reshape(rows, -1)


CHAINS = {
    "Identity": lambda i, _: i[0],
    "Dropout": lambda i, _: i[0],
    "Transpose": lambda i, a: i[0].permute([int(v) for v in a.get("perm", range(i[0].ndim)[::-1])]),
    "Reshape": _reshaped,
    "Flatten": _flattened,
    "Cast": _cast,
    "Squeeze": _squeezed,
    "Unsqueeze": _unsqueezed,
}


def read_roles(nodes: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> Roles:
    """Find what each constant is for.

    Args:
        nodes: of the graph in order, without ``Constant`` nodes.
        tensors: constants by name.

    Raises:
        UnsupportedGraphError: something of the supplier's would survive a fresh draw, or nothing could be trained.
    """
    reading = _Reading(tensors)
    for node in nodes:
        reading.visit(node)
    if WEIGHT not in reading.roles.parts.values():
        raise UnsupportedGraphError("the graph has no weights: no matrix product or convolution to train anew")
    reading.check_attributes(nodes)
    return reading.roles


class _Reading:
    """One walk through a graph. Large constants stand in by their shape (torch's ``meta`` device): no copies."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.roles = Roles()
        self._constants = {
            name: tensor if tensor.numel() <= MAX_KEPT and not tensor.is_floating_point() else tensor.to("meta")
            for name, tensor in tensors.items()
        }
        self._roots = {name: name for name in tensors}
        self._trainable = {name for name, tensor in tensors.items() if tensor.is_floating_point()}
        self._products: set[str] = set()
        self._kept: dict[str, int] = {}

    def visit(self, node: dict[str, Any]) -> None:
        names = [name for name in node["inputs"] if name]
        if all(name in self._constants for name in names):
            self._carry(node, names)
            return
        parts = PARTS.get(node["op"], {})
        if node["op"] == "Add" and self._products & set(names):
            parts = {0: ZERO, 1: ZERO}
        for slot, name in enumerate(node["inputs"]):
            if name in self._constants and (node["op"], slot) not in SHAPES:
                self._use(name, parts.get(slot) or self._part_if_large(node["op"], slot, self._constants[name]))
        if node["op"] in PRODUCTS or (node["op"] in CARRIERS and node["inputs"][0] in self._products):
            self._products |= set(node["outputs"])

    def _carry(self, node: dict[str, Any], names: list[str]) -> None:
        if node["op"] not in CHAINS or not names:
            raise UnsupportedGraphError(f"{node['op']} computes with the model's weights alone")
        made = CHAINS[node["op"]]([self._constants[name] for name in names], node["attributes"])
        output = node["outputs"][0]
        self._constants[output], self._roots[output] = made, self._roots[names[0]]
        self.roles.carried.add(output)

    @staticmethod
    def _part_if_large(op: str, slot: int, value: torch.Tensor) -> str | None:
        """Large summands and scales of channels start at 0 and 1; a matrix of factors has no start that trains."""
        one_axis = sum(side > 1 for side in value.shape) <= 1
        part = ONE if op == "Mul" and one_axis else LARGE.get((op, slot))
        return None if is_small(value) or (part == ONE and not one_axis) else part

    def _use(self, name: str, part: str | None) -> None:
        value, root = self._constants[name], self._roots[name]
        if part is None:
            self._keep(value, root)
            return
        if root not in self._trainable or not value.is_floating_point():
            raise UnsupportedGraphError(f"the weight {root!r} holds whole numbers, which are not trained")
        if self.roles.parts.setdefault(root, part) != part:
            raise UnsupportedGraphError(f"{root!r} is a {self.roles.parts[root]} here and a {part} there")
        if part == WEIGHT:
            self.roles.fan_in[root] = value[0].numel() if value.ndim > 2 else max([1, *value.shape])

    def _keep(self, value: torch.Tensor, root: str) -> None:
        if not is_small(value):
            raise UnsupportedGraphError(
                f"{root!r} ({'x'.join(map(str, value.shape))}) would stay as the supplier made it in a fresh draw"
            )
        self._kept[root] = value.numel()

    def check_attributes(self, nodes: list[dict[str, Any]]) -> None:
        """Count all that a fresh draw keeps: small constants and the different numbers in attributes."""
        numbers = {value for node in nodes for value in _floats(node["attributes"].values())}
        kept = sum(self._kept.values()) + len(numbers)
        if kept > MAX_KEPT_IN_ALL:
            raise UnsupportedGraphError(f"{kept} numbers would stay as the supplier made them in a fresh draw")


def is_small(value: torch.Tensor) -> bool:
    """True for what may stay as it is: a number, a number for each channel."""
    return value.numel() <= MAX_KEPT and sum(side > 1 for side in value.shape) <= 1


def _floats(values: Any) -> list[float]:
    found: list[float] = []
    for value in values:
        if isinstance(value, float):
            found.append(value)
        elif isinstance(value, list):
            found += _floats(value)
    return found
