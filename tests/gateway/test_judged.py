"""What counts as leaking and as unjudged, the same for alerts and pages: every word that the risk service can say."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest
from gateway_site import Site
from model_site import Maker

from edgepriv.device import verdicts as device_verdicts
from edgepriv.device.packing import Golden, Limits, pack
from edgepriv.errors import DataError
from edgepriv.wire import cbor, delivery
from gateway import models as gateway_models
from gateway.alerts import Facts, rules
from gateway.config import AlertsSection, load
from gateway.judged import AT_RISK, AUDIT_WITHIN_S, CONTAINED, leaks, round_audits, style, unjudged
from gateway.pages.figures import Figures
from gateway.pages.formats import verdict as style_of_round
from gateway.rollout import Plan

ROOT = Path(__file__).resolve().parent.parent.parent


def constants(path):
    """Every text that a module of the risk service assigns to a name of its own, read without importing it."""
    found = {}
    for line in ast.parse((ROOT / path).read_text()).body:
        if isinstance(line, ast.Assign):
            for target in line.targets:
                names, values = getattr(target, "elts", [target]), getattr(line.value, "elts", [line.value])
                pairs = zip(names, values, strict=False)
                found |= {n.id: v.value for n, v in pairs if isinstance(v, ast.Constant) and isinstance(v.value, str)}
    return found


MODEL_WORDS = constants("edgepriv/risk/reconstruction/verdict.py")
ROUND_WORDS = {
    name: text
    for path in sorted((ROOT / "edgepriv/risk/gradient_leakage").glob("*.py"))
    for name, text in constants(path).items()
    if name in {"LEAKS", "AT_RISK", "CONTAINED"}
}


def test_gateway_device_and_risk_service_say_the_same_words():
    assert MODEL_WORDS == {"VICIOUS": "vicious", "HIGH": "high leakage", "LOW": "low leakage"}
    assert gateway_models.GOOD_VERDICT == device_verdicts.GOOD_VERDICT == MODEL_WORDS["LOW"]
    assert ROUND_WORDS == {"LEAKS": "leaks", "AT_RISK": AT_RISK, "CONTAINED": CONTAINED}


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path, models={"require_verdict": False}, pages={"tokens": "operators.toml", "port": 1})
    made.now = time.time()
    made.daemon = made.gateway()
    made.maker = Maker(made.owner, made.keys["risk-lab"], now=int(made.now))
    made.figures = Figures(made.daemon.store.database, load(made.config_path), clock=lambda: made.now)
    yield made
    made.close()


def offered(site, name="m", word=None, **verdict):
    """A model with a verdict that says ``word``, as the daemon saw it last."""
    path = site.folder / f"{name}.onnx"
    path.write_bytes(name.encode())
    digest = site.daemon.models.add(path, name=name, version="1", actor="op", now=site.now)
    if word:
        site.daemon.models.take_verdict(site.maker.verdict(model=digest, word=word, **verdict), "risk-lab", site.now)
    return seen(site, name)


def seen(site, name="m"):
    site.daemon.watch.turn(site.now)
    site.daemon._write_status(site.now)
    (found,) = [m for m in site.figures.models() if m["id"] == name]
    return found


def alerts(site, name="model-leaks"):
    return [(a["subject"], a["severity"]) for a in site.figures.open_alerts() if a["name"] == name]


@pytest.mark.parametrize("word", [*MODEL_WORDS.values(), "a word of a later release"])
def test_whatever_is_not_the_good_word_leaks_on_alerts_and_pages(site, word):
    found, good = offered(site, word=word), word == MODEL_WORDS["LOW"]
    assert (leaks(found), unjudged(found, site.now), style(found, site.now)) == (
        not good, False, "good" if good else "bad",
    )  # fmt: skip
    assert alerts(site) == ([] if good else [("m 1", "critical")])
    overview = site.figures.overview()
    assert overview["leaking"] == ([] if good else [f"m 1: {word}"])
    assert overview["unsure"] == ""


def test_a_withheld_model_that_leaks_is_a_warning(site):
    found = offered(site, word="vicious")
    site.daemon.models.halt(bytes.fromhex(found["digest"]), actor="op", now=site.now)
    assert leaks(seen(site))
    assert alerts(site) == [("m 1", "warning")]


def test_an_expired_verdict_judges_nothing_but_a_bad_one_stays_bad(site):
    offered(site, "good", "low leakage", expires=60)
    offered(site, "bad", "vicious", expires=60)
    offered(site, "none")
    assert site.figures.overview()["unsure"] == "1 of 3 models have no valid verdict"
    site.now += 61
    assert site.figures.overview()["unsure"] == "2 of 3 models have no valid verdict"  # before the daemon looks again
    good, bad = seen(site, "good"), seen(site, "bad")
    assert (style(good, site.now), style(bad, site.now)) == ("unsure", "bad")
    assert (good["verdict"], good["valid"]) == ("low leakage", False)
    assert alerts(site) == [("bad 1", "warning")]  # what has expired is withheld
    assert site.figures.overview()["unsure"] == "2 of 3 models have no valid verdict"


def shipped(site, *statements):
    """A protected model whose delivery holds these verdicts."""
    maker, path = site.maker, site.folder / "eye.delivery"
    names = [delivery.VERDICT, *(delivery.verdict_name(level) for level in range(1, len(statements)))]
    path.write_bytes(pack(
        maker.files(1), Golden(maker.inputs, maker.labels), Limits(), maker.issuer,
        verdicts=dict(zip(names, statements, strict=True)),
    ))  # fmt: skip
    digest = site.daemon.models.add(path, name="", version="", actor="op", now=site.now)
    site.daemon.watch.turn(site.now)
    (found,) = [m for m in site.figures.models() if m["digest"] == digest.hex()]
    return found


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("other", ["low leakage", "expired", "other bytes", "stranger"])
def test_one_bad_verdict_in_a_protected_models_delivery_is_never_hidden_by_another(site, other, order):
    make = site.maker.verdict
    beside = {
        "low leakage": make,
        "expired": lambda: make(expires=-1),
        "other bytes": lambda: make(model=bytes(32)),
        "stranger": lambda: make(risk=Maker().risk),
    }[other]()
    found = shipped(site, *[make(word="vicious"), beside][::order])
    assert (found["verdict"], leaks(found), found["style"]) == ("vicious", True, "bad")
    assert len(alerts(site)) == 1


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("beside", [{"expires": -1}, {"model": bytes(32)}, {"model": bytes(32), "word": "vicious"}])
def test_a_good_verdict_beside_one_that_does_not_hold_leaves_the_model_unjudged(site, beside, order):
    found = shipped(site, *[site.maker.verdict(), site.maker.verdict(**beside)][::order])
    assert (leaks(found), unjudged(found, site.now), found["style"]) == (False, True, "unsure")
    assert alerts(site) == []


# --- rounds ---------------------------------------------------------------------------------------------------


def ended(site, number, *, ago=30.0, state="done"):
    site.daemon.store.database.execute(
        "INSERT INTO rounds (number, state, record, started, updated) VALUES (?, ?, ?, ?, ?)",
        (number, state, cbor.encode({"round": number}), site.now - ago - 60, site.now - ago),
    )


def reported(site, number, **body):
    site.daemon.store.database.execute(
        "INSERT INTO reports (kind, subject, sender, at, body) VALUES ('round', ?, 'risk-lab', ?, ?)",
        (str(number), site.now, cbor.encode(body)),
    )


def told(site):
    """Alerts about rounds, what leaks and what is not known."""
    site.daemon.watch.turn(site.now)
    overview = site.figures.overview()
    return alerts(site, "round-leaks"), overview["leaking"], overview["unsure"]


def test_the_newest_audited_round_decides(site):
    assert told(site) == ([], [], "")
    ended(site, 9)
    assert told(site) == ([], [], "no federated round has been audited")  # nobody is expected to
    reported(site, 9, verdict="contained", reason="masks")
    assert told(site) == ([], [], "")
    ended(site, 10)
    reported(site, 10, verdict="leaks", reason="pictures come back", leakage_bound=80.0)
    assert told(site) == ([("round 10", "critical")], ["round 10: leaks"], "")
    ended(site, 11)
    assert told(site)[0] == [("round 10", "critical")]  # its own audit may still come
    reported(site, 11, accuracy=0.9)  # of somebody who measures, not an audit
    assert told(site)[0] == [("round 10", "critical")]
    ended(site, 12)
    reported(site, 12, error="the weights are gone")
    assert told(site) == (
        [("round 10", "critical"), ("audits of rounds", "warning")],
        ["round 10: leaks"],
        "round 12 could not be audited: the weights are gone",
    )
    ended(site, 13)
    reported(site, 13, verdict="at risk", reason="no bound")
    assert told(site) == ([], [], "round 13 is at risk: no bound")
    ended(site, 14)
    reported(site, 14, verdict="contained", reason="masks")
    assert told(site) == ([], [], "")


def test_a_round_that_nobody_audits_any_more_is_a_warning_after_an_hour(site):
    ended(site, 1, ago=AUDIT_WITHIN_S + 1)
    assert told(site)[0] == []
    reported(site, 1, verdict="contained", reason="masks")
    ended(site, 2, ago=AUDIT_WITHIN_S - 1)
    ended(site, 3, ago=AUDIT_WITHIN_S + 1, state="aborted")
    assert told(site)[0] == []
    site.now += 2
    assert told(site) == (
        [("audits of rounds", "warning")], [], "round 2 ended over 1 h ago and nobody has audited it",
    )  # fmt: skip


@pytest.mark.parametrize("word", ["leaks", "a word of a later release"])
def test_a_round_with_any_other_word_is_critical(site, word):
    ended(site, 1)
    reported(site, 1, verdict=word, reason="why")
    assert round_audits(site.daemon.store.database, site.now).leaking
    assert told(site)[:2] == ([("round 1", "critical")], [f"round 1: {word}"])
    assert style_of_round(word) == "bad"


def test_the_rule_names_the_round_and_the_reason(site):
    ended(site, 7)
    reported(site, 7, verdict="leaks", reason="the attack identifies 90% of the canaries")
    facts = Facts(
        now=0, store_bytes=0, store_limit_bytes=1, not_ready={}, trust_expires=1e12, trust_error="",
        certificate_expires=0, rejected_last_minute=0, silent=(), silent_count=0, models=(), aborted_round=None,
        round_audits=round_audits(site.daemon.store.database, site.now),
    )  # fmt: skip
    (found,) = rules(facts, AlertsSection())
    assert found.text == "an audit of round 7 says “leaks”: the attack identifies 90% of the canaries"


def test_a_renewed_delivery_of_a_version_is_held_and_nothing_else_takes_its_version(site):
    first = shipped(site, site.maker.verdict())
    again = shipped(site, site.maker.verdict(serial=2))  # other bytes, and the same would run
    assert again["digest"] != first["digest"]
    assert (again["id"], again["version"]) == (first["id"], first["version"])
    assert "held" in again["withheld"]
    plain = site.folder / "plain.onnx"
    plain.write_bytes(b"plain")
    with pytest.raises(DataError, match="eye 1 is here already with other bytes"):
        site.daemon.models.add(plain, name="eye", version="1", actor="op", now=site.now)
    other = Maker(site.maker.issuer, site.maker.risk, levels=2)  # what would run at its first level is not the same
    path = site.folder / "other.delivery"
    path.write_bytes(pack(other.files(1), Golden(other.inputs, other.labels), Limits(), other.issuer))
    with pytest.raises(DataError, match="eye 1 is here already with other bytes") as refused:
        site.daemon.models.add(path, name="", version="", actor="op", now=site.now)
    assert "next version" in refused.value.hint


@pytest.mark.parametrize(("stop", "state"), [("halt", "halted"), ("roll_back", "rolled back"), ("bad", "halted")])
def test_a_fresh_shipment_of_a_version_that_was_stopped_stays_stopped(site, stop, state):
    models, first = site.daemon.models, bytes.fromhex(shipped(site, site.maker.verdict())["digest"])
    if stop == "bad":
        models.begin_rollout(first, Plan(stages=(100,), min_failures=1), actor="op", now=site.now)
        models.take_report(first, "dev-cam1", good=False, reason="slow", now=site.now)
    elif stop == "halt":
        models.halt(first, actor="op", now=site.now)
    else:
        models.set_state(first, state, actor="op", now=site.now)
    again = shipped(site, site.maker.verdict(serial=2))
    assert (again["state"], again["withheld"]) == (state, state)
    models.offer_again(first, actor="op", now=site.now)
    models.offer_again(bytes.fromhex(again["digest"]), actor="op", now=site.now)
    assert "held" in shipped(site, site.maker.verdict(serial=3))["withheld"]
