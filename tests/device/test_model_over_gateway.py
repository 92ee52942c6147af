"""A new model reaches a running device through the gateway, which learns how it went; no unjudged one is offered."""

import time

import pytest
from device_site import World
from gateway_site import Site
from model_site import TOML, Maker, Repository

from edgepriv.device.model_keeper import CHECK_S
from edgepriv.device.models import ModelStore
from edgepriv.device.packing import Limits
from edgepriv.device.protected import trust_of
from edgepriv.device.shipments import install_shipment, outcome
from edgepriv.device.start import start_device
from edgepriv.device.verdicts import Release
from edgepriv.errors import AuthenticationError, EdgeprivError
from edgepriv.keys import Identity
from edgepriv.selective_encryption.restore import open_with_key
from gateway.rollout import DONE, HALTED, Plan

ONE_STAGE = Plan(stages=(100,), settle_s=0.0, min_good=1, min_failures=1)


CONFIG = """
[device]
key = "NAME.key"
trust = "trust.cbor"
owner = "owner.key.pub"
gateway = "gateway-main"
state = "NAME"
[broker]
url = "mqtt://127.0.0.1:1"
[model]
path = "NAME/models"
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
interval_s = PACE
"""


class InThisProcess:
    """Installs as `edgepriv model install` does, without a process: for many devices."""

    def __init__(self, store, owner):
        self.store, self.owner, self.report = store, owner, None

    def start(self, shipment):
        store, error, measured = self.store(), None, None
        try:
            measured = install_shipment(shipment, store, self.owner)
        except EdgeprivError as caught:
            error = caught
        self.report = outcome(store, error, measured)

    def poll(self):
        return self.report


class Fleet:
    """Devices that follow the model ``eye``, their gateway, and the owner who ships versions."""

    def __init__(self, folder, count=1, *, at_gateway=True):
        names = [f"cam{n}" for n in range(1, count + 1)]
        self.site = Site(folder / "site", devices=names, models={"require_verdict": at_gateway})
        self.site.policy["*"]["require_verdict"] = True
        self.site.write_trust()
        self.owner = self.site.owner.public.ed25519
        self.maker = Maker(self.site.owner, self.site.keys["risk-lab"], now=int(time.time()))
        self.repository = Repository(self.maker, folder / "owner")
        self.world = World(self.site, None)
        self.models = self.world.gateway.models
        first = self.ship(1)
        for name in self.site.devices:
            install_shipment(first, self.store(name), self.owner)
            (self.site.folder / f"{name}.toml").write_text(
                CONFIG.replace("NAME", name)
                .replace("ROWS", str(list(range(400))))
                .replace("PACE", "5.0" if count == 1 else "1e6")
            )
            self.start(name)
        self.runtime = self.world.devices["dev-cam1"]

    def store(self, name):
        trust = trust_of(self.site.trust, self.owner, {"require_verdict": True}, release=Release("argmax"))
        return ModelStore(self.site.folder / name / "models", self.site.keys[name], trust)

    def start(self, name="dev-cam1"):
        link = self.world.broker.link()
        made = start_device(self.site.folder / f"{name}.toml", clock=lambda: self.site.now, link=link)
        if len(self.site.devices) > 1:
            made.stages.keeper.updates.installer = InThisProcess(lambda: self.store(name), self.owner)
        self.world.devices[name] = made
        self.runtime = made

    def ship(self, version, **options):
        return self.repository.ship(version, *(self.site.keys[name] for name in self.site.devices), **options)

    def offer(self, version, *, plan=ONE_STAGE, altered=lambda raw: raw, **options):
        """What `edgepriv-gateway models add` and `models rollout` do."""
        now, shipment = self.site.now, self.ship(version, **options)
        shipment.write_bytes(altered(shipment.read_bytes()))
        digest = self.models.add(shipment, name="", version="", actor="op", now=now)
        self.models.begin_rollout(digest, plan, actor="op", now=now)
        return digest

    def run(self, until, *, limit_s=60):
        end = time.monotonic() + limit_s
        while not until():
            assert time.monotonic() < end, (self.models.listed(self.site.now), self.runtime.counters)
            if len(self.site.devices) == 1:
                self.world.turn()
                time.sleep(0.002)  # a real process installs meanwhile
            else:
                self.world.turn(0.5)

    def reported(self, digest):
        count = len(self.site.devices)
        self.run(lambda: len(self.models.rollout_of(digest).reports) == count)
        self.models.advance_rollouts(self.site.devices, self.site.now)
        return self.models.rollout_of(digest)

    def running(self, name="dev-cam1"):
        return self.store(name).report()["version"]

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
    fleet.runtime.stages.spool.commit()
    disk = [path for path in (fleet.site.folder / "dev-cam1").rglob("*") if path.is_file()]
    assert {"spool", "models"} <= {path.relative_to(fleet.site.folder / "dev-cam1").parts[0] for path in disk}
    content = b"".join(path.read_bytes() for path in disk)
    assert len(fleet.maker.hidden_rows()) > 20
    assert not any(weights in content for weights in fleet.maker.hidden_rows())


