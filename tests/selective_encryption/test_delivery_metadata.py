"""Delivery metadata: the owner's root, no rollback, no mix, no forgery."""

import datetime as dt
import shutil

import pytest

from edgepriv.errors import MissingFileError, TrustError
from edgepriv.keys import Identity
from edgepriv.selective_encryption import delivery

NOW = dt.datetime.now(dt.timezone.utc)


@pytest.fixture
def owner():
    return Identity.new("owner", "root")


def publish(repository, content, owner, seeds, *, now=NOW, custom=None):
    source = seeds.with_name("new.delivery")
    source.write_bytes(content)
    delivery.publish(repository, source, "eye.delivery", owner, seeds, now=now, custom=custom or {})


@pytest.fixture
def repository(owner, tmp_path):
    place = tmp_path / "repo"
    publish(place, b"one" * 100, owner, tmp_path / "tuf.json", custom={"version": 1})
    return place


def pull(repository, owner, tmp_path):
    return delivery.pull(repository, "eye.delivery", owner.public.ed25519, tmp_path / "device")


def test_a_published_model_is_pulled_and_an_update_follows(repository, owner, tmp_path):
    path, custom = pull(repository, owner, tmp_path)
    assert path.read_bytes() == b"one" * 100
    assert custom == {"version": 1}
    publish(repository, b"two", owner, tmp_path / "tuf.json", custom={"version": 2})
    assert pull(repository, owner, tmp_path)[0].read_bytes() == b"two"


def test_a_repository_that_goes_back_is_refused(repository, owner, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(repository, old)
    publish(repository, b"two", owner, tmp_path / "tuf.json")
    pull(repository, owner, tmp_path)
    with pytest.raises(TrustError, match="refused"):
        pull(old, owner, tmp_path)


def test_another_owner_a_changed_target_and_expired_metadata_are_refused(repository, owner, tmp_path):
    with pytest.raises(TrustError, match="pinned owner"):
        pull(repository, Identity.new("owner", "thief"), tmp_path)
    target = next((repository / "targets").iterdir())
    target.write_bytes(b"evi" + target.read_bytes()[3:])
    with pytest.raises(TrustError, match="refused"):
        pull(repository, owner, tmp_path)
    past = NOW - dt.timedelta(days=400)
    stale = tmp_path / "stale"
    publish(stale, b"x", owner, tmp_path / "tuf2.json", now=past)
    with pytest.raises(TrustError, match="refused"):
        delivery.pull(stale, "eye.delivery", owner.public.ed25519, tmp_path / "other")


def test_missing_things_are_clear_errors(repository, owner, tmp_path):
    with pytest.raises(MissingFileError, match="offers no"):
        delivery.pull(repository, "none", owner.public.ed25519, tmp_path / "device")
    with pytest.raises(MissingFileError, match="no delivery repository"):
        delivery.pull(tmp_path / "void", "x", owner.public.ed25519, tmp_path / "device")


def test_what_is_shipped_is_enough_for_a_device(repository, owner, tmp_path):
    publish(repository, b"two", owner, tmp_path / "tuf.json", custom={"version": 2})
    copy = tmp_path / "copy"
    for name, source in delivery.shipped_files(repository, "eye.delivery").items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy / name)
    assert len(list((copy / "targets").iterdir())) == 1
    assert pull(copy, owner, tmp_path)[0].read_bytes() == b"two"
    with pytest.raises(MissingFileError, match="offers no"):
        delivery.shipped_files(repository, "none.delivery")
