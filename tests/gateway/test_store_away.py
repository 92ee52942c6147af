"""The store fails when a round closes and stays away for a while: memory never goes on from what was not committed."""

from __future__ import annotations

import numpy as np
import pytest
from gateway_site import Device, Postgres, Site
from round_site import SIZE, Fails, finish, opened, turn, update

from edgepriv.errors import StorageFullError, TemporaryError
from edgepriv.federated.lineage import named_models
from edgepriv.wire.update import decode_update, encode_update
from gateway import daemon
from gateway.commands import submit, wait
from gateway.database import PostgresDatabase


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon, "FAILED_PAUSE_S", 0.0)
    rounds = {"quorum": 2, "clip": 1000.0, "deadline_s": 60.0, "fraction_bits": 10, "resend_s": 1.0, "max_weight": 10}
    made = Site(tmp_path, rounds=rounds)
    made.weights = tmp_path / "w.bin"
    made.weights.write_bytes(encode_update({"w": np.full(SIZE, 0.5, np.float32)}))
    yield made
    made.close()


def test_a_closing_round_whose_commit_fails_ends_right_when_the_store_is_back(site):
    gateway, devices = site.gateway(), [Device(site, n) for n in site.devices]
    number = opened(site, gateway, devices)
    fails = Fails(gateway.store.database)
    fails.when = lambda: gateway.rounds.conductor.rounds[number].state == "done"
    offers = [update(devices[0], 1.0, number)[1], update(devices[1], 3.0, number)[1]]
    while fails.when or fails.away:
        site.now += 0.6
        turn(gateway, devices, *(d.seal(o) for d, o in zip(devices, offers, strict=True) if o.digest not in d.acks))
    assert all(o.digest not in d.acks for d, o in zip(devices, offers, strict=True)), (
        "nothing was promised before it was stored"
    )
    record = finish(site, gateway, devices, offers)
    assert (fails.when, fails.away, fails.tried) == (None, 0, 5), "it was tried again until it worked"
    assert (record["outcome"], record["participants"]) == ("done", ["dev-cam1", "dev-cam2"])
    raw = gateway.rounds.conductor.model_path(record["after"]).read_bytes()
    assert np.array_equal(decode_update(raw, max_bytes=1 << 20).tensors["w"], np.full(SIZE, 2.5, np.float32))
    for _ in range(3):
        site.now += 1
        turn(gateway, devices)
    assert not list((gateway.store.folder / "rounds").glob("round-*"))
    assert gateway.rounds.start({}, site.now) == number + 1


def test_while_the_store_is_away_nothing_else_is_done_and_nothing_is_acknowledged(site):
    gateway, device = site.gateway(), Device(site, "dev-cam1")
    number = opened(site, gateway, [device, Device(site, "dev-cam2")])
    fails = Fails(gateway.store.database)
    fails.away = 10**9
    offer = update(device, 1.0, number)[1]
    for _ in range(5):
        site.now += 1
        turn(gateway, [device], device.seal(offer))
        assert gateway.link.sent == []
        assert "store" in gateway.readiness()
    assert gateway.rounds.running == [number]
    fails.away = 0
    turn(gateway, [device], device.seal(offer))
    assert "store" not in gateway.readiness()
    assert len(gateway.transfers) == 1


def test_transfers_stay_whole_when_they_cannot_be_read_again(site):
    gateway, device = site.gateway(), Device(site, "dev-cam1")
    number = opened(site, gateway, [device, Device(site, "dev-cam2")])
    turn(gateway, [device], device.seal(update(device, 1.0, number)[1]))
    before = dict(gateway.transfers._open)
    assert before
    fails = Fails(gateway.store.database)
    fails.away = 1
    with pytest.raises(TemporaryError):
        gateway.transfers.load()
    assert gateway.transfers._open == before


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    server = Postgres(tmp_path_factory.mktemp("postgres"))
    yield server
    server.close()


def _broken_before_its_commit(database):
    with database.transaction():
        database.execute("INSERT INTO t (n) VALUES (?)", (1,))
        database._db.close()


def test_every_failure_of_postgresql_is_temporary_and_no_commit_moves_to_another_connection(postgres):
    database = PostgresDatabase(postgres.url_file.read_text().strip())
    database.execute("CREATE TABLE t (n BIGINT PRIMARY KEY)")
    with pytest.raises(TemporaryError):
        _broken_before_its_commit(database)
    assert database.query("SELECT n FROM t") == []
    with pytest.raises(TemporaryError), database.transaction():
        database.executemany("INSERT INTO t (n) VALUES (?)", [(1,), (1,)])
    with pytest.raises(TemporaryError):
        database.execute("no SQL")
    database._db.close()
    database.executemany("INSERT INTO t (n) VALUES (?)", [(2,)])
    assert database.query("SELECT n FROM t") == [(2,)]
    database._url = "postgresql://edgepriv@127.0.0.1:1/postgres"
    database.close()
    with pytest.raises(TemporaryError, match="cannot connect"):
        database.query("SELECT n FROM t")


@pytest.mark.parametrize("error", [TemporaryError("away"), StorageFullError("disk I/O error")])
def test_a_command_that_a_failing_store_stopped_is_carried_out_when_it_is_back(site, error):
    gateway, devices = site.gateway(), [Device(site, n) for n in site.devices]
    opened(site, gateway, devices)
    gateway.rounds.stop(1, "once more", site.now)
    gateway._release_replies()
    save, failed = gateway.rounds.table.save, []

    def fails_once(*args):
        if not failed:
            failed.append(args)
            raise error
        save(*args)

    gateway.rounds.table.save = fails_once
    number = submit(gateway.store, "me", "round-start", {}, site.now)
    for _ in range(4):
        site.now += 0.6
        turn(gateway, devices)
    assert failed
    assert wait(gateway.store, number, 1.0) == {"round": 2}
    assert gateway.rounds.running == [2]


def test_weights_handed_in_name_the_models_that_they_are_for(site):
    gateway = site.gateway()
    args = {"path": str(site.weights), "model": "m", "over": ["ab" * 32]}
    number = submit(gateway.store, "me", "round-weights", args, site.now)
    site.now += 1
    gateway.step()
    digest = wait(gateway.store, number, 1.0)["digest"]
    raw = gateway.rounds.conductor.model_path(digest).read_bytes()
    assert named_models(decode_update(raw, max_bytes=1 << 20).meta) == (b"\xab" * 32,)


@pytest.mark.parametrize("digest", ["ab", "xy" * 32])
def test_a_digest_that_is_none_is_a_clear_error_before_anything_is_asked(site, digest):
    done = site.cli("rounds", "weights", str(site.weights), "--model", "m", "--over", digest, check=False)
    assert done.returncode == 2
    assert "no SHA-256 in hex" in done.stderr
