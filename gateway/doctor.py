"""``edgepriv-gateway doctor``: what the gateway needs, checked one by one."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgepriv import doctor
from edgepriv.doctor import FAILED, OK, SKIPPED, WARNING, Finding, guarded
from edgepriv.keys import load_identity
from gateway.console import as_state_owner, opened_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.config import Config

DAY_S = 86_400
UNIT, PAGES_UNIT = "edgepriv-gateway.service", "edgepriv-pages.service"
KEYS = Path("/etc/edgepriv/keys")  # hidden from the unit of the pages
PORT_REMEDY = "see who has it: ss -ltnp 'sport = :{}'; if it is not the pages, set another [pages] port"
MOVE = "install -o edgepriv-gateway -g edgepriv-gateway -m 600 {} /etc/edgepriv/secrets/, and name it there"


def examine(config: Config, *, network: bool, running: bool) -> list[Finding]:
    """All findings. ``network``: connect to the broker; not done while the daemon runs, whose place it would take."""
    now = time.time()
    keys = [config.gateway.identity, config.broker.key, config.store.url_file, config.outputs.webhook_secret]
    checks: list[tuple[str, Callable[[], Finding], str]] = [
        ("configuration", partial(_settings, config), ""),
        ("clock", doctor.clock, ""),
        ("disk", partial(doctor.disk, config.gateway.state, min_free_bytes=config.store.min_free_bytes), ""),
        ("key files", partial(doctor.private_files, keys), ""),
        ("readable files", partial(_readable, config), ""),
        ("certificate", partial(doctor.certificate, config.broker.certificate, now=now), "is it a PEM certificate?"),
        ("crypto", doctor.crypto, "pip install 'edgepriv[gateway]'"),
        ("trust list", partial(_trust, config, now), "the owner signs a new one: edgepriv owner sign"),
        ("store", partial(_store, config), "check the path, its owner and the disk"),
        ("pages", partial(_pages, config), ""),
        ("ports", partial(_ports, config, running=running), ""),
        ("broker", partial(_broker, config, network=network, running=running), "systemctl status mosquitto"),
        ("daemon", partial(_daemon, config, now, running=running), "systemctl start edgepriv-gateway"),
    ]
    return [guarded(name, check, remedy) for name, check, remedy in checks]


def _settings(config: Config) -> Finding:
    """What only the rounds themselves look at otherwise, when they begin."""
    from gateway.round_driver import check_settings

    check_settings(dict(config.rounds))
    return Finding("configuration", OK, "every section is understood")


def _ports(config: Config, *, running: bool) -> Finding:
    """May the daemon listen where it is told to? Its own port is taken while it runs; the pages may be running too."""
    http, pages = config.http, config.pages
    why = doctor.port(http.host, http.port) if http.port and not running else ""
    if why:
        remedy = f"set another [http] port, or stop what has it: ss -ltnp 'sport = :{http.port}'"
        return Finding("ports", FAILED, f"[http] cannot listen on {http.host}:{http.port}: {why}", remedy)
    why = doctor.port(pages.host, pages.port) if pages.port else ""
    if why:
        text = f"[pages] {pages.host}:{pages.port}: {why}; all is well where the pages run already"
        return Finding("ports", OK if running else WARNING, text, "" if running else PORT_REMEDY.format(pages.port))
    return Finding("ports", OK, "the daemon has its own" if running else "free")


def _trust(config: Config, now: float) -> Finding:
    own = config.gateway
    trust = doctor.trusted(own.identity, own.owner, own.trust, role="gateway", now=now)
    days = (trust.expires - now) / DAY_S
    state = WARNING if days < doctor.CERTIFICATE_DAYS else OK
    remedy = "the owner signs a new one: edgepriv owner sign" if state == WARNING else ""
    return Finding("trust list", state, f"version {trust.version}, {days:.0f} days left", remedy)


def _readable(config: Config) -> Finding:
    """Can the service's own user read what gateway.toml names? Its unit hands over the two private keys only."""
    public, private = _named(config)
    with as_state_owner(config):
        refused = [name for name, path in {**public, **private}.items() if _refused(path)]
    for name in refused:
        path, unit = {**public, **private}[name], PAGES_UNIT if name.startswith("[pages]") else UNIT
        if not _handed_over(name, unit):
            remedy = MOVE.format(path) if name in private else f"chmod 644 {path}"
            return Finding("readable files", FAILED, f"the service may not read {path}, its {name}", remedy)
    shipped = config.pages.port and doctor.unit_environment(PAGES_UNIT)
    for name in ("[store] url_file", "[pages] key", "[pages] certificate", "[pages] client_ca") if shipped else ():
        path = {**public, **private}.get(name, Path())
        if KEYS in path.parents and not _handed_over(name, PAGES_UNIT):
            text = f"{PAGES_UNIT} does not see {KEYS}, and so not {path}, its {name}"
            return Finding("readable files", FAILED, text, MOVE.format(path))
    return Finding("readable files", OK, f"the service may read the {len(public) + len(private)} that are named")


