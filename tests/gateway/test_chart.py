"""The Helm chart: its values fit its schema, and what it renders is valid and read by the programs it starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edgepriv.risk.config import load_config as load_risk
from gateway.config import load

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
ROOT = Path(__file__).resolve().parent.parent.parent
CHART = ROOT / "deploy" / "helm" / "edgepriv"
VALUES = {
    "as it is": {},
    "with everything": {
        "gateway": {
            "shards": [
                {"name": "main", "shard": 0, "secret": "edgepriv-gateway-main"},
                {"name": "north", "shard": 1, "secret": "edgepriv-gateway-north"},
            ],
            "postgresql": {"north": "edgepriv-db-north"},
            "storage": {"size": "10Gi", "storageClass": "fast"},
            "rounds": {"privacy": "masked", "quorum": 32, "auto": True},
        },
        "pages": {"tlsSecret": "edgepriv-pages", "clientCa": True, "riskPagesUrl": "https://risk.example"},
        "metrics": {"prometheusRule": True},
        "imagePullSecrets": [{"name": "registry"}],
        "nodeSelector": {"disk": "ssd"},
        "networkPolicy": {"extraEgress": [{"ports": [{"port": 5432, "protocol": "TCP"}]}]},
        "risk": {"audit": {"policies": ["argmax"], "references": 5}},
    },
}


@pytest.fixture(scope="session")
def render(tmp_path_factory):
    """Helm, or a small program over the same template libraries."""
    if shutil.which("helm"):
        return lambda values: ["helm", "template", "site", str(CHART), "--values", str(values)]
    built = shutil.which("render_chart")
    if built is None:
        built = str(tmp_path_factory.mktemp("go") / "render_chart")
        source = str(Path(__file__).with_name("render_chart.go"))
        environment = {"GOPATH": "/usr/share/gocode", "GO111MODULE": "off", "GOCACHE": f"{built}-cache"}
        if shutil.which("go") is None or not Path("/usr/share/gocode/src/github.com/Masterminds/sprig").is_dir():
            pytest.skip("neither helm nor go with golang-github-masterminds-sprig-dev is installed")
        subprocess.run(["go", "build", "-o", built, source], env={**os.environ, **environment}, check=True, timeout=280)
    return lambda values: [built, str(CHART), str(values)]


@pytest.fixture(params=VALUES)
def manifests(request, render, tmp_path):
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(VALUES[request.param]))
    done = subprocess.run(render(values), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "rendered.yaml").write_text(done.stdout)
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def of_kind(manifests, kind):
    return [m for m in manifests if m["kind"] == kind]


def test_the_values_fit_the_schema_and_wrong_ones_do_not():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema, values = json.loads((CHART / "values.schema.json").read_text()), (CHART / "values.yaml").read_text()
    jsonschema.validate(yaml.safe_load(values), schema)
    for old, new in (
        ("url: mqtts://broker", "url: mqtt://broker"), ("shard: 0", "shard: -1"), ("enabled: true", "enable: true"),
        ("size: 50Gi", "size: big"), ("edgepriv/gateway:0.1.0", "edgepriv/gateway"),
    ):  # fmt: skip
        assert old in values
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(values.replace(old, new, 1)), schema)


def test_every_value_that_a_template_reads_has_its_line_in_values_yaml():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for template in (CHART / "templates").iterdir():
        for path in re.findall(r"\.Values((?:\.\w+)+)", template.read_text()):
            found = values
            for name in path.split(".")[1:]:
                assert name in found, f"{template.name}: .Values{path}"
                found = found[name]


def test_the_chart_ships_the_alert_rules_of_this_repository():
    assert (CHART / "alerts.yml").read_bytes() == (ROOT / "deploy" / "prometheus" / "alerts.yml").read_bytes()


def test_manifests_are_valid(manifests, tmp_path):
    if shutil.which("kubernetes-validate") is None:
        pytest.skip("kubernetes-validate is not installed")
    known = [m for m in manifests if m["apiVersion"] != "monitoring.coreos.com/v1"]
    path = tmp_path / "known.yaml"
    path.write_text(yaml.safe_dump_all(known))
    done = subprocess.run(
        ["kubernetes-validate", "--strict", str(path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count(" passed for ") == len(known)


def test_every_container_is_locked_down_and_nothing_but_the_gateway_has_its_keys(manifests):
    for workload in of_kind(manifests, "StatefulSet"):
        pod = workload["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        volumes = {v["name"] for v in pod["volumes"]} | {
            c["metadata"]["name"] for c in workload["spec"]["volumeClaimTemplates"]
        }
        for container in [*pod["initContainers"], *pod["containers"]]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"]
            assert not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            mounts = {m["name"]: m for m in container["volumeMounts"]}
            assert set(mounts) <= volumes
            if container["name"] in {"pages", "enrolment"}:
                assert mounts.get("keys", {}).get("subPath", "postgresql.url") == "postgresql.url"
                assert "secret" not in mounts
        assert all("livenessProbe" in c for c in pod["containers"])


def test_the_configurations_in_it_are_read_by_the_programs(manifests, tmp_path):
    maps = of_kind(manifests, "ConfigMap")
    assert len(maps) >= 2
    for number, manifest in enumerate(maps):
        for name, text in manifest["data"].items():
            path = tmp_path / f"{number}-{name}"
            path.write_text(text)
            if name == "gateway.toml":
                config = load(path)
                assert config.broker.url == "mqtts://broker.example:8884"
                assert config.http.port == 9464
            else:
                load_risk(path)


def test_one_gateway_for_each_shard_with_probes_that_it_answers(manifests):
    gateways = [m for m in of_kind(manifests, "StatefulSet") if "gateway" in m["metadata"]["name"]]
    assert {m["spec"]["replicas"] for m in gateways} == {1}
    for manifest in gateways:
        gateway = manifest["spec"]["template"]["spec"]["containers"][0]
        assert gateway["readinessProbe"]["httpGet"]["path"] == "/readyz"
        assert gateway["livenessProbe"]["httpGet"]["path"] == "/healthz"


def test_the_network_policy_lets_out_dns_and_the_broker_only_unless_told(manifests):
    (policy,) = of_kind(manifests, "NetworkPolicy")
    ports = {p["port"] for rule in policy["spec"]["egress"] for p in rule["ports"]}
    assert ports - {5432} == {53, 8884}
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
