"""The risk service, the gateway and mosquitto as processes: a vicious model is withheld, its honest twin is offered."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gateway_site import ROOT, Broker, GatewayProcess, Site

from edgepriv.datasets import load
from edgepriv.risk.jobs import JobQueue
from edgepriv.risk.reconstruction.onnx_writer import write_onnx
from edgepriv.risk.reconstruction.vicious import Recipe, TrainingSet, train

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

CONFIG = """[risk]
identity = "risk-lab.key"
owner = "owner.key.pub"
trust = "trust.cbor"
gateway = "gateway-main"
state = "risk"
poll_s = 0.3
[broker]
url = "mqtt://127.0.0.1:{port}"
[audit]
probe = "digits"
policies = ["argmax", "unsafe_raw_logits"]
references = 3
auditors = "ridge"
workers = 2
"""


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    broker, gateway = Broker(tmp_path, made.port), GatewayProcess(made)
    yield made
    if gateway.process.poll() is None:
        assert gateway.stop() == 0, gateway.text()
    gateway.log.close()
    broker.close()


def start(site, **environment):
    log = (site.folder / "risk.log").open("ab")
    command = [sys.executable, "-m", "edgepriv", "risk", "serve", "--config", str(site.folder / "risk.toml")]
    return subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log, env={**os.environ, **environment}), log


def models(site):
    return {m["id"]: m for m in json.loads(site.cli("models", "list", "--json").stdout)["models"]}


def test_verdicts_reach_the_gateway_through_a_kill_in_the_middle(site):
    torch.set_num_threads(1)
    data = load("digits", split="train")
    training = TrainingSet.of(data.images, data.labels)
    recipe = Recipe(epochs=15, batch=50)
    for name, chosen in (("vicious", recipe), ("honest", recipe.honest())):
        write_onnx(train(chosen, training).classifier, training.shape, 10, site.folder / f"{name}.onnx")
        site.cli("models", "add", str(site.folder / f"{name}.onnx"), "--id", name)
    assert {m["withheld"] for m in models(site).values()} == {"no verdict of the risk service"}
    (site.folder / "risk.toml").write_text(CONFIG.format(port=site.port))
    process, log = start(site)
    deadline = time.monotonic() + 120
    while "begins" not in (site.folder / "risk.log").read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    log.close()
    process, log = start(site)
    deadline = time.monotonic() + 220  # patience for a busy machine, not a limit
    while any(m["verdict"] == "not audited" for m in models(site).values()) and time.monotonic() < deadline:
        time.sleep(1)
    found = models(site)
    process.terminate()
    assert process.wait(60) == 0, (site.folder / "risk.log").read_text()
    log.close()
    assert found["vicious"]["verdict"] == "vicious", (site.folder / "risk.log").read_text()
    assert found["vicious"]["withheld"]
    assert found["honest"]["verdict"] == "low leakage"
    assert not found["honest"]["withheld"]
    assert "queued again" in (site.folder / "risk.log").read_text()
    gate = {name: shown(site, found[name]["digest"]) for name in found}
    assert gate["honest"] == 0
    assert gate["vicious"] == 3  # what a CI gates on


def test_a_stop_in_the_middle_of_an_audit_ends_in_seconds_and_costs_the_model_nothing(site):
    data = load("digits", split="train")
    training = TrainingSet.of(data.images, data.labels)
    write_onnx(train(Recipe(epochs=1).honest(), training).classifier, training.shape, 10, site.folder / "m.onnx")
    site.cli("models", "add", str(site.folder / "m.onnx"), "--id", "m")
    # an audit that takes far longer than this test's patience
    slow = CONFIG.replace('auditors = "ridge"', 'auditors = "conv"\ndecoder_epochs = 100000')
    (site.folder / "risk.toml").write_text(slow.format(port=site.port))
    for number in (signal.SIGTERM, signal.SIGINT):
        process, log = start(site)
        workers = []
        deadline = time.monotonic() + 90
        while not workers and time.monotonic() < deadline:
            workers = workers_of(process.pid)
            time.sleep(0.2)
        assert workers, (site.folder / "risk.log").read_text()
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(60) == 0, (site.folder / "risk.log").read_text()
        assert time.monotonic() - began < 15
        log.close()
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        queue = JobQueue(site.folder / "risk" / "jobs.db", max_jobs=9)
        (job,) = queue.listed()
        queue.close()
        assert (job.state, job.attempts, job.deaths) == ("queued", 0, 0)


def test_a_service_that_waits_for_its_gateway_is_alive_to_systemd_and_stops_at_once(tmp_path):
    site = Site(tmp_path)  # no broker and no gateway run
    (site.folder / "risk.toml").write_text(CONFIG.format(port=site.port))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.settimeout(60)
        process, log = start(site, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="1000000")
        assert heard.recv(100) == b"READY=1"
        assert [heard.recv(100) for _ in range(6)] == [b"WATCHDOG=1"] * 6
        # one wait for the gateway lasts 30 s: these came from within it
        assert "cannot be reached" not in (site.folder / "risk.log").read_text()
        began = time.monotonic()
        process.terminate()
        assert process.wait(60) == 0, (site.folder / "risk.log").read_text()
        assert time.monotonic() - began < 15
    log.close()


def workers_of(pid):
    """The audit processes of a service: spawned, each the leader of a session of its own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[3] == folder.name:
            found.append(int(folder.name))
    return found


def shown(site, digest):
    command = [sys.executable, "-m", "edgepriv", "risk", "show", "--config", str(site.folder / "risk.toml"), digest]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode
