"""Running the pages as a process of its own, on loopback unless the configuration says otherwise."""

from __future__ import annotations

import signal
import ssl
import sys
from typing import TYPE_CHECKING, Any

from edgepriv.doctor import port
from edgepriv.errors import ConfigError, MissingDependencyError, UnavailableError
from edgepriv.notify import Notifier

if TYPE_CHECKING:
    import uvicorn

    from gateway.config import Config, PagesSection

NOTIFY_S = 5  # systemd hears of the loop this often; its watchdog waits 30 s


def serve(config: Config) -> None:
    """Serve until told to stop.

    Raises:
        ConfigError: no port, TLS files that cannot be used, or a client CA without a certificate of the server.
        UnavailableError: nothing can listen there.
        MissingDependencyError: the extra ``gateway`` is not installed.
    """
    try:
        import uvicorn
    except ImportError:
        raise MissingDependencyError("the pages need uvicorn", hint="pip install 'edgepriv[gateway]'") from None
    from gateway.daemon import open_store
    from gateway.pages.app import Pages

    settings = config.pages
    if not settings.port:
        raise ConfigError("[pages] port is 0", hint="port = 8080")
    if settings.client_ca and not settings.certificate:
        raise ConfigError("[pages] client_ca needs a certificate of the server", hint="certificate = ..., key = ...")
    check_tls(settings)
    if why := port(settings.host, settings.port):
        raise UnavailableError(
            f"cannot listen on {settings.host}:{settings.port}: {why}",
            hint=f"set another [pages] port, or stop what has it: ss -ltnp 'sport = :{settings.port}'",
        )
    names: dict[Any, str] = {}
    notifier = Notifier()

    async def alive() -> None:
        notifier.alive()

    store = open_store(config)
    try:
        made = uvicorn.Config(
            Pages(config, store, names=names).guarded(),
            host=settings.host,
            port=settings.port,
            http=_naming(names),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=5,
            limit_concurrency=200,
            callback_notify=alive,
            timeout_notify=NOTIFY_S,
            **_tls(settings),
        )
        _run(made, notifier)
    finally:
        notifier.stopping()
        store.close()


def _run(config: uvicorn.Config, notifier: Notifier) -> None:
    """Run the server; a stop is heeded before, while and after it serves."""
    import uvicorn

    served = False

    class Server(uvicorn.Server):
        """Tells systemd when it listens."""

        async def startup(self, sockets: Any = None) -> None:
            nonlocal served
            served = True
            await super().startup(sockets)
            notifier.ready()
            notifier.alive()

    def stop(*_: object) -> None:
        if not served:  # while it serves, uvicorn stops at the signal, and afterwards raises it again, for nobody
            sys.exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    Server(config).run()


def _naming(names: dict[Any, str]) -> Any:
    """A protocol that notes the common name of each connection's verified certificate."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class NamedProtocol(H11Protocol):
        """One connection."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if name := _common_name(transport.get_extra_info("peercert")):
                names[transport.get_extra_info("peername")[:2]] = name

        def connection_lost(self, exc: Exception | None) -> None:
            if self.client is not None:
                names.pop(tuple(self.client), None)
            super().connection_lost(exc)

    return NamedProtocol


def _tls(settings: PagesSection) -> dict[str, Any]:
    """Uvicorn's options: none on plain loopback; with a client CA nobody without a certificate gets a connection."""
    if not settings.certificate:
        return {}
    tls: dict[str, Any] = {
        "ssl_certfile": str(settings.certificate),
        "ssl_keyfile": str(settings.key) if settings.key else None,
    }
    if settings.client_ca:
        tls |= {"ssl_ca_certs": str(settings.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return tls


def check_tls(settings: PagesSection) -> None:
    """Can the files of ``[pages]`` be used (ConfigError)?"""
    if not settings.certificate:
        return
    files = [path for path in (settings.certificate, settings.key, settings.client_ca) if path]
    for path in files:
        if not path.is_file():
            raise ConfigError(f"[pages]: no such file: {path}", hint="make it, or name the right path")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.certificate, settings.key, password="")  # never asks for one
        if settings.client_ca:
            context.load_verify_locations(settings.client_ca)
    except (OSError, ValueError) as error:
        names = ", ".join(map(str, files))
        hint = "PEM files that belong together, the key without a password"
        raise ConfigError(f"[pages]: cannot use {names}: {error}", hint=hint) from None


def _common_name(certificate: Any) -> str:
    if not certificate:
        return ""
    fields = {key: value for rdn in certificate.get("subject", ()) for key, value in rdn}
    return str(fields.get("commonName", ""))
