"""A new model reaches a running device through the gateway, which learns how it went; no unjudged one is offered."""

import time

import pytest
from device_site import World
from gateway_site import Site
from model_site import TOML, Maker, Repository

from edgepriv.device.models import ModelStore
from edgepriv.device.protected import trust_of
from edgepriv.device.shipments import install_shipment
from edgepriv.device.start import start_device
from gateway.rollout import DONE, HALTED, Plan

ONE_STAGE = Plan(stages=(100,), settle_s=0.0, min_good=1, min_failures=1)


class Fleet:
    """One device that follows the model ``eye``, its gateway, and the owner who ships versions."""

    def __init__(self, folder):
        self.site = Site(folder / "site", devices=("cam1",), models={"require_verdict": True})
        self.site.policy["*"]["require_verdict"] = True
        self.site.write_trust()
        self.device = self.site.keys["dev-cam1"]
        self.maker = Maker(self.site.owner, self.site.keys["risk-lab"], now=int(time.time()))
        self.repository = Repository(self.maker, folder / "owner")
        self.world = World(self.site, None)
        self.models = self.world.gateway.models
        trust = trust_of(self.site.trust, self.site.owner.public.ed25519, {"require_verdict": True})
        self.store = ModelStore(self.site.folder / "dev-cam1" / "models", self.device, trust)
        install_shipment(self.ship(1), self.store, self.site.owner.public.ed25519)
        self.config = self.site.folder / "device.toml"
        self.config.write_text(
            """
[device]
key = "dev-cam1.key"
trust = "trust.cbor"
owner = "owner.key.pub"
gateway = "gateway-main"
state = "dev-cam1"
[broker]
url = "mqtt://127.0.0.1:1"
[model]
path = "dev-cam1/models"
follow = "eye"
check_s = 1.0
[source]
kind = "simulated"
data = "digits"
rows = ROWS
height = 48
width = 64
[rounds]
take_part = false
[run]
status_s = 5.0
interval_s = 5.0
""".replace("ROWS", str(list(range(400))))
        )
        self.start()

    def start(self):
        link = self.world.broker.link()
        self.runtime = start_device(self.config, clock=lambda: self.site.now, link=link)
        self.world.devices["dev-cam1"] = self.runtime

    def ship(self, version, **options):
        return self.repository.ship(version, self.device, **options)

    def offer(self, version, **options):
        """What `edgepriv-gateway models add` and `models rollout` do."""
        now = self.site.now
        digest = self.models.add(self.ship(version, **options), name="", version="", actor="op", now=now)
        self.models.begin_rollout(digest, ONE_STAGE, actor="op", now=now)
        return digest

    def run(self, until, *, limit_s=60):
        end = time.monotonic() + limit_s
        while not until():
            assert time.monotonic() < end, (self.models.listed(self.site.now), self.runtime.counters)
            self.world.turn()
            time.sleep(0.002)

    def reported(self, digest):
        self.run(lambda: self.models.rollout_of(digest).reports)
        self.models.advance_rollouts(["dev-cam1"], self.site.now)
        return self.models.rollout_of(digest)

    def running(self):
        return self.runtime.stages.keeper.updates._store().report()["version"]

    def close(self):
        self.world.close()


@pytest.fixture
def fleet(tmp_path):
    made = Fleet(tmp_path)
    yield made
    made.close()


def row(fleet, digest):
    (found,) = [m for m in fleet.models.listed(fleet.site.now) if m["digest"] == digest]
    return found


def test_versions_are_fetched_tested_switched_or_rolled_back_and_the_gateway_learns_why(fleet):
    digest = fleet.offer(2)
    assert (row(fleet, digest)["id"], row(fleet, digest)["version"]) == ("eye", "2")
    done = fleet.reported(digest)
    assert (done.state, done.reports) == (DONE, {"dev-cam1": ("good", "")})
    assert fleet.running() == 2
    assert "1 good, 0 failed" in row(fleet, digest)["stage"]
    before = fleet.runtime.counters["accepted"]
    fleet.run(lambda: fleet.runtime.counters["accepted"] > before)  # frames go on with the new model

    broken = fleet.reported(fleet.offer(3, labels=(fleet.maker.labels + 1) % 5))
    assert broken.state == HALTED
    assert "accuracy 0.000" in broken.reason
    unfit = fleet.offer(4, toml=TOML + 'task = "regress"\n')  # passes its self-test, does not fit this device
    halted = fleet.reported(unfit)
    assert halted.state == HALTED
    assert "release policy" in halted.reason
    assert "halted" in row(fleet, unfit)["stage"]
    assert fleet.running() == 2
    assert fleet.runtime.status(0.0).counters["models_refused"] == 2


def test_a_restart_goes_on_with_the_report_that_was_not_told(fleet):
    digest = fleet.offer(2)
    updates = fleet.runtime.stages.keeper.updates
    fleet.run(lambda: any(one.good for one in updates._tried.values()))
    assert not fleet.models.rollout_of(digest).reports
    fleet.runtime.finish()
    fleet.start()
    assert fleet.running() == 2
    assert fleet.reported(digest).reports == {"dev-cam1": ("good", "")}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"verdict": None}, "no verdict"),
        ({"verdict": "other bytes"}, "other bytes"),
        ({"verdict": "vicious"}, "'vicious'"),
        ({"verdict": "stranger"}, "not signed by a risk service"),
        ({"verdict": "old"}, "has expired"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_gateway_withholds_a_protected_model_without_a_verdict_on_the_bytes_that_will_run(fleet, options, reason):
    make = fleet.maker.verdict
    made = {
        None: lambda: None,
        "other bytes": lambda: make(2, model=bytes(32)),
        "vicious": lambda: make(2, "vicious"),
        "stranger": lambda: make(2, risk=Maker().risk),
        "old": lambda: make(2, expires=-1),
    }[options["verdict"]]
    digest = fleet.offer(2, verdict=made())
    assert reason in row(fleet, digest)["withheld"]
    assert fleet.models.withheld(digest[:16], "dev-cam1", "device", fleet.site.now)
    assert not fleet.models.offers("dev-cam1", "device", fleet.site.now)


def test_a_judged_protected_model_is_offered(fleet):
    digest = fleet.offer(2)
    assert row(fleet, digest)["withheld"] == ""
    assert row(fleet, digest)["verdict"] == "low leakage"
