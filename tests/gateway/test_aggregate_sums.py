"""The streamed sum against numpy: exact, in any order and grouping, over every encoding, and through crashes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv import files
from edgepriv.errors import DataError, RefusedError
from edgepriv.federated.compression import compress, random_coordinates
from edgepriv.federated.fixed_point import decode_sum, quantise, ring_of
from edgepriv.wire.update import decode_update, encode_update
from gateway import aggregate, robust_sum, shards, update_files
from gateway.aggregate import Staged
from gateway.round_plan import RoundPlan, announcement

ROWS = (["a", [30, 11]], ["b", [7]])
SHAPES = {"a": (30, 11), "b": (7,)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    real = update_files.blocks
    small = lambda first, last, most=64: real(first, last, 64)
    monkeypatch.setattr(update_files, "blocks", small)
    monkeypatch.setattr(aggregate, "blocks", small)


def _opened(**kwargs):
    plan = RoundPlan(round=1, model="m", base=b"b" * 32, base_bytes=1, tensors=ROWS, **{"clip": 50.0, **kwargs})
    return announcement(plan, 20, 0.0)


def _updates(n, seed=0):
    rng = np.random.default_rng(seed)
    return [{k: rng.standard_normal(v).astype(np.float32) for k, v in SHAPES.items()} for _ in range(n)]


def _stage(folder, index, raw, weight=1):
    path = folder / f"up-{index}"
    path.write_bytes(raw)
    return Staged(f"dev-{index}", hashlib.sha256(raw).digest(), path, weight)


def _flat(update):
    return np.concatenate([update["a"].ravel(), update["b"]])


def _expected(opened, updates, weights):
    ring = ring_of(opened)
    total = np.zeros(337, ring.dtype)
    for update, weight in zip(updates, weights, strict=True):
        total += quantise(_flat(update), weight, ring)
    return np.concatenate([total, np.full(2, sum(weights), ring.dtype)])


def _sum(folder, opened):
    checkpoint = aggregate.load_checkpoint(folder, opened)
    return np.fromfile(checkpoint.path, ring_of(opened).dtype, checkpoint.length)


@given(st.permutations(range(6)), st.lists(st.integers(1, 3), min_size=6, max_size=6))
@settings(max_examples=25, deadline=None)
def test_a_sum_has_the_same_bits_in_any_order_and_grouping(tmp_path_factory, order, sizes):
    folder, opened, updates = tmp_path_factory.mktemp("sum"), _opened(), _updates(6)
    staged = [_stage(folder, i, encode_update(updates[i]), 1 + i) for i in order]
    while staged:
        size = sizes.pop()
        aggregate.fold(folder, opened, staged[:size])
        staged = staged[size:]
    assert np.array_equal(_sum(folder, opened), _expected(opened, updates, [1 + i for i in range(6)]))


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8", "topk", "randomk"])
def test_every_encoding_is_summed_as_it_decodes(tmp_path, encoding):
    opened = _opened(encoding=encoding, keep=0.3)
    updates = _updates(3)
    plain = []
    for i, update in enumerate(updates):
        arrays, scales = compress(update, opened, feedback={})
        raw = encode_update(arrays, scales=scales)
        assert aggregate.fold(tmp_path, opened, [_stage(tmp_path, i, raw, 2)])[1] == []
        plain.append(_decoded(decode_update(raw, max_bytes=1 << 20).tensors, opened))
    assert np.array_equal(_sum(tmp_path, opened), _expected(opened, plain, [2, 2, 2]))


def _decoded(tensors, opened):
    out = {k: np.zeros(v, np.float32) for k, v in SHAPES.items()}
    for name, shape in SHAPES.items():
        if name in tensors:
            out[name] = tensors[name].astype(np.float32).reshape(shape)
            continue
        where = tensors.get(name + "#i", None)
        where = random_coordinates(opened, name, out[name].size) if where is None else where
        out[name].reshape(-1)[where] = tensors[name + "#v"]
    return out


def test_top_k_owes_what_it_did_not_send_and_sends_it_later():
    opened, owed, sent = _opened(encoding="topk", keep=0.2), {}, np.zeros(337)
    update = _updates(1)[0]
    for _ in range(1):
        arrays, _ = compress(update, opened, feedback=owed)
        sent += _flat(_decoded(arrays, opened))
    rest = np.concatenate([owed["a"].ravel(), owed["b"].ravel()])
    assert np.allclose(sent + rest, _flat(update), atol=1e-6)


def test_folding_again_counts_once(tmp_path):
    opened, updates = _opened(), _updates(2)
    staged = [_stage(tmp_path, i, encode_update(u)) for i, u in enumerate(updates)]
    for _ in range(3):
        aggregate.fold(tmp_path, opened, staged)
    assert np.array_equal(_sum(tmp_path, opened), _expected(opened, updates, [1, 1]))


def test_a_second_update_of_one_device_is_refused(tmp_path):
    opened = _opened()
    one, two = _updates(2)
    aggregate.fold(tmp_path, opened, [_stage(tmp_path, 0, encode_update(one))])
    _, refused = aggregate.fold(tmp_path, opened, [_stage(tmp_path, 0, encode_update(two))])
    assert "another update of this device" in refused[0].reason
    assert np.array_equal(_sum(tmp_path, opened), _expected(opened, [one], [1]))


def test_a_crash_before_the_rename_leaves_the_old_sum(tmp_path, monkeypatch):
    opened, updates = _opened(), _updates(2)
    staged = [_stage(tmp_path, i, encode_update(u)) for i, u in enumerate(updates)]
    aggregate.fold(tmp_path, opened, staged[:1])
    with monkeypatch.context() as patch:
        patch.setattr(files, "rename", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
        with pytest.raises(OSError, match="power cut"):
            aggregate.fold(tmp_path, opened, staged[1:])
    assert np.array_equal(_sum(tmp_path, opened), _expected(opened, updates[:1], [1]))
    aggregate.fold(tmp_path, opened, staged)
    assert np.array_equal(_sum(tmp_path, opened), _expected(opened, updates, [1, 1]))


BAD = {
    "nan": lambda u: encode_update({**u, "b": np.full(7, np.nan, np.float32)}),
    "infinity": lambda u: encode_update({**u, "b": np.full(7, np.inf, np.float32)}),
    "another tensor": lambda u: encode_update({**u, "c": np.zeros(3, np.float32)}),
    "another shape": lambda u: encode_update({**u, "b": np.zeros(8, np.float32)}),
    "another dtype": lambda u: encode_update({**u, "b": np.zeros(7, np.int32)}),
    "cut short": lambda u: encode_update(u)[:-5],
    "longer": lambda u: encode_update(u) + b"x",
    "empty": lambda u: encode_update({}),
    "not an update": lambda u: b"EPU2" + b"x" * 50,
    "positions beyond": lambda u: encode_update({"b#i": np.array([9], np.uint32), "b#v": np.ones(1, np.float32)}),
    "positions twice": lambda u: encode_update({"b#i": np.array([1, 1], np.uint32), "b#v": np.ones(2, np.float32)}),
    "positions alone": lambda u: encode_update({"b#i": np.array([1], np.uint32)}),
    "values alone": lambda u: encode_update({"b#v": np.ones(3, np.float32)}),
    "a tensor twice": lambda u: encode_update({**u, "b#i": np.array([1], np.uint32), "b#v": np.ones(1, np.float32)}),
    "positions of another type": lambda u: encode_update(
        {"b#i": np.array([1], np.int32), "b#v": np.ones(1, np.float32)}
    ),
}


@pytest.mark.parametrize("encoding", ["float32", "topk"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_update_is_refused_and_leaves_the_sum_alone(tmp_path, kind, encoding):
    opened, updates = _opened(encoding=encoding, keep=0.5), _updates(2)
    good, bad = _stage(tmp_path, 0, encode_update(updates[0])), _stage(tmp_path, 1, BAD[kind](updates[1]))
    _, refused = aggregate.fold(tmp_path, opened, [good, bad])
    assert [r.device for r in refused] == ["dev-1"]
    assert np.array_equal(_sum(tmp_path, opened), _expected(opened, updates[:1], [1]))


@pytest.mark.parametrize(
    ("encoding", "keep", "kept", "good"),
    [
        ("float32", 1.0, 1, False),
        ("int8", 1.0, 1, False),
        ("randomk", 0.3, 99, False),  # the places are the round's, not the device's
        ("topk", 0.3, 99, True),
        ("topk", 0.3, 100, False),
        ("topk", 0.001, 1, True),
    ],
)
def test_chosen_coordinates_are_taken_where_the_round_asks_for_them_and_only_so_many(
    tmp_path, encoding, keep, kept, good
):
    opened = _opened(encoding=encoding, keep=keep)
    raw = encode_update({"a#i": np.arange(kept, dtype=np.uint32), "a#v": np.ones(kept, np.float32)})
    checkpoint, refused = aggregate.fold(tmp_path, opened, [_stage(tmp_path, 0, raw)])
    assert (len(checkpoint.taken), len(refused)) == (int(good), int(not good))
    assert good or "coordinates" in refused[0].reason


def test_a_sparse_update_takes_eight_bytes_a_kept_coordinate_and_a_dense_one_a_block(tmp_path):
    import tracemalloc

    size = 2_000_000
    plan = RoundPlan(
        round=1, model="m", base=bytes(32), base_bytes=1, tensors=(["w", [size]],), encoding="topk", keep=0.25
    )  # fmt: skip
    opened, kept = announcement(plan, 2, 0.0), size // 4
    raw = encode_update({"w#i": np.arange(0, size, 4, dtype=np.uint32), "w#v": np.ones(kept, np.float32)})
    staged = _stage(tmp_path, 0, raw)
    del raw
    tracemalloc.start()
    with staged.path.open("rb") as file:
        source = update_files.open_source(file, staged.path.stat().st_size, opened)
        held, _ = tracemalloc.get_traced_memory()
        assert source.values(4, 12).tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    tracemalloc.stop()
    assert held < 10 * kept


def test_an_update_above_the_clip_is_scaled_down_to_it(tmp_path):
    opened, update = _opened(clip=1.0), _updates(1)[0]
    aggregate.fold(tmp_path, opened, [_stage(tmp_path, 0, encode_update(update))])
    plain = decode_sum(_sum(tmp_path, opened)[:337], ring_of(opened))
    assert np.linalg.norm(plain) == pytest.approx(1.0, abs=1e-3)


def test_a_missing_tensor_does_not_dilute_the_mean_of_those_who_trained_it(tmp_path):
    opened, (one, two) = _opened(), _updates(2)
    base = tmp_path / "base"
    base.write_bytes(encode_update({k: np.zeros(v, np.float32) for k, v in SHAPES.items()}))
    aggregate.fold(tmp_path, opened, [_stage(tmp_path, 0, encode_update(one), 3)])
    aggregate.fold(tmp_path, opened, [_stage(tmp_path, 1, encode_update({"b": two["b"]}), 1)])
    aggregate.finish(tmp_path, opened, base, tmp_path / "out")
    new = decode_update((tmp_path / "out").read_bytes(), max_bytes=1 << 20).tensors
    assert np.allclose(new["a"], one["a"], atol=1e-4)
    assert np.allclose(new["b"], (3 * one["b"] + two["b"]) / 4, atol=1e-4)


def test_partial_sums_of_two_gateways_merge_to_the_sum_of_all(tmp_path):
    opened, updates = _opened(), _updates(4)
    for shard in (0, 1):
        folder = tmp_path / str(shard)
        folder.mkdir()
        for i in (2 * shard, 2 * shard + 1):
            aggregate.fold(folder, opened, [_stage(folder, i, encode_update(updates[i]), 1 + i)])
    for shard in (0, 1, 1):
        shards.add_cohort(tmp_path / "whole", opened, tmp_path / str(shard), opened, None)
    assert np.array_equal(_sum(tmp_path / "whole", opened), _expected(opened, updates, [1, 2, 3, 4]))
    (tmp_path / "2").mkdir()
    for i in (3, 4):
        aggregate.fold(tmp_path / "2", opened, [_stage(tmp_path / "2", i, encode_update(updates[i % 4]), 1)])
    with pytest.raises(DataError, match="in two partial sums"):
        shards.add_cohort(tmp_path / "whole", opened, tmp_path / "2", opened, None)


def test_an_empty_sum_is_not_published(tmp_path):
    with pytest.raises(RefusedError, match="no update"):
        aggregate.finish(tmp_path, _opened(), tmp_path / "base", tmp_path / "out")


def _base(folder):
    path = folder / "base"
    path.write_bytes(encode_update({k: np.zeros(v, np.float32) for k, v in SHAPES.items()}))
    return path


def _unit(tensors):
    """An update with these values at the beginning of its tensors, scaled to norm 1."""
    out = {}
    for name, values in tensors.items():
        out[name] = np.zeros(SHAPES[name], np.float32)
        out[name].reshape(-1)[: len(values)] = values
    norm = np.sqrt(sum(float(np.vdot(t, t)) for t in out.values()))
    return {name: (t / np.float32(norm)) for name, t in out.items()}


def test_head_and_whole_model_trainers_at_the_clip_make_an_honest_mean_that_is_longer_than_it(tmp_path):
    opened = _opened(clip=1.0)
    heads, whole = [_unit({"b": [1.0]})] * 3, _unit({"a": [0.9], "b": [0.43]})
    staged = [_stage(tmp_path, i, encode_update(u)) for i, u in enumerate([*heads, whole])]
    assert aggregate.fold(tmp_path, opened, staged)[1] == []
    result = aggregate.finish(tmp_path, opened, _base(tmp_path), tmp_path / "out")
    assert result.norm == pytest.approx(1.24, abs=0.01)
    new = decode_update((tmp_path / "out").read_bytes(), max_bytes=1 << 20).tensors
    assert new["a"][0, 0] == pytest.approx(whole["a"][0, 0], abs=1e-4)


@pytest.mark.parametrize(("weights", "longest"), [([4, 4], 1.0), ([1, 4], np.sqrt(2))])
def test_a_mean_that_no_honest_devices_can_make_is_not_published(tmp_path, weights, longest):
    opened, mean = _opened(clip=1.0), tmp_path / "mean"
    for norm, good in ((longest * 0.999, True), (longest * 1.05, False)):
        values = np.zeros(337, "<f4")
        values[0], values[330] = norm * weights[0] / np.sqrt(2), norm * weights[1] / np.sqrt(2)
        mean.write_bytes(values.tobytes())
        args = mean, np.array(weights), opened, _base(tmp_path), tmp_path / f"out-{good}", 1.0, 4
        if good:
            assert aggregate.apply_mean(*args).norm == pytest.approx(norm, rel=1e-3)
            continue
        with pytest.raises(RefusedError, match="no honest one"):
            aggregate.apply_mean(*args)
        assert not (tmp_path / "out-False").exists()


@pytest.mark.parametrize(("rule", "devices"), [("median", 3), ("trimmed", 8)])
def test_a_robust_rule_over_updates_at_the_clip_is_published_though_longer_than_the_clip(tmp_path, rule, devices):
    opened = _opened(clip=1.0, rule=rule)
    pairs = {"median": [[1, 1, 0], [1, 0, 1], [0, 1, 1]], "trimmed": [np.roll([1] * 6 + [0] * 2, i) for i in range(8)]}
    updates = [_unit({"a": values}) for values in pairs[rule]]
    staged = [_stage(tmp_path, i, encode_update(u)) for i, u in enumerate(updates)]
    assert len(staged) == devices
    assert robust_sum.keep(tmp_path, opened, staged) == []
    result = robust_sum.robust_finish(tmp_path, opened, _base(tmp_path), tmp_path / "out", rule=rule)
    assert 1.1 < result.norm < robust_sum.STRETCH


@pytest.fixture
def few_files():
    """A process that may have few open files."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    yield 300
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_devices_than_open_files_are_folded_and_judged(tmp_path, few_files):
    opened = announcement(
        RoundPlan(round=1, model="m", base=b"b" * 32, base_bytes=1, tensors=ROWS, clip=50.0), few_files, 0.0
    )
    updates = _updates(3)
    staged = [_stage(tmp_path, i, encode_update(updates[i % 3], {"of": i})) for i in range(few_files)]
    checkpoint, refused = aggregate.fold(tmp_path, opened, staged)
    assert (len(checkpoint.taken), refused) == (few_files, [])
    assert robust_sum.keep(tmp_path, opened, staged) == []
    base = _base(tmp_path)
    result = robust_sum.robust_finish(tmp_path, opened, base, tmp_path / "out", rule="median")
    assert result.devices == few_files
    new = decode_update((tmp_path / "out").read_bytes(), max_bytes=1 << 20).tensors
    assert np.allclose(_flat(new), np.median([_flat(u) for u in updates], axis=0), atol=1e-6)
