"""Find the weights inside an ONNX file without the ``onnx`` package: what a device needs to patch them.

A walk over the protocol-buffer bytes of ``ModelProto`` that reads names, types, shapes and *positions* and skips
everything else. Rules: any bytes give a `Graph` or one `DataError`; nothing is allocated from a length field
before it was checked against the buffer; only what is needed is decoded. Field numbers are those of ``onnx.proto3``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepriv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

# TensorProto.DataType -> bytes an element, for the types that can be patched or handed to a session.
ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
MAX_FIELDS = 5_000_000
MAX_DIMENSIONS = 8

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH, _MODEL_OPSET = 7, 8
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_OP, _NODE_DOMAIN = 4, 7
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 9, 13, 14


@dataclass(frozen=True, slots=True)
class Initializer:
    """One weight tensor and where its bytes lie.

    ``location`` is the bare name of an external-data file, or empty for bytes inside the model file; ``offset``
    and ``length`` count bytes in that file. ``length`` is -1 for a tensor that has no raw bytes (typed fields).
    """

    name: str
    data_type: int
    dims: tuple[int, ...]
    location: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Graph:
    """What a device wants to know of a model file."""

    initializers: tuple[Initializer, ...]
    operators: frozenset[str]
    domains: frozenset[str]

    def external_files(self) -> tuple[str, ...]:
        """Names of the external-data files in the order of their first use."""
        return tuple(dict.fromkeys(item.location for item in self.initializers if item.location))


def parse(model: bytes | bytearray | memoryview) -> Graph:
    """Read the initializers, operators and domains of an ONNX model.

    Raises:
        DataError: the bytes are not an ONNX model, or a tensor lies outside the file.
    """
    view = memoryview(model).cast("B")
    try:
        return _model(view)
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise DataError("not an ONNX model: the file is damaged or of another kind") from error


def check_domains(graph: Graph) -> None:
    """Refuse operators that would load foreign code.

    Raises:
        DataError: the model asks for a custom operator domain.
    """
    foreign = sorted(graph.domains - KNOWN_DOMAINS)
    if foreign:
        raise DataError(f"the model uses custom operators of {', '.join(foreign)!r}", hint="export it without them")


def _model(view: memoryview) -> Graph:
    initializers: list[Initializer] = []
    operators: set[str] = set()
    domains: set[str] = set()
    graphs = 0
    for field, kind, start, end in _fields(view, 0, len(view)):
        if field == _MODEL_GRAPH and kind == _BYTES:
            graphs += 1
            _graph(view, start, end, initializers, operators, domains)
        elif field == _MODEL_OPSET and kind == _BYTES:
            domains.add(_text_field(view, start, end, 1))
    if graphs != 1:
        raise ValueError
    return Graph(tuple(initializers), frozenset(operators), frozenset(domains))


def _graph(
    view: memoryview,
    start: int,
    end: int,
    initializers: list[Initializer],
    operators: set[str],
    domains: set[str],
) -> None:
    for field, kind, first, last in _fields(view, start, end):
        if kind != _BYTES:
            continue
        if field == _GRAPH_INITIALIZER:
            initializers.append(_tensor(view, first, last))
        elif field == _GRAPH_NODE:
            operators.add(_text_field(view, first, last, _NODE_OP))
            domains.add(_text_field(view, first, last, _NODE_DOMAIN))


def _tensor(view: memoryview, start: int, end: int) -> Initializer:
    name, data_type, offset, length, external = "", 0, 0, -1, False
    dims: list[int] = []
    entries: dict[str, str] = {}
    for field, kind, first, last in _fields(view, start, end):
        if field == _TENSOR_DIMS:
            dims += [first] if kind == _VARINT else _packed(view, first, last)
        elif field == _TENSOR_TYPE and kind == _VARINT:
            data_type = first
        elif field == _TENSOR_NAME:
            name = _text(view, first, last)
        elif field == _TENSOR_RAW and kind == _BYTES:
            offset, length = first, last - first
        elif field == _TENSOR_EXTERNAL and kind == _BYTES:
            entries[_text_field(view, first, last, 1)] = _text_field(view, first, last, 2)
        elif field == _TENSOR_LOCATION and kind == _VARINT:
            external = first == 1
    if len(dims) > MAX_DIMENSIONS:
        raise ValueError
    if external:
        return _external(name, data_type, tuple(dims), entries)
    return Initializer(name, data_type, tuple(dims), "", offset, length)


def _external(name: str, data_type: int, dims: tuple[int, ...], entries: dict[str, str]) -> Initializer:
    location = entries.get("location", "")
    if not location or "/" in location or "\\" in location or location.startswith("."):
        raise DataError(f"external data must lie beside the model under a bare name, not {location!r}")
    length = ITEM_BYTES.get(data_type, 1)
    for size in dims:
        length *= size
    offset = int(entries.get("offset", "0"))
    stated = int(entries.get("length", str(length)))
    if offset < 0 or stated != length:
        raise DataError(f"external data of {name!r}: offset or length is wrong")
    return Initializer(name, data_type, dims, location, offset, length)


def _fields(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (field number, wire type, first, last); a varint's value stands in ``first``."""
    at = start
    for _ in range(MAX_FIELDS):
        if at == end:
            return
        key, at = _varint(view, at, end)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(view, at, end)
            yield key >> 3, kind, value, at
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(kind, -1)
        if kind == _BYTES:
            length, at = _varint(view, at, end)
        if length < 0 or at + length > end or key >> 3 == 0:
            raise ValueError
        yield key >> 3, kind, at, at + length
        at += length
    raise ValueError


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError


def _packed(view: memoryview, start: int, end: int) -> list[int]:
    values: list[int] = []
    while start < end and len(values) <= MAX_DIMENSIONS:
        value, start = _varint(view, start, end)
        values.append(value)
    return values


def _text(view: memoryview, start: int, end: int) -> str:
    if end - start > 65_536:
        raise ValueError
    return bytes(view[start:end]).decode("utf-8")


def _text_field(view: memoryview, start: int, end: int, wanted: int) -> str:
    """First text field of that number inside a message, or the empty string."""
    for field, kind, first, last in _fields(view, start, end):
        if field == wanted and kind == _BYTES:
            return _text(view, first, last)
    return ""
