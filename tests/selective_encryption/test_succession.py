"""Comparing the carriers of two versions finds the encrypted kernels, unless the second follows the first."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sklearn.metrics import roc_auc_score

from edgepriv.errors import ConfigError, MissingFileError
from edgepriv.keys import Identity
from edgepriv.selective_encryption import bundle_files, carrier, pipeline, succession
from edgepriv.selective_encryption.restore import open_with_key

WIDTH = 40
FORM = {"task": "classify"}


def model_of(weights):
    tensors = [numpy_helper.from_array(np.asarray(w, np.float32), f"w{n}") for n, w in enumerate(weights)]
    nodes, before = [], "x"
    for number in range(len(weights)):
        nodes.append(helper.make_node("Conv", [before, f"w{number}"], [f"c{number}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        before = f"r{number}"
    info = helper.make_tensor_value_info
    inputs = [info("x", TensorProto.FLOAT, ["n", 3, 8, 8])]
    graph = helper.make_graph(nodes, "g", inputs, [info(before, TensorProto.FLOAT, ["n", WIDTH, 8, 8])], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def trained():
    rng = np.random.default_rng(0)
    return [rng.standard_t(5, size=(WIDTH, inputs, 3, 3)) * 0.05 for inputs in (3, WIDTH, WIDTH)]


def tuned(weights, share=1.0):
    """The same network after some more training: each changed kernel by about a tenth."""
    rng = np.random.default_rng(1)
    return [
        np.where(rng.random((len(w), w.shape[1], 1, 1)) < share, w + 0.1 * w.std() * rng.standard_normal(w.shape), w)
        for w in weights
    ]


def protect(weights, folder, *, version=1, previous=None, log=lambda _: None, mode="levels", **options):
    made, report = pipeline.make_bundle(
        carrier.normalised(model_of(weights)),
        None,
        None,
        pipeline.Options(**{"select": "random", "share": 0.1, "check": "none", "mode": mode, **options}),
        FORM,
        ISSUER,
        "eye",
        version,
        now_s=1,
        previous=None if previous is None else succession.read(previous),
        log=log,
    )
    bundle_files.write_bundle(folder, made.files, made.manifest, report["secrets"], ISSUER.public)
    return folder


ISSUER = Identity.new("owner", "maker")


@dataclasses.dataclass
class Carriers:
    """What everybody has of two versions, and the truth for scoring: kernels of all layers in a row."""

    one: np.ndarray
    two: np.ndarray
    hidden_one: np.ndarray
    hidden_two: np.ndarray
    true_two: np.ndarray


def both(first, second):
    shown, true = [], []
    for folder in (first, second):
        before = succession.read(folder)
        layers = carrier.layers(before.plain)
        shown.append(np.concatenate([carrier.weight_rows(before.masked, layer) for layer in layers]))
        true.append(np.concatenate([carrier.weight_rows(before.plain, layer) for layer in layers]))
    hidden = [np.any(s != t, axis=1) for s, t in zip(shown, true, strict=True)]
    return Carriers(*shown, *hidden, true[1])


@pytest.fixture
def first(tmp_path):
    return protect(trained(), tmp_path / "one")


def test_comparing_two_carriers_of_one_model_finds_every_kernel_unless_the_second_follows_the_first(first, tmp_path):
    alone = both(first, protect(trained(), tmp_path / "alone", version=2, share=0.2))
    differ = np.any(alone.one != alone.two, axis=1)
    assert np.array_equal(differ, alone.hidden_one | alone.hidden_two)  # each position, and nothing else
    read_in_one = alone.hidden_two & np.all(alone.one == alone.true_two, axis=1)
    assert read_in_one.sum() > 100  # true kernels that the second hides stand in the first
    after = both(first, protect(trained(), tmp_path / "after", version=2, previous=first))
    assert np.array_equal(after.one, after.two)
    assert np.array_equal(after.hidden_one, after.hidden_two)


def step_auc(pair):
    """How well the size of the change between the carriers tells encrypted kernels from others."""
    scale = np.linalg.norm(pair.one, axis=1) + np.linalg.norm(pair.two, axis=1)
    return roc_auc_score(pair.hidden_two, np.linalg.norm(pair.two - pair.one, axis=1) / scale)


@pytest.mark.parametrize("changed", [1.0, 0.3])
def test_a_retrained_version_shows_its_decoys_unless_they_change_as_the_other_kernels_do(first, tmp_path, changed):
    weights = tuned(trained(), changed)
    alone = both(first, protect(weights, tmp_path / "alone", version=2))
    assert step_auc(alone) > 0.9
    after = both(first, protect(weights, tmp_path / "after", version=2, previous=first))
    auc = step_auc(after)
    assert max(auc, 1 - auc) <= 0.6
    assert np.array_equal(after.hidden_one, after.hidden_two)
    moved = np.any(after.one != after.two, axis=1)
    assert abs(moved[after.hidden_two].mean() - moved[~after.hidden_two].mean()) < 0.1


def test_kernels_with_unrelated_new_values_are_chosen_freely_and_get_fresh_decoys(first, tmp_path):
    rng = np.random.default_rng(7)
    weights = trained()
    weights[2] = rng.standard_t(5, size=weights[2].shape) * 0.05
    pair = both(first, protect(weights, tmp_path / "two", version=2, previous=first))
    last = np.arange(len(pair.one)) >= WIDTH * (3 + WIDTH)
    assert np.array_equal(pair.hidden_one[~last], pair.hidden_two[~last])
    assert not np.array_equal(pair.hidden_one[last], pair.hidden_two[last])
    twice = last & pair.hidden_one & pair.hidden_two
    correlation = np.corrcoef(pair.one[twice].reshape(-1), pair.two[twice].reshape(-1))[0, 1]
    assert abs(correlation) < 0.3


@pytest.mark.parametrize("mode", ["levels", "both"])
def test_a_follower_keeps_the_model_id_has_keys_of_its_own_and_opens_exactly(tmp_path, mode):
    first = protect(trained(), tmp_path / "one", mode=mode)
    second = protect(tuned(trained()), tmp_path / "two", version=2, previous=first, mode=mode)
    third = protect(tuned(tuned(trained())), tmp_path / "three", version=3, previous=second, mode=mode)
    papers = [bundle_files.read_manifest(folder, [ISSUER.public.ed25519])[0] for folder in (first, second, third)]
    secrets = [bundle_files.read_secrets(folder) for folder in (first, second, third)]
    assert len({paper.binding.model_id for paper in papers}) == 1
    assert [paper.binding.version for paper in papers] == [1, 2, 3]
    assert len({secret["key"] for secret in secrets}) == 3
    assert len({secret["decoys"] for secret in secrets}) == 1
    opened = open_with_key(papers[2], secrets[2]["key"], 1, bundle_files.read_stored(third, papers[2]))
    model = onnx.load_from_string(opened.model_bytes())
    assert np.array_equal(
        numpy_helper.to_array(model.graph.initializer[2]), tuned(tuned(trained()))[2].astype(np.float32)
    )


def test_what_would_undo_the_protection_of_the_version_before_is_refused(first, tmp_path):
    for options, words in (({"version": 1}, "does not follow"), ({"version": 2, "width": 7}, "no weights in common")):
        weights = trained()
        if options.pop("width", 0):
            weights = [w[:, :, :2, :2] for w in weights]
        with pytest.raises(ConfigError, match=words):
            protect(weights, tmp_path / "two", previous=first, **options)
    with pytest.raises(MissingFileError, match="no protected model"):
        succession.read(tmp_path)
    said = []
    protect(trained(), tmp_path / "alone", version=2, log=said.append)
    assert any("--previous" in line for line in said)


def test_a_renamed_export_is_matched_by_the_order_of_its_layers(first, tmp_path):
    before = succession.read(first)
    model = carrier.normalised(model_of(trained()))
    for tensor in model.graph.initializer:
        for node in model.graph.node:
            for number, name in enumerate(node.input):
                if name == tensor.name:
                    node.input[number] = "new." + name
        tensor.name = "new." + tensor.name
    layers = carrier.layers(model)
    found = succession.inherited(before, model, layers, 2)
    assert [int(found.forced(layer).sum()) for layer in layers] == [
        int(mask.sum())
        for mask in carrier.differing_units(before.plain, before.masked, carrier.layers(before.plain)).values()
    ]
