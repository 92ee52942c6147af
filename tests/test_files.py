"""A file that is replaced is the old or the new one at every moment, and on the disk when the call returns."""

import hashlib
import os
import stat

import pytest

from edgepriv import files


def test_content_and_mode_are_what_was_asked_for_whatever_the_umask(tmp_path):
    old = os.umask(0o077)
    try:
        files.replace(tmp_path / "public", b"certificate", mode=0o644)
        files.replace(tmp_path / "plain", b"state")
        os.umask(0)
        files.replace(tmp_path / "secret", b"key", mode=0o600)
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"public": 0o644, "plain": 0o600, "secret": 0o600}
    assert (tmp_path / "secret").read_bytes() == b"key"


def test_the_bytes_are_synced_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    seen = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(os.path.realpath(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("rename"), replace(a, b)))
    files.replace(tmp_path / "state", b"new")
    assert seen == [str(tmp_path / "state.part"), "rename", str(tmp_path)]


def test_a_write_that_fails_leaves_the_old_file_and_what_it_left_is_in_nobodys_way(tmp_path, monkeypatch):
    path = tmp_path / "state"
    files.replace(path, b"old", mode=0o600)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            files.replace(path, b"new", mode=0o600)
    assert path.read_bytes() == b"old"
    files.replace(path, b"newer", mode=0o600)
    assert path.read_bytes() == b"newer"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_planted_link_under_the_passing_name_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "state.part").symlink_to(victim)
    files.replace(tmp_path / "state", b"new")
    assert victim.read_bytes() == b"mine"
    assert (tmp_path / "state").read_bytes() == b"new"


def test_the_digest_of_a_file_longer_than_one_piece(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "blob").write_bytes(content)
    assert files.sha256(tmp_path / "blob") == hashlib.sha256(content).digest()
