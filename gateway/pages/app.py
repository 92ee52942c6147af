"""The Starlette application of the operator pages.

Rules: every answer carries a strict content-security policy and forbids caching; there is no script but our own files
and every page reads without them. Reading needs a session; a change needs the role ``operator``, the session's CSRF
token and a request from this origin. Forms are at most 16 KB. Changes are commands that the daemon carries out and
audits. What is refused is logged, and audited where somebody was logged in.
"""

from __future__ import annotations

import hmac
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from edgepriv.errors import DataError, EdgeprivError
from gateway import commands
from gateway.pages import formats
from gateway.pages.access import LOGINS_PER_MINUTE, Operators, Rate, Sessions
from gateway.pages.figures import Figures, whole_number
from gateway.pages.guard import Guard
from gateway.pages.live import Live

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from gateway.config import Config
    from gateway.pages.access import Session
    from gateway.store import Store

log = logging.getLogger("gateway.pages")
HERE = Path(__file__).parent
COOKIE = "edgepriv_session"
COMMAND_S = 10.0
# form action -> (command of the daemon, fields that are passed on)
ACTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "model-halt": ("model-halt", ("model",)),
    "model-offer": ("model-offer", ("model",)),
    "model-rollout": ("model-rollout", ("model",)),
    "model-rollback": ("model-rollback", ("model",)),
    "round-start": ("round-start", ()),
    "round-stop": ("round-stop", ("round",)),
}


