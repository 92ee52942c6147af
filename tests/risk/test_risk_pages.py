"""The risk service's own pages: the first page, a vicious model's report in a real browser, releases by their cards."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from edgepriv.datasets import load
from edgepriv.device.release import parse_policy
from edgepriv.errors import ConfigError, TemporaryError, UnavailableError
from edgepriv.keys import Identity
from edgepriv.mqtt import BrokerSettings
from edgepriv.risk.config import AuditSection, RiskConfig, RiskSection, load_config
from edgepriv.risk.pages import answer, serve
from edgepriv.risk.service import RiskService

AXE = Path(__file__).resolve().parent.parent / "vendor" / "axe-core" / "axe.min.js"


class Here:
    """An executor that runs at once."""

    def submit(self, fn, /, *args):
        future = Future()
        future.set_result(fn(*args))
        return future

    def shutdown(self, wait=True, *, cancel_futures=False):
        pass


class Offering:
    """A gateway that offers models and takes verdicts."""

    def __init__(self, models):
        self.models = models

    def query(self, what, **_):
        if what == "models":
            rows = [(name, hashlib.sha256(raw).digest(), len(raw)) for name, raw in self.models.items()]
            held = {"verdict_bytes": b"", "expires": 0}
            return {"models": [{"id": n, "digest": d, "size": size, **held} for n, d, size in rows]}
        if what == "verdict":
            return {"accepted": True}
        raise TemporaryError("the gateway did not answer")

    def fetch_object(self, ref, _size, *, max_bytes):
        return next(r for r in self.models.values() if hashlib.sha256(r).digest()[:16] == ref)

    def close(self):
        pass


def service_with(folder, models):
    data = load("digits", split="all")
    np.savez(folder / "release.npz", images=data.images[:700], labels=data.labels[:700])
    config = RiskConfig(
        RiskSection(folder / "k", folder / "o", folder / "t", "gateway-main", folder / "state"),
        BrokerSettings("mqtt://127.0.0.1:1"),
        AuditSection(str(folder / "release.npz"), policies=("argmax",), references=3, auditors="ridge"),
    )
    key = Identity.new("risk", "lab")
    return RiskService(config, lambda: Offering(models), key.sign, [parse_policy("argmax")], Here(), clock=time.time)


@pytest.fixture(scope="module")
def audited(digit_models, tmp_path_factory):
    """A service that has audited an honest and a vicious model, with a release's card."""
    folder, _ = digit_models
    models = {name: (folder / f"{name}.onnx").read_bytes() for name in ("honest", "vicious")}
    service = service_with(tmp_path_factory.mktemp("risk"), models)
    for _ in range(6):
        service.step()
    card = service.folder / "releases" / "digits-2026"
    card.mkdir(parents=True)
    (card / "card.json").write_text(json.dumps({"recommendation": "Release: <b>it</b> gains", "released": 700}))
    (card / "card.html").write_text("<!doctype html><title>card</title>")
    yield service
    service.close()


def test_the_first_page_names_models_with_verdicts_and_releases_with_their_cards(audited):
    status, kind, raw = answer(audited, "/")
    page = raw.decode()
    assert (status, kind) == (200, "text/html; charset=utf-8")
    vicious = next(job for job in audited.jobs.listed() if job.name == "vicious")
    assert f"/reports/{vicious.digest.hex()}.html" in page
    assert '<strong class="bad">vicious</strong>' in page
    assert '<strong class="good">low leakage</strong>' in page
    assert "Release: &lt;b&gt;it&lt;/b&gt; gains" in page
    assert "No round was audited." in page
    assert "<script" not in page
    for target in set(re.findall(r'href="([^"]+)"', page)):
        assert answer(audited, target)[0] == 200, target


