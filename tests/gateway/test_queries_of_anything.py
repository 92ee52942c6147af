"""Whatever an enrolled party asks, the gateway answers or refuses it, counts it, and goes on."""

from __future__ import annotations

import numpy as np
import pytest
from gateway_site import Device, Postgres, Recipient, Site, exchange
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgepriv.errors import WireError
from edgepriv.keys import Identity
from edgepriv.wire import cbor
from edgepriv.wire.update import encode_update
from gateway.database import PostgresDatabase, SqliteDatabase
from gateway.models import read_verdict
from gateway.outputs import MAX_COUNT, count_output

PARTIES = ("dev-cam1", "op-alice", "risk-lab", "gateway-a")
KINDS = ("frames", "epoch", "trust", "models", "verdict", "windows", "rounds", "report", "reference", "shard-round")
NAMES = (
    "after", "limit", "device", "since", "digest", "verdict", "kind", "subject", "report", "statement", "update",
    "last", "round", "state", "reason",
)  # fmt: skip
NUMBERS = st.integers() | st.sampled_from((-(1 << 63) - 1, 1 << 63, 10**400, 1 << 33)) | st.floats()
TEXTS = st.text(max_size=20) | st.sampled_from(("model", "round", "00", "\x00", "out", "ab" * 32))
LEAVES = st.none() | st.booleans() | NUMBERS | st.binary(max_size=40) | TEXTS
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=6)
REPORTS = st.dictionaries(st.sampled_from(("good", "reason", "verdict", "attack")), VALUES, max_size=3)
ARGS = st.dictionaries(st.sampled_from(NAMES), VALUES | REPORTS, max_size=5)


class ManySite(Site):
    """A site with another gateway in its trust list."""

    def write_trust(self, **changes):
        self.keys.setdefault("gateway-a", Identity.new("gateway", "a"))
        super().write_trust(**changes)


class Asked:
    """A gateway with weights, a frame and a model, and a party of each role."""

    def __init__(self, folder):
        self.site = ManySite(folder, rounds={"shards": ["gateway-a"], "quorum": 1}, models={"require_verdict": False})
        self.gateway = self.site.gateway()
        for name, raw in (("base", encode_update({"w": np.zeros(50, np.float32)})), ("m.onnx", b"a model")):
            (folder / name).write_bytes(raw)
        self.gateway.rounds.set_weights(folder / "base", "m")
        add = self.gateway.models.add
        self.model = add(folder / "m.onnx", name="eye", version="1", actor="op", now=self.site.now)
        self.parties = {name: Recipient(self.site, name) for name in PARTIES}
        for party in self.parties.values():
            exchange(self.gateway, party, party.record())
        self.gateway.rounds.start({}, self.site.now)

    def ask(self, name, what, args):
        """One query; the reply, after the gateway has also kept house."""
        party, before = self.parties[name], self.counted()
        party.other.clear()
        exchange(self.gateway, party, party.query(what, **args))
        assert self.counted() == before + 1
        assert not self.gateway.failed_batch
        self.site.now += 1
        return party.reply()

    def counted(self):
        totals = self.gateway.totals
        return totals["query_answered"] + totals["query_refused"] + totals["packet_rejected"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    made = Asked(tmp_path_factory.mktemp("asked"))
    yield made
    made.site.close()


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(PARTIES), what=st.sampled_from(KINDS), args=ARGS)
def test_any_query_is_answered_or_refused_once_and_the_gateway_goes_on(asked, name, what, args):
    asked.ask(name, what, args)
    assert asked.ask("risk-lab", "trust", {}).ok


@pytest.mark.parametrize(
    ("name", "what", "args"),
    [
        ("dev-cam1", "report", {"kind": "model", "subject": "00", "report": 5}),
        ("risk-lab", "report", {"kind": "round", "subject": "1\x00", "report": {}}),
        ("op-alice", "frames", {"after": 1 << 63}),
        ("op-alice", "frames", {"after": "1"}),
        ("op-alice", "frames", {"limit": float("inf")}),
        ("op-alice", "frames", {"since": float("nan")}),
        ("op-alice", "frames", {"since": 10**400}),
        ("op-alice", "frames", {"device": "dev-\x00"}),
        ("op-alice", "epoch", {"digest": 1 << 40}),
        ("risk-lab", "windows", {"since": float("inf")}),
        ("risk-lab", "rounds", {"after": 1 << 63}),
        ("risk-lab", "verdict", {"verdict": 1 << 40}),
        ("risk-lab", "reference", {"statement": 1 << 40}),
        ("gateway-a", "shard-round", {"last": 1 << 63}),
        ("gateway-a", "shard-round", {"last": (1 << 63) - 1}),
        ("gateway-a", "shard-round", {"last": float("inf")}),
    ],
)
def test_arguments_that_once_stopped_a_gateway_are_one_refusal(asked, name, what, args):
    highest = asked.gateway.rounds.root.highest
    reply = asked.ask(name, what, args)
    assert not reply.ok
    assert asked.gateway.rounds.root.highest == highest


def test_no_detection_brings_the_sum_of_a_window_out_of_a_columns_range(asked):
    device = Device(asked.site, "dev-cam1", seq=9)
    (counted,) = count_output(device.output(task="detect", policy="counts", values=([3, (1 << 40) - 1],)))
    assert counted.count == MAX_COUNT


def test_a_verdict_with_a_time_that_no_clock_shows_is_refused(asked):
    fields = {"model": asked.model, "verdict": "low leakage", "policy": "argmax", "serial": 1, "issued": 1}
    body = cbor.encode({**fields, "expires": 1 << 70})
    signed = cbor.encode([body, asked.site.keys["risk-lab"].sign("verdict", body)])
    with pytest.raises(WireError, match="out of range"):
        read_verdict(signed, asked.gateway.roster, "risk-lab", asked.site.now)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("database")
    if request.param == "sqlite":
        made = SqliteDatabase(folder / "t.db")
        yield made
        made.close()
        return
    server = Postgres(folder)
    made = PostgresDatabase(server.url_file.read_text().strip())
    yield made
    made.close()
    server.close()


@pytest.mark.parametrize("value", [1 << 63, -(1 << 63) - 1, float("inf"), "a\x00b"])
def test_a_value_that_no_column_holds_is_its_senders_mistake_and_the_transaction_goes_on(database, value):
    database.execute("CREATE TABLE IF NOT EXISTS t (n BIGINT, x TEXT)")
    database.execute("DELETE FROM t")
    with database.transaction():
        for run in (database.execute, database.query, lambda sql, row: database.executemany(sql, [row])):
            column = "x" if isinstance(value, str) else "n"
            with pytest.raises(WireError, match="out of the range"):
                run(f"INSERT INTO t ({column}) VALUES (?)", (value,))
        database.execute("INSERT INTO t (n) VALUES (?)", (7,))
    assert database.query("SELECT n FROM t") == [(7,)]
