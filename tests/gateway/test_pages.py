"""The operator pages without a browser: who may do what, and what hostile requests get."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from pathlib import Path

import httpx
import pytest
from gateway_site import Device, PagesServer, Site, exchange
from pages_site import client, csrf, ended_round, pages_site, reported

from edgepriv.wire import cbor
from gateway.config import load
from gateway.daemon import open_store
from gateway.pages.access import Operators, Rate, Sessions
from gateway.pages.app import Pages

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def site(tmp_path):
    with pages_site(tmp_path) as made:
        yield made


class Turning:
    """The daemon's loop in a thread, while a request waits for it."""

    def __init__(self, gateway):
        self.gateway, self.stop = gateway, threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        while not self.stop.is_set():
            self.gateway._clock = time.time
            self.gateway.step()
            time.sleep(0.02)

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


READS = ["/", "/fleet", "/rounds", "/models", "/storage", "/alerts", "/audit"]


def test_nothing_is_read_without_a_session(site):
    made = client(site)
    for path in [*READS, "/live", "/rounds/1"]:
        assert made.get(path).status_code in {303, 401}


def test_every_page_reads_for_a_viewer_and_carries_the_strict_headers(site):
    made = client(site, "vic")
    for path in READS:
        answer = made.get(path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
        assert "<script>" not in answer.text
        assert "style=" not in answer.text


def test_a_fresh_install_lets_nobody_in_and_says_how_to_begin(tmp_path):
    fresh = Site(tmp_path / "fresh", pages={"tokens": "operators.toml"})
    store = open_store(load(fresh.config_path))
    server = PagesServer(Pages(load(fresh.config_path), store).guarded())
    with httpx.Client(base_url=server.url) as made:
        assert "operators add" in made.get("/login").text
        for token in ("", "admin", "password"):
            assert made.post("/login", data={"token": token}).status_code == 403
    server.close()
    store.close()


def test_forged_cookies_are_no_session(site):
    made = client(site)
    for cookie in ("x", "a" * 43, "../../etc/passwd", json.dumps({"role": "operator"})):
        assert made.get("/", headers={"cookie": f"edgepriv_session={cookie}"}).status_code == 303


def test_a_viewer_cannot_change_anything_and_the_attempt_is_audited(site):
    made = client(site, "vic")
    assert "Start a round" not in made.get("/rounds").text
    answer = made.post("/do/round-start", data={"csrf": csrf(made, "/")})
    assert answer.status_code == 403
    assert ("page:vic", "refused") in site.store.database.query("SELECT actor, action FROM audit")
    assert site.store.database.query("SELECT count(*) FROM commands") == [(0,)]


def test_cross_site_posts_and_wrong_csrf_tokens_are_refused(site):
    made = client(site, "ann")
    token = csrf(made)
    for headers in ({"origin": "http://evil"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}):
        assert made.post("/do/round-start", data={"csrf": token}, headers=headers).status_code == 403
    for wrong in ("", token[:-1], csrf(client(site, "ann"))):
        assert made.post("/do/round-start", data={"csrf": wrong}).status_code == 403
    assert made.post("/login", data={"token": site.tokens["ann"]}, headers={"origin": "http://evil"}).status_code == 403
    assert site.store.database.query("SELECT count(*) FROM commands") == [(0,)]
    assert ("page:ann", "forged-request") in site.store.database.query("SELECT actor, action FROM audit")


def test_an_operators_change_reaches_the_daemon_and_its_refusal_the_page(site):
    made = client(site, "ann")
    token = csrf(made)
    with Turning(site.daemon):
        answer = made.post("/do/round-start", data={"csrf": token})
    assert answer.status_code == 303
    assert "no global weights" in made.get(answer.headers["location"]).text
    assert ("page:ann", "command-round-start") in site.store.database.query("SELECT actor, action FROM audit")


def test_halting_and_offering_a_model_from_the_page(site):
    model = site.folder / "m.onnx"
    model.write_bytes(b"model bytes")
    digest = site.daemon.models.add(model, name="m", version="2", actor="test", now=site.now)
    site.daemon.watch.turn(site.now)
    made = client(site, "ann")
    assert "Halt m 2" in made.get("/models").text
    with Turning(site.daemon):
        made.post("/do/model-halt", data={"csrf": csrf(made), "model": digest.hex()})
    assert site.daemon.models.listed(site.now)[0]["state"] == "halted"


def test_oversized_forms_are_refused(site):
    for size in (20_000, 2_000_000):
        with client(site) as made:
            assert made.post("/login", data={"token": "x" * size}).status_code == 413


def test_an_oversized_form_without_a_declared_length_is_refused(site):
    def endless():
        for _ in range(100):
            yield b"token=" + b"x" * 1000

    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert client(site).post("/login", content=endless(), headers=headers).status_code == 413


def test_path_traversal_finds_nothing(site):
    made = client(site, "vic")
    paths = ("../../config.py", "%2e%2e/app.py", "/etc/passwd", "..%2f..%2fdaemon.py", "", "vendor/../../app.py")
    for path in paths:
        assert made.get(f"/static/{path}").status_code in {404, 405}


def test_a_senseless_page_number_is_a_clear_error(site):
    made = client(site, "vic")
    for page in ("-1", "x", "1e9", "9" * 30, "²"):
        answer = made.get("/fleet", params={"page": page})
        assert answer.status_code == 400
        assert "page number" in answer.text


def test_names_with_markup_are_shown_as_text(site):
    evil = "dev-<script>alert(1)</script>\"'"
    site.store.database.execute("INSERT INTO devices (party, first_seen, last_seen) VALUES (?, 0, 0)", (evil,))
    made = client(site, "vic")
    text = made.get("/fleet", params={"search": "<script>"}).text
    assert "<script>alert" not in text
    assert "dev-&lt;script&gt;" in text
    assert "<script>x" not in made.get("/", params={"said": "<script>x"}).text


def test_search_takes_wildcards_literally(site):
    device = Device(site)
    exchange(site.daemon, device, device.record())
    site.now += 1
    site.daemon.step()
    made = client(site, "vic")
    assert "dev-cam1" in made.get("/fleet", params={"search": "cam"}).text
    assert "dev-cam1" not in made.get("/fleet", params={"search": "c%1"}).text
    assert "dev-cam1" not in made.get("/fleet", params={"search": "ca_1"}).text


def test_stale_figures_are_marked(site):
    site.daemon._write_status(time.time() - 100)
    assert "Stale" in client(site, "vic").get("/").text
    site.daemon._write_status(time.time())
    assert "Stale" not in client(site, "vic").get("/").text


def test_guessing_tokens_is_limited_and_audited(site):
    made = client(site)
    codes = [made.post("/login", data={"token": f"guess{i}"}).status_code for i in range(14)]
    assert codes.count(403) == 10
    assert codes.count(429) == 4
    actions = [a for (a,) in site.store.database.query("SELECT action FROM audit")]
    assert actions.count("login-refused") == 10
    assert made.post("/login", data={"token": site.tokens["ann"]}).status_code == 429


def test_a_removed_or_demoted_operator_is_out_at_the_next_request(site):
    made = client(site, "ann")
    assert made.get("/").status_code == 200
    site.pages.operators.add("ann", "viewer")
    assert made.get("/").status_code == 303
    other = client(site, "vic")
    site.pages.operators.remove("vic")
    assert other.get("/").status_code == 303


def test_the_operators_file_is_private_and_holds_no_token(site):
    path = site.folder / "operators.toml"
    assert path.stat().st_mode & 0o077 == 0
    assert site.tokens["ann"] not in path.read_text()


def test_sessions_and_rates_end():
    now = [0.0]
    operators = Operators(None)
    sessions = Sessions(operators, clock=lambda: now[0])
    assert sessions.find("x") is None
    rate = Rate(2, clock=lambda: now[0])
    assert [rate.allow("a"), rate.allow("a"), rate.allow("a"), rate.allow("b")] == [True, True, False, True]
    now[0] = 61
    assert rate.allow("a")


@pytest.mark.parametrize("folder", ["gateway/pages/static/vendor", "tests/vendor/axe-core"])
def test_vendored_files_are_what_the_manifest_says(folder):
    manifest = json.loads((ROOT / folder / "manifest.json").read_text())
    for entry in manifest.values():
        assert entry["license"]
        for name, digest in entry["files"].items():
            assert hashlib.sha256((ROOT / folder / name).read_bytes()).hexdigest() == digest


def test_the_pages_name_no_other_host(site):
    made = client(site, "vic")
    for path in READS:
        assert not re.search(r'(?:src|href)="(?:https?:)?//', made.get(path).text)


def test_a_round_shows_what_its_updates_give_away_and_says_when_nobody_looked(site):
    for number in (1, 2, 3, 4):
        ended_round(site, number)
    attack = {"psnr_db": 31.4, "ssim": 0.91, "iip": 1.0, "rdlv": 0.2, "seconds": 12.0}
    reported(
        site, 1, leakage_bound=80.5, leakage_floor=11.4, verdict="leaks", reason="pictures come back", attack=attack,
        seen="one device's own update", canaries=4, about="<b>pictures</b> of the lab", caveat="one attack",
    )  # fmt: skip
    reported(site, 2, leakage_bound=12.0, leakage_floor=11.4, verdict="contained", reason="masks", accuracy=0.973)
    reported(site, 3, error="the weights are gone")
    made = client(site, "vic")
    text = made.get("/rounds").text
    for shown in ("80.5 (prior 11.4): leaks", "12.0 (prior 11.4): contained", "could not be audited", "not audited"):
        assert shown in text
    assert "97.3 %" in text
    leaking = made.get("/rounds/1").text
    for shown in ("80.5 dB PSNR", "11.4 dB", "31.4 dB", "SSIM 0.91", "one device&#39;s own update", "risk-lab", "34"):
        assert shown in leaking
    assert "&lt;b&gt;pictures" in leaking
    assert "no partial sum came" in leaking
    assert "not measured" in leaking
    assert "the weights are gone" in made.get("/rounds/3").text
    assert "Not audited" in made.get("/rounds/4").text


def test_a_report_of_nonsense_figures_breaks_no_page(site):
    ended_round(site)
    reported(
        site, 1, leakage_bound="much", leakage_floor=None, attack="all of it", verdict=7, canaries={"a": 1}, at="x"
    )
    made = client(site, "vic")
    for path in ("/rounds", "/rounds/1"):
        assert made.get(path).status_code == 200


def test_the_fleet_page_shows_what_devices_report(site):
    status = {
        "model": "gate", "level": 2, "trust_version": 3,
        "counters": {"queue_items": 1234, "dropped_frames": 5, "dropped_outputs": 2, "certificate_days": 40.2},
    }  # fmt: skip
    site.store.database.execute(
        "INSERT INTO devices (party, first_seen, last_seen, status, status_at) VALUES ('dev-cam9', 0, ?, ?, ?)",
        (time.time(), cbor.encode(status), time.time()),
    )
    text = client(site, "vic").get("/fleet").text
    row = text[text.index("dev-cam9") :]
    cells = re.findall(r"<td>(.*?)</td>", row[: row.index("</tr>")])
    assert cells[1:] == ["gate", "2", "1,234", "7", "40 d", "3"]
    listed = json.loads(site.cli("devices", "--json").stdout)
    assert listed["schema"] == "edgepriv.gateway-devices/1"
    assert [d["name"] for d in listed["devices"]] == ["dev-cam9"]
    assert "1234 items wait, 7 dropped, certificate 40 days, trust list 3" in site.cli("devices").stdout
    assert "no devices" in site.cli("devices", "--search", "nobody").stdout


def test_what_is_refused_is_logged_with_its_client_and_cannot_forge_a_line(site, caplog):
    made = client(site)
    made.get("/", headers={"cookie": "edgepriv_session=forged"})
    made.post("/login", data={"token": "x" * 20_000})
    vic = client(site, "vic")
    vic.get("/static/%2e%2e/app.py%0aann%20login")
    vic.post("/do/round-start", data={"csrf": csrf(vic, "/")})
    vic.post("/do/round-start", data={"csrf": csrf(vic, "/")}, headers={"origin": "http://evil"})
    logged = [record.getMessage() for record in caplog.records if record.name == "gateway.pages"]
    for said in ("is no session (forged", "refused: 413 '/login'", "refused: 404 '/static/", "page:vic refused"):
        assert any(said in line for line in logged), said
    assert any("a request from another site was refused" in line for line in logged)
    assert sum("refused: 403 '/do/round-start'" in line for line in logged) == 2
    assert not [line for line in logged if "\n" in line]


def test_a_client_that_is_refused_again_and_again_does_not_fill_the_log(site, caplog):
    made = client(site)
    for _ in range(90):
        made.get("/nothing-here")
    logged = [r for r in caplog.records if r.name == "gateway.pages" and "404" in r.getMessage()]
    assert len(logged) == 60