def test_the_first_page_shows_audited_rounds_and_links_no_page_of_one_that_could_not_be_audited(tmp_path):
    service = service_with(tmp_path, {})
    figures = {"psnr_db": 12.34, "ssim": 0.456, "iip": 0.0, "rdlv": None, "pool_size": 500, "seconds": 1.0}
    found = {
        "verdict": "contained", "reason": "near <the> prior", "attack": figures, "leakage_bound": 11.9,
        "leakage_floor": 11.4,
    }  # fmt: skip
    told = {"before": b"w" * 32, "round": 3}
    service.rounds._keep(told, found)
    (service.rounds.folder / "3.html").write_text("<!doctype html><title>3</title>")
    service.rounds._keep({**told, "round": 4}, {**found, "verdict": "leaks", "leakage_bound": None})
    (service.rounds.folder / "4.html").write_text("<!doctype html><title>4</title>")
    service.rounds._keep({**told, "round": 5}, {"error": "the weights <are> gone"})
    page = answer(service, "/")[2].decode()
    for words in (
        '<strong class="good">contained</strong>', '<strong class="bad">leaks</strong>', "near &lt;the&gt; prior",
        "11.9 dB; the prior alone 11.4 dB", "12.3 dB, SSIM 0.46", "not audited", "the weights &lt;are&gt; gone",
    ):  # fmt: skip
        assert words in page, words
    assert "no verdict" not in page
    links = set(re.findall(r'href="(/rounds/[^"]+)"', page))
    assert links == {"/rounds/3.html", "/rounds/4.html"}
    assert all(answer(service, link)[0] == 200 for link in links)
    service.close()


def test_earlier_verdicts_under_the_same_name_stay_to_be_seen(tmp_path):
    service = service_with(tmp_path, {})
    for version in (b"one", b"two", b"three"):
        service.jobs.add(hashlib.sha256(version).digest(), "gate <2>", 3, time.time())
    for word in ("low leakage", "high leakage"):
        job = service.jobs.take()
        service.jobs.finish(job.digest, {"verdict": word, "reason": "measured"}, time.time())
    page = answer(service, "/")[2].decode()
    assert page.count('<th scope="row">gate &lt;2&gt;') == 1
    assert "low leakage" in page
    assert "high leakage" in page
    service.close()


def test_paths_that_lead_elsewhere_find_nothing(audited):
    for path in (
        "/releases/../jobs.db", "/releases/digits-2026/release.npz", "/releases/%2e%2e/card.json", "/reports/x.html",
        "//", "/releases/.hidden/card.json", "/rounds/../../k", "/reports/" + "a" * 64 + "/../jobs.db",
    ):  # fmt: skip
        assert answer(audited, path)[0] == 404, path


def test_a_damaged_card_says_so_and_breaks_nothing(audited):
    bad = audited.folder / "releases" / "damaged"
    bad.mkdir()
    (bad / "card.json").write_text("[")
    (bad / "card.html").write_text("x")
    listed = json.loads(answer(audited, "/releases")[2])
    assert [row["name"] for row in listed] == ["damaged", "digits-2026"]
    assert "cannot be read" in answer(audited, "/")[2].decode()
    shutil.rmtree(bad)


def test_answers_over_http_forbid_scripts_framing_and_writing(audited):
    server = serve(audited, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    with urllib.request.urlopen(url + "/") as reply:
        assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
        assert "script-src" not in reply.headers["Content-Security-Policy"]
        assert reply.headers["X-Frame-Options"] == "DENY"
    for request in (urllib.request.Request(url + "/", data=b"x", method=m) for m in ("POST", "PUT", "DELETE")):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(request)
    server.shutdown()
    server.server_close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_vicious_models_page_in_a_real_browser(audited, tmp_path, scheme):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    shots = Path(os.environ.get("EDGEPRIV_REPORT_DIR", tmp_path)) / "screenshots"
    shots.mkdir(parents=True, exist_ok=True)
    server = serve(audited, "127.0.0.1", 0)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_context(color_scheme=scheme, bypass_csp=True).new_page()
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        assert faults(page) == []
        page.screenshot(path=str(shots / f"risk-{scheme}.png"), full_page=True)
        page.click("tr:has-text('vicious') >> text=table and pictures")
        page.wait_for_selector("h1:has-text('What the outputs of vicious give away')")
        assert page.inner_text(".verdict").startswith("vicious")
        assert page.locator("img").count() >= 1
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert faults(page) == []
        page.screenshot(path=str(shots / f"risk-vicious-{scheme}.png"), full_page=True)
        browser.close()
    server.shutdown()
    server.server_close()


def faults(page):
    """Violations that axe-core calls serious or critical."""
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run()")["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html'][:120]}" for v in found if v["impact"] in {"serious", "critical"}]


def test_a_port_that_is_taken_or_is_none_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UnavailableError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"
        ) as error:
            serve(None, "127.0.0.1", port)
    assert "[http] port" in error.value.hint
    example = (Path(__file__).resolve().parent.parent.parent / "deploy" / "examples" / "risk.toml").read_text()
    path = tmp_path / "risk.toml"
    path.write_text(example.replace("port = 9465", "port = 99999"))
    with pytest.raises(ConfigError, match="0 to 65535"):
        load_config(path)
