"""Root's commands on a packaged gateway: nothing in the state folder becomes root's, and the daemon reads its files."""

from __future__ import annotations

import os

import pytest
from click.testing import CliRunner
from gateway_site import Site

from gateway.cli import root
from gateway.config import load
from gateway.console import as_state_owner, handed_over, opened_store

SERVICE = 23_456
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can work for another user")


@pytest.fixture
def site(tmp_path):
    """A site whose state belongs to a service user that may reach it."""
    made = Site(tmp_path / "site", pages={"tokens": "state/operators.toml", "port": 1})
    state = tmp_path / "site" / "state"
    state.mkdir()
    os.chown(state, SERVICE, SERVICE)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o001)
    yield made
    made.close()


def call(site, *words):
    result = CliRunner().invoke(root, [*words, "--config", str(site.config_path)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_what_root_makes_in_the_state_folder_belongs_to_the_service(site, tmp_path):
    state = site.folder / "state"
    call(site, "operators", "add", "ann")
    call(site, "check")
    call(site, "token", "ca", "--out", str(tmp_path / "device-ca.crt"))
    call(site, "token", "new", "--device", "cam1", "--url", "https://h:1", "--out", str(tmp_path / "cam1.token"))
    made = [path for path in state.rglob("*") if path.is_file()]
    assert {"operators.toml", "gateway.db", "ca.key", "enrolment.sqlite"} <= {path.name for path in made}
    assert {path.stat().st_uid for path in made} == {SERVICE}
    assert (tmp_path / "cam1.token").stat().st_uid == 0
    assert (tmp_path / "cam1.token").stat().st_mode & 0o777 == 0o600
    certificate = (state / "enrolment" / "ca.crt").read_bytes()
    assert (tmp_path / "device-ca.crt").read_bytes() == certificate
    assert call(site, "token", "ca", "--out", "-").stdout_bytes == certificate
    assert os.geteuid() == 0


def test_a_file_of_root_is_copied_for_the_daemon_and_the_copy_goes_afterwards(site, tmp_path):
    config, model = load(site.config_path), tmp_path / "private" / "model.onnx"
    model.parent.mkdir(mode=0o700)
    model.write_bytes(b"a model that only root can read")
    with handed_over(config, model) as path:
        assert path != model
        with as_state_owner(config):
            assert path.read_bytes() == b"a model that only root can read"
            assert os.geteuid() == SERVICE
            with pytest.raises(PermissionError):
                model.read_bytes()
        copy = path
    assert not copy.exists()
    assert list((site.folder / "state" / "incoming").iterdir()) == []


def test_a_store_that_cannot_be_opened_leaves_root_as_root(site):
    config = load(site.config_path)
    (site.folder / "state" / "gateway.db").mkdir()
    with pytest.raises(Exception), opened_store(config, create=True):  # noqa: B017 - whatever sqlite says
        pass
    assert os.geteuid() == 0


def test_without_another_owner_nothing_changes(tmp_path):
    made = Site(tmp_path)
    config, model = load(made.config_path), tmp_path / "m.onnx"
    model.write_bytes(b"x")
    with handed_over(config, model) as path:
        assert path == model
    with as_state_owner(config):
        assert os.geteuid() == 0
    made.close()
