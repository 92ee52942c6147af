"""Configuration and commands: what is wrong is said clearly, with its own exit code, and nothing else happens."""

from __future__ import annotations

import json
import os
import time

import pytest
from gateway_site import Device, MemoryLink, Site, exchange

from edgepriv.errors import ConfigError, EdgeprivError, MissingFileError, RefusedError, TrustError
from gateway import commands
from gateway.cli import root, run_tree
from gateway.config import load
from gateway.console import parse_time
from gateway.round_driver import check_settings
from gateway.schema import MIGRATIONS


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    made.close()


def run(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        run_tree(root, [str(a) for a in args])
    out = capsys.readouterr()
    return ended.value.code, out.out, out.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[store]\nmax_byts = 5\n", "did you mean 'max_bytes'"),
        ("[ingest]\nbatch = 0\n", "above 0"),
        ('[log]\nlevel = "loud"\n', "not one of"),
        ('[outputs]\nwebhook_url = "ftp://x"\n', "http"),
        ("[nonsense]\n", "unknown key 'nonsense'"),
    ],
)
def test_a_wrong_configuration_names_the_key_and_ends_with_78(site, capsys, line, words):
    text = site.config_path.read_text()
    section = line.split("\n", 1)[0]
    kept = "\n\n".join(part for part in text.split("\n\n") if not part.startswith(section))
    site.config_path.write_text(f"{kept}\n\n{line}")
    code, out, err = run(capsys, "check", "--config", site.config_path)
    assert (code, out) == (78, "")
    assert words in err
    assert "Traceback" not in err


def test_the_environment_overrides_the_file(site, monkeypatch):
    monkeypatch.setenv("EDGEPRIV_STORE__MAX_BYTES", "12345")
    assert load(site.config_path).store.max_bytes == 12345


def test_check_says_that_all_is_well_or_what_is_not(site, capsys):
    code, out, _ = run(capsys, "check", "--config", site.config_path, "--json")
    assert code == 0
    assert json.loads(out)["parties"] == {"device": 2, "recipient": 2, "risk": 1}
    key = site.folder / "gateway-main.key"
    os.chmod(key, 0o644)
    assert run(capsys, "check", "--config", site.config_path)[0] == 72
    os.chmod(key, 0o600)
    (site.folder / "trust.cbor").write_bytes(b"nonsense")
    assert run(capsys, "check", "--config", site.config_path)[0] == 67
    (site.folder / "trust.cbor").unlink()
    assert run(capsys, "check", "--config", site.config_path)[0] == 66


def test_a_gateway_that_the_owner_did_not_list_does_not_start(site):
    site.keys.pop("gateway-main")
    site.write_trust()
    with pytest.raises(TrustError):
        site.gateway()


def test_times_are_ages_or_dates():
    assert abs(parse_time("2h") - (time.time() - 7200)) < 5
    assert parse_time("2026-01-01T00:00:00+00:00") == 1767225600.0
    with pytest.raises(ConfigError):
        parse_time("yesterday")


def test_settings_of_rounds_are_checked_by_name():
    assert check_settings({"quorum": 3, "auto": True}) == {"quorum": 3, "auto": True}
    with pytest.raises(ConfigError, match="quorun"):
        check_settings({"quorun": 3})
    with pytest.raises(ConfigError):
        check_settings({"round": 3})


def test_a_command_is_carried_out_audited_and_a_refusal_reaches_who_asked(site):
    gateway, device = site.gateway(), Device(site)
    exchange(gateway, device, device.record(), device.seal(device.output()))
    site.now += 5
    number = commands.submit(gateway.store, "cli:ann", "erase", {"device": "dev-cam1", "before": site.now}, site.now)
    refused = commands.submit(gateway.store, "cli:ann", "round-start", {}, site.now)
    unknown = commands.submit(gateway.store, "page:eve", "format-disk", {}, site.now)
    gateway.step()
    assert commands.wait(gateway.store, number, 1)["outputs"] == 1
    with pytest.raises(EdgeprivError, match="no global weights"):
        commands.wait(gateway.store, refused, 1)
    with pytest.raises(EdgeprivError, match="unknown command"):
        commands.wait(gateway.store, unknown, 1)
    audited = gateway.store.database.query("SELECT actor, action FROM audit ORDER BY id")
    assert audited == [
        ("cli:ann", "erase"), ("cli:ann", "command-erase"), ("cli:ann", "command-round-start"),
        ("page:eve", "command-format-disk"),
    ]  # fmt: skip


def test_commands_that_read_need_no_daemon_and_say_so_when_there_is_no_store(site, capsys):
    assert run(capsys, "outputs", "--config", site.config_path)[0] == 66
    assert run(capsys, "status", "--config", site.config_path)[0] == 66
    site.gateway(MemoryLink())
    code, out, _ = run(capsys, "outputs", "--config", site.config_path, "--json")
    assert (code, json.loads(out)["rows"]) == (0, [])
    code, out, _ = run(capsys, "rounds", "list", "--config", site.config_path, "--json")
    assert json.loads(out) == {"schema": "edgepriv.gateway-rounds/1", "rounds": []}
    assert run(capsys, "rounds", "show", "3", "--config", site.config_path)[0] == 66
    code, out, _ = run(capsys, "models", "list", "--config", site.config_path)
    assert out == "no models\n"


def test_a_store_of_a_much_newer_release_is_refused_and_of_the_next_one_is_not(site):
    gateway = site.gateway()
    gateway.store.database.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="schema 99"):
        site.gateway()
    gateway.store.database.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    site.gateway()  # one version back still runs


def test_a_round_needs_weights_and_devices(site):
    gateway = site.gateway()
    with pytest.raises(RefusedError, match="no global weights"):
        gateway.rounds.start({}, site.now)
    with pytest.raises((EdgeprivError, MissingFileError)):
        gateway.rounds.set_weights(site.folder / "nothing", "m")
