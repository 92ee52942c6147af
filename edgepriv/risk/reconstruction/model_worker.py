"""The child process in which a supplier's ONNX file is opened: limits first, then parse, check, run.

Started by ``python -m edgepriv.risk.reconstruction.isolation REQUEST.json``, which takes the network away before
anything here is loaded. It holds no key and no environment, it may use a stated amount of memory and processor time.
It answers in files (``reply.json``, ``outputs.npy``, ``weights.npz``) and never pickles or unpickles.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ALLOWED_DOMAINS = frozenset({"", "ai.onnx"})
MAX_OUTPUTS = 4096  # a choice of the supplier's: what is fitted on them grows with its square


class UnusableModelError(Exception):
    """The file is no model that can be audited; the words go to the person."""


def restrict(memory_bytes: int, cpu_s: int) -> None:
    """Give up memory, time and core dumps."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def check_graph(path: Path) -> Any:
    """Parse the file without external data and refuse what must not be opened.

    Raises:
        UnusableModelError: not ONNX, foreign operators, or external data outside the model's folder.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise UnusableModelError(f"not an ONNX file: {type(error).__name__}") from error
    if not model.graph.node or not model.opset_import:
        raise UnusableModelError("not an ONNX file: it has no graph")
    domains = {node.domain for node in model.graph.node} | {item.domain for item in model.opset_import}
    foreign = sorted(domains - ALLOWED_DOMAINS - {"ai.onnx.ml"})
    if foreign or model.functions:
        raise UnusableModelError(f"it uses operators outside the ONNX standard: {foreign or 'local functions'}")
    for tensor in model.graph.initializer:
        if is_external(tensor):
            check_location({entry.key: entry.value for entry in tensor.external_data}.get("location", ""), path)
    if any(is_external(tensor) for tensor in inner_tensors(model.graph)):
        raise UnusableModelError("it has external data in an attribute; only its weights may lie beside the file")
    return model


def is_external(tensor: Any) -> bool:
    """True where a tensor's bytes lie in another file, by either of the two fields that say so."""
    return bool(tensor.external_data) or tensor.data_location == type(tensor).EXTERNAL


def inner_tensors(message: Any, *, top: bool = True) -> Iterator[Any]:
    """Yield every tensor inside a graph but its own dense initializers: attributes, subgraphs, sparse weights."""
    for field, content in message.ListFields():
        if field.message_type is None or (top and field.name == "initializer"):
            continue
        for item in [content] if hasattr(content, "ListFields") else content:
            if item.DESCRIPTOR.name == "TensorProto":
                yield item
            else:
                yield from inner_tensors(item, top=False)


def check_location(location: str, path: Path) -> None:
    """Refuse external data that is not a plain file beside the model."""
    target = path.parent / location
    allowed = {path.name + ".data", path.name + "_data"}  # these two are in the digest that a verdict is bound to
    if location not in allowed or target.is_symlink() or not target.is_file():
        raise UnusableModelError(f"its weights are said to lie in {location!r}; only {path.name}.data is opened")


