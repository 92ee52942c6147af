"""The device's own ONNX reader: the same weights as the onnx package, one error for anything else."""

import contextlib

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from edgepriv.errors import DataError
from edgepriv.selective_encryption import carrier, onnx_bytes


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_it_finds_every_weight_where_the_onnx_package_does(models, dtype):
    model = carrier.normalised(models[dtype]())
    raw = model.SerializeToString()
    found = {item.name: item for item in onnx_bytes.parse(raw).initializers}
    for tensor in model.graph.initializer:
        item = found[tensor.name]
        assert raw[item.offset : item.offset + item.length] == tensor.raw_data
        assert item.dims == tuple(tensor.dims)


def test_it_reads_external_data_and_refuses_paths(models):
    files = carrier.file_bytes(carrier.normalised(models["float32"]()), "m", external=True)
    graph = onnx_bytes.parse(files["m.onnx"])
    assert graph.external_files() == ("m.weights",)
    item = next(i for i in graph.initializers if i.name == "b.w")
    model = models["float32"]()
    true = next(t for t in model.graph.initializer if t.name == "b.w")
    raw = files["m.weights"][item.offset : item.offset + item.length]
    assert np.array_equal(np.frombuffer(raw, "<f4"), numpy_helper.to_array(true).ravel())
    for location in ("../m.weights", "/etc/passwd", ".hidden"):
        evil = onnx.load_from_string(files["m.onnx"])
        evil.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
        evil.graph.initializer[0].ClearField("raw_data")
        del evil.graph.initializer[0].external_data[:]
        evil.graph.initializer[0].external_data.add(key="location", value=location)
        with pytest.raises(DataError, match="bare name"):
            onnx_bytes.parse(evil.SerializeToString())


def test_custom_operators_are_refused(models):
    model = models["float32"]()
    model.graph.node[0].domain = "evil.corp"
    with pytest.raises(DataError, match="custom operators"):
        onnx_bytes.check_domains(onnx_bytes.parse(model.SerializeToString()))


@given(st.binary(max_size=300))
def test_any_bytes_give_a_graph_or_one_documented_error(raw):
    with contextlib.suppress(DataError):
        assert isinstance(onnx_bytes.parse(raw), onnx_bytes.Graph)


@given(st.data())
def test_any_damage_to_a_model_gives_a_graph_or_one_documented_error(data):
    tensor = numpy_helper.from_array(np.zeros((4, 4), np.float32), "w")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [], [], [tensor])
    raw = bytearray(onnx.helper.make_model(graph).SerializeToString())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        onnx_bytes.parse(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