class Pages:
    """Handlers; one object for each process."""

    def __init__(self, config: Config, store: Store, *, names: dict[Any, str] | None = None) -> None:
        self.config, self.store = config, store
        self.figures = Figures(store.database, config)
        self.operators = Operators(config.pages.tokens)
        self.sessions = Sessions(self.operators)
        self.logins = Rate(LOGINS_PER_MINUTE)
        self.live = Live(self.figures)
        self.certificates = names if names is not None else {}
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=select_autoescape(default=True), trim_blocks=True
        )
        self._templates.filters.update(formats.FILTERS)

    def app(self) -> Starlette:
        """The application with its guard around it."""
        get, post = ["GET"], ["POST"]
        routes = [
            Route("/", self._read("overview.html", self._overview), methods=get),
            Route("/fleet", self._read("fleet.html", self._fleet), methods=get),
            Route("/rounds", self._read("rounds.html", self._rounds), methods=get),
            Route("/rounds/{number:int}", self._read("round.html", self._round), methods=get),
            Route("/models", self._read("models.html", self._models), methods=get),
            Route("/storage", self._read("storage.html", self._storage), methods=get),
            Route("/alerts", self._read("alerts.html", self._alerts), methods=get),
            Route("/audit", self._read("audit.html", self._audit), methods=get),
            Route("/live", self._live, methods=get),
            Route("/login", self._login_page, methods=get),
            Route("/login", self._login, methods=post),
            Route("/logout", self._logout, methods=post),
            Route("/do/{action}", self._do, methods=post),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ]
        handlers: Any = {HTTPException: self._error, DataError: self._bad, EdgeprivError: self._bad}
        return Starlette(routes=routes, exception_handlers=handlers)

    def guarded(self) -> Guard:
        """What a server serves: limits and headers before anything else."""
        rate = Rate(self.config.pages.requests_per_minute)
        return Guard(self.app(), rate, secure=self.config.pages.certificate is not None)

    # --- reading ------------------------------------------------------------------------------------------

    def _read(self, template: str, gather: Callable[[Request], dict[str, Any]]) -> Callable[[Request], Any]:
        async def page(request: Request) -> Response:
            session = self._session(request)
            if session is None:
                return RedirectResponse("/login", status_code=303)
            values = await run_in_threadpool(gather, request)
            return await run_in_threadpool(self._render, template, request, session, values)

        return page

    def _render(
        self, template: str, request: Request, session: Session | None, values: dict[str, Any], status: int = 200
    ) -> HTMLResponse:
        shown = {
            "session": session,
            "path": request.url.path,
            "query": dict(request.query_params),
            "daemon": self.figures.status(),
            "risk_url": self.config.pages.risk_pages_url,
            "now": time.time(),
            "said": request.query_params.get("said", "")[:200],
            **values,
        }
        return HTMLResponse(self._templates.get_template(template).render(shown), status_code=status)

    def _overview(self, _request: Request) -> dict[str, Any]:
        figures, overview = self.figures, self.figures.overview()
        return {
            "signature": overview["signature"], "overview": overview, "counts": figures.fleet_counts(),
            "running": figures.running(),
        }  # fmt: skip

    def _fleet(self, request: Request) -> dict[str, Any]:
        query = request.query_params
        search, silent = query.get("search", "")[:48], query.get("silent") == "1"
        page = self.figures.fleet(search, whole_number(query.get("page"), 1), only_silent=silent)
        return {"page": page, "search": search, "silent": silent, "counts": self.figures.fleet_counts()}

    def _rounds(self, request: Request) -> dict[str, Any]:
        page = self.figures.rounds(whole_number(request.query_params.get("page"), 1))
        return {"page": page, "running": self.figures.running(), "series": self.figures.round_series()}

    def _round(self, request: Request) -> dict[str, Any]:
        found = self.figures.round(min(int(request.path_params["number"]), 1 << 60))
        if found is None:
            raise HTTPException(404, "There was no such round.")
        return {"round": found}

    def _models(self, _request: Request) -> dict[str, Any]:
        return {"models": self.figures.models()}

    def _storage(self, request: Request) -> dict[str, Any]:
        totals, page = self.figures.storage(whole_number(request.query_params.get("page"), 1))
        return {"totals": totals, "page": page}

    def _alerts(self, _request: Request) -> dict[str, Any]:
        overview = self.figures.overview()
        return {"signature": overview["signature"], "open": overview["alerts"], "past": self.figures.past_alerts()}

    def _audit(self, request: Request) -> dict[str, Any]:
        return {"page": self.figures.audit(whole_number(request.query_params.get("page"), 1))}

    async def _live(self, request: Request) -> Response:
        if self._session(request) is None:
            raise HTTPException(401, "Log in first.")
        return self.live.response(request, lambda: self._still_open(request))

    # --- log-in -------------------------------------------------------------------------------------------

    def _session(self, request: Request) -> Session | None:
        cookie = request.cookies.get(COOKIE, "")
        session = self.sessions.find(cookie) or self._by_certificate(request)
        if session is None and cookie and request.url.path != "/login":
            client = request.client.host if request.client else "?"
            log.warning("a cookie from %s is no session (forged, ended or expired): %r", client, request.url.path[:200])
        return session

    def _still_open(self, request: Request) -> bool:
        """Whether a stream's reader may go on reading; asked again and again, so it logs nothing."""
        try:
            cookie = request.cookies.get(COOKIE, "")
            return (self.sessions.find(cookie) or self._by_certificate(request)) is not None
        except EdgeprivError:  # the operators' file cannot be trusted now
            return False

    def _by_certificate(self, request: Request) -> Session | None:
        """With a client CA the name in the certificate is the log-in; its session lives beside the connection."""
        name = self.certificates.get(request.client and (request.client.host, request.client.port))
        operator = self.operators.by_name(name) if name else None
        if operator is None:
            return None
        return self.live.certificate_session(operator)

    async def _login_page(self, request: Request) -> Response:
        if self._session(request):
            return RedirectResponse("/", status_code=303)
        empty = not await run_in_threadpool(self.operators.all)
        return self._render("login.html", request, None, {"wrong": False, "empty": empty})

    async def _login(self, request: Request) -> Response:
        self._same_origin(request)
        client = request.client.host if request.client else "?"
        form = await request.form()
        if not self.logins.allow(client):
            self._note(f"page:{client}", "login-limited", {})
            raise HTTPException(429, "Too many attempts. Wait a minute.")
        operator = self.operators.by_token(str(form.get("token", ""))[:200])
        if operator is None:
            self._note(f"page:{client}", "login-refused", {})
            return self._render("login.html", request, None, {"wrong": True, "empty": False}, status=403)
        key, session = self.sessions.begin(operator)
        self._note(f"page:{session.name}", "login", {"role": session.role})
        answer = RedirectResponse("/", status_code=303)
        secure = self.config.pages.certificate is not None
        answer.set_cookie(COOKIE, key, httponly=True, samesite="strict", secure=secure, path="/")
        return answer

    async def _logout(self, request: Request) -> Response:
        await self._change(request)
        self.sessions.end(request.cookies.get(COOKIE, ""))
        answer = RedirectResponse("/login", status_code=303)
        answer.delete_cookie(COOKIE, path="/")
        return answer

    # --- changes ------------------------------------------------------------------------------------------

    async def _change(self, request: Request) -> tuple[Session, dict[str, str]]:
        """The session and fields of a change that really comes from a page of ours."""
        self._same_origin(request)
        session = self._session(request)
        if session is None:
            raise HTTPException(401, "Log in first.")
        fields = {str(k): str(v)[:1000] for k, v in (await request.form()).items()}
        if not hmac.compare_digest(fields.pop("csrf", "").encode(), session.csrf.encode()):
            self._note(f"page:{session.name}", "forged-request", {"path": request.url.path})
            raise HTTPException(403, "This form was not made for you. Reload the page.")
        return session, fields

    @staticmethod
    def _same_origin(request: Request) -> None:
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
        host = request.headers.get("host", "")
        foreign = origin is not None and origin.split("://", 1)[-1] != host
        if foreign or (site is not None and site not in {"same-origin", "none"}):
            log.warning("a request from another site was refused: %s", request.url.path)
            raise HTTPException(403, "Requests from other sites are refused.")

    async def _do(self, request: Request) -> Response:
        session, fields = await self._change(request)
        action = str(request.path_params["action"])
        if session.role != "operator":
            self._note(f"page:{session.name}", "refused", {"action": action[:48], "role": session.role})
            raise HTTPException(403, "A viewer cannot change anything.")
        if action not in ACTIONS:
            raise HTTPException(404, "There is no such action.")
        command, names = ACTIONS[action]
        args: dict[str, Any] = {name: fields.get(name, "") for name in names}
        if "round" in args:
            args["round"] = whole_number(args["round"], 0)
        said = await run_in_threadpool(self._carry_out, session, command, args)
        target = {"round": "/rounds", "model": "/models"}[action.split("-", maxsplit=1)[0]]
        return RedirectResponse(f"{target}?said={said}", status_code=303)

    def _carry_out(self, session: Session, command: str, args: dict[str, Any]) -> str:
        """Ask the daemon; the answer, as text for the next page."""
        from urllib.parse import quote

        now, actor = time.time(), f"page:{session.name}"
        number = commands.submit(self.store, actor, command, args, now, timeout_s=COMMAND_S)
        try:
            commands.wait(self.store, number, COMMAND_S)
        except EdgeprivError as error:
            return quote(f"Refused: {error}"[:180])
        return quote("Done.")

    def _note(self, actor: str, action: str, detail: dict[str, Any]) -> None:
        log.warning("%s %s %s", actor, action, detail)
        with self.store.batch():
            self.store.audit(actor[:80], action, detail, time.time())

    # --- errors -------------------------------------------------------------------------------------------

    async def _error(self, request: Request, error: HTTPException) -> Response:
        values = {"status": error.status_code, "text": error.detail}
        return self._render("error.html", request, self._session(request), values, status=error.status_code)

    async def _bad(self, request: Request, error: EdgeprivError) -> Response:
        status = 400 if isinstance(error, DataError) else 503
        values = {"status": status, "text": str(error)}
        return self._render("error.html", request, self._session(request), values, status=status)
