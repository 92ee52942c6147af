"""Purified outputs on the device: what the operator's file does, what is refused, and that it acts before release."""

from __future__ import annotations

import json

import numpy as np
import pytest
from device_site import World, classifier
from gateway_site import Site
from hypothesis import given
from hypothesis import strategies as st

from edgepriv.device.config import ReleaseConfig
from edgepriv.device.purify import SCHEMA, OutputPurifier, PurifiedPolicy
from edgepriv.device.release import parse_policy
from edgepriv.errors import ConfigError, DataError, MissingFileError

LOGITS = np.random.default_rng(0).normal(0, 2, (50, 3))


def file(strength, k=3):
    centres = np.full((k, k), -4.0) + 3.9 * np.eye(k)
    return json.dumps({"schema": SCHEMA, "centres": centres.tolist(), "strength": strength}).encode()


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_winner_stays_and_the_rest_comes_closer_to_its_centre(strength):
    purified = OutputPurifier.from_bytes(file(strength)).apply(LOGITS)
    assert np.array_equal(purified.argmax(1), LOGITS.argmax(1))
    plain = OutputPurifier.from_bytes(file(0.0)).apply(LOGITS)
    one = plain.argmax(1) == 0
    assert purified[one].std(0).sum() <= (1 - strength) * plain[one].std(0).sum() + 1e-5


def test_bits_and_name_are_the_policys_and_its_integers_come_from_purified_outputs():
    policy = PurifiedPolicy(parse_policy("softmax:2"), OutputPurifier.from_bytes(file(1.0)))
    assert (policy.name, policy.bits(3)) == ("softmax:2", parse_policy("softmax:2").bits(3))
    assert len(np.unique(policy.apply(LOGITS), axis=0)) == 3
    assert len(np.unique(parse_policy("softmax:2").apply(LOGITS), axis=0)) > 10
    with pytest.raises(ConfigError, match="for classifiers"):
        PurifiedPolicy(parse_policy("counts"), OutputPurifier.from_bytes(file(1.0)))


@pytest.mark.parametrize("bad", [LOGITS[:, :2], LOGITS * np.nan, LOGITS[0]])
def test_outputs_of_another_form_are_refused(bad):
    with pytest.raises(DataError):
        OutputPurifier.from_bytes(file(0.5)).apply(bad)


def test_a_missing_file_says_who_writes_it(tmp_path):
    with pytest.raises(MissingFileError) as caught:
        OutputPurifier.load(tmp_path / "absent.json")
    assert "edgepriv harden" in caught.value.hint


@given(st.one_of(st.binary(max_size=60), st.dictionaries(st.text(max_size=8), st.floats()).map(json.dumps)))
def test_any_bytes_give_a_purifier_or_one_error(raw):
    with pytest.raises(DataError):
        OutputPurifier.from_bytes(raw if isinstance(raw, bytes) else raw.encode())


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_outside_its_range_is_refused(strength):
    with pytest.raises(DataError):
        OutputPurifier.from_bytes(file(strength))


def test_a_configured_purifier_acts_before_the_release(tmp_path):
    world = World(Site(tmp_path), classifier(tmp_path / "model"))
    path = tmp_path / "purifier.json"
    path.write_bytes(file(1.0))
    device = world.device(release=ReleaseConfig(policy="softmax:3", purifier=path))
    assert isinstance(device.stages.policy, PurifiedPolicy)
    world.run()
    assert device.counters["accepted"] == len(world.stored("outputs")) > 0
    world.close()


def test_softmax_without_decimals_is_the_coarsest_that_keeps_the_accuracy():
    assert parse_policy("softmax").name == "softmax:1"