def _named(config: Config) -> tuple[dict[str, Path], dict[str, Path]]:
    """Public and private files by the names of their settings, without what the unit hands over in any case."""
    public = {
        "[gateway] owner": config.gateway.owner, "[gateway] trust": config.gateway.trust,
        "[broker] ca": config.broker.ca, "[broker] certificate": config.broker.certificate,
        "[pages] certificate": config.pages.certificate, "[pages] client_ca": config.pages.client_ca,
    }  # fmt: skip
    private = {
        "[store] url_file": config.store.url_file, "[outputs] webhook_secret": config.outputs.webhook_secret,
        "[broker] password_file": config.broker.password_file, "[pages] key": config.pages.key,
    }  # fmt: skip
    return {k: v for k, v in public.items() if v}, {k: v for k, v in private.items() if v}


def _refused(path: Path) -> bool:
    try:
        path.open("rb").close()
    except PermissionError:
        return True
    except OSError:  # it is not there: the check that needs it says so
        return False
    return False


def _handed_over(name: str, unit: str) -> bool:
    """Whether the unit names another place itself, as for a credential."""
    section, _, key = name.strip("[").partition("] ")
    return f"EDGEPRIV_{section}__{key}=".upper() in doctor.unit_environment(unit)


def _store(config: Config) -> Finding:
    if config.store.url_file is None and not (config.gateway.state / "gateway.db").is_file():
        return Finding("store", SKIPPED, "the gateway has not run yet")
    with opened_store(config) as store:
        if store.database.kind == "sqlite":
            (answer,) = store.database.query("PRAGMA quick_check(1)")[0]
            if answer != "ok":
                return Finding("store", FAILED, f"the database is damaged: {answer}", "restore a backup")
        kind, share = store.database.kind, store.used_bytes / store.max_bytes
    state = FAILED if share >= 1 else (WARNING if share > config.alerts.store_used_ratio else OK)
    remedy = "raise [store] max_bytes or erase old data" if state != OK else ""
    return Finding("store", state, f"{kind}, {100 * share:.1f} % of its limit", remedy)


def _pages(config: Config) -> Finding:
    if not config.pages.port:
        return Finding("pages", SKIPPED, "they are off")
    from gateway.pages.access import Operators
    from gateway.pages.serve import check_tls

    count = len(Operators(config.pages.tokens).all())
    if not count:
        remedy = "edgepriv-gateway operators add NAME --role operator"
        return Finding("pages", WARNING, "nobody can log in", remedy)
    local = config.pages.host in {"127.0.0.1", "::1", "localhost"}
    if not local and config.pages.certificate is None:
        remedy = 'host = "127.0.0.1" behind a TLS proxy, or set certificate and key'
        return Finding("pages", FAILED, f"served at {config.pages.host} without TLS", remedy)
    check_tls(config.pages)
    return Finding("pages", OK, f"{count} operators may log in")


def _broker(config: Config, *, network: bool, running: bool) -> Finding:
    if not network or running:
        reason = "the daemon has the connection" if running else "not asked for"
        return Finding("broker", SKIPPED, reason)
    b = config.broker
    name = load_identity(config.gateway.identity).name
    return doctor.broker(b.url, name, tls=b.tls, username=b.username, password_file=b.password_file)


def _daemon(config: Config, now: float, *, running: bool) -> Finding:
    import json

    if not running:
        return Finding("daemon", WARNING, "it does not run", "systemctl start edgepriv-gateway")
    status = json.loads((config.gateway.state / "status.json").read_text())
    age = now - float(status["at"])
    if age > 30:
        return Finding(
            "daemon", FAILED, f"its loop has not turned for {age:.0f} s", "systemctl restart edgepriv-gateway"
        )
    if status["failed"]:
        text = "; ".join(f"{name}: {why}" for name, why in status["failed"].items())
        return Finding("daemon", FAILED, text, "journalctl -u edgepriv-gateway")
    return Finding("daemon", OK, "it runs and is ready")
