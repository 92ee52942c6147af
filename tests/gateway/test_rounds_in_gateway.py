"""Federated rounds through the whole gateway: offers, credits, chunks, sum, new weights; killed anywhere."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future

import numpy as np
import pytest
from click.testing import CliRunner
from gateway_site import Device, Recipient, Site, exchange
from round_site import SIZE, finish, opened, turn, update

from edgepriv.mqtt import BrokerSettings
from edgepriv.risk.config import AuditSection, RiskConfig, RiskSection, RoundsSection
from edgepriv.risk.metrics import RiskMetrics
from edgepriv.risk.round_audit import RoundAnswer
from edgepriv.risk.round_watch import RoundWatch
from edgepriv.wire.messages import Fetch, Query, Reply, RoundMessage
from edgepriv.wire.rounds import read_step
from edgepriv.wire.update import decode_update, encode_update
from gateway.cli_rounds import rounds
from gateway.round_audits import leakage, lines


@pytest.fixture
def site(tmp_path):
    rounds = {"quorum": 2, "clip": 1000.0, "deadline_s": 60.0, "fraction_bits": 10, "resend_s": 1.0, "max_weight": 10}
    made = Site(tmp_path, rounds=rounds)
    weights = tmp_path / "w.bin"
    weights.write_bytes(encode_update({"w": np.full(SIZE, 0.5, np.float32)}))
    made.weights = weights
    yield made
    made.close()


def test_a_round_ends_with_the_weighted_mean_and_devices_fetch_it(site):
    gateway, devices = site.gateway(), [Device(site, n) for n in site.devices]
    number = opened(site, gateway, devices)
    announced = [m for m in devices[0].other if isinstance(m, RoundMessage)]
    assert read_step(announced[0], up=False).tensors == (["w", [SIZE]],)
    offers = [update(devices[0], 1.0, number, 1)[1], update(devices[1], 3.0, number, 3)[1]]
    record = finish(site, gateway, devices, offers)
    assert (record["outcome"], record["participants"]) == ("done", ["dev-cam1", "dev-cam2"])
    assert {d.acks[o.digest].outcome for d, o in zip(devices, offers, strict=True)} == {"stored"}
    exchange(gateway, devices[0], devices[0].seal(Fetch(record["after"][:16], 0, 64, 4096)))
    chunks = devices[0].objects[record["after"][:16]]
    raw = b"".join(chunks[i] for i in range(len(chunks)))
    assert hashlib.sha256(raw).digest() == record["after"]
    assert np.array_equal(decode_update(raw, max_bytes=1 << 20).tensors["w"], np.full(SIZE, 0.5 + 2.5, np.float32))
    assert list(gateway.store.blobs.iterdir()) == []
    assert gateway.rounds.start({}, site.now) == number + 1
    assert gateway.rounds.head()["digest"] == record["after"]


@pytest.mark.parametrize("kill_after", [1, 2, 4, 7, 9, 12])
def test_a_gateway_that_is_killed_anywhere_in_a_round_ends_it_with_the_same_sum(site, kill_after):
    gateway, devices = site.gateway(), [Device(site, n) for n in site.devices]
    number = opened(site, gateway, devices)
    offers = [update(devices[0], 1.0, number)[1], update(devices[1], 3.0, number)[1]]
    for index in range(kill_after):
        turn(gateway, devices, *([d.seal(o) for d, o in zip(devices, offers, strict=True)] if index == 0 else []))
        site.now += 0.6
    again = site.gateway()
    again.store.sweep()
    record = finish(site, again, devices, offers)
    assert record["outcome"] == "done"
    raw = again.rounds.conductor.model_path(record["after"]).read_bytes()
    assert np.array_equal(decode_update(raw, max_bytes=1 << 20).tensors["w"], np.full(SIZE, 2.5, np.float32))
    assert again.store.database.query("SELECT count(*) FROM uploads") == [(0,)]


def test_a_device_that_was_killed_offers_again_without_its_weight_and_still_counts_with_it(site):
    gateway, devices = site.gateway(), [Device(site, n) for n in site.devices]
    number = opened(site, gateway, devices)
    raw = encode_update({"w": np.full(SIZE, 3.0, np.float32)}, {"round": number, "examples": 3})
    forgetful = devices[1].offer(raw, "update", number, 1024)
    offers = [update(devices[0], 1.0, number, 1)[1], forgetful]
    record = finish(site, gateway, devices, offers)
    raw = gateway.rounds.conductor.model_path(record["after"]).read_bytes()
    assert np.array_equal(decode_update(raw, max_bytes=1 << 20).tensors["w"], np.full(SIZE, 0.5 + 2.5, np.float32))


def test_weights_of_rounds_long_past_are_deleted(site):
    gateway, devices = site.gateway(), [Device(site, n) for n in site.devices]
    number = opened(site, gateway, devices)
    for turns in range(6):
        finish(site, gateway, devices, [update(d, 1.0 + turns, number)[1] for d in devices])
        while gateway.rounds.running:
            site.now += 1
            turn(gateway, devices)
        record = gateway.rounds.table.records()[-1]
        number = gateway.rounds.start({}, site.now)
        gateway._release_replies()
        turn(gateway, devices)
    assert len(list(gateway.rounds.conductor.models.iterdir())) <= 5
    assert gateway.rounds.conductor.model_path(record["after"]).exists()


def test_newly_set_weights_are_the_base_of_the_next_round_and_not_the_last_result(site):
    gateway, devices = site.gateway(), [Device(site, n) for n in site.devices]
    number = opened(site, gateway, devices)
    offers = [update(d, 1.0, number)[1] for d in devices]
    finish(site, gateway, devices, offers)
    fresh = site.folder / "fresh.bin"
    fresh.write_bytes(encode_update({"w": np.zeros(SIZE, np.float32)}))
    head = gateway.rounds.set_weights(fresh, "m")
    gateway.rounds.start({}, site.now)
    assert gateway.rounds.head()["digest"] == head["digest"]


def test_hostile_updates_are_counted_rejections_and_the_round_goes_on(site):
    gateway, devices = site.gateway(), [Device(site, n) for n in site.devices]
    number = opened(site, gateway, devices)
    good = [update(d, 1.0, number)[1] for d in devices]
    bad = np.full(SIZE, np.nan, np.float32)
    raw = encode_update({"w": bad})
    poison = devices[0].offer(raw, "update", number, 1024, meta={"examples": 1})
    stranger = devices[1].offer(encode_update({"x": np.ones(3, np.float32)}), "update", 99, 1024, meta={"examples": 1})
    turn(gateway, devices, devices[1].seal(stranger))
    turn(gateway, devices)
    assert devices[1].acks[stranger.digest].outcome == "rejected"
    record = finish(site, gateway, devices, [poison, good[1]], turns=300)
    assert devices[0].acks[poison.digest].outcome == "rejected"
    assert record["outcome"] == "aborted"
    assert "quorum" in record["reason"]
    assert any("dev-cam1" in row[0] for row in record["rejected"])


def test_the_risk_service_sees_windows_and_reports_on_a_round(site):
    gateway, devices = site.gateway(), [Device(site, n) for n in site.devices]
    exchange(gateway, devices[0], devices[0].record(), devices[0].seal(devices[0].output(label=4)))
    lab = Recipient(site, "risk-lab")
    exchange(gateway, lab, lab.record(), lab.query("windows"))
    (window,) = lab.reply().body["windows"]
    assert (window["device"], window["class"], window["count"]) == ("dev-cam1", 4, 1)
    exchange(gateway, lab, lab.query("report", kind="round", subject="1", report={"leakage_bound": 0.25}))
    assert lab.reply().ok
    exchange(gateway, lab, lab.query("report", kind="weather", subject="1", report={}))
    assert not lab.reply().ok


def test_an_ended_round_waits_for_its_audit_and_keeps_the_report_with_its_record(site):
    gateway, devices = site.gateway(), [Device(site, n) for n in site.devices]
    number = opened(site, gateway, devices)
    finish(site, gateway, devices, [update(d, 1.0, number)[1] for d in devices])
    lab = Recipient(site, "risk-lab")
    exchange(gateway, lab, lab.record(), lab.query("rounds"))
    (told,) = lab.reply().body["rounds"]
    assert (told["round"], told["devices"], told["clip"], told["training"]) == (number, 2, 1000.0, {})
    assert "dev-cam1" not in str(told)
    exchange(gateway, lab, lab.seal(Fetch(told["before"][:16], 0, 64, 4096)))
    chunks = lab.objects[told["before"][:16]]
    assert hashlib.sha256(b"".join(chunks[i] for i in range(len(chunks)))).digest() == told["before"]
    attack = {"psnr_db": 31.0, "ssim": 0.9, "iip": 1.0}
    found = {"leakage_bound": 80.5, "leakage_floor": 11.4, "verdict": "leaks", "reason": "r", "attack": attack}
    exchange(gateway, lab, lab.query("report", kind="round", subject=str(number), report=found))
    exchange(gateway, lab, lab.query("rounds"))
    assert lab.reply().body["rounds"] == []
    shown = CliRunner().invoke(rounds, ["show", str(number), "--config", str(site.config_path), "--json"])
    leakage = json.loads(shown.output)["leakage"]
    assert {k: leakage[k] for k in found} == found
    assert leakage["sender"] == "risk-lab"
    text = CliRunner().invoke(rounds, ["show", str(number), "--config", str(site.config_path)]).output
    assert "leakage bound: 80.5 dB PSNR; the prior alone 11.4 dB" in text
    exchange(gateway, devices[0], devices[0].seal(Query(b"12345678", "rounds", {})))
    assert not next(m for m in devices[0].other if isinstance(m, Reply)).ok


class ByWire:
    """The risk service's session over the test's wire."""

    def __init__(self, gateway, lab):
        self.gateway, self.lab = gateway, lab

    def query(self, what, **args):
        exchange(self.gateway, self.lab, self.lab.query(what, **args))
        assert self.lab.reply().ok
        return self.lab.reply().body

    def fetch_object(self, ref, size, *, max_bytes):
        exchange(self.gateway, self.lab, self.lab.seal(Fetch(ref, 0, 64, 4096)))
        chunks = self.lab.objects[ref]
        return b"".join(chunks[i] for i in range(len(chunks)))


class Finds:
    """A worker that concludes at once, from the weights that it was given."""

    def submit(self, _function, task):
        assert decode_update(task.weights.read_bytes(), max_bytes=1 << 20).tensors["w"].shape == (SIZE,)
        future = Future()
        future.set_result(RoundAnswer({"verdict": "contained", "reason": "r", "leakage_bound": 12.5}, "<p>"))
        return future


def test_the_risk_services_own_step_audits_what_the_gateway_tells_and_leaves_its_report(site):
    gateway, devices = site.gateway(), [Device(site, n) for n in site.devices]
    number = opened(site, gateway, devices)
    finish(site, gateway, devices, [update(d, 1.0, number)[1] for d in devices])
    lab = Recipient(site, "risk-lab")
    exchange(gateway, lab, lab.record())
    config = RiskConfig(
        RiskSection(site.folder, site.folder, site.folder, "gateway-main", site.folder / "risk"),
        BrokerSettings("mqtt://127.0.0.1:1"), AuditSection("digits"), rounds=RoundsSection("digits", "cnn-bn"),
    )  # fmt: skip
    watch = RoundWatch(config, Finds(), RiskMetrics())
    for _ in range(3):
        watch.step(ByWire(gateway, lab))
    kept = leakage(gateway.store.database, number)
    assert (kept["leakage_bound"], kept["sender"]) == (12.5, "risk-lab")
    assert lines(kept)[0] == "leakage: contained: r"
    assert lines(None)[0].startswith("leakage: not audited")
    assert "because" in lines({"error": "because"})[0]
