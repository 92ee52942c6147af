"""Weights that a graph holds twice are encrypted as one, so that no copy of them stays in clear."""

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepriv.errors import RefusedError
from edgepriv.keys import Identity
from edgepriv.selective_encryption import carrier, protection
from edgepriv.selective_encryption.select.choose import choose
from edgepriv.selective_encryption.select.scores import random_scores

WIDTH = 8


def tied_model(second):
    """Two 3x3 convolutions with one weight, which the second reads as ``second`` says; a branch reads it too."""
    rng = np.random.default_rng(1)
    weight = (rng.normal(size=(WIDTH, WIDTH, 3, 3)) * 0.2).astype(np.float32)
    first = numpy_helper.from_array((rng.normal(size=(WIDTH, 3, 3, 3)) * 0.3).astype(np.float32), "first")
    tensors, nodes = [first, numpy_helper.from_array(weight, "w")], []
    if second == "identity":
        nodes = [helper.make_node("Identity", ["w"], ["once"]), helper.make_node("Identity", ["once"], ["copy"])]
    elif second == "partly":
        weight = weight.copy()
        weight[::2] += 1
        tensors.append(numpy_helper.from_array(weight, "copy"))
    elif second == "constant":
        nodes = [helper.make_node("Constant", [], ["copy"], value=numpy_helper.from_array(weight))]
    else:
        tensors.append(numpy_helper.from_array(weight, "copy"))
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Conv", ["b", "copy"], ["z"], pads=[1] * 4)], "then", [], [info("z", 1, None)]
    )
    other = helper.make_graph([helper.make_node("Identity", ["b"], ["e"])], "else", [], [info("e", 1, None)])
    tensors.append(numpy_helper.from_array(np.array(True), "yes"))
    nodes += [
        helper.make_node("Conv", ["x", "first"], ["a"], pads=[1] * 4),
        helper.make_node("Conv", ["a", "w"], ["b"], pads=[1] * 4),
        helper.make_node("If", ["yes"], ["c"], then_branch=body, else_branch=other),
        helper.make_node("Conv", ["c", "copy"], ["y"], pads=[1] * 4),
    ]
    shape = ["n", 3, 8, 8], ["n", WIDTH, 8, 8]
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, shape[0])], [info("y", TensorProto.FLOAT, shape[1])], tensors
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def run(model, x):
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


def in_clear(made):
    """How many encrypted kernels stand anywhere in the carrier's bytes."""
    shown, count = b"".join(bytes(content) for content in made.masked), 0
    for number, unit in made.choice.order:
        count += made.regions[number].rows(made.plain)[unit].tobytes() in shown
    return count


def drafted(model, share=0.4):
    layers = carrier.layers(model)
    return protection.draft(model, layers, random_scores(layers, 1), share, secret=b"s" * 32, model_id=b"m" * 16)


@pytest.mark.parametrize("second", ["identity", "constant", "equal"])
def test_equal_weights_become_one_tensor_and_no_encrypted_kernel_stays_in_clear(second, inputs):
    raw = tied_model(second)
    model = carrier.normalised(raw)
    assert [layer.name for layer in carrier.layers(model)] == ["first", "w"]
    assert "copy" not in model.SerializeToString().decode("latin-1")
    onnx.checker.check_model(model)
    assert np.array_equal(run(model, inputs), run(raw, inputs))
    assert in_clear(drafted(model)) == 0


def with_separate_copy(model):
    """What an earlier edgepriv made of an Identity: a second tensor for the last consumer."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = onnx.TensorProto()
    tensor.CopyFrom(next(t for t in copy.graph.initializer if t.name == "w"))
    tensor.name = "copy"
    copy.graph.initializer.append(tensor)
    copy.graph.node[-1].input[1] = "copy"
    return copy


def test_a_draft_that_shows_what_it_encrypts_is_refused():
    """Positive control: with a tensor for each consumer, true kernels of one stand in the other."""
    model = with_separate_copy(carrier.normalised(tied_model("identity")))
    made = drafted(model)
    assert in_clear(made) == 0
    choice = choose(random_scores(made.layers, 1), made.layers, 0.4)
    masked = [content.copy() for content in made.masked]
    for number, unit in choice.order:
        made.regions[number].rows(masked)[unit] = bytes(36)
    leaking = dataclasses.replace(made, choice=choice, masked=masked)
    assert in_clear(leaking) > 20
    plans = [protection.LevelPlan(None, None, choice.units)]
    options = {"model_id": b"m" * 16, "version": 1, "mode": "levels", "name": "x", "now_s": 1, "about": {}}
    with pytest.raises(RefusedError, match="stand in clear in another tensor"):
        protection.finish(leaking, plans, Identity.new("owner", "maker"), **options)
    plans = [protection.LevelPlan(None, None, made.choice.units)]
    assert protection.finish(made, plans, Identity.new("owner", "maker"), **options).decoded.levels


def test_kernels_that_two_tensors_have_in_common_are_not_selected():
    model = carrier.normalised(tied_model("partly"))
    layers = carrier.layers(model)
    assert [layer.name for layer in layers] == ["first", "w", "copy"]
    made = drafted(model, share=1.0)
    common = np.repeat(np.arange(WIDTH) % 2 == 1, WIDTH)
    for name in ("w", "copy"):
        assert np.array_equal(made.choice.selected[name], ~common)
    assert made.choice.selected["first"].all()


def test_folding_leaves_weights_alone_that_a_body_reads_too(inputs):
    model = carrier.normalised(tied_model("identity"))
    del model.graph.node[-1]
    norm = [
        numpy_helper.from_array(np.full(WIDTH, v, np.float32), n) for n, v in zip("abcd", (2, 1, 0, 4), strict=True)
    ]
    for tensor in norm:
        tensor.name = "norm." + tensor.name
    model.graph.initializer.extend(norm)
    names = [tensor.name for tensor in norm]
    model.graph.node.append(helper.make_node("BatchNormalization", ["b", *names], ["n"]))
    model.graph.node.append(helper.make_node("Add", ["n", "c"], ["y"]))
    folded, count = carrier.fold_batchnorm(model)
    assert count == 0
    assert np.allclose(run(folded, inputs), run(model, inputs), atol=1e-5)
