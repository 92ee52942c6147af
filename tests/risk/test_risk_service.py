"""The risk service: what it believes of a gateway, what it keeps over a kill, and what it signs."""

import hashlib
import json
import sqlite3
import time
from concurrent.futures import Future

import numpy as np
import pytest
from click.testing import CliRunner

from edgepriv.cli.risk import risk
from edgepriv.datasets import load
from edgepriv.device.indicator import OutputIndicator
from edgepriv.device.purify import OutputPurifier, PurifiedPolicy
from edgepriv.device.release import parse_policy
from edgepriv.errors import (
    ConfigError,
    EdgeprivError,
    MissingFileError,
    RiskThresholdError,
    TemporaryError,
    WireError,
)
from edgepriv.keys import Identity
from edgepriv.mqtt import BrokerSettings
from edgepriv.risk.audit_settings import purifier_digests
from edgepriv.risk.config import (
    AuditSection,
    DriftSection,
    HttpSection,
    RiskConfig,
    RiskSection,
    load_config,
)
from edgepriv.risk.drift import Audited, DriftWatch, stability_index
from edgepriv.risk.jobs import LONGEST_WAIT_S, MAX_DEATHS, MAX_INTERRUPTED, JobQueue
from edgepriv.risk.pages import answer
from edgepriv.risk.pool import WorkerDiedError
from edgepriv.risk.reconstruction.calibration import Calibration
from edgepriv.risk.service import RiskService
from edgepriv.risk.signed_verdict import VERDICT_USE, held_policies
from edgepriv.risk.worker import AuditAnswer
from edgepriv.wire import cbor

KEY = Identity.new("risk", "lab")


class InThread:
    """An executor that runs at once, or never."""

    def __init__(self, *, stuck=False, kills=(), says=None):
        self.stuck, self.kills, self.says, self.tasks = stuck, kills, says, []

    def submit(self, fn, /, *args):
        self.tasks.append(args[0])
        future = Future()
        if args[0].name in self.kills:
            future.set_exception(WorkerDiedError("the worker ended with code -9"))
        elif not self.stuck:
            future.set_result(self.says(args[0]) if self.says else fn(*args))
        return future

    def shutdown(self, wait=True, *, cancel_futures=False):
        pass


class Offering:
    """A gateway with models: honest unless told otherwise."""

    def __init__(self, models, *, windows=None):
        self.models, self.windows, self.verdicts, self.down = dict(models), windows, {}, False
        self.lie, self.refused, self.no_verdicts, self.by_digest = None, (), False, None

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
            if self.no_verdicts:
                raise EdgeprivError("the gateway refuses: a verdict of a model that is not here")
            body = cbor.decode_map(cbor.decode(args["verdict"], max_bytes=65536)[0], max_bytes=65536)
            self.verdicts[body["model"]] = args["verdict"]
            return {"accepted": True}
        if self.windows is None:
            raise EdgeprivError("the gateway refuses: a risk cannot ask for 'windows'")
        return {"windows": self.windows} | ({} if self.by_digest is None else {"models": self.by_digest})

    def fetch_object(self, ref, size, *, max_bytes):
        name, raw = next((n, r) for n, r in self.models.items() if hashlib.sha256(r).digest()[:16] == ref)
        if name in self.refused:
            raise WireError("the gateway refuses: withheld")
        return self.lie or raw

    def close(self):
        pass


def concluded(task):
    """An audit's answer without its work: what the service does with answers is looked at, not how they are found."""
    judged = {"output": ["", "logits"], "scale": [1 / 255], "mean": [0.0], "colour": "gray"}
    (purifier,) = set(purifier_digests(task.pipelines))
    report = {
        "sha256": hashlib.sha256(task.model.read_bytes()).hexdigest(), "verdict": "low leakage", "reason": "said so",
        "policies": [{"policy": pipeline.name} for pipeline in task.pipelines], "duration_s": 0.1,
        "judged": {**judged, "purifier": purifier.hex()},
    }  # fmt: skip
    return AuditAnswer(report)


@pytest.fixture
def make(tmp_path):
    def build(gateway, *, stuck=False, audit=None, clock=time.time, pool=None):
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
        if config.audit.purifier is not None:
            pipelines = [PurifiedPolicy(policy, OutputPurifier.load(config.audit.purifier)) for policy in pipelines]
        return RiskService(config, lambda: gateway, KEY.sign, pipelines, pool or InThread(stuck=stuck), clock=clock)

    return build


@pytest.fixture
def files(digit_models):
    folder, _ = digit_models
    return {name: (folder / f"{name}.onnx").read_bytes() for name in ("honest", "vicious")}


