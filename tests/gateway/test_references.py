"""FLTrust's reference update: signed by whom the gateway is told to believe, for the weights in force, or refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gateway_site import Device, Recipient, Site, exchange

from edgepriv.errors import AuthenticationError, ConfigError, DataError, RefusedError, TrustError, WireError
from edgepriv.wire.reference import Reference, read_reference, sign_reference
from edgepriv.wire.update import encode_update

ROOT = Path(__file__).resolve().parents[2]
SIZE = 200
BASE = encode_update({"w": np.zeros(SIZE, np.float32)})
UPDATE = encode_update({"w": np.ones(SIZE, np.float32)})


def _digest(raw):
    return hashlib.sha256(raw).digest()


def _statement(site, sender, *, base=BASE, update=UPDATE, hours=1.0, key=None):
    reference = Reference(sender, _digest(base), _digest(update), site.now, site.now + 3600 * hours)
    return sign_reference(reference, site.keys[key or sender])


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path, rounds={"rule": "fltrust", "quorum": 1, "references": ["risk-lab", "dev-cam2"]})
    (tmp_path / "base").write_bytes(BASE)
    made.running = made.gateway()
    made.running.rounds.set_weights(tmp_path / "base", "m")
    yield made
    made.close()


def test_no_round_with_fltrust_starts_without_a_signed_reference_for_its_weights(site):
    rounds = site.running.rounds
    exchange(site.running, device := Device(site), device.record())
    site.now += 1
    site.running.step()
    with pytest.raises(RefusedError, match="needs a signed reference"):
        rounds.start({}, site.now)
    rounds.references.add(_statement(site, "risk-lab"), UPDATE, site.now)
    number = rounds.start({}, site.now)
    plan = rounds.conductor.rounds[number].plan
    assert (plan.reference, plan.reference_by) == (_digest(UPDATE), "risk-lab")


def test_a_round_does_not_start_on_the_reference_of_a_sender_who_was_revoked_since(site):
    exchange(site.running, device := Device(site), device.record())
    site.running.rounds.references.add(_statement(site, "risk-lab"), UPDATE, site.now)
    site.revoked = ("risk-lab",)
    site.write_trust()
    site.now += 1
    site.running.step()
    with pytest.raises(RefusedError, match="no longer good"):
        site.running.rounds.start({}, site.now)


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"sender": "dev-cam1"}, TrustError, "may not make references"),
        ({"sender": "op-alice"}, TrustError, "op-alice"),
        ({"sender": "risk-lab", "key": "dev-cam1"}, AuthenticationError, "sign|key|verif|authentic"),
        ({"sender": "risk-lab", "base": UPDATE}, RefusedError, "other weights"),
        ({"sender": "risk-lab", "update": BASE}, DataError, "not the one that was signed"),
        ({"sender": "risk-lab", "hours": -1}, WireError, "no longer"),
    ],
)
def test_a_reference_is_refused(site, changes, error, why):
    with pytest.raises(error, match=why):
        site.running.rounds.references.add(_statement(site, **changes), UPDATE, site.now)


def test_a_reference_of_another_model_is_refused(site):
    other = encode_update({"x": np.ones(3, np.float32)})
    with pytest.raises(DataError, match="does not touch"):
        site.running.rounds.references.add(_statement(site, "risk-lab", update=other), other, site.now)


def test_a_canary_device_learns_which_weights_are_in_force_and_sends_its_reference_over_the_link(site):
    canary = Device(site, "dev-cam2")
    lab = Recipient(site, "risk-lab")
    exchange(site.running, lab, lab.record(), lab.query("reference"))
    assert lab.reply().body["digest"] == _digest(BASE)
    query = {"statement": _statement(site, "dev-cam2"), "update": UPDATE}
    exchange(site.running, lab, lab.query("reference", **query))
    assert "another party" in lab.reply().body["error"]
    canary.query = lambda what, **args: Recipient.query(canary, what, **args)
    exchange(site.running, canary, canary.record(), canary.query("reference", **query))
    assert canary.other[-1].ok
    assert site.running.rounds.references.current(_digest(BASE), site.now).sender == "dev-cam2"


def test_any_risk_service_may_make_references_where_nobody_is_named(site):
    statement = _statement(site, "risk-lab")
    assert read_reference(statement, site.trust, senders=(), now=site.now).sender == "risk-lab"
    with pytest.raises(TrustError):
        read_reference(_statement(site, "dev-cam2"), site.trust, senders=(), now=site.now)


@pytest.mark.parametrize("raw", [b"", b"\x80", b"\x82\x40\x40", b"\xff" * 40])
def test_any_other_bytes_are_one_error(site, raw):
    with pytest.raises(WireError):
        read_reference(raw, site.trust, senders=(), now=site.now)


def test_names_that_cannot_sign_are_a_configuration_error(tmp_path):
    made = Site(tmp_path, rounds={"references": ["alice"]})
    with pytest.raises(ConfigError, match="references"):
        made.gateway()


def test_the_command_signs_a_reference_that_the_gateway_takes(site, tmp_path):
    (tmp_path / "update").write_bytes(UPDATE)
    arguments = ["--update", str(tmp_path / "update"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "s")]
    command = [sys.executable, "-m", "edgepriv", "federated", "reference", *arguments, "--json"]
    done = subprocess.run(
        [*command, "--key", str(tmp_path / "risk-lab.key")], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert json.loads(done.stdout)["sender"] == "risk-lab"
    taken = site.running.rounds.references.add_files(tmp_path / "update", tmp_path / "s", site.now)
    assert taken["sender"] == "risk-lab"
