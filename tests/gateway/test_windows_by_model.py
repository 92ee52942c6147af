"""Counts by the digest of the model that ran: two versions under one name are told apart, and erased with the rest."""

import pytest
from gateway_site import Recipient, Site, exchange

from edgepriv.wire.output import Output
from gateway.outputs import Windows, by_model

FIRST, SECOND = b"1" * 32, b"2" * 32


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    made.close()


def output(digest, label, at):
    return Output(
        counter=0, at=at, model="gate", model_digest=digest, task="classify", policy="argmax", bits=1.0, decimals=0,
        scene=b"", values=([label, 0],),
    )  # fmt: skip


def fill(gateway, now):
    windows = Windows(gateway.store.database, 10)
    for party, digest, label, count in (
        ("dev-cam1", FIRST, 3, 5), ("dev-cam1", SECOND, 3, 2), ("dev-cam2", SECOND, 3, 4), ("dev-cam2", SECOND, 1, 1),
    ):  # fmt: skip
        for _ in range(count):
            windows.add(party, output(digest, label, now), now)
    with gateway.store.batch():
        windows.flush()
    windows.add("dev-cam1", output(FIRST, 0, now), now)
    windows.discard()
    with gateway.store.batch():
        windows.flush()


def test_two_versions_under_one_name_are_counted_apart(site):
    gateway = site.gateway()
    fill(gateway, site.now)
    rows = [(row["digest"], row["class"], row["count"]) for row in by_model(gateway.store.database, since=0)]
    assert rows == [(FIRST, 3, 5), (SECOND, 1, 1), (SECOND, 3, 6)]
    assert not by_model(gateway.store.database, since=site.now + 3600)
    lab = Recipient(site, "risk-lab")
    exchange(gateway, lab, lab.record())
    exchange(gateway, lab, lab.query("windows"))
    told = lab.reply().body
    assert [(row["digest"], row["class"], row["count"]) for row in told["models"]] == rows
    assert {row["model"] for row in told["windows"]} == {"gate"}


def test_erasing_a_device_takes_its_counts_by_model_too(site):
    gateway = site.gateway()
    fill(gateway, site.now)
    gateway.store.erase("dev-cam2", site.now + 7200, actor="op", now=site.now + 7200)
    rows = [(row["digest"], row["class"], row["count"]) for row in by_model(gateway.store.database, since=0)]
    assert rows == [(FIRST, 3, 5), (SECOND, 3, 2)]
