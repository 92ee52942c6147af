"""A supplier who hides trained weights from the redraw is flagged all the same; odd graphs end in a black-box audit."""

import copy
import re

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import flat_model, value, write

from edgepriv.device.release import parse_policy
from edgepriv.errors import DataError
from edgepriv.risk.reconstruction.audit import AuditRequest, audit_outputs
from edgepriv.risk.reconstruction.detectors import Evidence, outputs_of
from edgepriv.risk.reconstruction.graph_roles import MAX_KEPT, UnsupportedGraphError
from edgepriv.risk.reconstruction.hardening import harden
from edgepriv.risk.reconstruction.leakage import AuditSettings, Bench, Probe
from edgepriv.risk.reconstruction.onnx_reader import ImportedNetwork, import_graph
from edgepriv.risk.reconstruction.references import (
    UntrainableError,
    check_imported,
    check_trained,
    trainable_factor,
)
from edgepriv.risk.reconstruction.supplied_model import SuppliedModel
from edgepriv.risk.reconstruction.vicious import Recipe, TrainingSet, train

POLICIES = (parse_policy("argmax"), parse_policy("unsafe_raw_logits"))
FAST = AuditSettings(trained=None)


def audit(path, probes, *, references=3, scale=None):
    request = AuditRequest(settings=FAST, references=references)
    return audit_outputs(SuppliedModel.find(path, scale=scale), probes[0], POLICIES, request, reference_data=probes[1])


def rebuilt(source, path, change):
    """A copy of a model whose nodes and weights were changed in place."""
    model = onnx.load(str(source))
    change(model.graph)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def put_first(graph, nodes):
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def rename_inputs(graph, names):
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def behind_identities(graph):
    names = {t.name: t.name + "_i" for t in graph.initializer}
    rename_inputs(graph, names)
    put_first(graph, [helper.make_node("Identity", [old], [new]) for old, new in names.items()])


def as_constants(graph):
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in graph.initializer]
    del graph.initializer[:]
    put_first(graph, nodes)


