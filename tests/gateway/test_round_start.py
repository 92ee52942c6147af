"""What no device would take part in, or what breaks the budget, does not start, and the operator is told why."""

from __future__ import annotations

import numpy as np
import pytest
from gateway_site import Device, Site, exchange
from round_fleet import Fleet, fixed_trainer

from edgepriv.errors import ConfigError, RefusedError
from edgepriv.wire import messages
from edgepriv.wire.rounds import Cohort, step_message
from edgepriv.wire.update import encode_update
from gateway.round_start import check_packets
from gateway.rounds import Round

BASE = {"w": np.zeros(10, np.float32)}
NOISE = {"privacy": "masked", "noise": "distributed", "noise_multiplier": 1.0, "max_weight": 1, "min_cohort": 4}
CANNOT = {
    "all collude": (NOISE | {"colluders": 4}, "no honest noise of 4 devices"),
    "fewer than none": (NOISE | {"colluders": -1}, "no honest noise"),
    "rounded away": (NOISE | {"fraction_bits": 0, "clip": 1.0}, "steps wide"),
    "half a batch": ({"training": {"batch_size": 7.5}}, "batch_size"),
    "unknown training": ({"training": {"momemtum": 0.5}}, "momemtum"),
    "endless decay": ({"training": {"weight_decay": float("inf")}}, "weight_decay"),
    "too large a cohort": ({"privacy": "masked", "max_cohort": 257}, "at most 256"),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_a_plan_that_every_device_would_decline_is_refused(tmp_path, kind):
    changes, why = CANNOT[kind]
    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.ones(10)}, 1) for _ in range(8)])
    plan = fleet.plan(BASE, **changes)
    with pytest.raises(ConfigError, match=why):
        fleet.open(plan)
    assert fleet.conductor.rounds == fleet.store.saved == {}
    assert Round.from_bytes(Round(plan, ["dev-000"], 0.0).to_bytes()).plan == plan, "a stored round stays readable"


def test_a_budget_without_noise_is_refused(tmp_path):
    pytest.importorskip("dp_accounting")
    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.ones(10)}, 1) for _ in range(4)])
    noisy = {"noise": "central", "noise_multiplier": 1.0, "max_weight": 1, "clip": 1.0, "max_epsilon": 6.0}
    fleet.open(fleet.plan(BASE, **noisy))
    assert fleet.run().outcome == "done"
    with pytest.raises(RefusedError, match="adds no noise"):
        fleet.open(fleet.plan(BASE, round=2, max_epsilon=6.0))


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path, rounds={"quorum": 1, "participation": "poisson", "sample_share": 0.5})
    yield made
    made.close()


def _started(site, tensors, **changes):
    gateway, devices = site.gateway(), [Device(site, n) for n in site.devices]
    for device in devices:
        exchange(gateway, device, device.record())
    site.now += 1
    gateway.step()
    weights = site.folder / "w.bin"
    weights.write_bytes(encode_update(tensors))
    gateway.rounds.set_weights(weights, "m")
    gateway.link.max_packet_bytes = 4096
    return gateway.rounds.start(changes, site.now), gateway


def test_devices_chosen_by_hand_are_not_charged_as_if_they_were_drawn(site):
    number, gateway = _started(site, BASE, devices=["dev-cam1", "dev-cam2"])
    plan = gateway.rounds.conductor.rounds[number].plan
    assert (plan.participation, plan.sample_share) == ("all", 1.0)
    assert set(gateway.rounds.conductor.rounds[number].devices) == {"dev-cam1", "dev-cam2"}


def test_a_round_whose_announcement_is_larger_than_a_packet_does_not_start(site):
    many = {f"layer{i}.weight": np.zeros(1, np.float32) for i in range(400)}
    with pytest.raises(ConfigError, match=r"the round's announcement has \d+ bytes, the broker's packets at most 4096"):
        _started(site, many, devices=["dev-cam1", "dev-cam2"])


def test_a_list_of_members_that_is_larger_than_a_packet_is_foreseen_to_the_byte(tmp_path):
    fleet = Fleet(tmp_path, [fixed_trainer({"w": np.ones(10)}, 1) for _ in range(20)])
    plan = fleet.plan(BASE, privacy="masked", round=1)
    fleet.open(plan)
    sent = Cohort(tuple(d._running.member.advert for d in _joined(fleet)))
    size = len(messages.encode(step_message(1, "cohort", sent)))
    with pytest.raises(ConfigError, match=r"list of members has (\d+) bytes") as caught:
        check_packets(plan, fleet.devices, size)
    foreseen = int(str(caught.value).split(" has ")[1].split()[0])
    assert size < foreseen < size + 600, "no more than the link and the broker add"
    check_packets(plan, fleet.devices, foreseen)


def _joined(fleet):
    fleet.turn()
    return fleet.devices.values()
