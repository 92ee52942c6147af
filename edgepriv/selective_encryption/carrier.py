"""The ONNX side of protection: find the weights that can be encrypted, put decoys there, write an ordinary file.

Owner side only (it uses ``onnx``). A *unit* is what is encrypted as a whole: one kernel ``W[f, c]`` of a convolution
or depthwise convolution, one row of a 1x1 convolution, Gemm or MatMul weight; always one run of bytes. Weights may
be float32, float16 or int8/uint8 behind DequantizeLinear; they may lie in the file or in external data.

Rules: every initializer is normalised to raw bytes, so that a device can patch it without ``onnx``; equal weights
are one initializer (`shared_weights`), so that none stays in clear in a second copy; the regions of the manifest come
from the same byte parser that the device uses; folding BatchNorm is arithmetic in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from edgepriv.errors import DataError, MissingFileError
from edgepriv.selective_encryption import onnx_bytes, shared_weights
from edgepriv.selective_encryption.levels import Region

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

CONV, DEPTHWISE, DENSE = "conv", "depthwise", "dense"
EXTERNAL_FROM_BYTES = 8_000_000  # larger models get an external weight file: it starts faster and passes 2 GB
MAX_INLINE_BYTES = 2_000_000_000
ALIGNMENT = 64
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
_INTS = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight tensor that can be encrypted: ``units`` rows of ``unit_size`` elements, row = f * inputs + c."""

    name: str
    kind: str
    dims: tuple[int, ...]
    units: int
    unit_size: int
    outputs: int
    inputs: int

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.units * self.unit_size


def load(path: Path | str) -> onnx.ModelProto:
    """Read an ONNX file and normalise it: raw initializers, constants as initializers.

    Raises:
        MissingFileError: no such file.
        DataError: not an ONNX model, or one with custom operators.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"no such model: {path}")
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's error type differs between its versions
        raise DataError(f"{path} is not an ONNX model", hint="export one, or give --arch and --weights") from error
    if not model.graph.node:
        raise DataError(f"{path} is not an ONNX model: it has no operators")
    return _normalise(model)


def normalised(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose initializers all hold raw bytes, Constant nodes among them, and no foreign operators."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return _normalise(copy)


def _normalise(copy: onnx.ModelProto) -> onnx.ModelProto:
    foreign = {item.domain for item in copy.opset_import} - onnx_bytes.KNOWN_DOMAINS
    if foreign:
        raise DataError(f"the model uses custom operators of {sorted(foreign)}", hint="export it without them")
    graph = copy.graph
    constants = [node for node in graph.node if node.op_type == "Constant" and node.attribute[0].name == "value"]
    for node in constants:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)
    shared_weights.join_identities(graph)
    for tensor in graph.initializer:
        if not tensor.HasField("raw_data") and tensor.data_type != onnx.TensorProto.STRING:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
        del tensor.external_data[:]
        tensor.ClearField("data_location")
    shared_weights.join_equal(graph)
    return copy


def fold_batchnorm(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Fold each BatchNormalization that directly follows a float convolution; returns model and how many."""
    if not any(node.op_type == "BatchNormalization" for node in model.graph.node):
        return model, 0  # no copy of what may be gigabytes
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in copy.graph.initializer}
    makers = {out: node for node in copy.graph.node for out in node.output}
    uses = shared_weights.uses(copy.graph)
    folded = 0
    for norm in [node for node in copy.graph.node if node.op_type == "BatchNormalization"]:
        conv = makers.get(norm.input[0])
        alone = conv is not None and uses[norm.input[0]] == 1 and uses[conv.input[1]] == 1
        if conv is None or conv.op_type != "Conv" or not alone or conv.input[1] not in tensors:
            continue
        _fold(copy.graph, tensors, conv, norm)
        folded += 1
    _drop_unused(copy.graph)
    return copy, folded


