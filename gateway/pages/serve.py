"""Running the pages as a process of its own, on loopback unless the configuration says otherwise."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

from edgepriv.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from gateway.config import Config


def serve(config: Config) -> None:
    """Serve until told to stop.

    Raises:
        ConfigError: no port, or an address that is not loopback without TLS.
        MissingDependencyError: the extra ``gateway`` is not installed.
    """
    try:
        import uvicorn
        from uvicorn.protocols.http.h11_impl import H11Protocol
    except ImportError:
        raise MissingDependencyError("the pages need uvicorn", hint="pip install 'edgepriv[gateway]'") from None
    from gateway.daemon import open_store
    from gateway.pages.app import Pages

    settings = config.pages
    if not settings.port:
        raise ConfigError("[pages] port is 0", hint="port = 8080")
    if settings.client_ca and not settings.certificate:
        raise ConfigError("[pages] client_ca needs a certificate of the server", hint="certificate = ..., key = ...")
    names: dict[Any, str] = {}

    class NamedProtocol(H11Protocol):
        """Notes the common name of each connection's verified certificate."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if name := _common_name(transport.get_extra_info("peercert")):
                names[transport.get_extra_info("peername")[:2]] = name

        def connection_lost(self, exc: Exception | None) -> None:
            if self.client is not None:
                names.pop(tuple(self.client), None)
            super().connection_lost(exc)

    store = open_store(config)
    pages = Pages(config, store, names=names)
    tls: dict[str, Any] = {}
    if settings.certificate:
        tls = {"ssl_certfile": str(settings.certificate), "ssl_keyfile": str(settings.key) if settings.key else None}
    if settings.client_ca:
        tls |= {"ssl_ca_certs": str(settings.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    try:
        uvicorn.run(
            pages.guarded(),
            host=settings.host,
            port=settings.port,
            http=NamedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=5,
            limit_concurrency=200,
            **tls,
        )
    finally:
        store.close()


def _common_name(certificate: Any) -> str:
    if not certificate:
        return ""
    fields = {key: value for rdn in certificate.get("subject", ()) for key, value in rdn}
    return str(fields.get("commonName", ""))