def behind_a_chain(graph):
    """Each matrix stored transposed and flat, in half precision."""
    nodes, names = [], {}
    for tensor in list(graph.initializer):
        array = numpy_helper.to_array(tensor)
        if array.ndim < 2:
            continue
        name, turned = tensor.name, array.transpose()
        tensor.CopyFrom(numpy_helper.from_array(turned.reshape(-1).astype(np.float16), name))
        graph.initializer.append(numpy_helper.from_array(np.array(turned.shape, np.int64), name + "_shape"))
        nodes += [
            helper.make_node("Cast", [name], [name + "_c"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", [name + "_c", name + "_shape"], [name + "_r"]),
            helper.make_node("Transpose", [name + "_r"], [name + "_t"]),
        ]
        names[name] = name + "_t"
    rename_inputs(graph, names)
    put_first(graph, nodes)


def as_left_operands(graph):
    """Each Gemm y = x W' + b as (W x')' + b."""
    nodes = []
    for node in graph.node:
        if node.op_type != "Gemm":
            nodes.append(node)
            continue
        x, w, b, y = *node.input, node.output[0]
        nodes += [
            helper.make_node("Transpose", [x], [y + "_x"], perm=[1, 0]),
            helper.make_node("MatMul", [w, y + "_x"], [y + "_p"]),
            helper.make_node("Transpose", [y + "_p"], [y + "_q"], perm=[1, 0]),
            helper.make_node("Add", [y + "_q", b], [y]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


def as_sums_of_products(graph):
    """The last Gemm without any matrix product: an elementwise product and a mean."""
    last = graph.node[-1]
    x, w, b, y = *last.input, last.output[0]
    matrix = next(numpy_helper.to_array(t) for t in graph.initializer if t.name == w)
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.ascontiguousarray(matrix[None] * matrix.shape[1]), "spread"),
            numpy_helper.from_array(np.array([-1, 1, matrix.shape[1]], np.int64), "rows"),
        ]
    )
    kept = list(graph.node)[:-1]
    del graph.node[:]
    graph.node.extend(
        [
            *kept,
            helper.make_node("Reshape", [x, "rows"], ["column"]),
            helper.make_node("Mul", ["column", "spread"], ["terms"]),
            helper.make_node("ReduceMean", ["terms"], ["sum"], axes=[2], keepdims=0),
            helper.make_node("Add", ["sum", b], [y]),
        ]
    )


@pytest.mark.parametrize("hide", [behind_identities, as_constants, behind_a_chain, as_left_operands])
def test_weights_behind_passing_nodes_are_drawn_afresh_and_the_model_is_flagged(
    hide, digit_models, digits_probes, tmp_path
):
    path = rebuilt(digit_models[0] / "vicious.onnx", tmp_path / "hidden.onnx", hide)
    images = digits_probes[0].images[:200]
    network = import_graph(SuppliedModel.find(path), images[:16])
    fresh = copy.deepcopy(network)
    fresh.reinitialise(1)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    own, drawn = (outputs_of(n, x).argmax(1) for n in (network, fresh))
    assert (own == digits_probes[0].labels[:200]).mean() > 0.8
    assert (drawn == digits_probes[0].labels[:200]).mean() < 0.5
    found = audit(path, digits_probes)
    assert found.architecture == "as in the file"
    assert found.verdict.word == "vicious"


def beside_the_picture(graph):
    """The first convolution's kernel comes along as further channels of the picture: no weight to a redraw."""
    graph.initializer.append(numpy_helper.from_array(np.ones((1, 2, 8, 8), np.float32), "planes"))
    graph.initializer.append(numpy_helper.from_array(np.zeros((1,), np.float32), "none"))
    put_first(
        graph,
        [
            helper.make_node("Concat", ["planes", "image"], ["wide"], axis=1),
            helper.make_node("ReduceMean", ["wide"], ["flat"], axes=[1]),
            helper.make_node("Mul", ["flat", "none"], ["nothing"]),
            helper.make_node("Add", ["image", "nothing"], ["pixels"]),
        ],
    )
    for node in list(graph.node)[4:]:
        node.input[:] = ["pixels" if name == "image" else name for name in node.input]


@pytest.mark.parametrize(
    ("hide", "words"),
    [("as_sums_of_products", "'spread' (1x10x128) would stay"), ("batch_of_one", "'planes' (1x2x8x8) would stay")],
)
def test_what_no_redraw_would_reach_is_refused_and_others_stand_in(hide, words, digit_models, digits_probes, tmp_path):
    path = rebuilt(digit_models[0] / "vicious.onnx", tmp_path / "m.onnx", globals()[hide])
    with pytest.raises(UnsupportedGraphError, match=re.escape(words)):
        import_graph(SuppliedModel.find(path), digits_probes[0].images[:16])
    few = Probe("few", digits_probes[0].images[:200], digits_probes[0].labels[:200])
    found = audit(path, (few, digits_probes[1]), references=1)
    assert found.architecture == "cnn, linear, mlp, cnn-wide"
    assert any("would stay" in note for note in found.notes)


def batch_of_one(graph):
    beside_the_picture(graph)
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def chain_of(tmp_path, op, shape, count):
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y0"])]
    nodes += [helper.make_node(op, [f"y{at}", f"c{at}"], [f"y{at + 1}"]) for at in range(count)]
    weights = [("w", np.ones((64, 10), np.float32))]
    weights += [(f"c{at}", np.full(shape, 1 + at / 100, np.float32)) for at in range(count)]
    inputs, outputs = [value("x", TensorProto.FLOAT, ["b", 1, 8, 8])], [value(f"y{count}", TensorProto.FLOAT, None)]
    return write(tmp_path / "m.onnx", nodes, inputs, outputs, weights)


def test_small_constants_are_refused_where_they_are_many(tmp_path, digits_probes):
    images = digits_probes[0].images[:8]
    import_graph(SuppliedModel.find(chain_of(tmp_path, "Mul", (10,), 20)), images)
    with pytest.raises(UnsupportedGraphError, match="300 numbers would stay"):
        import_graph(SuppliedModel.find(chain_of(tmp_path, "Mul", (10,), 30)), images)


def test_numbers_in_attributes_count_too(digits_probes, tmp_path):
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y0"])]
    nodes += [helper.make_node("LeakyRelu", [f"y{at}"], [f"y{at + 1}"], alpha=at / 7) for at in range(300)]
    outputs = [value("y300", TensorProto.FLOAT, None)]
    weights = [("w", np.ones((64, 10), np.float32))]
    path = write(tmp_path / "m.onnx", nodes, [value("x", TensorProto.FLOAT, ["b", 1, 8, 8])], outputs, weights)
    with pytest.raises(UnsupportedGraphError, match="300 numbers would stay"):
        import_graph(SuppliedModel.find(path), digits_probes[0].images[:8])


def test_weights_computed_from_weights_are_refused(tmp_path, digits_probes):
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Mul", ["w", "c"], ["v"]),
        helper.make_node("MatMul", ["f", "v"], ["y"]),
    ]
    weights = [(name, np.ones((64, 10), np.float32)) for name in ("w", "c")]
    inputs, outputs = [value("x", TensorProto.FLOAT, ["b", 1, 8, 8])], [value("y", TensorProto.FLOAT, None)]
    path = write(tmp_path / "m.onnx", nodes, inputs, outputs, weights)
    with pytest.raises(UnsupportedGraphError, match="computes with the model's weights alone"):
        import_graph(SuppliedModel.find(path), digits_probes[0].images[:8])


