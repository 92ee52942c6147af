"""A newer trust list comes by way of the gateway, which can deliver it and can neither make nor change one."""

from __future__ import annotations

import dataclasses
import hashlib
import os

import pytest
from device_site import classifier, device_config
from gateway_site import Broker, GatewayProcess
from patience import wait_for

from edgepriv.device.config import RunConfig
from edgepriv.device.start import assemble
from edgepriv.errors import TrustError
from edgepriv.keys import Identity
from edgepriv.trust_file import TrustFile
from edgepriv.wire.trust import sign_trust


def own_copy(site):
    """The device's trust list is a file of its own: what the operator once copied to it."""
    copy = site.folder / "device-trust.cbor"
    copy.write_bytes((site.folder / "trust.cbor").read_bytes())
    return dataclasses.replace(device_config(site, "dev-cam1", site.folder).device, trust=copy)


def started(world, **run):
    run = RunConfig(frames=20, status_s=1.0, **run)
    return world.device(device=own_copy(world.site), run=run)


def test_a_device_adopts_the_owners_newer_list_and_seals_to_its_new_recipient(world):
    device = started(world, interval_s=0.5)
    world.run(until=lambda: device.counters["captured"] >= 4)
    assert device.status(0).trust_version == 1
    before = device.stages.sealer.epoch_digest
    world.site.policy = {"*": {"recipients": ["op-bob"]}}
    world.site.write_trust()
    world.run()
    assert device.status(0).trust_version == 2
    assert device.stages.trust.counters == {"trust_adopted": 1, "trust_refused": 0}
    assert device.stages.sealer.epoch_digest != before
    rows = world.gateway.store.database.query("SELECT count(DISTINCT epoch) FROM frames")
    assert rows[0][0] == 2


def test_a_device_keeps_the_received_list_when_it_starts_again(world):
    device = started(world)
    world.site.write_trust()
    world.run(until=lambda: device.status(0).trust_version == 2)
    config = own_copy(world.site)
    config.trust.write_bytes(sign_trust(dataclasses.replace(world.site.trust_list(), version=1), world.site.owner))
    again = TrustFile(config.trust, config.owner, config.state / "trust-version", clock=lambda: world.site.now)
    assert again.current().version == 2


def test_the_learner_checks_its_next_round_against_the_new_list(world, tmp_path):
    from edgepriv.device.config import RoundsConfig

    device = world.device(device=own_copy(world.site), run=RunConfig(status_s=1.0), rounds=RoundsConfig(min_cohort=2))
    world.site.keys["dev-new"] = Identity.new("device", "new")
    world.site.write_trust()
    world.run(until=lambda: device.status(0).trust_version == 2)
    assert device.stages.learner.participant.trust.party("dev-new").name == "dev-new"


FORGERIES = {
    "another owner's": lambda site: sign_trust(
        dataclasses.replace(site.trust_list(), version=9), Identity.new("owner", "owner")
    ),
    "one changed byte": lambda site: _changed(
        sign_trust(dataclasses.replace(site.trust_list(), version=9), site.owner)
    ),
    "rolled back": lambda site: sign_trust(dataclasses.replace(site.trust_list(), version=1), site.owner),
    "expired": lambda site: sign_trust(
        dataclasses.replace(site.trust_list(), version=9, expires=int(site.now) - 1), site.owner
    ),
    "rubbish": lambda _site: b"\xff" * 400,
}


def _changed(raw):
    return raw[:60] + bytes([raw[60] ^ 1]) + raw[61:]


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_list_that_a_lying_gateway_makes_up_is_refused_and_the_old_one_stays(world, kind):
    world.site.write_trust()
    device = started(world)
    world.run(until=lambda: device.stages.publisher.epoch_known(device.stages.sealer.epoch_digest))
    forged = FORGERIES[kind](world.site)
    roster = world.gateway.roster
    roster.raw, roster.trust = forged, dataclasses.replace(roster.trust, version=9)
    world.run(turns=4000, until=lambda: device.stages.trust.counters["trust_refused"] == 1)
    assert device.status(0).trust_version == 2
    fetched = world.gateway.totals["fetch_served"]
    world.run()
    for _ in range(200):  # ten seconds of further notices: the same rubbish is not fetched again
        world.turn()
    assert world.gateway.totals["fetch_served"] == fetched
    assert device.stages.trust.counters == {"trust_adopted": 0, "trust_refused": 1}


