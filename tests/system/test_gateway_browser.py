"""A real browser on the real pages: log-in, a live round, a rollout that halts itself, a leaking model; axe-core.

Screenshots land in ``EDGEPRIV_REPORT_DIR`` where it is set, else in the test's own folder.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from gateway_site import Broker, Device, GatewayProcess, LiveParty, PagesServer, Recipient, Site
from patience import wait_for

from edgepriv.wire import cbor
from edgepriv.wire.messages import Query
from edgepriv.wire.update import encode_update
from gateway import commands
from gateway.config import load
from gateway.daemon import open_store
from gateway.pages.app import Pages

pytestmark = [pytest.mark.system, pytest.mark.browser]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
AXE = Path(__file__).resolve().parent.parent / "vendor" / "axe-core" / "axe.min.js"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def site(tmp_path, request):
    made = Site(
        tmp_path, devices=[f"cam{i}" for i in range(1, 5)], pages={"tokens": "operators.toml", "port": 1},
        models={"require_verdict": False}, rounds={"quorum": 1, "deadline_s": 60.0, "resend_s": 1.0},
        alerts=getattr(request, "param", {}),
    )  # fmt: skip
    made.broker, made.daemon = Broker(tmp_path, made.port), GatewayProcess(made)
    made.config = load(made.config_path)
    made.store = open_store(made.config)
    pages = Pages(made.config, made.store)
    made.tokens = {name: pages.operators.add(name, role) for name, role in (("ann", "operator"), ("vic", "viewer"))}
    made.server = PagesServer(pages.guarded())
    yield made
    made.server.close()
    made.store.close()
    assert made.daemon.stop() == 0
    made.broker.close()


def shot(page, name, tmp_path):
    folder = Path(os.environ.get("EDGEPRIV_REPORT_DIR", tmp_path)) / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(folder / f"{name}.png"), full_page=True)


def serious_faults(page):
    """Violations that axe-core calls serious or critical."""
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run()")
    bad = [v for v in found["violations"] if v["impact"] in {"serious", "critical"}]
    return [f"{v['id']}: {v['nodes'][0]['html'][:120]}" for v in bad]


def log_in(page, site, who):
    page.goto(site.server.url + "/")
    page.fill("#token", site.tokens[who])
    page.click("main button")
    page.wait_for_selector("h1:has-text('Overview')")


def report(device, digest, good, reason=""):
    return device.seal(Query(os.urandom(8), "report", {
        "kind": "model", "subject": digest.hex(), "report": {"good": good, "reason": reason},
    }))  # fmt: skip


@pytest.fixture
def fleet(site, tmp_path):
    """Four devices that the gateway hears, and weights to begin rounds with."""
    parties = [LiveParty(site, Device(site, name)) for name in site.devices]
    for party in parties:
        wait_for(lambda p=party: p.pump() or p.device.acks, 15, "no session")
    weights = tmp_path / "w.bin"
    weights.write_bytes(encode_update({"w": np.zeros(4, np.float32)}))
    told(site, "round-weights", path=str(weights), model="m")
    time.sleep(1.0)  # the devices' presence is written twice a second
    yield parties
    for party in parties:
        party.close()


def told(site, action, **args):
    """Let the daemon carry out a command; its result."""
    return commands.wait(site.store, commands.submit(site.store, "test", action, args, time.time()), 15)


def checked_page(browser, **context):
    """A page whose script errors are collected."""
    page, errors = browser.new_context(**context).new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    return page, errors


def test_every_page_is_without_serious_faults(site, fleet, browser, tmp_path):
    page, errors = checked_page(browser, color_scheme="light")
    page.goto(site.server.url + "/")
    assert serious_faults(page) == []
    shot(page, "login", tmp_path)
    log_in(page, site, "ann")
    for path in ("/", "/fleet", "/rounds", "/models", "/storage", "/alerts", "/audit"):
        page.goto(site.server.url + path)
        assert serious_faults(page) == [], path
        shot(page, path.strip("/") or "overview", tmp_path)
    assert errors == []
    page.context.close()


def test_no_page_is_wider_than_a_telephone(site, fleet, browser, tmp_path):
    page, errors = checked_page(browser, viewport={"width": 390, "height": 844}, color_scheme="dark")
    log_in(page, site, "vic")
    for path in ("/", "/fleet", "/rounds", "/models", "/storage", "/alerts", "/audit"):
        page.goto(site.server.url + path)
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), path
    shot(page, "narrow", tmp_path)
    assert errors == []
    page.context.close()


def test_an_operator_starts_follows_and_stops_a_live_round(site, fleet, browser, tmp_path):
    page, errors = checked_page(browser, color_scheme="light")
    log_in(page, site, "ann")
    page.goto(site.server.url + "/rounds")
    page.click("text=Start a round")
    page.wait_for_selector("text=Done.")
    page.wait_for_selector("#live-round:not([hidden])")
    assert page.inner_text("[aria-current=step]") == "collecting"
    shot(page, "round-live", tmp_path)
    first = page.inner_text("[data-live=seconds]")
    wait_for(lambda: page.inner_text("[data-live=seconds]") != first, 10, "the page does not follow the round")
    assert serious_faults(page) == []
    page.click("text=Stop round 1")
    page.wait_for_selector("text=Done.")
    page.wait_for_selector("td:has-text('aborted')")
    page.click("th a:has-text('1')")
    page.wait_for_selector("h1:has-text('Round 1')")
    assert "Not audited" in page.inner_text("main")
    assert serious_faults(page) == []
    shot(page, "round", tmp_path)
    assert errors == []
    page.context.close()


@pytest.mark.parametrize("site", [{"certificate_days": 0.5}], indirect=True, ids=["well"])  # trust lasts a day here
def test_an_open_page_follows_alerts_and_says_so_when_the_gateway_dies(site, fleet, browser, tmp_path):
    page, errors = checked_page(browser, color_scheme="light")
    log_in(page, site, "vic")
    wait_for(lambda: page.inner_text("#well .big") == "Yes", 15, "the fleet is not well to begin with")
    loaded = page.evaluate("performance.timeOrigin")
    site.broker.kill()
    wait_for(lambda: page.inner_text("#well .big") == "No", 20, "the lost broker is not shown")
    assert page.inner_text("#state") == "Not ready: broker: not connected"
    assert "not connected" in page.inner_text("[data-refresh=alerts] .critical")
    site.broker.start()
    wait_for(lambda: page.inner_text("#well .big") == "Yes", 30, "the mended broker is not shown")
    assert page.inner_text("#state") == "The gateway runs and the broker is connected."
    site.daemon.kill()
    wait_for(lambda: page.inner_text("#state").startswith("Stale: the gateway last wrote"), 30, "nothing says it died")
    wait_for(lambda: page.inner_text("#well .big") == "Not known", 10, "the fleet is still called well")
    assert page.inner_text("#leaking .big") == "Not known"
    assert page.get_attribute("#state", "class") == "state bad"
    assert serious_faults(page) == []
    shot(page, "gateway-dead", tmp_path)
    site.daemon.start()
    wait_for(lambda: page.inner_text("#state").startswith("The gateway runs"), 30, "its return is not shown")
    assert page.evaluate("performance.timeOrigin") == loaded  # never loaded again: the page itself kept up
    assert errors == []
    page.context.close()


def test_an_open_page_of_a_removed_operator_closes(site, fleet, browser):
    page, errors = checked_page(browser)
    log_in(page, site, "vic")
    assert site.cli("operators", "remove", "vic").returncode == 0
    page.wait_for_selector("h1:has-text('Log in')", timeout=15_000)
    assert errors == []
    page.context.close()


def test_a_rollout_halts_itself_when_devices_report_failures(site, fleet, browser, tmp_path):
    model = tmp_path / "m.onnx"
    model.write_bytes(b"the model's bytes")
    digest = told(site, "model-add", path=str(model), name="gate", version="2")["digest"]
    told(site, "model-rollout", model="gate", stages=[100], settle_s=0.0)
    for party in fleet[:2]:
        packet = report(party.device, digest, False, "accuracy 0.2 on the golden inputs")
        party.link.send(packet.topic, packet.payload)
    wait_for(lambda: [p.pump() for p in fleet] and len(fleet[1].device.other) > 0, 10, "no reply")
    page, errors = checked_page(browser, color_scheme="light")
    log_in(page, site, "ann")

    def halted():
        page.goto(site.server.url + "/models")
        return "rollout halted" in page.content()

    wait_for(halted, 15, "the rollout did not halt")
    assert "accuracy 0.2" in page.content()
    shot(page, "rollout-halted", tmp_path)
    assert serious_faults(page) == []
    page.click("text=Halt gate 2")
    page.wait_for_selector("text=Done.")
    assert errors == []
    page.context.close()


def test_a_leaking_model_is_the_first_thing_seen_in_the_dark_and_without_javascript(site, browser, tmp_path):
    wait_for((site.folder / "state" / "status.json").exists, 15, "the gateway did not start")
    model = tmp_path / "v.onnx"
    model.write_bytes(b"a vicious model")
    digest = told(site, "model-add", path=str(model), name="eye", version="1")["digest"]
    body = cbor.encode({
        "model": digest, "verdict": "vicious", "policy": "argmax", "serial": 1, "issued": int(time.time()),
        "expires": int(time.time()) + 86_400,
    })  # fmt: skip
    lab = Recipient(site, "risk-lab")
    party = LiveParty(site, lab)
    wait_for(lambda: party.pump() or lab.acks, 15, "no session")
    raw = cbor.encode([body, site.keys["risk-lab"].sign("verdict", body)])
    packet = lab.query("verdict", verdict=raw)
    party.link.send(packet.topic, packet.payload)
    wait_for(lambda: party.pump() or lab.other, 10, "no reply")
    assert lab.reply().ok
    context = browser.new_context(java_script_enabled=False, color_scheme="dark")
    page = context.new_page()
    page.goto(site.server.url + "/")
    page.fill("#token", site.tokens["vic"])
    page.click("main button")

    def seen():
        page.goto(site.server.url + "/")
        raised = page.locator(".alerts .critical:has-text('the risk service')").count() == 1
        return raised and "found leakage in eye 1: vicious" in page.inner_text("main")

    wait_for(seen, 15, "the leak is not shown")
    assert page.inner_text("#leaking .big") == "Yes"
    assert page.locator("#leaking.bad").count() == 1
    shot(page, "leaking-dark", tmp_path)
    page.goto(site.server.url + "/models")
    assert page.inner_text("td.bad").startswith("vicious")
    assert page.locator("button:has-text('Halt')").count() == 0  # a viewer
    shot(page, "models-dark", tmp_path)
    context.close()
    checked = browser.new_context(color_scheme="dark", bypass_csp=True)
    page = checked.new_page()
    log_in(page, site, "vic")
    assert serious_faults(page) == []
    checked.close()
    party.close()