def body_of(raw):
    body, signature = cbor.decode(raw, max_bytes=65536)
    KEY.public.verify(VERDICT_USE, body, signature)
    return cbor.decode_map(body, max_bytes=65536)


def config_file(folder):
    config = folder / "risk.toml"
    config.write_text(
        '[risk]\nidentity = "k"\nowner = "o"\ntrust = "t"\ngateway = "gateway-main"\nstate = "state"\n'
        '[broker]\nurl = "mqtt://127.0.0.1:1"\n[audit]\nprobe = "digits"\n'
    )
    return config


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
    now = [1_000_000.0]
    service = make(gateway, clock=lambda: now[0])
    service.step()
    assert b'edgepriv_risk_rejected_total{kind="digest"} 1.0' in answer(service, "/metrics")[2]
    for _ in range(8):
        now[0] += LONGEST_WAIT_S
        service.step()
    (job,) = service.jobs.listed()
    assert (job.state, job.attempts) == ("queued", 0)
    assert "other bytes" in job.error
    assert not gateway.verdicts
    assert not service._pool.tasks
    gateway.lie = None
    now[0] += LONGEST_WAIT_S
    run(service)
    assert gateway.verdicts


def test_a_service_that_is_killed_again_and_again_gives_its_model_up_in_the_end(make, files):
    gateway = Offering({"honest": files["honest"]})
    for _ in range(MAX_INTERRUPTED):
        service = make(gateway, stuck=True)
        service.step()
        assert service.jobs.listed()[0].state == "running"
        service.jobs.close()
    service = make(gateway)
    run(service)
    assert service.jobs.listed()[0].state == "failed"


def test_planned_restarts_cost_a_model_no_attempt(make, files):
    gateway = Offering({"honest": files["honest"]})
    for _ in range(2 * MAX_INTERRUPTED):
        service = make(gateway, stuck=True)
        service.step()
        assert service.jobs.listed()[0].state == "running"
        service.close()
    service = make(gateway, pool=InThread(says=concluded))
    run(service)
    (job,) = service.jobs.listed()
    assert (job.state, job.attempts, job.deaths) == ("done", 1, 0)


def test_a_model_that_kills_its_worker_is_given_up_and_the_others_are_judged(make, files, tmp_path):
    gateway = Offering({"killer": b"kills the worker", **files})
    service = make(gateway, pool=InThread(kills=("killer",), says=concluded))
    run(service, 3 * MAX_DEATHS + 6)
    jobs = {job.name: job for job in service.jobs.listed()}
    assert (jobs["killer"].state, jobs["killer"].deaths) == ("failed", MAX_DEATHS)
    assert "-9" in jobs["killer"].error
    assert {jobs[name].deaths for name in files} == {0}
    assert len(gateway.verdicts) == 2
    service.jobs.close()
    digest = hashlib.sha256(b"kills the worker").hexdigest()
    again = CliRunner().invoke(risk, ["retry", "--config", str(config_file(tmp_path)), digest[:10]])
    assert again.output == f"{digest[:12]} killer is queued\n"
    nothing = CliRunner().invoke(risk, ["retry", "--config", str(config_file(tmp_path)), "ff" * 32])
    assert isinstance(nothing.exception, MissingFileError)
    service = make(gateway, pool=InThread(says=lambda _: AuditAnswer(error="no model after all", final=True)))
    run(service)
    assert service.jobs.find(bytes.fromhex(digest)).error == "no model after all"


def test_what_the_gateway_refuses_of_one_model_keeps_no_other_waiting(make, files):
    now = [1_000_000.0]
    gateway = Offering({"absent": b"somewhere", **files})
    gateway.refused = ("absent",)
    service = make(gateway, clock=lambda: now[0], pool=InThread(says=concluded))
    run(service, 8)
    assert len(gateway.verdicts) == 2
    (job,) = [job for job in service.jobs.listed() if job.name == "absent"]
    assert (job.state, job.attempts, "withheld" in job.error) == ("queued", 0, True)
    gateway.verdicts, gateway.no_verdicts = {}, True
    now[0] += 60
    run(service, 3)
    assert b'edgepriv_risk_rejected_total{kind="verdict"} 2.0' in answer(service, "/metrics")[2]
    gateway.no_verdicts = False
    now[0] += 60
    run(service, 3)
    assert len(gateway.verdicts) == 2


def test_an_error_of_the_machine_puts_an_audit_off_and_counts_nothing(make, files):
    now = [1_000_000.0]
    pool = InThread(says=lambda _: AuditAnswer(error="no space left on device"))
    service = make(Offering({"honest": files["honest"]}), clock=lambda: now[0], pool=pool)
    for _ in range(10):
        run(service)
        now[0] += LONGEST_WAIT_S
    (job,) = service.jobs.listed()
    assert (job.state, job.deaths, len(pool.tasks)) == ("queued", 0, 10)
    pool.says = concluded
    run(service)
    assert service.jobs.listed()[0].state == "done"


