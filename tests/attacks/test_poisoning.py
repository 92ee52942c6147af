"""Dishonest devices in clear rounds: each attack works without a rule (control) and is stopped by one that claims to.

Twenty devices on scikit-learn's digits, four of them (20 %) dishonest; the attackers know the rule and the honest
updates' size.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from round_fleet import Fleet, new_head

from edgepriv.federated.head import accuracy, train_head
from edgepriv.federated.local_recipe import head_recipe
from edgepriv.federated.local_update import LocalUpdate
from edgepriv.wire.update import encode_update

RECIPE = {"learning_rate": 0.2, "batch_size": 16, "epochs": 4, "batch_normalisation": "frozen"}
N, BAD = 20, 4


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return (data.data[order] / 16).astype(np.float32), data.target[order].astype(np.int64)


def _trainer(features, labels, attack):
    def train(weights, settings):
        y = (labels + 1) % 10 if attack == "label-flip" else labels
        delta = train_head(weights, features, y, settings.recipe, seed=settings.seed)
        factor = {"sign-flip": -4.0, "scaling": -1000.0}.get(attack, 1.0)
        return LocalUpdate({n: v * np.float32(factor) for n, v in delta.items()}, len(labels))

    return train


def _final_accuracy(tmp_path, digits, attack, *, clip=1e6, rule="mean", rounds=6):
    x, y = digits
    held, shards = (x[:400], y[:400]), np.array_split(np.arange(400, len(y)), N)
    trainers = [_trainer(x[s], y[s], attack if i < BAD else "") for i, s in enumerate(shards)]
    fleet, head = Fleet(tmp_path, trainers), new_head(10, 64)
    for number in range(1, rounds + 1):
        options = {"clip": clip, "rule": rule, "training": RECIPE, "max_weight": 100, "fraction_bits": 12}
        if attack:  # a lying device does not clip either
            _do_not_clip(fleet, trainers)
        if rule == "fltrust":
            root = slice(400, 500)
            anchor = train_head(head, x[root], y[root], head_recipe(learning_rate=0.1, batch_size=16, epochs=2), seed=1)
            options["reference"] = fleet.conductor.add_model(encode_update(anchor))
        plan = fleet.plan(head, round=number, **options)
        fleet.open(plan)
        record = fleet.run()
        assert record.outcome == "done", record.reason
        head = fleet.weights(record)
    return accuracy(head, *held)


def _do_not_clip(fleet, trainers):
    """Replace the payloads of the dishonest by what their trainer really made."""
    for i in range(BAD):
        name = f"dev-{i:03d}"

        def raw(_payload, i=i, name=name):
            running = fleet.devices[name]._running
            weights = fleet.base_of(running.opened)
            from edgepriv.federated.local_update import RoundSettings
            from edgepriv.federated.participant import _recipe

            settings = RoundSettings(_recipe(running.opened), running.opened.round, 0)
            return encode_update(trainers[i](weights, settings).tensors)

        fleet.tamper[name] = raw


@pytest.fixture(scope="module")
def honest(tmp_path_factory, digits):
    return _final_accuracy(tmp_path_factory.mktemp("honest"), digits, "")


def test_without_attackers_the_head_learns(honest):
    assert honest > 0.85


@pytest.mark.parametrize("attack", ["scaling", "sign-flip"])
def test_control_one_attack_in_five_devices_spoils_the_plain_mean(tmp_path, digits, honest, attack):
    assert _final_accuracy(tmp_path, digits, attack) < honest - 0.2


def test_the_norm_bound_stops_scaling(tmp_path, digits, honest):
    assert _final_accuracy(tmp_path, digits, "scaling", clip=1.5) > honest - 0.1


@pytest.mark.parametrize("rule", ["trimmed", "median", "fltrust"])
@pytest.mark.parametrize("attack", ["scaling", "sign-flip", "label-flip"])
def test_a_robust_rule_stops_it(tmp_path, digits, honest, rule, attack):
    assert _final_accuracy(tmp_path, digits, attack, rule=rule) > honest - 0.1


def test_fltrust_names_whom_it_refuses(tmp_path, digits):
    x, y = digits
    trainers = [
        _trainer(x[s], y[s], "sign-flip" if i == 0 else "") for i, s in enumerate(np.array_split(np.arange(200), 4))
    ]
    fleet, head = Fleet(tmp_path, trainers), new_head(10, 64)
    anchor = train_head(head, x[200:300], y[200:300], head_recipe(learning_rate=0.1), seed=1)
    reference = fleet.conductor.add_model(encode_update(anchor))
    fleet.open(fleet.plan(head, rule="fltrust", reference=reference, training=RECIPE))
    record = fleet.run()
    assert dict(record.rejected)["dev-000"] == "points away from the trusted reference update"
    assert len(record.participants) == 3
    assert hashlib.sha256(encode_update(anchor)).digest() == reference


def test_robust_rules_are_refused_under_masks(tmp_path):
    from edgepriv.errors import ConfigError

    with pytest.raises(ConfigError, match="single updates"):
        Fleet(tmp_path, [None]).plan(new_head(2, 2), privacy="masked", rule="median")