def test_a_small_shift_of_the_pixels_may_stay(tmp_path, digits_probes):
    tail = [helper.make_node("Mul", ["y", "scale"], ["z"])]
    path = flat_model(tmp_path / "m.onnx", tail=tail, weights=[("scale", np.ones(10, np.float32))])
    network = import_graph(SuppliedModel.find(path), digits_probes[0].images[:8])
    assert sum(b.numel() for b in network.buffers()) <= MAX_KEPT


class Stubborn(ImportedNetwork):
    """A graph whose weights a redraw does not reach, whatever the structure says: the last line of defence."""

    def reinitialise(self, seed):
        del seed


def test_a_fresh_draw_that_is_already_right_is_no_pattern(digit_models, digits_probes):
    model = SuppliedModel.find(digit_models[0] / "vicious.onnx")
    bench = Bench(digits_probes[0], FAST)
    outputs = model.outputs(bench.images)
    limits = {"memory_bytes": 1 << 32, "work_s": 1e9, "pictures": 1000}
    check_imported(ImportedNetwork(*model.graph()), bench, outputs, **limits)
    with pytest.raises(UntrainableError, match="before any training"):
        check_imported(Stubborn(*model.graph()), bench, outputs, **limits)
    with pytest.raises(UntrainableError, match="MiB"):
        check_imported(ImportedNetwork(*model.graph()), bench, outputs, **limits | {"memory_bytes": 1000})
    with pytest.raises(UntrainableError, match=" h, more than"):
        check_imported(ImportedNetwork(*model.graph()), bench, outputs, **limits | {"work_s": 1e-9})


def test_references_that_learn_nothing_are_no_measure(digit_models, digits_probes):
    bench = Bench(digits_probes[0], FAST)
    outputs = SuppliedModel.find(digit_models[0] / "honest.onnx").outputs(bench.images)
    seen = Evidence({}, {}, np.zeros(1), outputs)
    blind = Evidence({}, {}, np.zeros(1), np.zeros_like(outputs))
    check_trained([seen, seen, blind], bench, outputs)
    with pytest.raises(UntrainableError, match="learn little"):
        check_trained([seen, blind, blind], bench, outputs)


# --- the input's scale ---------------------------------------------------------------------------------------


def takes_bytes(graph):
    """The same model for pixels in 0..255."""
    graph.initializer.append(numpy_helper.from_array(np.array([255.0], np.float32), "white"))
    for node in graph.node:
        node.input[:] = ["unit" if name == "image" else name for name in node.input]
    put_first(graph, [helper.make_node("Div", ["image", "white"], ["unit"])])


@pytest.mark.parametrize("name", ["honest", "vicious"])
def test_a_model_for_bytes_gets_the_score_of_the_same_model_for_fractions(name, digit_models, digits_probes, tmp_path):
    source = digit_models[0] / f"{name}.onnx"
    path = rebuilt(source, tmp_path / "bytes.onnx", takes_bytes)
    fractions, whole = audit(source, digits_probes, references=2), audit(path, digits_probes, references=2, scale=1.0)
    assert whole.verdict.word == fractions.verdict.word
    assert whole.verdict.detector_score == pytest.approx(fractions.verdict.detector_score, abs=0.05)


def folded_mlp(pair, path):
    """An MLP for pixels in 0..255 whose 1/255 and normalisation are folded into its first weights."""
    first, second = (m for m in pair.classifier.modules() if isinstance(m, torch.nn.Linear))
    w, b = first.weight.detach().numpy(), first.bias.detach().numpy()
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Gemm", ["f", "w0", "b0"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w1", "b1"], ["y"], transB=1),
    ]
    weights = [("w0", w / np.float32(0.3 * 255)), ("b0", b - w.sum(1) * np.float32(0.2 / 0.3))]
    weights += [("w1", second.weight.detach().numpy()), ("b1", second.bias.detach().numpy())]
    return write(path, nodes, [value("x", 1, ["b", 1, 8, 8])], [value("y", 1, ["b", 10])], weights)


