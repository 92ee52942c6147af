"""Alerts: each rule alone, and the life of an alert from raised to cleared."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from gateway_site import Device, Site, exchange

from gateway.alerts import AlertEngine, Facts, rules
from gateway.config import AlertsSection
from gateway.judged import RoundAudits
from gateway.metrics import Metrics

WELL = Facts(
    now=1e9,
    store_bytes=1,
    store_limit_bytes=100,
    not_ready={},
    trust_expires=2e9,
    trust_error="",
    certificate_expires=0,
    rejected_last_minute=0,
    silent=(),
    silent_count=0,
    models=(),
    aborted_round=None,
)
LEAKS = {"id": "m", "version": "1", "verdict": "high leakage", "withheld": ""}


def test_a_well_gateway_has_no_alert():
    assert rules(WELL, AlertsSection()) == []


@pytest.mark.parametrize(
    ("changes", "name", "severity"),
    [
        ({"store_bytes": 95}, "store-nearly-full", "warning"),
        ({"not_ready": {"broker": "not connected"}}, "not-ready-broker", "critical"),
        ({"trust_expires": 1e9 + 86_400}, "trust-expires", "warning"),
        ({"trust_expires": 1e9 - 1}, "trust-expires", "critical"),
        ({"trust_error": "forged"}, "trust-refused", "warning"),
        ({"certificate_expires": 1e9 + 3600}, "certificate-expires", "warning"),
        ({"rejected_last_minute": 60}, "many-rejections", "warning"),
        ({"silent": ("dev-a",), "silent_count": 1}, "devices-silent", "warning"),
        ({"models": (LEAKS,)}, "model-leaks", "critical"),
        ({"models": ({**LEAKS, "withheld": "verdict"},)}, "model-leaks", "warning"),
        ({"models": ({**LEAKS, "verdict": "vicious"},)}, "model-leaks", "critical"),
        ({"round_audits": RoundAudits(7, "leaks", "pictures come back")}, "round-leaks", "critical"),
        ({"round_audits": RoundAudits(7, "contained", "", "round 8 was not audited")}, "round-leaks", "warning"),
        ({"aborted_round": (3, "quorum")}, "round-aborted", "warning"),
    ],
)
def test_each_rule_raises_its_alert_and_no_other(changes, name, severity):
    found = rules(dataclasses.replace(WELL, **changes), AlertsSection())
    assert [(a.name, a.severity) for a in found] == [(name, severity)]


def test_an_alert_that_becomes_worse_or_better_is_published_again_and_keeps_its_row(tmp_path):
    site, published = Site(tmp_path), []
    store = site.gateway().store
    engine = AlertEngine(store, AlertsSection(), published.append)
    for left in (13.4, 13.2, -1, -1, 2, 100):  # days of the trust list
        engine.turn(dataclasses.replace(WELL, trust_expires=WELL.now + left * 86_400))
    assert [(d["state"], d["severity"], d["text"][-13:]) for d in published] == [
        ("raised", "warning", "13.4 days left"[-13:]),
        ("raised", "critical", "0.0 days left"),
        ("raised", "warning", "2.0 days left"),
        ("cleared", "warning", "2.0 days left"),
    ]
    assert {d["name"] for d in published} == {"trust-expires"}
    rows = store.database.query("SELECT name, severity, cleared IS NULL FROM alerts WHERE name = 'trust-expires'")
    assert rows == [("trust-expires", "warning", 0)]
    site.close()


def test_an_alert_is_published_when_it_is_raised_and_when_it_is_cleared_and_no_more(tmp_path):
    site = Site(tmp_path)
    gateway, device = site.gateway(), Device(site)
    exchange(gateway, device, device.record())
    site.now += 1
    gateway.step()

    def published():
        packets = [p for p in gateway.link.sent if p.topic == "edgepriv/v1/gateway-main/out/alerts"]
        return [(d["name"], d["state"]) for d in (json.loads(p.payload) for p in packets)]

    site.now += 400
    gateway.step()
    site.now += 6
    gateway.step()
    assert published() == [("devices-silent", "raised")]
    gateway.link.inbox.append(device.seal(device.output()))
    gateway.step()
    for _ in range(3):
        site.now += 6
        gateway.step()
    assert published() == [("devices-silent", "raised"), ("devices-silent", "cleared")]
    assert gateway.store.database.query("SELECT count(*) FROM alerts WHERE cleared IS NOT NULL") == [(1,)]
    assert b'edgepriv_gateway_devices{state="heard"} 1.0' in gateway.metrics.text()
    site.close()


def exposed(metrics):
    """Series and values of the alert metric."""
    return dict(re.findall(r"^edgepriv_gateway_alerts(\{.*\}) (\S+)$", metrics.text().decode(), re.MULTILINE))


def test_the_metric_tells_severities_apart_and_forgets_what_is_over(tmp_path):
    site, metrics = Site(tmp_path), Metrics()
    engine = AlertEngine(site.gateway().store, AlertsSection(), lambda _: None)
    models = (LEAKS, *({**LEAKS, "version": version, "withheld": "its verdict"} for version in "23"))
    told = []
    for facts in (dataclasses.replace(WELL, models=models), dataclasses.replace(WELL, models=models[1:]), WELL):
        metrics.set_alerts(engine.turn(facts))
        told.append(exposed(metrics))
    critical, warning = (f'{{name="model-leaks",severity="{s}"}}' for s in ("critical", "warning"))
    assert told == [{critical: "1.0", warning: "2.0"}, {warning: "2.0"}, {}]
    site.close()


def test_a_series_of_the_metric_that_stays_is_never_away_while_it_is_set(monkeypatch):
    metrics, seen = Metrics(), []
    metrics.set_alerts({("devices-silent", "warning"): 1})
    labels = metrics.alerts.labels
    monkeypatch.setattr(metrics.alerts, "labels", lambda *names: (seen.append(exposed(metrics)), labels(*names))[1])
    metrics.set_alerts({("model-leaks", "critical"): 1, ("devices-silent", "warning"): 2})
    assert len(seen) == 2
    assert all('{name="devices-silent",severity="warning"}' in one for one in seen)
