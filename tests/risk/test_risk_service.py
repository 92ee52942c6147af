"""The risk service: what it believes of a gateway, what it keeps over a kill, and what it signs."""

import hashlib
import json
import time
from concurrent.futures import Future

import numpy as np
import pytest
from click.testing import CliRunner

from edgepriv.cli.risk import risk
from edgepriv.datasets import load
from edgepriv.device.indicator import OutputIndicator
from edgepriv.device.release import parse_policy
from edgepriv.errors import ConfigError, EdgeprivError, RiskThresholdError, TemporaryError
from edgepriv.keys import Identity
from edgepriv.mqtt import BrokerSettings
from edgepriv.risk.config import (
    AuditSection,
    DriftSection,
    HttpSection,
    RiskConfig,
    RiskSection,
    load_config,
)
from edgepriv.risk.drift import DriftWatch, stability_index
from edgepriv.risk.jobs import MAX_ATTEMPTS, JobQueue
from edgepriv.risk.pages import answer
from edgepriv.risk.service import RiskService
from edgepriv.risk.signed_verdict import VERDICT_USE, held_policies
from edgepriv.wire import cbor

KEY = Identity.new("risk", "lab")


class InThread:
    """An executor that runs at once, or never."""

    def __init__(self, *, stuck=False):
        self.stuck = stuck

    def submit(self, fn, /, *args):
        future = Future()
        if not self.stuck:
            future.set_result(fn(*args))
        return future

    def shutdown(self, wait=True, *, cancel_futures=False):
        pass


class Offering:
    """A gateway with models: honest unless told otherwise."""

    def __init__(self, models, *, windows=None):
        self.models, self.windows, self.verdicts, self.down = dict(models), windows, {}, False
        self.lie = None

    def query(self, what, **args):
        if self.down:
            raise TemporaryError("the gateway did not answer")
        if what == "models":
            rows = [
                {
                    "digest": hashlib.sha256(raw).digest(),
                    "id": name,
                    "size": len(raw),
                    "verdict_bytes": b"",
                    "expires": 0,
                }
                for name, raw in self.models.items()
            ]
            for row in rows:
                if held := self.verdicts.get(row["digest"]):
                    body = cbor.decode_map(cbor.decode(held, max_bytes=65536)[0], max_bytes=65536)
                    row |= {"verdict_bytes": held, "expires": body["expires"]}
            return {"models": [*rows, {"digest": b"short"}, "nonsense"]}
        if what == "verdict":
            body = cbor.decode_map(cbor.decode(args["verdict"], max_bytes=65536)[0], max_bytes=65536)
            self.verdicts[body["model"]] = args["verdict"]
            return {"accepted": True}
        if self.windows is None:
            raise EdgeprivError("the gateway refuses: a risk cannot ask for 'windows'")
        return {"windows": self.windows}

    def fetch_object(self, ref, size, *, max_bytes):
        raw = next(r for r in self.models.values() if hashlib.sha256(r).digest()[:16] == ref)
        return self.lie or raw

    def close(self):
        pass


@pytest.fixture
def make(tmp_path):
    def build(gateway, *, stuck=False, audit=None, clock=time.time):
        data = load("digits", split="all")
        probe = tmp_path / "probe" / "release.npz"
        probe.parent.mkdir(exist_ok=True)
        np.savez(probe, images=data.images[:700], labels=data.labels[:700])
        settings = {"policies": ("argmax",), "references": 3, "auditors": "ridge", **(audit or {})}
        config = RiskConfig(
            RiskSection(tmp_path / "k", tmp_path / "o", tmp_path / "t", "gateway-main", tmp_path / "state"),
            BrokerSettings("mqtt://127.0.0.1:1"),
            AuditSection(str(probe), **settings),
            DriftSection(every_s=0.0),
        )
        pipelines = [parse_policy(spec) for spec in config.audit.policies]
        return RiskService(config, lambda: gateway, KEY.sign, pipelines, InThread(stuck=stuck), clock=clock)

    return build


