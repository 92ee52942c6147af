"""Configuration and commands: what is wrong is said clearly, with its own exit code, and nothing else happens."""

from __future__ import annotations

import json
import os
import re
import socket
import time

import pytest
from gateway_site import Device, MemoryLink, Site, exchange

from edgepriv.errors import ConfigError, EdgeprivError, MissingFileError, RefusedError, TemporaryError, TrustError
from gateway import commands, console
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
        ("[nonsense]\n", "unknown section [nonsense]"),
        ("[page]\nport = 8080\n", "did you mean [pages]?"),
        ("[http]\nport = 99999\n", "[http] port must be 0 to 65535"),
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


def _states(gateway):
    return [state for (state,) in gateway.store.database.query("SELECT state FROM commands ORDER BY id")]


def test_a_command_that_nobody_waits_for_any_more_is_refused_and_not_run(site):
    gateway = site.gateway()
    args = {"device": "dev-cam1", "before": site.now}
    late = commands.submit(gateway.store, "cli:ann", "erase", args, site.now, timeout_s=20)
    soon = commands.submit(gateway.store, "cli:ann", "erase", args, site.now + 10, timeout_s=20)
    site.now += 21
    gateway.step()
    with pytest.raises(EdgeprivError, match="came too late"):
        commands.wait(gateway.store, late, 1)
    assert commands.wait(gateway.store, soon, 1)["frames"] == 0
    audited = gateway.store.database.query("SELECT action FROM audit ORDER BY id")
    assert audited == [("command-erase",), ("erase",), ("command-erase",)]


def test_who_gives_up_waiting_takes_the_command_back_and_is_told_so(site):
    gateway = site.gateway()
    number = commands.submit(gateway.store, "cli:ann", "erase", {"device": "dev-cam1", "before": 0.0}, site.now)
    with pytest.raises(TemporaryError, match="taken back, and nothing was done"):
        commands.wait(gateway.store, number, 0.1)
    site.now += 1
    gateway.step()
    assert gateway.store.database.query("SELECT action FROM audit") == []


@pytest.mark.parametrize("second", ["erase", "round-stop"])
def test_a_command_that_is_taken_back_while_the_one_before_it_runs_is_not_run(site, second):
    gateway = site.gateway()

    def slow(args, actor, now):
        with pytest.raises(TemporaryError, match="taken back"):
            commands.wait(gateway.store, 2, 0.1)
        return {}

    gateway.commands.on("slow", slow)
    commands.submit(gateway.store, "cli:ann", "slow", {}, site.now)
    commands.submit(gateway.store, "cli:ann", second, {"device": "dev-cam1", "before": 0.0, "round": 1}, site.now)
    gateway.commands.tick(site.now)
    assert _states(gateway) == ["done", "refused"]
    assert gateway.store.database.query("SELECT action FROM audit") == [("command-slow",)]


def test_who_gives_up_on_a_command_that_has_begun_is_told_that_it_goes_on(site):
    gateway = site.gateway()

    def slow(args, actor, now):
        with pytest.raises(TemporaryError, match="still at command"):
            commands.wait(gateway.store, 1, 0.1)
        return {}

    gateway.commands.on("slow", slow, repeatable=True)
    commands.submit(gateway.store, "cli:ann", "slow", {}, site.now, timeout_s=20)
    gateway.commands.tick(site.now)
    assert _states(gateway) == ["done"]


def test_whoever_cannot_take_a_command_back_is_told_that_it_is_still_queued(site):
    gateway = site.gateway()
    number = commands.submit(gateway.store, "cli:ann", "erase", {}, site.now, timeout_s=20)

    def away(sql, params=()):
        raise TemporaryError("the store is busy")

    gateway.store.database.execute = away
    with pytest.raises(TemporaryError, match="still queued, and is refused unless it is begun in time"):
        commands.wait(gateway.store, number, 0.1)
    del gateway.store.database.execute


def test_what_a_command_changes_and_its_answer_are_one_commit(site):
    gateway, run = site.gateway(), []

    def half(args, actor, now):
        run.append(now)
        gateway.store.set_meta("half", len(run))
        if len(run) == 1:
            raise TemporaryError("the store went away in the middle")
        return {}

    gateway.commands.on("half", half)
    number = commands.submit(gateway.store, "cli:ann", "half", {}, site.now)
    with pytest.raises(TemporaryError):
        gateway.commands.tick(site.now)
    assert (gateway.store.meta("half"), _states(gateway)) == (None, ["new"])
    gateway.commands.tick(site.now)
    assert commands.wait(gateway.store, number, 1) == {}
    assert gateway.store.meta("half") == 2