@pytest.mark.parametrize(
    "detail",
    [
        {},
        {"version": "9", "digest": bytes(32), "size": 10},
        {"version": 9, "digest": b"short", "size": 10},
        {"version": 9, "digest": bytes(32), "size": 5 << 20},
        {"version": 9, "digest": bytes(32), "size": 0},
    ],
)
def test_a_notice_of_a_wrong_form_is_counted_and_changes_nothing(world, detail):
    from edgepriv.wire.messages import Notice

    device = started(world)
    world.run(until=lambda: device.stages.publisher.epoch_known(device.stages.sealer.epoch_digest))
    world.gateway.downlink.put("dev-cam1", Notice("trust-list", "", detail))
    world.run()
    assert device.counters["down_malformed"] == 1
    assert device.status(0).trust_version == 1


def test_adopting_needs_a_higher_version_and_the_operators_newer_file_wins_over_a_received_one(site, tmp_path):
    copy = own_copy(site).trust
    trust = TrustFile(copy, site.folder / "owner.key.pub", tmp_path / "seen", clock=lambda: site.now)
    first = copy.read_bytes()
    with pytest.raises(TrustError, match="not newer"):
        trust.adopt(first)
    site.write_trust()
    assert trust.adopt((site.folder / "trust.cbor").read_bytes()).version == 2
    with pytest.raises(TrustError, match="older than 2"):
        trust.adopt(first)
    with pytest.raises(TrustError, match="too large"):
        trust.adopt(bytes((4 << 20) + 1))
    site.write_trust()
    copy.write_bytes((site.folder / "trust.cbor").read_bytes())
    assert trust.current().version == 3
    (tmp_path / "seen.cbor").write_bytes(b"damaged on the disk")
    assert trust.current().version == 3


def test_a_deleted_received_list_does_not_bring_the_older_one_back(site, tmp_path):
    copy, owner, seen = own_copy(site).trust, site.folder / "owner.key.pub", tmp_path / "seen"
    trust = TrustFile(copy, owner, seen, clock=lambda: site.now)
    trust.current()
    site.write_trust()
    trust.adopt((site.folder / "trust.cbor").read_bytes())
    (tmp_path / "seen.cbor").unlink()
    os.utime(copy)
    assert trust.current().version == 2
    assert "older than 2" in trust.error
    with pytest.raises(TrustError, match="older than 2"):
        TrustFile(copy, owner, seen, clock=lambda: site.now).current()


def test_the_version_before_this_one_reads_the_number_alone_and_may_be_gone_back_to(site, tmp_path):
    copy, owner, seen = own_copy(site).trust, site.folder / "owner.key.pub", tmp_path / "seen"
    trust = TrustFile(copy, owner, seen, clock=lambda: site.now)
    trust.current()
    site.write_trust()
    trust.adopt((site.folder / "trust.cbor").read_bytes())
    assert int(seen.read_text()) == 2
    seen.write_text("3")  # the older program saw a newer list, and knows no digest
    site.write_trust()
    copy.write_bytes((site.folder / "trust.cbor").read_bytes())
    assert TrustFile(copy, owner, seen, clock=lambda: site.now).current().version == 3


@pytest.mark.system
def test_a_revocation_reaches_a_running_device_over_a_real_broker(site, tmp_path):
    broker, daemon = Broker(tmp_path, site.port), GatewayProcess(site)
    config = device_config(
        site, "dev-cam1", classifier(tmp_path / "model"), f"mqtt://127.0.0.1:{site.port}",
        device=own_copy(site), run=RunConfig(frames=0, interval_s=0.1, status_s=0.5),
    )  # fmt: skip
    from time import time

    device = assemble(config, folder=tmp_path, clock=time)

    def stepped():
        device.step()
        return True

    try:
        wait_for(lambda: stepped() and device.counters["acked_stored"] > 2, 20, "nothing was acknowledged")
        site.revoked = ("op-bob",)
        site.write_trust()
        wait_for(lambda: stepped() and device.status(time()).trust_version == 2, 20, "the list did not arrive")
        received = (config.device.state / "trust-version.cbor").read_bytes()
        assert hashlib.sha256(received).digest() == site.trust.digest
        assert daemon.stop() == 0
    finally:
        device.finish()
        broker.close()
        if daemon.process.poll() is None:
            daemon.kill()
