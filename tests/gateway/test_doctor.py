"""The self-checks of device and gateway: each finds its fault and says how to mend it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from gateway_site import Broker, Site

from edgepriv import doctor
from edgepriv.cli import root as device_commands
from edgepriv.cli.doctor import TINY_MODEL
from edgepriv.device.loop import lock_state
from gateway import doctor as gateway_doctor
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


SERVICE = 23_456
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can work for another user")


@pytest.fixture
def packaged(tmp_path):
    """A site as a package leaves it: keys of root, a state folder of the service's user."""
    made = Site(tmp_path / "site", pages={"tokens": "state/operators.toml", "port": 1})
    (made.folder / "state").mkdir()
    os.chown(made.folder / "state", SERVICE, SERVICE)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o001)
    yield made
    made.close()


@root_only
def test_the_doctor_of_root_leaves_nothing_of_root_in_the_services_folder(packaged):
    assert packaged.cli("check").returncode == 0
    found = {f.name: f for f in examine(load(packaged.config_path), network=False, running=False)}
    assert (found["store"].state, found["readable files"].state) == ("ok", "ok"), found
    made = list((packaged.folder / "state").rglob("*"))
    assert made
    assert {path.stat().st_uid for path in made} == {SERVICE}
    assert os.geteuid() == 0


@root_only
@pytest.mark.parametrize(("section", "key"), [("store", "url_file"), ("outputs", "webhook_secret")])
def test_a_secret_that_the_service_may_not_read_is_found_with_its_remedy(packaged, section, key):
    packaged.settings[section] = {**packaged.settings.get(section, {}), key: "secret"}
    packaged.write_config()
    secret = packaged.folder / "secret"
    secret.write_text("postgresql://edgepriv@127.0.0.1:1/none\n")
    secret.chmod(0o600)

    def found():
        checks = examine(load(packaged.config_path), network=False, running=False)
        return {f.name: f for f in checks}

    refused = found()["readable files"]
    assert (refused.state, f"[{section}] {key}" in refused.text) == ("failed", True)
    assert "install -o edgepriv-gateway" in refused.remedy
    assert found()["key files"].state == "ok"  # it is private enough
    os.chown(secret, SERVICE, SERVICE)
    assert found()["readable files"].state == "ok"
    if key == "url_file" and importlib.util.find_spec("psycopg"):
        importlib.import_module("psycopg")  # as root, where the libraries of the tests are root's
        assert "cannot connect" in found()["store"].text  # it was read, as the service


@root_only
def test_a_certificate_that_the_service_may_not_read_is_found_too(packaged):
    (packaged.folder / "gateway-main.key.pub").chmod(0o600)
    (packaged.folder / "owner.key.pub").chmod(0o600)
    found = {f.name: f for f in examine(load(packaged.config_path), network=False, running=False)}
    assert found["readable files"].state == "failed"
    assert found["readable files"].remedy == f"chmod 644 {packaged.folder / 'owner.key.pub'}"


def test_what_the_pages_unit_does_not_see_is_found_and_what_a_drop_in_hands_over_is_not(site, monkeypatch):
    hidden = site.folder / "keys" / "postgresql.url"
    site.settings |= {"store": {"url_file": hidden}, "pages": {"port": 1}}
    site.write_config()
    monkeypatch.setattr(gateway_doctor, "KEYS", hidden.parent)
    config = load(site.config_path)
    given = {"": "ok", "ORT_DISABLE_TELEMETRY=1": "failed", "EDGEPRIV_STORE__URL_FILE=/run/x": "ok"}
    for environment, state in given.items():
        monkeypatch.setattr(doctor, "unit_environment", lambda _unit, said=environment: said)
        assert gateway_doctor._readable(config).state == state


def test_the_doctor_of_a_running_device_leaves_it_its_camera_and_its_connection(tmp_path):
    site = Site(tmp_path)
    model, state = tmp_path / "model" / "model.onnx", tmp_path / "cam1"
    model.parent.mkdir()
    model.write_bytes(TINY_MODEL)
    model.with_name("model.toml").write_text('id = "probe"\nwidth = 8\nheight = 8\nlabels = ["r", "g", "b"]\n')
    broker = Broker(tmp_path, site.port)
    config = tmp_path / "device.toml"
    config.write_text(
        f"""[device]\nkey = "dev-cam1.key"\ntrust = "trust.cbor"\nowner = "owner.key.pub"\ngateway = "gateway-main"
        state = "{state}"\n[broker]\nurl = "mqtt://127.0.0.1:{site.port}"\n[model]\npath = "model/model.onnx"
        [source]\nkind = "simulated"\ndata = "digits"\nrows = [0]\nheight = 48\nwidth = 64\n"""
    )

    def looked():
        result = CliRunner().invoke(device_commands, ["doctor", "--config", str(config), "--json"])
        return {f["name"]: (f["state"], f["text"]) for f in json.loads(result.stdout)["findings"]}

    alone = looked()
    assert (alone["camera"], alone["broker"][0]) == (("ok", "simulated gives 64 x 48 pixels"), "ok")
    assert not state.exists()
    lock = lock_state(state)
    broker.kill()  # whoever connected now would fail
    running = looked()
    os.close(lock)
    assert running["camera"] == (
        "skipped", "the device runs and has the camera; to check it here: systemctl stop edgepriv-device",
    )  # fmt: skip
    assert running["broker"][0] == "skipped"
    assert looked()["broker"][0] == "failed"  # the lock is free again
    site.close()