def run(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Run the model on the request's images in batches and describe it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(request["threads"])
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnusableModelError(f"onnxruntime cannot open it: {str(error)[:200]}") from error
    feed = InputForm(session.get_inputs(), tuple(request["image_shape"]), request["scale"])
    wanted = chosen_output(session.get_outputs(), request.get("output"))
    folder = Path(request["folder"])
    images = np.load(folder / "images.npy", allow_pickle=False)
    rows = [
        as_scores(session.run([wanted], feed.batch(images[i : i + feed.size]))[0], len(images[i : i + feed.size]))
        for i in range(0, len(images), feed.size)
    ]
    np.save(folder / "outputs.npy", np.concatenate(rows))
    return {"layout": feed.layout, "output": wanted, "outputs": [item.name for item in session.get_outputs()]}


class InputForm:
    """How pictures are laid out for the model's single input."""

    def __init__(self, inputs: list[Any], image_shape: tuple[int, int, int], scale: float | None) -> None:
        if len(inputs) != 1:
            raise UnusableModelError(f"it takes {len(inputs)} inputs; an audit feeds one picture")
        self._name, self._type = inputs[0].name, inputs[0].type
        if self._type not in {"tensor(float)", "tensor(uint8)"}:
            raise UnusableModelError(f"its input is {self._type}; float32 or uint8 pictures are supported")
        shape = list(inputs[0].shape)
        if shape and isinstance(shape[0], int) and shape[0] > 1:
            self.size = shape[0]
            raise UnusableModelError(f"its batch size is fixed at {shape[0]}: export it with a dynamic batch axis")
        self.size = 1 if shape and shape[0] == 1 else 256
        self.layout = input_layout(shape, image_shape)
        self._scale = 1 / 255 if scale is None else scale

    def batch(self, images: Any) -> dict[str, Any]:
        """Turn uint8 pictures [n, h, w, c] into the model's feed."""
        values = images if self._type == "tensor(uint8)" else images.astype(np.float32) * np.float32(self._scale)
        if self.layout == "nchw":
            values = values.transpose(0, 3, 1, 2)
        elif self.layout == "nhw":
            values = values[..., 0]
        elif self.layout == "flat":
            values = values.reshape(len(values), -1)
        return {self._name: np.ascontiguousarray(values)}


def input_layout(shape: list[Any], image_shape: tuple[int, int, int]) -> str:
    """Name the layout (nchw, nhwc, nhw, flat) in which pictures of this shape fit the input.

    Raises:
        UnusableModelError: no layout fits, for example because there is no batch axis.
    """
    height, width, channels = image_shape
    forms = {
        "nchw": (channels, height, width),
        "nhwc": (height, width, channels),
        "flat": (height * width * channels,),
    }
    if channels == 1:
        forms["nhw"] = (height, width)
    for layout, form in forms.items():
        rest = shape[1:]
        same_rank = len(rest) == len(form)
        if same_rank and all(not isinstance(have, int) or have == want for have, want in zip(rest, form, strict=True)):
            return layout
    if tuple(shape) in set(forms.values()):
        raise UnusableModelError("its input has no batch axis: export it with a first, dynamic axis")
    raise UnusableModelError(f"its input {shape} does not take pictures of {height}x{width}x{channels}")


def chosen_output(outputs: list[Any], wanted: str | None) -> str:
    """Return the name of the output to audit: the one asked for, else the first."""
    names = [item.name for item in outputs]
    if wanted is not None and wanted not in names:
        raise UnusableModelError(f"it has no output {wanted!r}; it has {', '.join(names)}")
    chosen = outputs[names.index(wanted) if wanted is not None else 0]
    if chosen.type not in {"tensor(float)", "tensor(double)", "tensor(float16)"}:
        raise UnusableModelError(f"its output {chosen.name!r} is {chosen.type}, not scores: audit its float output")
    return str(chosen.name)


def as_scores(values: Any, n: int) -> Any:
    """Check a batch of outputs and return it as float32 [n, k]."""
    if values.ndim == 0 or len(values) != n:
        raise UnusableModelError(f"for {n} pictures it gave an output of shape {values.shape}: no batch axis")
    flat = values.reshape(n, -1).astype(np.float32)
    if not 2 <= flat.shape[1] <= MAX_OUTPUTS:
        raise UnusableModelError(f"it gives {flat.shape[1]} numbers a picture; an audit takes 2 to {MAX_OUTPUTS:,}")
    if not np.isfinite(flat).all():
        raise UnusableModelError("it gives NaN or infinite outputs on these pictures")
    return flat


def extract(model: Any, path: Path, folder: Path) -> dict[str, Any]:
    """Write the graph's constants to ``weights.npz`` and return its nodes as plain values.

    Constants are initializers and the outputs of ``Constant`` nodes; those that hold no numbers are left out, so that
    nothing is ever pickled and the importer does not find them.
    """
    import onnx

    onnx.load_external_data_for_model(model, str(path.parent))
    arrays = dict(constant_arrays(model))
    names = list(arrays)
    np.savez(folder / "weights.npz", **{f"w{i}": arrays[name] for i, name in enumerate(names)})
    nodes = [
        {
            "op": node.op_type,
            "inputs": list(node.input),
            "outputs": list(node.output),
            "attributes": {a.name: plain(onnx.helper.get_attribute_value(a)) for a in node.attribute},
        }
        for node in model.graph.node
        if node.op_type != "Constant"
    ]
    own = {tensor.name for tensor in model.graph.initializer}
    free = [value for value in model.graph.input if value.name not in own]
    kind = free[0].type.tensor_type if free else None
    shape = [d.dim_value if d.HasField("dim_value") else "dynamic" for d in kind.shape.dim] if kind else []
    return {
        "nodes": nodes,
        "constants": {name: f"w{i}" for i, name in enumerate(names)},
        "inputs": [value.name for value in free],
        "input_shape": shape,
        "input_type": "float" if kind and kind.elem_type == onnx.TensorProto.FLOAT else "other",
        "outputs": [value.name for value in model.graph.output],
        "opset": max(item.version for item in model.opset_import if item.domain in ALLOWED_DOMAINS),
    }


def constant_arrays(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, array) for every constant of the graph that holds numbers."""
    from onnx import TensorProto, numpy_helper

    values = [(tensor.name, tensor) for tensor in model.graph.initializer]
    constants = [node for node in model.graph.node if node.op_type == "Constant" and len(node.attribute) == 1]
    values += [(node.output[0], attribute_number(node.attribute[0])) for node in constants]
    for name, value in values:
        if isinstance(value, TensorProto) and value.data_type == TensorProto.STRING:
            continue
        array = numpy_helper.to_array(value) if isinstance(value, TensorProto) else value
        if array is not None and array.dtype.kind in "biuf" and array.dtype.isbuiltin:
            yield name, np.asarray(array)


def attribute_number(attribute: Any) -> Any:
    """Return what a ``Constant`` node's one attribute holds as tensor or array; None where it is no number."""
    forms: dict[str, Callable[[], Any]] = {
        "value": lambda: attribute.t,
        "value_float": lambda: np.float32(attribute.f),
        "value_floats": lambda: np.array(attribute.floats, np.float32),
        "value_int": lambda: np.int64(attribute.i),
        "value_ints": lambda: np.array(attribute.ints, np.int64),
    }
    return forms[attribute.name]() if attribute.name in forms else None


def plain(value: Any) -> Any:
    """Return an attribute as a JSON value; of tensors and subgraphs only that they are there."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str | int | float):
        return value
    if not isinstance(value, Iterable):
        return {"unread": type(value).__name__}  # a tensor, a subgraph: no operator that the importer reads has one
    return [plain(item) for item in value]


def serve(request_path: Path) -> dict[str, Any]:
    """Answer one request; every expected failure becomes ``{"error": words}``."""
    request = json.loads(request_path.read_text())
    path = Path(request["model"])
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401  # imported before the limits: loading the libraries is not the model's cost

    restrict(request["memory_bytes"], request["cpu_s"])
    try:
        model = check_graph(path)
        if request["what"] == "extract":
            return extract(model, path, Path(request["folder"]))
        del model
        return run(path, request)
    except UnusableModelError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it needs more memory than the limit for suppliers' models"}
    except Exception as error:
        return {"error": f"it fails while running: {type(error).__name__}: {str(error)[:200]}"}
