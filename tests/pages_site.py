"""A site with its pages served, and clients that are logged in."""

from __future__ import annotations

import contextlib
import re
import time
from typing import TYPE_CHECKING

import httpx
from gateway_site import PagesServer, Site

from edgepriv.wire import cbor
from gateway.config import load
from gateway.daemon import open_store
from gateway.pages.app import Pages

if TYPE_CHECKING:
    from pathlib import Path


@contextlib.contextmanager
def pages_site(folder: Path):
    """Daemon, pages and server of one site, with an operator ann and a viewer vic."""
    made = Site(folder, pages={"tokens": "operators.toml", "port": 1})
    made.daemon = made.gateway()
    made.config = load(made.config_path)
    made.store = open_store(made.config)
    made.pages = Pages(made.config, made.store)
    made.tokens = {
        name: made.pages.operators.add(name, role) for name, role in (("ann", "operator"), ("vic", "viewer"))
    }
    made.server = PagesServer(made.pages.guarded())
    made.clients = []
    yield made
    for opened in made.clients:
        opened.close()
    made.server.close()
    made.store.close()
    made.close()


def client(site, name=None):
    made = httpx.Client(base_url=site.server.url, follow_redirects=False, timeout=90)
    site.clients.append(made)
    if name:
        answer = made.post("/login", data={"token": site.tokens[name]})
        assert answer.status_code == 303, answer.text
    return made


def csrf(made, path="/rounds"):
    return re.search(r'name="csrf" value="([^"]+)"', made.get(path).text)[1]


def ended_round(site, number=1, **changes):
    """A round as the daemon stores it when it is over."""
    record = {
        "round": number, "outcome": "done", "privacy": "masked", "participants": ["dev-cam1"], "invited": 2,
        "rejected": [], "epsilon": 1.5, "delta": 1e-6, "noise": "distributed", "before": b"a" * 32, "after": b"b" * 32,
        "parts": [["root/0", "done", "", 34], ["north", "out", "no partial sum came", 0]], **changes,
    }  # fmt: skip
    site.store.database.execute(
        "INSERT INTO rounds (number, state, record, started, updated) VALUES (?, 'done', ?, ?, ?)",
        (number, cbor.encode(record), time.time() - 90, time.time() - 30),
    )


def reported(site, number, **body):
    site.store.database.execute(
        "INSERT INTO reports (kind, subject, sender, at, body) VALUES ('round', ?, 'risk-lab', ?, ?)",
        (str(number), time.time(), cbor.encode(body)),
    )
