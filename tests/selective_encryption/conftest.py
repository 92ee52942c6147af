"""Small ONNX models of every kind that protection must handle, and a protected one to take apart."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepriv.keys import Identity
from edgepriv.selective_encryption import carrier, protection
from edgepriv.selective_encryption.select.scores import random_scores

NOW = 1_900_000_000


def conv_bn_model(dtype=np.float32, width=16):
    """Conv+BN+Relu twice, a 1x1, a depthwise convolution, and a Gemm head on 8x8 inputs."""
    rng = np.random.default_rng(3)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    tensors, nodes = [], []

    def tensor(name, *shape, scale=0.3, around=0.0):
        tensors.append(numpy_helper.from_array((rng.normal(size=shape) * scale + around).astype(dtype), name))
        return name

    def conv(source, out, *shape, **more):
        pads = [shape[2] // 2] * 4
        nodes.append(helper.make_node("Conv", [source, tensor(f"{out}.w", *shape)], [f"{out}.c"], pads=pads, **more))
        c = shape[0]
        stats = [
            tensor(f"{out}.scale", c, scale=0.1, around=1),
            tensor(f"{out}.shift", c),
            tensor(f"{out}.mean", c),
        ]
        tensors.append(numpy_helper.from_array(np.full(c, 0.8, dtype), f"{out}.var"))
        nodes.append(helper.make_node("BatchNormalization", [f"{out}.c", *stats, f"{out}.var"], [f"{out}.n"]))
        nodes.append(helper.make_node("Relu", [f"{out}.n"], [out]))
        return out

    h = conv("x", "a", width, 3, 3, 3)
    h = conv(h, "b", 2 * width, width, 3, 3)
    h = conv(h, "c", width, 2 * width, 1, 1)
    h = conv(h, "d", width, 1, 3, 3, group=width)
    nodes.append(helper.make_node("GlobalAveragePool", [h], ["p"]))
    nodes.append(helper.make_node("Flatten", ["p"], ["f"]))
    nodes.append(helper.make_node("Gemm", ["f", tensor("head.w", 5, width), tensor("head.b", 5)], ["y"], transB=1))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", kind, ["n", 5])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def int8_model():
    """A QDQ convolution with int8 weights per channel, then Relu and a MatMul."""
    rng = np.random.default_rng(4)
    weight = rng.integers(-100, 100, (24, 3, 3, 3)).astype(np.int8)
    tensors = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(rng.uniform(0.01, 0.02, 24).astype(np.float32), "w.scale"),
        numpy_helper.from_array(np.zeros(24, np.int8), "w.zero"),
        numpy_helper.from_array(np.float32(0.05), "x.scale"),
        numpy_helper.from_array(np.uint8(128), "x.zero"),
        numpy_helper.from_array(rng.normal(size=(24, 5)).astype(np.float32), "m"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x.scale", "x.zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "x.scale", "x.zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["w", "w.scale", "w.zero"], ["wf"], axis=0),
        helper.make_node("Conv", ["dq", "wf"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["p"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["p", "m"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


MODELS = {
    "float32": lambda: conv_bn_model(np.float32),
    "float16": lambda: conv_bn_model(np.float16),
    "int8": int8_model,
}


@pytest.fixture
def models():
    return MODELS


@pytest.fixture
def issuer():
    return Identity.new("owner", "maker")


@pytest.fixture
def device():
    return Identity.new("device", "cam1")


@pytest.fixture
def protect(issuer):
    """Protect a model by chance selection, three levels, no training: (plain model, draft, bundle)."""

    def make(model, *, share=0.3, mode="levels", external=False, version=1, dense=False, model_id=b"m" * 16):
        model = carrier.normalised(model)
        layers = carrier.layers(model, dense=dense)
        scores = random_scores(layers, 1)
        made = protection.draft(model, layers, scores, share, secret=b"s" * 32, model_id=model_id, external=external)
        total = made.choice.units
        plans = [
            protection.LevelPlan(target, target, count)
            for target, count in ((0.3, total // 3), (0.6, 2 * total // 3), (None, total))
        ]
        bundle = protection.finish(
            made,
            plans,
            issuer,
            model_id=model_id,
            version=version,
            mode=mode,
            name="test",
            now_s=NOW - 10,
            about={},
        )
        return model, made, bundle

    return make


@pytest.fixture
def inputs():
    return np.random.default_rng(5).normal(size=(4, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def onnx_checker():
    return onnx.checker.check_model
