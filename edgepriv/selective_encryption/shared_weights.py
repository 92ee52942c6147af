"""Weights that occur more than once: one tensor for all consumers, and units that another tensor shows in clear.

Encrypting a kernel hides nothing while the same bytes stand in clear elsewhere. Exporters share weights by Identity
nodes, and networks with tied layers hold equal tensors: both become *one* initializer that all consumers read, so that
it is encrypted as one. What remains are tensors that are equal in part; their common units are never selected.

Rules: works on protobuf objects and bytes, imports no ``onnx``; the graph computes the same as before.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.selective_encryption import onnx_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from edgepriv.selective_encryption.carrier import Layer

WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
BETWEEN = {"DequantizeLinear", "Cast", "Identity"}  # may stand between a stored weight and its consumer


def join_identities(graph: Any) -> None:
    """Let the consumers of ``Identity(initializer)`` read the initializer itself."""
    tensors, outputs = {tensor.name for tensor in graph.initializer}, {item.name for item in graph.output}
    same: dict[str, str] = {}
    for node in [node for node in graph.node if node.op_type == "Identity"]:
        source, made = same.get(node.input[0], node.input[0]), node.output[0]
        if source in tensors and made not in outputs:
            same[made] = source
            graph.node.remove(node)
    _rename(graph, same)


def join_equal(graph: Any) -> None:
    """Keep one of several stored weights with equal type, shape and bytes."""
    given = {item.name for item in graph.input} | {item.name for item in graph.output}
    weights = set(_weight_names(graph)) - given
    groups: dict[Any, list[Any]] = {}
    for tensor in graph.initializer:
        if tensor.name in weights:
            groups.setdefault((tensor.data_type, tuple(tensor.dims)), []).append(tensor)
    same: dict[str, str] = {}
    for group in groups.values():
        first: dict[bytes, str] = {}
        for tensor in group if len(group) > 1 else ():
            kept = first.setdefault(hashlib.sha256(tensor.raw_data).digest(), tensor.name)
            if kept != tensor.name:
                same[tensor.name] = kept
    for tensor in [tensor for tensor in graph.initializer if tensor.name in same]:
        graph.initializer.remove(tensor)
    _rename(graph, same)


def _weight_names(graph: Any) -> Iterator[str]:
    """Names that a weighted operator reads as its weight, also through what may stand between."""
    behind = {node.output[0]: node.input[0] for node in graph.node if node.op_type in BETWEEN and node.input}
    for node in graph.node:
        for name in node.input[1:2] if node.op_type in WEIGHTED else ():
            yield behind.get(name, name)


def _rename(graph: Any, same: Mapping[str, str]) -> None:
    for node in _nodes(graph) if same else ():
        for number, name in enumerate(node.input):
            if name in same:
                node.input[number] = same[name]


def uses(graph: Any) -> Counter[str]:
    """How often each name is read by an operator."""
    return Counter(name for node in _nodes(graph) for name in node.input)


def _nodes(graph: Any) -> Iterator[Any]:
    """All operators, those in the bodies of If and Loop included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _nodes(body)


def echoes(
    names: Sequence[str], true: Sequence[NDArray[np.uint8]], shown: Sequence[NDArray[np.uint8]], layers: Iterable[Layer]
) -> dict[str, NDArray[np.bool_]]:
    """Units whose true bytes stand in ``shown`` at the same row of another tensor of the same type and shape.

    Args:
        names: file names, graph first.
        true: the plain model's files.
        shown: the files that others see; the plain ones again for asking which units occur twice.
        layers: whose units are asked about.
    """
    graph = onnx_bytes.parse(true[0].data)
    spans = {item.name: item for item in graph.initializers}
    prints: dict[tuple[str, int], NDArray[np.uint64]] = {}

    def printed(item: onnx_bytes.Initializer, files: Sequence[NDArray[np.uint8]], units: int) -> NDArray[np.uint64]:
        key = (item.name, id(files))
        if key not in prints:
            prints[key] = _fingerprints(_rows(item, names, files, units))
        return prints[key]

    found = {}
    for layer in layers:
        mine, hit = spans[layer.name], np.zeros(layer.units, bool)
        for item in graph.initializers:
            if item is not mine and (item.data_type, item.dims) == (mine.data_type, mine.dims):
                hit |= printed(item, shown, layer.units) == printed(mine, true, layer.units)
        found[layer.name] = hit
    return found


def _rows(
    item: onnx_bytes.Initializer, names: Sequence[str], files: Sequence[NDArray[np.uint8]], units: int
) -> NDArray[np.uint8]:
    file = files[list(names).index(item.location)] if item.location else files[0]
    return np.asarray(file[item.offset : item.offset + item.length]).reshape(units, -1)


def _fingerprints(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """64 bits of each row: equal rows agree, others by a chance of about 2^-60 (a fixed linear hash)."""
    width = 4 if rows.shape[1] % 4 == 0 else 1
    words = rows.view(np.uint32) if width == 4 and rows.flags.c_contiguous else rows
    factors = np.random.default_rng(0xED6E).integers(0, 2**64, words.shape[1], np.uint64) | np.uint64(1)
    return np.asarray(words.astype(np.uint64) @ factors)