def _fold(graph: Any, tensors: dict[str, Any], conv: Any, norm: Any) -> None:
    weight = tensors[conv.input[1]]
    scale, shift, mean, var = (numpy_helper.to_array(tensors[n]).astype(np.float64) for n in norm.input[1:5])
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    w = numpy_helper.to_array(weight)
    gain = scale / np.sqrt(var + epsilon)
    old = numpy_helper.to_array(tensors[conv.input[2]]).astype(np.float64) if len(conv.input) > 2 else 0.0
    bias = ((old - mean) * gain + shift).astype(w.dtype)
    folded = (w * gain.reshape(-1, *[1] * (w.ndim - 1))).astype(w.dtype)
    weight.CopyFrom(numpy_helper.from_array(folded, weight.name))
    name = weight.name + ".folded_bias"
    graph.initializer.append(numpy_helper.from_array(bias, name))
    tensors[name] = graph.initializer[-1]
    inputs = [conv.input[0], conv.input[1], name]
    del conv.input[:]
    conv.input.extend(inputs)
    conv.output[0] = norm.output[0]
    graph.node.remove(norm)


def _drop_unused(graph: Any) -> None:
    used = set(shared_weights.uses(graph)) | {item.name for item in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def layers(model: onnx.ModelProto, *, dense: bool = False) -> list[Layer]:
    """List what can be encrypted, in graph order.

    Args:
        model: a normalised model.
        dense: also take Gemm and MatMul weights.

    Raises:
        DataError: there is nothing to encrypt.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    behind = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type in {"DequantizeLinear", "Cast", "Identity"} and node.input
    }
    found: dict[str, Layer] = {}
    for node in model.graph.node:
        for name in node.input[1:2] if node.op_type in {"Conv", "Gemm", "MatMul"} else ():
            source = behind.get(name, name)
            tensor = tensors.get(source)
            if tensor is not None and tensor.data_type in _FLOATS | _INTS and source not in found:
                layer = _layer(node, tensor)
                if layer is not None and (dense or layer.kind != DENSE):
                    found[source] = layer
    if not found:
        raise DataError(
            "the model has no convolution with weights of its own", hint="--dense takes Gemm and MatMul weights too"
        )
    return list(found.values())


def _layer(node: Any, tensor: Any) -> Layer | None:
    dims = tuple(tensor.dims)
    if node.op_type == "Conv" and len(dims) >= 3:
        outputs, inputs, taps = dims[0], dims[1], int(np.prod(dims[2:]))
        if taps == 1:  # a 1x1 convolution is a matrix: one row a unit
            return Layer(tensor.name, CONV, dims, outputs, inputs, outputs, 1)
        kind = DEPTHWISE if inputs == 1 and outputs > 1 else CONV
        return Layer(tensor.name, kind, dims, outputs * inputs, taps, outputs, inputs)
    if node.op_type != "Conv" and len(dims) == 2:
        return Layer(tensor.name, DENSE, dims, dims[0], dims[1], dims[0], 1)
    return None


def input_type(model: onnx.ModelProto) -> str:
    """Element type of the model's first input, for example ``float16``.

    Raises:
        DataError: it takes neither pictures nor other floating-point numbers.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    given = next((item for item in model.graph.input if item.name not in weights), None)
    kind = 0 if given is None else given.type.tensor_type.elem_type
    if kind not in {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}:
        name = "nothing" if given is None else onnx.TensorProto.DataType.Name(kind).lower()
        raise DataError(
            f"the model's input takes {name}: devices feed float32, float16 or float64",
            hint="export it with a floating-point input",
        )
    return str(onnx.helper.tensor_dtype_to_np_dtype(kind).name)


def weight_rows(model: onnx.ModelProto, layer: Layer) -> NDArray[Any]:
    """The layer's weights [units, unit_size] in the file's own element type (a copy)."""
    tensor = next(item for item in model.graph.initializer if item.name == layer.name)
    return np.array(numpy_helper.to_array(tensor)).reshape(layer.units, layer.unit_size)


def with_rows(model: onnx.ModelProto, rows: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """A copy of the model with other weights in the named layers."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in rows:
            old = numpy_helper.to_array(tensor)
            new = np.asarray(rows[tensor.name], old.dtype).reshape(old.shape)
            tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
    return copy


def file_bytes(model: onnx.ModelProto, stem: str, *, external: bool | None = None) -> dict[str, bytes | bytearray]:
    """Write a model as files: ``stem.onnx`` and, for large models, ``stem.weights`` beside it.

    Args:
        model: a normalised model.
        stem: bare file name without suffix.
        external: force or forbid the weight file; by default models over 8 MB get one.
    """
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if external is None:
        external = size > EXTERNAL_FROM_BYTES
    if not external:
        if size > MAX_INLINE_BYTES:
            raise DataError("a model over 2 GB needs an external weight file")
        return {f"{stem}.onnx": model.SerializeToString(deterministic=True)}
    graph, at = _without_initializers(model), 0
    places = []
    for tensor in model.graph.initializer:
        length = len(tensor.raw_data)
        if length < 1024:  # shapes and scalars stay inside: shape inference needs them
            graph.graph.initializer.add().CopyFrom(tensor)
            continue
        stub = graph.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        stub.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", f"{stem}.weights"), ("offset", str(at)), ("length", str(length))):
            stub.external_data.add(key=key, value=value)
        places.append((at, tensor))
        at += length + -length % ALIGNMENT
    blob = bytearray(at)
    for start, tensor in places:
        raw = tensor.raw_data
        blob[start : start + len(raw)] = raw
    return {f"{stem}.onnx": graph.SerializeToString(deterministic=True), f"{stem}.weights": blob}


def _without_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of everything but the weights, which may be more than a message can be copied with."""
    copy = onnx.ModelProto()
    for source, target in ((model, copy), (model.graph, copy.graph)):
        for field, value in source.ListFields():
            if field.name in {"graph", "initializer"}:
                continue
            if hasattr(value, "MergeFrom"):  # a message or a repeated field
                getattr(target, field.name).MergeFrom(value)
            else:
                setattr(target, field.name, value)
    return copy


def regions(files: Mapping[str, Any], chosen: list[Layer]) -> list[Region]:
    """Where the layers' units lie in written files, by the parser that devices use."""
    names = list(files)
    graph = onnx_bytes.parse(files[names[0]])
    spans = {item.name: item for item in graph.initializers}
    found = []
    for layer in chosen:
        item = spans[layer.name]
        if item.length % layer.units or item.length < 0:
            raise DataError(f"weight {layer.name!r} is not stored as plain bytes")
        file = names.index(item.location) if item.location else 0
        found.append(Region(file, item.offset, item.length // layer.units, layer.units))
    return found


def from_files(files: Mapping[str, Any]) -> onnx.ModelProto:
    """Read back what `file_bytes` wrote, from memory: graph first, external files after it."""
    names = list(files)
    model = onnx.load_from_string(bytes(files[names[0]]))
    spans = {item.name: item for item in onnx_bytes.parse(bytes(files[names[0]])).initializers}
    for tensor in model.graph.initializer:
        item = spans[tensor.name]
        if item.location:
            raw = files[item.location][item.offset : item.offset + item.length]
            tensor.raw_data = bytes(raw)
            tensor.ClearField("data_location")
            del tensor.external_data[:]
    return model


def differing_units(one: onnx.ModelProto, other: onnx.ModelProto, chosen: list[Layer]) -> dict[str, NDArray[np.bool_]]:
    """Which units of each layer differ between two models: the encrypted ones, seen by their owner."""
    pairs = ((layer, weight_rows(one, layer), weight_rows(other, layer)) for layer in chosen)
    return {layer.name: np.any(a != b, axis=1) for layer, a, b in pairs}