@pytest.mark.parametrize("repeatable", [False, True])
def test_a_path_of_a_commands_own_that_fails_is_refused_and_stalls_nothing(site, repeatable):
    gateway = site.gateway()

    def reads(args, actor, now):
        raise PermissionError(13, "Permission denied", args["path"])

    def writes(args, actor, now):
        raise OSError(5, "Input/output error", str(gateway.store.blobs))

    gateway.commands.on("reads", reads, repeatable=repeatable)
    gateway.commands.on("writes", writes, repeatable=repeatable)
    number = commands.submit(gateway.store, "cli:ann", "reads", {"path": "/home/ann/m.onnx"}, site.now)
    gateway.commands.tick(site.now)
    with pytest.raises(EdgeprivError, match=r"cannot read /home/ann/m\.onnx: Permission denied"):
        commands.wait(gateway.store, number, 1)
    commands.submit(gateway.store, "cli:ann", "writes", {"path": "/home/ann/m.onnx"}, site.now)
    with pytest.raises(OSError, match="Input/output"):
        gateway.commands.tick(site.now)
    assert _states(gateway) == ["refused", "running" if repeatable else "new"]


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


def named(site, key, value):
    """A configuration with another value of one key."""
    text = re.sub(rf"^{key} = .*$", f'{key} = "{value}"', site.config_path.read_text(), count=1, flags=re.MULTILINE)
    site.config_path.write_text(text)


def test_a_configuration_that_is_not_there_and_a_key_of_another_role_are_told_what_to_do(site, capsys):
    code, _, err = run(capsys, "doctor", "--config", site.folder / "none.toml")
    assert (code, "--config" in err.partition("what to do")[2]) == (66, True)
    named(site, "identity", "risk-lab.key")
    code, _, err = run(capsys, "check", "--config", site.config_path)
    assert code == 72
    assert "the key of risk-lab, not of a gateway" in err
    named(site, "identity", "none.key")
    code, _, err = run(capsys, "check", "--config", site.config_path)
    assert (code, "edgepriv keys new" in err) == (66, True)


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_state_folder_that_cannot_be_made_is_named(site, capsys, command):
    named(site, "state", site.config_path / "below-a-file")
    code, _, err = run(capsys, command, "--config", site.config_path)
    assert code == 69
    assert "cannot make the state folder" in err
    assert "[gateway] state" in err


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("pages",), "[pages] port"),
        (("token", "serve", "--listen", "127.0.0.1:PORT"), "--listen"),
        (("run",), "[http] port"),
    ],
)
def test_a_port_that_is_taken_is_one_clear_line(site, capsys, monkeypatch, words, where):
    site.gateway()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for section in ("PAGES", "HTTP"):
            monkeypatch.setenv(f"EDGEPRIV_{section}__PORT", port)
        monkeypatch.setenv("EDGEPRIV_PAGES__TOKENS", "operators.toml")
        code, _, err = run(capsys, *(w.replace("PORT", port) for w in words), "--config", site.config_path)
    assert code == 69
    told, _, remedy = err.partition("what to do: ")
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in told
    assert where in remedy


@pytest.mark.parametrize("files", [{"certificate": "none.crt"}, {"certificate": "gateway.toml", "key": "gateway.toml"}])
def test_certificates_of_the_pages_that_cannot_be_used_are_named(site, capsys, files):
    site.gateway()
    site.settings["pages"] = {"port": 1, "tokens": "operators.toml", **files}
    site.write_config()
    code, _, err = run(capsys, "pages", "--config", site.config_path)
    assert code == 78
    assert "[pages]" in err
    assert files["certificate"] in err


def test_a_command_for_a_gateway_that_does_not_run_says_so_at_once_and_asks_for_nothing(site, capsys, monkeypatch):
    monkeypatch.setattr(console, "START_S", 0.3)
    gateway, model = site.gateway(), site.folder / "m.onnx"
    assert run(capsys, "models", "add", model, "--id", "m", "--config", site.config_path)[0] == 66
    model.write_bytes(b"model")
    code, _, err = run(capsys, "models", "add", model, "--id", "m", "--config", site.config_path)
    assert code == 75
    assert err.startswith("the gateway does not run; waiting")
    assert "nothing was asked of it" in err
    assert gateway.store.database.query("SELECT count(*) FROM commands") == [(0,)]