def test_a_restart_goes_on_with_the_report_that_was_not_told(fleet):
    digest = fleet.offer(2)
    updates = fleet.runtime.stages.keeper.updates
    fleet.run(lambda: any(one.good for one in updates._tried.values()))
    assert not fleet.models.rollout_of(digest).reports
    fleet.runtime.finish()
    fleet.start()
    assert fleet.running() == 2
    assert fleet.reported(digest).reports == {"dev-cam1": ("good", "")}


def test_a_revoked_model_is_replaced_by_the_last_good_one_or_closed_while_the_device_runs(fleet):
    fleet.reported(fleet.offer(2))
    keeper = fleet.runtime.stages.keeper
    hour = [0.0]
    keeper._monotonic = lambda: time.monotonic() + hour[0]

    def revoke(*names):
        fleet.site.revoked = names
        fleet.site.write_trust()
        hour[0] += CHECK_S + 1
        fleet.world.turn()

    good, current = fleet.store("dev-cam1").state.last_good, fleet.store("dev-cam1").state.current
    revoke(good)
    assert (fleet.running(), keeper.inferer.closed) == (2, False)
    revoke(current)
    assert (fleet.store("dev-cam1").state.current, keeper.inferer.closed) == ("", True)
    assert any("revoked" in one.reason for one in keeper.updates._tried.values())


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


def test_a_bad_bundle_is_refused_on_each_of_twenty_devices_with_the_reason_at_the_gateway(tmp_path):
    fleet = Fleet(tmp_path, 20, at_gateway=False)
    everyone = set(fleet.site.devices)
    plan = Plan(stages=(100,), settle_s=0.0, min_good=1, min_failures=20)

    def refused(reason, version, **options):
        found = fleet.reported(fleet.offer(version, plan=plan, **options))
        assert found.state == HALTED
        assert set(found.reports) == everyone
        assert all(state == "bad" and reason in why for state, why in found.reports.values()), found.reports
        assert {fleet.running(name) for name in everyone} == {1 if version == 2 else 3}

    refused("delivery metadata is refused", 2, altered=lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    refused("no verdict", 2, verdict=None)
    refused("not a pinned model issuer", 2, issuer=Identity.new("owner", "stranger"))
    refused("ms is over", 2, limits=Limits(max_latency_s=1e-9))
    refused("accuracy 0.000", 2, labels=(fleet.maker.labels + 1) % 5)
    done = fleet.reported(fleet.offer(3, plan=plan))
    assert (done.state, {state for state, _ in done.reports.values()}) == (DONE, {"good"})
    refused("is older than 3", 1, limits=Limits(min_accuracy=0.5))
    fleet.close()


def test_the_gateway_takes_no_model_of_a_stranger(fleet, tmp_path):
    strange = Repository(Maker(), tmp_path / "strange").ship(2)
    with pytest.raises(AuthenticationError, match="not a trusted model issuer"):
        fleet.models.add(strange, name="", version="", actor="op", now=fleet.site.now)


def test_the_verdict_on_the_plain_bytes_goes_into_the_protected_models_shipment(fleet, tmp_path):
    bundle = fleet.maker.bundle(2)
    opened = open_with_key(bundle.decoded, bundle.key, 1, bundle.files)
    plain, now = tmp_path / "level-1.onnx", fleet.site.now
    plain.write_bytes(opened.model_bytes())
    digest = fleet.models.add(plain, name="eye-level-1", version="2", actor="op", now=now, only_judge=True)
    assert digest == bundle.decoded.levels[0].digest
    fleet.models.take_verdict(fleet.maker.verdict(2), "risk-lab", now)
    assert row(fleet, digest)["withheld"] == "only to be judged"
    assert not [m for m in fleet.models.offers("dev-cam1", "device", now) if m["digest"] == digest]
    assert [m for m in fleet.models.offers("risk-lab", "risk", now) if m["digest"] == digest]
    fleet.site.cli("models", "verdict", "eye-level-1", "--out", str(tmp_path / "verdict"))
    shipped = fleet.offer(2, verdict=(tmp_path / "verdict").read_bytes())
    assert fleet.reported(shipped).state == DONE
    assert "no verdict yet" in fleet.site.cli("models", "verdict", "eye", "--out", "x", check=False).stderr