@pytest.fixture
def files(digit_models):
    folder, _ = digit_models
    return {name: (folder / f"{name}.onnx").read_bytes() for name in ("honest", "vicious")}


def body_of(raw):
    body, signature = cbor.decode(raw, max_bytes=65536)
    KEY.public.verify(VERDICT_USE, body, signature)
    return cbor.decode_map(body, max_bytes=65536)


def run(service, steps=4):
    for _ in range(steps):
        service.step()


def test_offered_models_are_audited_once_and_get_signed_verdicts(make, files):
    gateway = Offering(files)
    service = make(gateway)
    run(service, 6)
    found = {name: body_of(gateway.verdicts[hashlib.sha256(raw).digest()]) for name, raw in files.items()}
    assert found["vicious"]["verdict"] == "vicious"
    assert found["honest"]["verdict"] == "low leakage"
    assert found["honest"]["policy"] == "argmax"
    assert found["honest"]["expires"] > time.time() + 29 * 86400
    assert {job.attempts for job in service.jobs.listed()} == {1}
    digest = hashlib.sha256(files["vicious"]).hexdigest()
    assert json.loads((service.folder / "reports" / f"{digest}.json").read_text())["verdict"] == "vicious"
    indicator = OutputIndicator.from_bytes(answer(service, f"/reports/{digest}.indicator.json")[2])
    assert len(indicator.distances(np.zeros((3, 10)))) == 3
    status, kind, page = answer(service, f"/reports/{digest}.html")
    assert (status, kind.split(";")[0]) == (200, "text/html")
    assert b"vicious" in page
    assert answer(service, f"/reports/{digest}.argmax.png")[2].startswith(b"\x89PNG")
    assert b'edgepriv_risk_audits_total{verdict="vicious"} 1.0' in answer(service, "/metrics")[2]
    assert answer(service, "/reports/../../jobs.db")[0] == 404
    assert b'edgepriv_risk_rejected_total{kind="offer"}' in answer(service, "/metrics")[2]


def test_bytes_that_are_not_what_was_offered_are_never_audited(make, files):
    gateway = Offering({"honest": files["honest"]})
    gateway.lie = files["vicious"]
    service = make(gateway)
    run(service, MAX_ATTEMPTS + 2)
    (job,) = service.jobs.listed()
    assert job.state == "failed"
    assert "other bytes" in job.error
    assert not gateway.verdicts


def test_a_killed_audit_is_queued_again_and_a_model_that_kills_is_given_up(make, files):
    gateway = Offering({"honest": files["honest"]})
    for attempt in range(1, MAX_ATTEMPTS + 1):
        service = make(gateway, stuck=True)
        service.step()
        (job,) = service.jobs.listed()
        assert (job.state, job.attempts) == ("running", attempt)
        service.jobs.close()
    service = make(gateway)
    run(service)
    assert service.jobs.listed()[0].state == "failed"


def test_an_interrupted_audit_ends_after_a_restart(make, files):
    gateway = Offering({"honest": files["honest"]})
    make(gateway, stuck=True).step()
    service = make(gateway)
    run(service)
    assert service.jobs.listed()[0].state == "done"
    assert gateway.verdicts


def test_a_gateway_that_is_away_is_tried_again(make, files):
    gateway = Offering({"honest": files["honest"]})
    gateway.down = True
    service = make(gateway)
    run(service, 2)
    gateway.down = False
    run(service)
    assert gateway.verdicts


def test_a_verdict_is_signed_again_before_it_ends_without_another_audit(make, files):
    now = [1_000_000.0]
    gateway = Offering({"honest": files["honest"]})
    service = make(gateway, clock=lambda: now[0])
    run(service)
    (first,) = gateway.verdicts.values()
    now[0] += 20 * 86400
    run(service)
    assert next(iter(gateway.verdicts.values())) == first
    now[0] += 5 * 86400
    run(service)
    (second,) = gateway.verdicts.values()
    assert body_of(second)["serial"] > body_of(first)["serial"]
    assert body_of(second)["expires"] > body_of(first)["expires"]
    assert service.jobs.listed()[0].attempts == 1