def test_a_verdict_is_signed_for_the_audited_policies_and_never_for_the_configured_ones(make, files):
    gateway = Offering({"honest": files["honest"]})
    service = make(gateway, pool=InThread(says=concluded))
    run(service)
    (first,) = map(body_of, gateway.verdicts.values())
    service.close()
    stuck = InThread(stuck=True)
    changed = make(gateway, audit={"policies": ("argmax", "softmax:2")}, pool=stuck)
    gateway.verdicts = {}
    run(changed, 8)
    assert len(stuck.tasks) == 1  # audited again; until that ends nothing is signed, neither old nor new
    assert not gateway.verdicts
    assert changed.jobs.listed()[0].report["verdict"] == "low leakage"
    assert json.loads(answer(changed, "/reports")[2])[0]["verdict"] is None
    assert b"not valid any more" in answer(changed, "/")[2]
    changed.close()
    changed = make(gateway, audit={"policies": ("argmax", "softmax:2")}, pool=InThread(says=concluded))
    run(changed)
    (second,) = map(body_of, gateway.verdicts.values())
    assert (first["policy"], second["policy"]) == ("argmax", "argmax,softmax:2")
    assert changed.jobs.listed()[0].attempts == 2


def test_a_changed_purifier_limit_or_detector_and_an_old_report_are_audited_again(make, files, tmp_path, monkeypatch):
    now = [1_000_000.0]
    gateway = Offering({"honest": files["honest"]})

    def audits(**audit):
        service = make(gateway, clock=lambda: now[0], audit=audit, pool=InThread(says=concluded))
        run(service)
        tasks = len(service._pool.tasks)
        service.close()
        return tasks

    file = tmp_path / "purifier.json"
    for strength, expected in ((0.5, 1), (0.5, 0), (0.6, 1)):
        centres = (5 * np.eye(10)).tolist()
        content = {"schema": "edgepriv.output-purifier/1", "centres": centres, "strength": strength}
        file.write_text(json.dumps(content))
        assert audits(purifier=file) == expected
    (found,) = map(body_of, gateway.verdicts.values())
    assert found["purifier"] == hashlib.sha256(file.read_bytes()).digest()
    assert audits(max_explained_variance=0.3) == 1
    assert audits(max_explained_variance=0.3, workers=3, verdict_days=20.0) == 0
    monkeypatch.setattr("edgepriv.risk.audit_settings.SHIPPED", Calibration({"ridge": 1.0}, 0.0))
    assert audits(max_explained_variance=0.3) == 1
    now[0] += 181 * 86_400
    assert audits(max_explained_variance=0.3) == 1
    assert audits(max_explained_variance=0.3) == 0


def test_a_verdict_that_says_something_else_is_replaced_before_it_ends(make, files):
    gateway = Offering({"honest": files["honest"]})
    service = make(gateway, pool=InThread(says=concluded))
    run(service)
    ((digest, raw),) = gateway.verdicts.items()
    older = {k: v for k, v in body_of(raw).items() if k not in {"purifier", "output", "scale", "mean", "colour"}}
    body = cbor.encode(older)
    gateway.verdicts = {digest: cbor.encode([body, KEY.sign(VERDICT_USE, body)])}
    service._sent.clear()
    run(service)
    assert body_of(gateway.verdicts[digest])["output"] == ["", "logits"]


def test_a_report_of_other_bytes_is_refused(make, files):
    gateway = Offering({"honest": files["honest"]})
    other = {"sha256": "00" * 32, "verdict": "low leakage", "policies": [{"policy": "argmax"}], "duration_s": 1}
    service = make(gateway, pool=InThread(says=lambda _: AuditAnswer(other)))
    run(service)
    (job,) = service.jobs.listed()
    assert (job.state, job.error) == ("failed", "the audit was of other bytes than the model's")
    assert not gateway.verdicts


def test_the_verdict_says_how_pixels_became_the_models_input(make, files):
    gateway = Offering({"honest": files["honest"]})
    run(make(gateway))
    (said,) = map(body_of, gateway.verdicts.values())
    assert (said["scale"], said["mean"], said["colour"], said["purifier"]) == ([1 / 255], [0.0], "gray", b"")
    gateway.verdicts = {}
    shifted = {"scale": (0.004,), "mean": (3.0,), "output": said["output"][1]}
    service = make(gateway, audit=shifted)
    run(service)
    (said,) = map(body_of, gateway.verdicts.values())
    assert (said["scale"], said["mean"]) == ([0.004], [3.0])
    assert any("black box" in note for note in service.jobs.listed()[0].report["notes"])


