"""The pages as their own process under mutual TLS: the certificate logs in, the operators' file gives the role."""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time

import httpx
import pytest
from gateway_site import ROOT, Site, free_port
from patience import wait_for

from edgepriv.primitives import x509
from gateway.pages.access import Operators

pytestmark = pytest.mark.system


class Served:
    """A running ``edgepriv-gateway pages`` and the certificates of its people."""

    def __init__(self, folder, **environment):
        now = time.time()
        self.folder, self.port = folder, free_port()
        self.ca, self.stranger_ca = x509.new_ca("staff", now, 10), x509.new_ca("staff", now, 10)
        server = x509.issue_server(self.ca, "pages", ("127.0.0.1",), now, 10)
        for name, content in (
            ("ca.crt", self.ca.certificate),
            ("tls.crt", server.certificate),
            ("tls.key", server.key),
        ):
            (folder / name).write_bytes(content)
            (folder / name).chmod(0o600)
        pages = {"tokens": "operators.toml", "port": self.port, "certificate": "tls.crt", "key": "tls.key"}
        self.site = Site(folder / "site", pages={**pages, "client_ca": "../ca.crt"})
        for name in ("tls.crt", "tls.key"):
            (folder / name).rename(folder / "site" / name)
        self.site.gateway()  # makes the store
        operators = Operators(folder / "site" / "operators.toml")
        self.tokens = {name: operators.add(name, role) for name, role in (("ann", "operator"), ("vic", "viewer"))}
        self.log = (folder / "pages.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "pages", "--config", str(self.site.config_path)],
            cwd=ROOT, stdout=self.log, stderr=self.log, env={**os.environ, **environment},
        )  # fmt: skip
        wait_for(self.listens, 20, "the pages do not listen")

    def listens(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def client(self, name=None, *, ca=None):
        context = ssl.create_default_context(cadata=self.ca.certificate.decode())
        if name:
            key = x509.new_key()
            certificate = x509.issue(ca or self.ca, x509.new_request(key), name, time.time(), 5)
            path = self.folder / f"{name}-{id(context)}.pem"
            path.write_bytes(key + certificate)
            context.load_cert_chain(path)
        return httpx.Client(base_url=f"https://127.0.0.1:{self.port}", verify=context, timeout=90)

    def close(self):
        self.process.terminate()
        assert self.process.wait(60) == 0
        self.log.close()
        self.site.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("pages"))
    yield made
    made.close()


def audited(served):
    rows = served.site.gateways[0].store.database.query("SELECT actor, action FROM audit")
    return [tuple(row) for row in rows]


def test_a_certificate_of_the_client_ca_logs_in_with_the_role_of_the_operators_file(served):
    with served.client("ann") as ann:
        page = ann.get("/rounds")
        assert page.status_code == 200
        assert "ann (operator)" in page.text
        assert "Start a round" in page.text
        assert "strict-transport-security" in page.headers
    with served.client("vic") as vic:
        page = vic.get("/rounds")
        assert "vic (viewer)" in page.text
        assert "Start a round" not in page.text


def test_nobody_without_a_certificate_of_that_ca_gets_a_connection(served):
    for made in (served.client(), served.client("ann", ca=served.stranger_ca)):
        with made, pytest.raises(httpx.TransportError):
            made.get("/login")


def test_a_certificate_whose_name_is_no_operators_reads_nothing(served):
    for name in ("eve", "dev-cam1", "ANN"):
        with served.client(name) as made:
            answer = made.get("/fleet")
            assert answer.status_code == 303
            assert answer.headers["location"] == "/login"


def test_changes_need_the_csrf_token_of_this_person_also_with_a_certificate(served):
    with served.client("ann") as ann, served.client("vic") as vic:
        token = re.search(r'name="csrf" value="([^"]+)"', ann.get("/rounds").text)[1]
        foreign = re.search(r'name="csrf" value="([^"]+)"', vic.get("/rounds").text)[1]
        assert ann.post("/do/round-start", data={}).status_code == 403
        assert ann.post("/do/round-start", data={"csrf": foreign}).status_code == 403
        evil = {"origin": "https://evil.example"}
        assert ann.post("/do/round-start", data={"csrf": token}, headers=evil).status_code == 403
        assert vic.post("/do/round-start", data={"csrf": foreign}).status_code == 403
    assert ("page:ann", "forged-request") in audited(served)
    assert ("page:vic", "refused") in audited(served)
    assert not served.site.gateways[0].store.database.query("SELECT 1 FROM commands")


def test_a_removed_operators_certificate_is_worth_nothing_at_the_next_request(served):
    operators = Operators(served.site.folder / "operators.toml")
    operators.add("bob", "operator")
    with served.client("bob") as bob:
        assert bob.get("/").status_code == 200
        operators.add("bob", "viewer")
        assert "bob (viewer)" in bob.get("/").text
        operators.remove("bob")
        assert bob.get("/").status_code == 303


def test_a_token_works_on_the_same_connection_and_its_cookie_is_for_tls_only(served):
    with served.client("eve") as made:
        answer = made.post("/login", data={"token": served.tokens["vic"]})
        assert answer.status_code == 303
        cookie = answer.headers["set-cookie"].lower()
        assert "secure" in cookie
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert "vic (viewer)" in made.get("/").text


def test_a_closed_connection_takes_its_name_with_it(served):
    with served.client("ann") as ann:
        assert ann.get("/").status_code == 200
    with served.client("eve") as eve:  # whoever gets the same port next is not ann
        assert eve.get("/").status_code == 303


def test_systemd_hears_when_the_pages_listen_and_that_their_loop_turns(tmp_path):
    heard, address = [], str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.settimeout(0.2)
        stop = threading.Event()

        def listen():
            while not stop.is_set():
                try:
                    heard.append(listener.recv(100).decode())
                except TimeoutError:
                    continue
                except OSError:
                    return

        thread = threading.Thread(target=listen)
        thread.start()
        made = Served(tmp_path, NOTIFY_SOCKET=address, WATCHDOG_USEC="2000000")
        wait_for(lambda: heard.count("WATCHDOG=1") >= 2, 20, "the watchdog hears nothing")
        made.close()
        stop.set()
        thread.join()
    assert heard[0] == "READY=1"
    assert heard[-1] == "STOPPING=1"


@pytest.mark.parametrize("after_s", [0.0, 0.4, 0.8, 1.6])
def test_a_stop_while_the_pages_start_is_not_lost(tmp_path, after_s):
    site = Site(tmp_path, pages={"tokens": "operators.toml", "port": free_port()})
    site.gateway()
    command = [sys.executable, "-m", "gateway", "pages", "--config", str(site.config_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    time.sleep(after_s)
    process.terminate()
    assert process.wait(60) in {0, -15}
    site.close()
