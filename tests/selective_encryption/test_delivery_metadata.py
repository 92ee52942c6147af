"""Delivery metadata: the owner's root, no rollback, no mix, no forgery; a cut copy goes on."""

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


@pytest.fixture
def repository(owner, tmp_path):
    place = tmp_path / "repo"
    delivery.publish(place, b"one" * 100, "eye.delivery", owner, tmp_path / "tuf.json", now=NOW, custom={"version": 1})
    return place


def pull(repository, owner, tmp_path):
    return delivery.pull(repository, "eye.delivery", owner.public.ed25519, tmp_path / "device")


def test_a_published_model_is_pulled_and_an_update_follows(repository, owner, tmp_path):
    path, custom = pull(repository, owner, tmp_path)
    assert path.read_bytes() == b"one" * 100
    assert custom == {"version": 1}
    delivery.publish(repository, b"two", "eye.delivery", owner, tmp_path / "tuf.json", now=NOW, custom={"version": 2})
    assert pull(repository, owner, tmp_path)[0].read_bytes() == b"two"


def test_a_repository_that_goes_back_is_refused(repository, owner, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(repository, old)
    delivery.publish(repository, b"two", "eye.delivery", owner, tmp_path / "tuf.json", now=NOW, custom={})
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
    delivery.publish(stale, b"x", "eye.delivery", owner, tmp_path / "tuf2.json", now=past, custom={})
    with pytest.raises(TrustError, match="refused"):
        delivery.pull(stale, "eye.delivery", owner.public.ed25519, tmp_path / "other")


def test_missing_things_are_clear_errors(repository, owner, tmp_path):
    with pytest.raises(MissingFileError, match="offers no"):
        delivery.pull(repository, "none", owner.public.ed25519, tmp_path / "device")
    with pytest.raises(MissingFileError, match="no delivery repository"):
        delivery.pull(tmp_path / "void", "x", owner.public.ed25519, tmp_path / "device")


def test_a_cut_copy_goes_on_where_it_stopped(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(bytes(range(256)) * 10)
    target.write_bytes(source.read_bytes()[:700])
    assert delivery.copy_growing(source, target) == 2560 - 700
    assert target.read_bytes() == source.read_bytes()
