"""Delivery metadata: the owner's root, no rollback, no mix, no forgery."""

import datetime as dt
import json
import shutil

import pytest

from edgepriv.errors import KeyFileError, MissingFileError, TrustError
from edgepriv.keys import Identity
from edgepriv.selective_encryption import delivery, tuf_keys

NOW = dt.datetime.now(dt.timezone.utc)


@pytest.fixture
def owner():
    return Identity.new("owner", "root")


def publish(repository, content, owner, seeds, *, now=NOW, custom=None):
    seeds.parent.mkdir(exist_ok=True)
    source = seeds.with_name("new.delivery")
    source.write_bytes(content)
    delivery.publish(repository, source, "eye.delivery", owner, seeds, now=now, custom=custom or {})


@pytest.fixture
def repository(owner, tmp_path):
    place = tmp_path / "repo"
    publish(place, b"one" * 100, owner, tmp_path / "tuf.json", custom={"version": 1})
    return place


def pull(repository, owner, tmp_path, *, at=None):
    now_s = None if at is None else int(at.timestamp())
    return delivery.pull(repository, "eye.delivery", owner.public.ed25519, tmp_path / "device", now_s=now_s)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def test_keys_that_the_repository_does_not_list_are_refused_before_anything_is_written(repository, owner, tmp_path):
    before = content(repository)
    other = tmp_path / "other" / "tuf.json"
    publish(tmp_path / "elsewhere", b"x", owner, other)
    with pytest.raises(KeyFileError, match="devices would refuse") as caught:
        publish(repository, b"two", owner, other)
    assert "--tuf-keys" in caught.value.hint
    with pytest.raises(KeyFileError, match="another owner"):
        publish(repository, b"two", Identity.new("owner", "thief"), tmp_path / "tuf.json")
    assert content(repository) == before
    assert pull(repository, owner, tmp_path)[0].read_bytes() == b"one" * 100


def test_one_file_keeps_the_keys_of_several_repositories_and_no_two_share_a_key(repository, owner, tmp_path):
    keys, second = tmp_path / "tuf.json", tmp_path / "second"
    publish(second, b"else", owner, keys)
    publish(repository, b"two", owner, keys)
    sets = json.loads(keys.read_text())["repositories"].values()
    seeds = [seed for one in sets for seed in one.values()]
    assert (len(sets), len(set(seeds))) == (2, 8)
    assert keys.stat().st_mode & 0o077 == 0
    assert pull(repository, owner, tmp_path)[0].read_bytes() == b"two"


def test_keys_that_an_earlier_edgepriv_left_in_the_first_bundle_are_taken_over(repository, owner, tmp_path):
    keys, old, here = tmp_path / "tuf.json", tmp_path / "bundle" / "tuf.json", tmp_path / "kept" / "owner.tuf.json"
    old.parent.mkdir()
    (one,) = json.loads(keys.read_text())["repositories"].values()
    old.write_text(json.dumps(one))
    old.chmod(0o600)
    with pytest.raises(KeyFileError, match="devices would refuse"):
        delivery.check_keys(repository, owner, here)
    delivery.check_keys(repository, owner, here, earlier=old)
    old.unlink()
    publish(repository, b"two", owner, here.parent / "owner.tuf.json")
    assert pull(repository, owner, tmp_path)[0].read_bytes() == b"two"


def test_another_repository_of_the_same_owner_is_refused_once_one_is_followed(repository, owner, tmp_path):
    pull(repository, owner, tmp_path)
    other = tmp_path / "other"
    for content in (b"old", b"older", b"oldest"):
        publish(other, content, owner, tmp_path / "tuf.json")
    with pytest.raises(TrustError, match="another repository"):
        pull(other, owner, tmp_path)
    (tmp_path / "device" / "first-root").unlink()  # a device that followed before the digest was kept
    with pytest.raises(TrustError, match="another repository"):
        pull(other, owner, tmp_path)
    assert pull(repository, owner, tmp_path)[0].read_bytes() == b"one" * 100


def test_a_repository_that_was_never_verified_is_not_followed(owner, tmp_path):
    stale, good = tmp_path / "stale", tmp_path / "good"
    publish(stale, b"x", owner, tmp_path / "tuf.json", now=NOW - dt.timedelta(days=400))
    publish(good, b"y", owner, tmp_path / "tuf.json")
    with pytest.raises(TrustError, match="refused"):
        pull(stale, owner, tmp_path)
    assert pull(good, owner, tmp_path)[0].read_bytes() == b"y"


def test_the_root_is_renewed_in_time_and_devices_follow_it_for_years(repository, owner, tmp_path):
    keys = tmp_path / "tuf.json"
    for days in (100, 200, 390, 800, 810):
        later = NOW + dt.timedelta(days=days)
        publish(repository, b"day %d" % days, owner, keys, now=later)
        assert pull(repository, owner, tmp_path, at=later)[0].read_bytes() == b"day %d" % days
    roots = sorted(path.name for path in (repository / "metadata").glob("*.root.json"))
    assert roots == ["1.root.json", "2.root.json", "3.root.json", "4.root.json"]
    with pytest.raises(TrustError, match="expired"):
        pull(repository, owner, tmp_path, at=later + dt.timedelta(days=400))
    fresh = tmp_path / "fresh"
    found = delivery.pull(repository, "eye.delivery", owner.public.ed25519, fresh, now_s=int(later.timestamp()))
    assert found[0].read_bytes() == b"day 810"


def test_expiry_is_judged_by_the_given_time_and_not_by_the_clock(repository, owner, tmp_path):
    with pytest.raises(TrustError, match="expired"):
        pull(repository, owner, tmp_path, at=NOW + dt.timedelta(days=15))
    past = NOW - dt.timedelta(days=400)
    old = tmp_path / "old"
    publish(old, b"old", owner, tmp_path / "tuf.json", now=past)
    with pytest.raises(TrustError, match="expired"):
        pull(old, owner, tmp_path)
    assert pull(old, owner, tmp_path, at=past)[0].read_bytes() == b"old"


def test_a_damaged_or_open_key_file_is_named(repository, owner, tmp_path):
    keys = tmp_path / "tuf.json"
    keys.chmod(0o644)
    with pytest.raises(KeyFileError, match="read by others"):
        publish(repository, b"two", owner, keys)
    keys.chmod(0o600)
    for text in ("", "[]", "{}", '{"schema": "edgepriv.tuf-keys/1", "repositories": {"x": {"root": "zz"}}}'):
        keys.write_text(text)
        with pytest.raises(KeyFileError, match="holds no keys"):
            tuf_keys.find(keys, b"root")
