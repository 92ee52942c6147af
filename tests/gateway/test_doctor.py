"""The self-checks of device and gateway: each finds its fault and says how to mend it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gateway_site import Broker, Site

from edgepriv import doctor
from gateway.config import load
from gateway.doctor import examine

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    made.close()


def states(found):
    return {f.name: f.state for f in found}


def test_a_prepared_gateway_has_nothing_that_fails(site):
    site.gateway()
    broker = Broker(site.folder, site.port)
    found = examine(load(site.config_path), network=True, running=False)
    broker.close()
    assert not [f for f in found if f.state == "failed"]
    assert states(found)["broker"] == "ok"
    assert all(f.remedy for f in found if f.state == "warning")


def test_each_fault_of_a_gateway_is_found_with_its_remedy(site):
    os.chmod(site.folder / "gateway-main.key", 0o640)
    (site.folder / "trust.cbor").write_bytes(b"x")
    found = {f.name: f for f in examine(load(site.config_path), network=True, running=False)}
    assert found["key files"].state == "failed"
    assert "chmod 600" in found["key files"].remedy
    assert found["trust list"].state == "failed"
    assert found["broker"].state == "failed"
    assert all(f.remedy for f in found.values() if f.state == "failed")


def test_a_check_that_breaks_is_a_finding_and_no_crash():
    found = doctor.guarded("x", lambda: 1 / 0, "mend it")
    assert (found.state, found.remedy) == ("failed", "mend it")


def test_a_full_disk_and_an_old_clock_fail(tmp_path, monkeypatch):
    assert doctor.disk(tmp_path / "not" / "there", min_free_bytes=1 << 60).state == "failed"
    monkeypatch.setattr(doctor.time, "time", lambda: 1000.0)
    assert doctor.clock().state == "failed"


def test_the_device_doctor_runs_a_real_inference_without_any_configuration():
    command = [sys.executable, "-m", "edgepriv", "doctor", "--json", "--no-network"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    document = json.loads(done.stdout)
    assert document["schema"] == "edgepriv.doctor/1"
    found = {f["name"]: f for f in document["findings"]}
    assert found["onnxruntime"]["state"] == "ok", found["onnxruntime"]
    assert found["crypto"]["state"] == "ok"
    assert done.returncode == 0


def test_running_a_model_leaves_nothing_for_the_vendor_of_the_inference_library(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"HOME": str(tmp_path)}
    code = "from edgepriv.cli.doctor import _onnxruntime; assert _onnxruntime().state in {'ok', 'warning'}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=60)
    assert list(tmp_path.rglob("*")) == []
