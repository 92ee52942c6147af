"""Key files: roles and names, file modes, what never shows."""

import os

import pytest

from edgepriv.errors import AuthenticationError, ConfigError, KeyFileError, MissingFileError
from edgepriv.keys import Identity, full_name, load_identity, load_public, public_path


@pytest.fixture
def saved(tmp_path):
    identity = Identity.new("device", "cam1")
    identity.save(tmp_path / "cam1.key")
    return identity, tmp_path / "cam1.key"


def test_a_key_comes_back_from_its_file(saved):
    identity, path = saved
    assert load_identity(path).public == identity.public == load_public(path) == load_public(public_path(path))
    identity.public.verify("x", b"m", load_identity(path).sign("x", b"m"))
    assert os.stat(path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o777])
def test_a_private_file_that_others_can_reach_is_refused(saved, mode):
    saved[1].chmod(mode)
    with pytest.raises(KeyFileError, match="read by others") as caught:
        load_identity(saved[1])
    assert "chmod 600" in caught.value.hint


def test_systemd_credentials_may_be_group_readable(saved, monkeypatch):
    saved[1].chmod(0o440)
    with pytest.raises(KeyFileError):
        load_identity(saved[1])
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(saved[1].parent))
    assert load_identity(saved[1]).name == "dev-cam1"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(saved[1].parent / "elsewhere"))
    with pytest.raises(KeyFileError):
        load_identity(saved[1])


def test_keys_are_never_overwritten(saved):
    with pytest.raises(KeyFileError, match="exists"):
        Identity.new("device", "cam1").save(saved[1])
    assert load_identity(saved[1]).public == saved[0].public


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", 'role = "device"\nname = "dev-a"\n', 'role = "device"\nname = "dev-a"\ned25519_private = "x"\n'],
)
def test_malformed_files_are_one_error_without_their_content(tmp_path, text):
    path = tmp_path / "k"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match="not an edgepriv private key"):
        load_identity(path)
    with pytest.raises(KeyFileError):
        load_public(path)
    with pytest.raises(MissingFileError):
        load_identity(tmp_path / "none")


def test_a_broken_private_file_does_not_leak_into_the_error(saved):
    path = saved[1]
    text = path.read_text()
    secret = text.split('ed25519_private = "')[1][:20]
    path.write_text(text.replace('x25519_private = "', 'x25519_private = "!'))
    with pytest.raises(KeyFileError) as caught:
        load_identity(path)
    shown = str(caught.value) + caught.value.hint + repr(caught.value.__cause__)
    assert secret not in shown


def test_names_carry_their_role():
    assert full_name("device", "cam1") == full_name("device", "dev-cam1") == "dev-cam1"
    assert full_name("recipient", "ann") == "op-ann"
    for bad in ("Cam1", "", "a" * 49, "a/b", "a b", "+", "#"):
        with pytest.raises(ConfigError, match="not a name"):
            full_name("device", bad)
    with pytest.raises(ConfigError, match="unknown role"):
        full_name("king", "x")


def test_signatures_do_not_pass_for_another_use():
    identity = Identity.new("device", "cam1")
    with pytest.raises(AuthenticationError):
        identity.public.verify("epoch", b"m", identity.sign("frame", b"m"))


def test_two_parties_agree_on_one_secret():
    a, b = Identity.new("device", "a"), Identity.new("device", "b")
    assert a.agree(b.public.x25519) == b.agree(a.public.x25519)
    with pytest.raises(AuthenticationError):
        a.agree(bytes(32))