def test_a_store_of_an_older_release_is_read_and_its_conclusions_are_reached_again(make, files, tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    old = sqlite3.connect(state / "jobs.db")
    old.execute(
        "CREATE TABLE jobs (seq INTEGER PRIMARY KEY, digest BLOB UNIQUE NOT NULL, name TEXT NOT NULL,"
        " size INTEGER NOT NULL, state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,"
        " error TEXT NOT NULL DEFAULT '', report TEXT, added REAL NOT NULL, finished REAL NOT NULL DEFAULT 0)"
    )
    digest = hashlib.sha256(files["honest"]).digest()
    report = json.dumps({"verdict": "low leakage", "reason": "then", "sha256": digest.hex(), "policies": []})
    row = (digest, "honest", len(files["honest"]), "done", 1, "", report, 1.0, time.time())
    columns = "(digest, name, size, state, attempts, error, report, added, finished)"
    old.execute(f"INSERT INTO jobs {columns} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    old.commit()
    old.close()
    gateway = Offering({"honest": files["honest"]})
    service = make(gateway, pool=InThread(says=concluded))
    run(service)
    assert service.jobs.listed()[0].attempts == 2
    assert body_of(gateway.verdicts[digest])["policy"] == "argmax"


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


def test_two_versions_under_one_name_are_judged_by_their_digests_and_seen_everywhere(make, files, tmp_path):
    gateway = Offering({"gate": files["honest"]}, windows=[])
    service = make(gateway)
    run(service)
    gateway.models = {"gate": files["vicious"]}
    run(service)
    assert {job.name for job in service.jobs.listed()} == {"gate"}
    good, bad = (hashlib.sha256(files[name]).digest() for name in ("honest", "vicious"))
    like = [{"digest": good, "class": label, "count": 50} for label in range(10)]
    unlike = [{"digest": bad, "class": label, "count": 900 if label == 3 else 1} for label in range(10)]
    gateway.by_digest = [*like, *unlike, {"digest": "x"}, 7]
    run(service, 5)
    assert list(service.alerts) == [bad.hex()]
    assert b"edgepriv_risk_drift_alerts_total 1.0" in answer(service, "/metrics")[2]
    told = {row["digest"]: row["drift"] for row in json.loads(answer(service, "/reports")[2])}
    assert (told[good.hex()]["alert"], told[bad.hex()]["alert"]) == (False, True)
    page = answer(service, "/")[2].decode()
    assert page.count("what devices release is not what was audited") == 1
    service.close()
    listed = CliRunner().invoke(risk, ["list", "--config", str(config_file(tmp_path))])
    assert listed.output.count("drift: index") == 1
    assert next(line for line in listed.output.splitlines() if "drift" in line).startswith(bad.hex()[:12])


def test_a_gateway_that_tells_names_only_raises_one_alert_for_a_name_and_it_does_not_flap():
    watch = DriftWatch(min_outputs=100, threshold=0.25)
    versions = [Audited(b"1" * 32, "gate", [100, 100, 1]), Audited(b"2" * 32, "gate", [1, 100, 100])]

    def seen(*counts):
        watch.take([{"device": "d", "model": "gate", "class": i, "start": 0, "count": n} for i, n in enumerate(counts)])
        return watch.look(versions)

    assert [one.alert for one in seen(100, 100, 1)] == [False]  # as the older version
    assert [one.alert for one in seen(1, 100, 100)] == [False]  # as the newer one
    assert [one.alert for one in seen(100, 1, 100)] == [True]
    assert set(watch.alerts) == {"gate"}
    barely = 260
    assert 0.2 < stability_index([100, 100, 1], {0: barely, 1: 100, 2: 1}) < 0.25
    assert [one.alert for one in seen(barely, 100, 1)] == [True]  # below the threshold, above four fifths of it
    assert not [one for one in seen(100, 100, 1) if one.alert]
    assert not [one for one in seen(barely, 100, 1) if one.alert]


def test_windows_that_were_refused_are_asked_for_again(make, files):
    now = [1_000_000.0]
    gateway = Offering({"honest": files["honest"]})
    service = make(gateway, clock=lambda: now[0], pool=InThread(says=concluded))
    run(service)
    gateway.windows = []
    asked = []
    query = gateway.query
    gateway.query = lambda what, **args: (asked.append(what), query(what, **args))[1]
    run(service, 3)
    assert "windows" not in asked
    now[0] += 601
    run(service, 1)
    assert "windows" in asked


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
    config = config_file(tmp_path)
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
