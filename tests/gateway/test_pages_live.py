"""The pages' two answers and their live stream: what they say as the daemon, its alerts and its readers change."""

from __future__ import annotations

import json
import re
import time

import pytest
from pages_site import client, csrf, ended_round, pages_site, reported

from edgepriv.wire import cbor
from gateway.pages.access import SESSION_S


@pytest.fixture
def site(tmp_path):
    with pages_site(tmp_path) as made:
        yield made


def events(stream):
    """Documents of a stream of server-sent events, with their kind."""
    kind = "message"
    for line in stream.iter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield kind, json.loads(line.removeprefix("data: "))
            kind = "message"


def removed(site):
    site.pages.operators.remove("ann")


def demoted(site):
    site.pages.operators.add("ann", "viewer")


def expired(site):
    site.pages.sessions._clock = lambda: time.time() + SESSION_S + 1


def unsafe(site):
    (site.folder / "operators.toml").chmod(0o644)
    site.pages.operators._stamp = (0, 0)


@pytest.mark.parametrize("happens", [removed, demoted, expired, unsafe])
def test_an_open_stream_ends_with_its_session(site, happens):
    site.daemon._write_status(time.time())
    with client(site, "ann").stream("GET", "/live") as stream:
        found = events(stream)
        assert next(found)[0] == "message"
        happens(site)
        rest = list(found)  # comes to an end
    assert rest[-1] == ("ended", {})
    assert len(rest) <= 3


def test_an_open_stream_ends_when_its_reader_logs_out(site):
    made = client(site, "ann")
    with made.stream("GET", "/live") as stream:
        found = events(stream)
        next(found)
        assert client_like(site, made).post("/logout", data={"csrf": csrf(client_like(site, made))}).status_code == 303
        assert list(found)[-1] == ("ended", {})


def client_like(site, other):
    """A second connection with the same cookie."""
    made = client(site)
    made.cookies = other.cookies
    return made


def test_the_stream_says_when_the_daemon_stops_writing_and_when_alerts_change(site):
    site.daemon._write_status(time.time())
    with client(site, "vic").stream("GET", "/live") as stream:
        found = (document for kind, document in events(stream) if kind == "message")
        first = next(found)
        assert first["state"] == {"style": "good", "text": "The gateway runs and the broker is connected."}
        site.daemon.link.connected = False
        site.daemon._write_status(time.time())
        second = next(d for d in found if d["state"] != first["state"])
        assert second["state"] == {"style": "bad", "text": "Not ready: broker: not connected"}
        site.daemon._write_status(time.time() - 60)
        third = next(d for d in found if d["state"] != second["state"])
        assert third["state"]["text"].startswith("Stale: the gateway last wrote its status at 20")
        assert third["signature"] != first["signature"]  # what is said of the fleet is not known any more
        site.store.database.execute(
            "INSERT INTO alerts (name, subject, severity, text, raised) VALUES ('x', 'y', 'warning', 'z', 1)"
        )
        fourth = next(d for d in found if d["alerts"] != third["alerts"])
        assert fourth["signature"] != third["signature"]


def card(text, name):
    """Style and answer of one of the overview's two questions."""
    found = re.search(rf'<div class="card (\w+)" id="{name}">.*?<p class="big">([^<]+)</p>', text, re.DOTALL)
    return found.groups()


def test_the_overview_knows_nothing_of_a_gateway_that_is_silent(site):
    made = client(site, "vic")
    site.daemon.watch.turn(time.time())
    site.daemon._write_status(time.time())
    assert card(made.get("/").text, "well")[1] in {"Yes", "No"}
    site.store.database.execute("DELETE FROM alerts")
    assert card(made.get("/").text, "well") == ("good", "Yes")
    site.daemon._write_status(time.time() - 100)
    text = made.get("/").text
    assert card(text, "well") == card(text, "leaking") == ("unsure", "Not known")


@pytest.mark.parametrize(
    ("word", "expires", "shown"),
    [
        ("vicious", 1000, ("bad", "Yes")),
        ("high leakage", 1000, ("bad", "Yes")),
        ("vicious", -1, ("bad", "Yes")),
        ("low leakage", 1000, ("good", "Not found")),
        ("low leakage", -1, ("unsure", "Not known")),
        ("a later word", 1000, ("bad", "Yes")),
    ],
)
def test_the_overview_answers_whether_anything_leaks(site, word, expires, shown):
    model = site.folder / "m.onnx"
    model.write_bytes(b"model bytes")
    now = time.time()
    digest = site.daemon.models.add(model, name="gate", version="2", actor="test", now=now)
    body = cbor.encode({
        "model": digest, "verdict": word, "policy": "argmax", "serial": 1, "issued": int(now),
        "expires": int(now) + expires,
    })  # fmt: skip
    raw = cbor.encode([body, site.keys["risk-lab"].sign("verdict", body)])
    site.daemon.models.take_verdict(raw, "risk-lab", now)
    site.daemon.watch.turn(now)
    site.daemon._write_status(now)
    made = client(site, "vic")
    overview, models = made.get("/").text, made.get("/models").text
    assert card(overview, "leaking") == shown
    assert (f"gate 2: {word}" in overview) == (shown[1] == "Yes")
    assert f'<td class="{shown[0]}">{word}' in models
    assert ("does not hold now" in models) == (expires < 0)


def test_a_leaking_round_turns_the_overview_red_and_a_contained_one_green_again(site):
    made = client(site, "vic")
    ended_round(site, 1)
    reported(site, 1, verdict="leaks", reason="pictures come back")
    site.daemon.watch.turn(time.time())
    site.daemon._write_status(time.time())
    text = made.get("/").text
    assert card(text, "leaking") == ("bad", "Yes")
    assert "an audit of round 1 says “leaks”: pictures come back" in text
    ended_round(site, 2)
    reported(site, 2, verdict="contained", reason="masks")
    site.daemon.watch.turn(time.time())
    text = made.get("/").text
    assert card(text, "leaking")[0] != "bad"
    assert "round 1 says" not in text
