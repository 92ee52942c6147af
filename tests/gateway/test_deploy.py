"""The deployment folder: documents whose commands run, units that are hardened, files that parse and agree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from edgepriv.cli import root as device_commands
from edgepriv.device.config import DeviceConfig
from edgepriv.settings import load_settings
from gateway.cli import root as gateway_commands
from gateway.config import load
from gateway.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
TEXT = (DEPLOY / "README.md").read_text()


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
        ["sh", "-c", script], cwd=work, env=environment, capture_output=True, text=True, timeout=110, check=False
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
        capture_output=True, text=True, timeout=60, check=False,
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


def test_dashboards_and_alerts_name_metrics_that_exist():
    exposed = Metrics().text().decode()
    known = set(re.findall(r"^# TYPE (edgepriv_\w+)", exposed, re.MULTILINE))
    known |= {f"{name}_bucket" for name in known}
    dashboard = (DEPLOY / "grafana" / "dashboards" / "gateway.json").read_text()
    assert json.loads(dashboard)["panels"]
    for text in (dashboard, (DEPLOY / "prometheus" / "alerts.yml").read_text()):
        for name in set(re.findall(r"edgepriv_gateway_\w+", text)):
            assert name in known, name


def test_the_compose_file_keeps_the_gateways_key_from_the_pages():
    text = (DEPLOY / "compose" / "compose.yaml").read_text()
    pages = text[text.index("  pages:") : text.index("  prometheus:")]
    assert "./site:/etc" not in pages
    assert "gateway.key" not in pages
    assert text.count("no-new-privileges:true") == 3


def test_package_scripts_are_sound_shell():
    for script in sorted((DEPLOY / "debian").iterdir()):
        shell = "bash" if script.name.endswith("-package") else "sh"
        subprocess.run([shell, "-n", str(script)], check=True, timeout=20)