def test_a_lock_that_may_not_be_read_leaves_the_question_to_the_service_manager(tmp_path, monkeypatch):
    (tmp_path / "lock").touch()
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    for said in ("", None):
        monkeypatch.setattr(doctor, "_systemctl", lambda *_words, said=said: said)
        assert doctor.in_use(tmp_path, "edgepriv-device.service") == (said is not None)


def test_a_check_that_breaks_is_a_finding_and_no_crash():
    found = doctor.guarded("x", lambda: 1 / 0, "mend it")
    assert (found.state, found.remedy) == ("failed", "mend it")


def test_a_full_disk_and_an_old_clock_fail(tmp_path, monkeypatch):
    assert doctor.disk(tmp_path / "not" / "there", min_free_bytes=1 << 60).state == "failed"
    monkeypatch.setattr(doctor.time, "time", lambda: 1000.0)
    assert doctor.clock().state == "failed"


def test_the_device_doctor_runs_a_real_inference_without_any_configuration():
    command = [sys.executable, "-m", "edgepriv", "doctor", "--json", "--no-network"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, check=False)
    document = json.loads(done.stdout)
    assert document["schema"] == "edgepriv.doctor/1"
    found = {f["name"]: f for f in document["findings"]}
    assert found["onnxruntime"]["state"] == "ok", found["onnxruntime"]
    assert found["crypto"]["state"] == "ok"
    assert done.returncode == 0


def test_running_a_model_leaves_nothing_for_the_vendor_of_the_inference_library(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"HOME": str(tmp_path)}
    code = "from edgepriv.cli.doctor import _onnxruntime; assert _onnxruntime().state in {'ok', 'warning'}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=240)
    assert list(tmp_path.rglob("*")) == []


def wrong(site, **changes):
    """The finding on the trust list where the gateway's own section names other files."""
    config = load(site.config_path)
    own = dataclasses.replace(config.gateway, **{key: site.folder / name for key, name in changes.items()})
    found = examine(dataclasses.replace(config, gateway=own), network=False, running=False)
    return next(f for f in found if f.name == "trust list")


@pytest.mark.parametrize(
    ("changes", "text", "remedy"),
    [
        ({"identity": "none.key"}, "no such key file", "edgepriv keys new"),
        ({"identity": "risk-lab.key"}, "the key of risk-lab, not of a gateway", "--role gateway"),
        ({"owner": "gateway-main.key.pub"}, "the key of gateway-main, not of an owner", "owner.key.pub"),
        ({"owner": "none.pub"}, "no such key file", "right path"),
        ({"trust": "none.cbor"}, "none.cbor: No such file", "edgepriv owner sign"),
        ({"trust": "."}, "Is a directory", "right path"),
    ],
)
def test_a_wrong_file_of_the_gateway_is_named_with_what_to_do(site, changes, text, remedy):
    found = wrong(site, **changes)
    assert found.state == "failed"
    assert text in found.text
    assert remedy in found.remedy


def test_ports_that_are_taken_and_rounds_that_are_not_understood_are_found_before_the_start(site):
    config = load(site.config_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        http = dataclasses.replace(config.http, port=port)
        pages = dataclasses.replace(config.pages, port=port, tokens=site.folder / "operators.toml")
        cases = [
            ({"http": http}, False, "failed"),
            ({"http": http}, True, "ok"),  # the daemon has it
            ({"pages": pages}, False, "warning"),
            ({"pages": pages}, True, "ok"),
            ({}, False, "ok"),
        ]
        for changes, running, state in cases:
            found = {f.name: f for f in examine(dataclasses.replace(config, **changes), network=False, running=running)}
            assert found["ports"].state == state, changes
            assert (str(port) in found["ports"].remedy) == (state != "ok")
    found = examine(dataclasses.replace(config, rounds={"privaci": "masked"}), network=False, running=False)
    (finding,) = [f for f in found if f.name == "configuration"]
    assert (finding.state, "privacy" in finding.remedy) == ("failed", True)


def test_the_device_doctor_names_each_missing_file_with_its_own_remedy(tmp_path):
    config = tmp_path / "device.toml"
    config.write_text((ROOT / "deploy" / "examples" / "device.toml").read_text())
    done = CliRunner().invoke(
        device_commands, ["doctor", "--config", str(config), "--json", "--no-network", "--no-camera"]
    )
    found = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert "device.key" in found["trust list"]["text"]
    assert "edgepriv enroll" in found["trust list"]["remedy"]
    assert found["certificate"]["text"].endswith("tls.crt is missing")
    assert all(f["remedy"] for f in found.values() if f["state"] == "failed")