def test_a_file_that_is_no_model_fails_for_good_and_gets_no_verdict(make):
    gateway = Offering({"junk": b"not a model" * 100})
    service = make(gateway)
    run(service)
    (job,) = service.jobs.listed()
    assert (job.state, job.attempts) == ("failed", 1)
    assert not gateway.verdicts


def test_the_queue_is_bounded_and_counts_what_it_refuses(tmp_path):
    queue = JobQueue(tmp_path / "jobs.db", max_jobs=3)
    taken = [queue.add(bytes([i]) * 32, "m", 10, 0.0) for i in range(5)]
    assert taken == [True, True, True, False, False]
    assert queue.refused == 2
    serials = [queue.next_serial(now) for now in (100.0, 50.0, 50.0)]
    assert serials == sorted(set(serials))


def test_outputs_that_leave_the_audited_behaviour_raise_an_alert_once(make, files):
    rows = [{"device": "dev-a", "model": "honest", "class": c, "start": 0, "count": 50} for c in range(10)]
    gateway = Offering({"honest": files["honest"]}, windows=rows)
    service = make(gateway)
    run(service)
    assert not service.alerts
    gateway.windows = [{**row, "count": 500 if row["class"] == 3 else 1} for row in rows]
    run(service)
    assert service.alerts["honest"].index > 0.25
    assert b"edgepriv_risk_drift_alerts_total 1.0" in answer(service, "/metrics")[2]
    gateway.windows = [{"device": 1}]
    run(service, 1)


def test_the_stability_index_is_zero_for_equal_shares_and_large_for_unseen_classes():
    assert stability_index([100, 200, 300], {0: 100, 1: 200, 2: 300}) < 0.01
    assert stability_index([10, 20, 30], {7: 600}) > 1
    watch = DriftWatch(min_outputs=100, threshold=0.25)
    watch.take([{"device": "d", "model": "m", "class": 0, "start": 0, "count": 60}] * 5)
    assert watch.judge("m", [10, 10]) is None  # the same window five times is one window


def test_policies_spelled_unsafe_are_not_what_a_verdict_holds_for():
    assert held_policies(["argmax", "unsafe_raw_logits"]) == ["argmax"]
    assert held_policies(["unsafe_raw_logits"]) == ["unsafe_raw_logits"]


def test_the_commands_list_and_gate(make, files, tmp_path):
    service = make(Offering(files))
    run(service, 6)
    service.jobs.close()
    config = tmp_path / "risk.toml"
    config.write_text(
        '[risk]\nidentity = "k"\nowner = "o"\ntrust = "t"\ngateway = "gateway-main"\nstate = "state"\n'
        '[broker]\nurl = "mqtt://127.0.0.1:1"\n[audit]\nprobe = "digits"\n'
    )
    listed = CliRunner().invoke(risk, ["list", "--config", str(config), "--json"])
    assert {m["verdict"] for m in json.loads(listed.stdout)["models"]} == {"vicious", "low leakage"}
    digests = {m["model"]: m["digest"] for m in json.loads(listed.stdout)["models"]}
    good = CliRunner().invoke(risk, ["show", "--config", str(config), digests["honest"][:16]])
    assert good.exit_code == 0, good.output
    bad = CliRunner().invoke(risk, ["show", "--config", str(config), digests["vicious"][:16]])
    assert isinstance(bad.exception, RiskThresholdError)


def test_a_wrong_configuration_is_named(tmp_path):
    path = tmp_path / "risk.toml"
    base = (
        '[risk]\nidentity = "k"\nowner = "o"\ntrust = "t"\ngateway = "g"\nstate = "s"\n[broker]\nurl = "mqtt://x"\n'
        '[audit]\nprobe = "digits"\n'
    )
    for line, words in (
        ('auditors = "magic"', "auditors"),
        ('executor = "cloud"', "executor"),
        ("workers = 0", "worker"),
    ):
        path.write_text(base + line)
        with pytest.raises(ConfigError, match=words):
            load_config(path)
    path.write_text(base)
    assert load_config(path).http == HttpSection()
