"""The process that opens a supplier's file: no network, no other file, no pickle, bounded outputs."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import flat_model, value, write

from edgepriv.device.release import parse_policy
from edgepriv.errors import DataError
from edgepriv.risk.reconstruction.audit import AuditRequest, audit_outputs
from edgepriv.risk.reconstruction.isolation import leave_network
from edgepriv.risk.reconstruction.leakage import AuditSettings, Probe
from edgepriv.risk.reconstruction.supplied_model import SuppliedModel


def test_the_report_says_whether_the_model_had_a_network(tmp_path, digits_probes):
    few = Probe("few", digits_probes[0].images[:80], digits_probes[0].labels[:80])
    request = AuditRequest(settings=AuditSettings(trained=None), references=0)
    model = SuppliedModel.find(flat_model(tmp_path / "m.onnx"))
    found = audit_outputs(model, few, [parse_policy("argmax")], request)
    said = found.record["isolation"]
    assert said == "the model ran without network" or "could not be taken away" in said
    assert (said in found.notes) == ("could not" in said)


def external(tensor, location):
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


@pytest.mark.parametrize("location", ["other.bin", "m.onnx.data"])
def test_external_data_of_a_constant_node_is_refused(location, tmp_path, digits_probes):
    matrix = np.ones((64, 10), np.float32)
    (tmp_path / location).write_bytes(matrix.tobytes())
    tensor = numpy_helper.from_array(matrix, "c")
    external(tensor, location)
    path = tmp_path / "m.onnx"
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    constant = helper.make_node("Constant", [], ["w"])
    attribute = constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    attribute.t.CopyFrom(tensor)
    write(path, [constant, *nodes], [value("x", 1, ["b", 1, 8, 8])], [value("y", 1, None)])
    with pytest.raises(DataError, match="external data in an attribute"):
        SuppliedModel.find(path).outputs(digits_probes[0].images[:8])


def test_external_data_in_a_subgraph_or_a_sparse_weight_is_refused(tmp_path, digits_probes):
    tensor = numpy_helper.from_array(np.ones(10, np.float32), "inner")
    external(tensor, "other.bin")
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["out"])], "b", [], [value("out", 1, [10])], [tensor]
    )
    tail = [
        helper.make_node("If", ["yes"], ["add"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["y", "add"], ["z"]),
    ]
    path = flat_model(tmp_path / "if.onnx", tail=tail, weights=[("yes", np.array(True))])
    with pytest.raises(DataError, match="external data in an attribute"):
        SuppliedModel.find(path).outputs(digits_probes[0].images[:8])
    path = flat_model(tmp_path / "sparse.onnx")
    model = onnx.load(str(path))
    sparse = model.graph.sparse_initializer.add(dims=[10])
    sparse.values.CopyFrom(tensor)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="external data in an attribute"):
        SuppliedModel.find(path).outputs(digits_probes[0].images[:8])


def test_more_outputs_than_an_audit_can_bound_are_refused(tmp_path, digits_probes):
    with pytest.raises(DataError, match="gives 5000 numbers a picture; an audit takes 2 to 4,096"):
        SuppliedModel.find(flat_model(tmp_path / "m.onnx", k=5000)).outputs(digits_probes[0].images[:8])


class Forbidding:
    """A C library under a service manager that forbids name spaces."""

    def __init__(self, *_, **__):
        self.asked = []

    def unshare(self, flags):
        self.asked.append(flags)
        return -1


def test_a_kernel_that_keeps_the_network_is_reported(monkeypatch, tmp_path, digits_probes):
    monkeypatch.setattr("edgepriv.risk.reconstruction.isolation.ctypes.CDLL", Forbidding)
    assert leave_network().startswith("could not be taken away: ")
    model = SuppliedModel.find(flat_model(tmp_path / "m.onnx"))
    model.observed["network"] = leave_network()
    assert model.isolation.startswith("the model's network could not be taken away: ")


def test_the_child_has_one_thread_and_no_interface_when_it_leaves_the_network():
    program = (
        "from edgepriv.risk.reconstruction.isolation import leave_network\n"
        "import os, socket, sys\n"
        "before = len(os.listdir('/proc/self/task')), sorted({'numpy', 'onnx', 'onnxruntime'} & set(sys.modules))\n"
        "print(before, leave_network(), [name for _, name in socket.if_nameindex() if name != 'lo'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("(1, []) ")
    assert done.stdout.strip().endswith("taken away []") or "could not be taken away" in done.stdout