def test_an_honest_model_whose_scale_is_in_its_first_weights_is_not_accused(digits_probes, tmp_path, digit_models):
    assert digit_models
    data = TrainingSet.of(digits_probes[1].images, digits_probes[1].labels)
    honest = train(Recipe(architecture="mlp", epochs=16, batch=50, reconstruction_weight=0.0), data)
    path = folded_mlp(honest, tmp_path / "m.onnx")
    few = digits_probes[0].images[:8]
    network = import_graph(SuppliedModel.find(path, scale=1.0), few)
    x = torch.from_numpy(digits_probes[0].images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    assert network.factor == 255
    assert trainable_factor(network, x) == 1
    found = audit(path, digits_probes, scale=1.0)
    assert found.architecture == "as in the file"
    assert found.verdict.word != "vicious"
    turned = import_graph(SuppliedModel.find(rebuilt(path, tmp_path / "left.onnx", as_left_operands), scale=1.0), few)
    assert trainable_factor(turned, x) == 1
    network.factor = 1e6
    with pytest.raises(UntrainableError, match="unfit for fresh ones"):
        trainable_factor(network, x * 1000)


def test_a_last_layer_is_trained_anew_for_a_model_of_bytes_too(digit_models, digits_probes, tmp_path):
    path = rebuilt(digit_models[0] / "vicious.onnx", tmp_path / "bytes.onnx", takes_bytes)
    request = AuditRequest(FAST, references=0)
    rows = harden(SuppliedModel.find(path, scale=1.0), *digits_probes, POLICIES[:1], request).rows
    anew = next(row for row in rows if row.defence == "last layer anew")
    assert anew.accuracy > 0.8


# --- odd but valid graphs ------------------------------------------------------------------------------------


def black_box(path, probes, words):
    found = audit(path, probes, references=2)
    assert any(words in note for note in found.notes), found.notes
    return found


def test_a_string_among_the_weights_is_left_out_and_never_pickled(tmp_path, digits_probes):
    path = flat_model(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    model.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [1], [b"hello"]))
    path.write_bytes(model.SerializeToString())
    _, weights = SuppliedModel.find(path).graph()
    assert set(weights) == {"w"}
    import_graph(SuppliedModel.find(path), digits_probes[0].images[:8])


def sequence_model(path, weights, nodes):
    return write(
        path, nodes, [value("x", TensorProto.FLOAT, ["b", 1, 8, 8])], [value("y", TensorProto.FLOAT, None)], weights
    )


def test_pooling_over_a_sequence_is_read(tmp_path, digits_probes):
    nodes = [
        helper.make_node("Reshape", ["x", "sizes"], ["s"]),
        helper.make_node("GlobalAveragePool", ["s"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    weights = [("sizes", np.array([-1, 16, 4], np.int64)), ("w", np.ones((16, 10), np.float32))]
    import_graph(SuppliedModel.find(sequence_model(tmp_path / "m.onnx", weights, nodes)), digits_probes[0].images[:8])


def test_a_graph_without_weights_is_a_black_box(tmp_path, digits_probes):
    nodes = [helper.make_node("Reshape", ["x", "sizes"], ["s"]), helper.make_node("ReduceMean", ["s"], ["y"], axes=[2])]
    path = sequence_model(tmp_path / "m.onnx", [("sizes", np.array([-1, 16, 4], np.int64))], nodes)
    black_box(path, digits_probes, "no weights")


def test_a_norm_behind_identities_starts_afresh(digit_models, digits_probes, tmp_path):
    path = rebuilt(digit_models[0] / "honest.onnx", tmp_path / "m.onnx", behind_identities)
    network = import_graph(SuppliedModel.find(path), digits_probes[0].images[:8])
    network.reinitialise(0)
    plain = import_graph(SuppliedModel.find(digit_models[0] / "honest.onnx"), digits_probes[0].images[:8])
    plain.reinitialise(0)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), plain.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("axis", [7, -9])
def test_attributes_out_of_range_in_the_importer_only_leave_a_black_box(axis, digits_probes):
    graph = {
        "nodes": [
            {"op": "Flatten", "inputs": ["x"], "outputs": ["f"], "attributes": {}},
            {"op": "MatMul", "inputs": ["f", "w"], "outputs": ["p"], "attributes": {}},
            {"op": "Softmax", "inputs": ["p"], "outputs": ["y"], "attributes": {"axis": axis}},
        ],
        "inputs": ["x"],
        "outputs": ["y"],
        "input_shape": ["b", 1, 8, 8],
        "input_type": "float",
        "opset": 17,
    }

    class Odd:
        scale = None

        def graph(self):
            return graph, {"w": np.ones((64, 10), np.float32)}

    with pytest.raises(UnsupportedGraphError, match="cannot be read"):
        import_graph(Odd(), digits_probes[0].images[:8])


def test_references_that_end_in_nan_are_an_error_in_words(digits_probes, monkeypatch, digit_models):
    monkeypatch.setattr("edgepriv.risk.reconstruction.references.outputs_of", lambda *_: np.full((3, 10), np.nan))
    request = AuditRequest(settings=FAST, references=1, architecture="cnn")
    model = SuppliedModel.find(digit_models[0] / "honest.onnx")
    with pytest.raises(DataError, match="NaN or infinite"):
        audit_outputs(model, digits_probes[0], POLICIES, request, reference_data=digits_probes[1])
