"""The root's side of rounds over several gateways: whom it answers, and configurations that cannot work."""

from __future__ import annotations

import numpy as np
import pytest
from gateway_site import Recipient, Site, exchange

from edgepriv.errors import ConfigError, RefusedError
from edgepriv.keys import Identity
from edgepriv.wire.messages import Offer
from edgepriv.wire.update import encode_update
from gateway.root import shard_plan

BASE = encode_update({"w": np.zeros(50, np.float32)})


class ShardSite(Site):
    """A site with two more gateways in its trust list."""

    def write_trust(self, **changes):
        for name in ("a", "x"):
            if f"gateway-{name}" not in self.keys:
                self.keys[f"gateway-{name}"] = Identity.new("gateway", name)
        super().write_trust(**changes)


@pytest.fixture
def site(tmp_path):
    made = ShardSite(tmp_path, rounds={"shards": ["gateway-a"], "quorum": 1, "shard_silence_s": 30.0})
    (tmp_path / "base").write_bytes(BASE)
    made.root = made.gateway()
    made.root.rounds.set_weights(tmp_path / "base", "m")
    yield made
    made.close()


def _ask(site, name, **args):
    shard = Recipient(site, name, seq=1 + len(site.gateways))
    exchange(site.root, shard, shard.record(), shard.query("shard-round", **args))
    return shard.reply()


def test_a_shard_learns_the_weights_and_the_round_and_may_say_that_it_sits_out(site):
    assert _ask(site, "gateway-a").body["round"] is None
    number = site.root.rounds.start({}, site.now)
    body = _ask(site, "gateway-a", round=0, state="new", reason="", last=7).body
    assert (body["round"]["round"], body["part"]) == (number, "open")
    assert body["head"]["size"] == len(BASE)
    plan = shard_plan(body["round"], "gateway-a", {"min_cohort": 40}, 12)
    assert (plan.cohort, plan.publish, plan.min_cohort, plan.population) == ("gateway-a", "partial", 40, 12)
    _ask(site, "gateway-a", round=number, state="out", reason="no device", last=7)
    record = site.root.rounds.table.records()[-1]
    assert record["outcome"] == "aborted"
    assert "gateway-a: no device" in record["reason"]
    assert site.root.rounds.start({}, site.now) == 8  # above all numbers that the shard has used


def test_only_the_shards_that_are_named_are_answered_and_no_other_role(site):
    site.root.rounds.start({}, site.now)
    assert "not a shard" in _ask(site, "gateway-x").body["error"]
    assert "cannot ask" in _ask(site, "risk-lab").body["error"]


@pytest.mark.parametrize("sender", ["dev-cam1", "risk-lab"])
def test_nobody_but_a_gateway_offers_a_partial_sum(site, sender):
    party = Recipient(site, sender)
    offer = Offer(b"r" * 16, "partial", 100, 4096, b"r" * 16 + bytes(16), 1, site.now + 60, {})
    exchange(site.root, party, party.record(), party.seal(offer))
    assert site.root.totals["rejected_malformed"] == 1
    assert len(site.root.transfers) == 0


def test_a_partial_sum_that_is_none_or_comes_too_late_is_refused(site):
    number, shard = site.root.rounds.start({}, site.now), Recipient(site, "gateway-a")
    junk = b"not a partial sum" * 20
    exchange(site.root, shard, shard.record(), shard.seal(shard.offer(junk, "partial", number)))
    late = shard.offer(b"another" * 30, "partial", number + 5)
    exchange(site.root, shard, shard.seal(late))
    assert {a.outcome for d, a in shard.acks.items() if d != shard.signed.digest} == {"rejected"}
    assert "not running" in shard.acks[late.digest].reason
    assert site.root.rounds.running == [number]


def test_rules_that_need_single_updates_are_refused_over_shards(site):
    with pytest.raises(ConfigError, match="plain sums"):
        site.root.rounds.start({"rule": "median"}, site.now)


@pytest.mark.parametrize(
    ("rounds", "why"),
    [
        ({"shards": ["dev-1"]}, "list of gateways"),
        ({"shards": ["gateway-a", "gateway-a"]}, "list of gateways"),
        ({"root": "gateway-main"}, "another gateway"),
        ({"root": "risk-lab"}, "another gateway"),
        ({"root": "gateway-a", "root_shard": 1000}, "root_shard"),
        ({"root": "gateway-a", "shards": ["gateway-x"]}, "one or the other"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_at_the_start(tmp_path, rounds, why):
    with pytest.raises(ConfigError, match=why):
        ShardSite(tmp_path, rounds=rounds).gateway()


def test_a_shard_starts_no_rounds_of_its_own(tmp_path):
    made = ShardSite(tmp_path, rounds={"root": "gateway-a", "root_shard": 9})
    gateway = made.gateway()
    with pytest.raises(RefusedError, match="shard of gateway-a"):
        gateway.rounds.start({}, made.now)
    made.close()


def test_a_root_of_another_release_is_named_as_the_reason():
    with pytest.raises(ConfigError, match="unknown setting 'novelty'"):
        shard_plan({"novelty": 1}, "gateway-a", {}, 1)
