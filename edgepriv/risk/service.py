"""The risk service: audits offered models and signs verdicts, audits rounds on canaries, watches for drift.

Rules: what the gateway says is a claim: a model is audited only if its bytes have the digest it was offered under, and
the verdict names that digest. What is signed is what the stored audit was of: its bytes, policies, purifier and
preprocessing; after a change of the settings that it depends on, or when it is old, the model is audited again. The
model's bytes are opened in the workers' child processes, which hold no key; the signing key stays here. One step does
everything that is due and never waits for an audit, and `close` kills the workers, so a stop takes effect at once; what
ran is queued again. One offer that cannot be dealt with is counted and does not keep the others waiting.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from typing import TYPE_CHECKING, Any, Protocol

from edgepriv import files
from edgepriv.errors import EdgeprivError, TemporaryError, UnavailableError, WireError
from edgepriv.risk.audit_settings import settings_digest
from edgepriv.risk.drift import Audited, DriftWatch, keep_drift
from edgepriv.risk.jobs import Job, JobQueue
from edgepriv.risk.metrics import RiskMetrics
from edgepriv.risk.round_watch import RoundWatch
from edgepriv.risk.signed_verdict import DAY_S, says, statement, verdict_bytes
from edgepriv.risk.worker import AuditAnswer, AuditTask, run_task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor, Future
    from pathlib import Path

    from edgepriv.risk.config import RiskConfig
    from edgepriv.risk.drift import Drift
    from edgepriv.risk.reconstruction.auditors import Pipeline

LOG = logging.getLogger("edgepriv.risk")
REF_BYTES = 16
RENEW_SHARE = 0.25  # a verdict is signed again in the last quarter of its life
REFUSED_WAIT_S = 600.0
CONNECTION = (TemporaryError, UnavailableError)  # the session's fault, not one offer's


class Gateway(Protocol):
    """What the service needs of its session with the gateway; :class:`edgepriv.client.GatewayClient` is one."""

    def query(self, what: str, **args: Any) -> dict[str, Any]:
        """Ask the gateway."""

    def fetch_object(self, ref: bytes, size: int, *, max_bytes: int = ...) -> bytes:
        """Fetch a model's bytes."""

    def close(self) -> None:
        """End the session."""


class RiskService:
    """State and one step of the service.

    Args:
        config: the file.
        connect: opens a session with the gateway.
        sign: ``(use, message) -> signature`` of the risk key.
        pipelines: release policies to audit under, as the device applies them.
        pool: where audits run.
        clock: Unix seconds.
    """

    def __init__(
        self,
        config: RiskConfig,
        connect: Callable[[], Gateway],
        sign: Callable[[str, bytes], bytes],
        pipelines: Sequence[Pipeline],
        pool: Executor,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config, self._connect, self._sign, self._clock = config, connect, sign, clock
        self._pipelines, self._pool = tuple(pipelines), pool
        self._settings = settings_digest(config.audit, self._pipelines)
        self.folder = config.risk.state
        for name in ("models", "reports"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.jobs = JobQueue(self.folder / "jobs.db", max_jobs=config.audit.max_jobs)
        self.metrics = RiskMetrics()
        self.rounds = RoundWatch(config, pool, self.metrics)
        self._drift = DriftWatch(min_outputs=config.drift.min_outputs, threshold=config.drift.threshold)
        self._gateway: Gateway | None = None
        self._running: dict[bytes, Future[AuditAnswer]] = {}
        self._sent: dict[bytes, float] = {}
        self._watched = self._refused = -1e18
        if again := self.jobs.recover():
            LOG.info("%d audits were interrupted and are queued again", again)

    def step(self) -> None:
        """Do everything that is due now; connection failures are logged and tried again at the next step."""
        self._collect()
        try:
            gateway = self._session()
            offers = self._offers(gateway)
            self._enqueue(offers)
            self._start(gateway)
            self._report(gateway, offers)
            self._watch(gateway)
            self._rounds(gateway)
            self.metrics.connected.set(1)
        except (TemporaryError, UnavailableError, WireError) as error:
            LOG.warning("the gateway cannot be reached: %s", error)
            self._disconnect()
        self.metrics.show_jobs(self.jobs.counts(), self.jobs.refused)

    def close(self) -> None:
        """Keep what is finished, kill the workers, end the session; what ran is queued again and not counted."""
        self._collect(stopping=True)
        for digest in self._running:
            self.jobs.give_back(digest)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._disconnect()
        self.jobs.close()

    def _session(self) -> Gateway:
        if self._gateway is None:
            self._gateway = self._connect()
            LOG.info("connected to %s", self.config.risk.gateway)
        return self._gateway

    def _disconnect(self) -> None:
        self.metrics.connected.set(0)
        if self._gateway is not None:
            self._gateway.close()
            self._gateway = None

    def _offers(self, gateway: Gateway) -> list[dict[str, Any]]:
        """Models that the gateway offers, the malformed ones left out and counted."""
        rows = gateway.query("models").get("models", [])
        good = []
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, dict) and isinstance(row.get("digest"), bytes) and len(row["digest"]) == 32:
                good.append(row)
            else:
                self.metrics.rejected.labels("offer").inc()
        return good

    def _enqueue(self, offers: list[dict[str, Any]]) -> None:
        now = self._clock()
        for offer in offers:
            size = offer.get("size")
            if offer.get("protected"):  # nobody without a permission has its bytes: its owner has them judged
                continue
            if isinstance(size, int) and self.jobs.add(offer["digest"], str(offer.get("id", ""))[:200], size, now):
                LOG.info("model %s (%s) is queued", offer.get("id"), offer["digest"].hex()[:12])
                continue
            job = self.jobs.find(offer["digest"])
            if job is not None and (why := self._outdated(job, now)) and self.jobs.again(job.digest):
                LOG.info("model %s is audited again: %s", job.name, why)

    def _outdated(self, job: Job, now: float) -> str:
        """Why what was concluded about a model is no answer to today's question; empty where it is one."""
        if job.state not in {"done", "failed"}:
            return ""
        if job.settings != self._settings:
            return "it was judged under other settings"
        old = now - job.finished > self.config.audit.report_days * DAY_S
        return "the report is old" if old and job.state == "done" else ""

    def _start(self, gateway: Gateway) -> None:
        at_once = getattr(self._pool, "workers", self.config.audit.workers)
        while len(self._running) < at_once and (job := self._next()) is not None:
            path = self._model_file(gateway, job)
            if path is None:
                continue
            task = AuditTask(path, self.config.audit, self._pipelines, job.name)
            try:
                self._running[job.digest] = self._pool.submit(run_task, task)
            except Exception:  # a cluster that is gone: the restarted service joins it again, and no model pays
                self.jobs.give_back(job.digest)
                raise
            LOG.info("audit of %s begins", job.name)

    def _next(self) -> Job | None:
        return self.jobs.take(self._clock(), settings=self._settings)

    def _model_file(self, gateway: Gateway, job: Job) -> Path | None:
        """Fetch a model's bytes, check their digest, and keep them; None where that fails."""
        path = self.folder / "models" / f"{job.digest.hex()}.onnx"
        if path.is_file() and hashlib.sha256(path.read_bytes()).digest() == job.digest:
            return path
        limit = int(self.config.audit.max_model_mb * 2**20)
        if not 0 < job.size <= limit:
            words = f"{job.size} bytes are over the limit of {limit}"
            self.jobs.fail(job.digest, words, self._clock())
            return None
        try:
            raw = gateway.fetch_object(job.digest[:REF_BYTES], job.size, max_bytes=limit)
        except CONNECTION as error:
            self.jobs.postpone(job.digest, str(error), self._clock())
            raise
        except EdgeprivError as error:
            self._not_now(job, "fetch", str(error))
            return None
        if hashlib.sha256(raw).digest() != job.digest:
            self._not_now(job, "digest", "the gateway sent other bytes than it offered")
            return None
        files.replace(path, raw)
        return path

    def _not_now(self, job: Job, kind: str, error: str) -> None:
        """The gateway's fault: count it and ask again later."""
        LOG.warning("model %s is not had: %s", job.name, error)
        self.metrics.rejected.labels(kind).inc()
        self.jobs.postpone(job.digest, error, self._clock())

    def _collect(self, *, stopping: bool = False) -> None:
        """Take what finished audits found; a worker that dies as the service stops says nothing of its model."""
        for digest, future in [(d, f) for d, f in self._running.items() if f.done()]:
            if stopping and (future.cancelled() or future.exception() is not None):
                continue
            del self._running[digest]
            try:
                answer = future.result()
            except Exception as error:  # the worker died, with nothing but this model in its hands
                LOG.warning("audit of %s: %s", digest.hex()[:12], error)
                self.metrics.rejected.labels("worker").inc()
                self.jobs.worker_died(digest, str(error) or type(error).__name__, self._clock())
            else:
                self._keep(digest, answer)

    def _keep(self, digest: bytes, answer: AuditAnswer) -> None:
        now, report = self._clock(), answer.report
        if report is not None and report["sha256"] != digest.hex():
            answer = AuditAnswer(error="the audit was of other bytes than the model's", final=True)
        if report is None or answer.report is None:
            LOG.warning("audit of %s failed: %s", digest.hex()[:12], answer.error)
            self.metrics.audits.labels("failed").inc()
            if answer.final:
                self.jobs.fail(digest, answer.error, now)
            else:
                self.jobs.postpone(digest, answer.error, now)
            return
        folder = self.folder / "reports"
        (folder / f"{digest.hex()}.json").write_text(json.dumps(answer.report, indent=2))
        (folder / f"{digest.hex()}.html").write_text(answer.html)
        if answer.indicator:
            (folder / f"{digest.hex()}.indicator.json").write_bytes(answer.indicator)
        for policy, png in answer.grids:
            (folder / f"{digest.hex()}.{policy.replace(':', '-')}.png").write_bytes(png)
        self.jobs.finish(digest, answer.report, now)
        self.metrics.audits.labels(answer.report["verdict"]).inc()
        self.metrics.audit_seconds.observe(float(answer.report["duration_s"]))
        LOG.info("verdict on %s: %s", digest.hex()[:12], answer.report["verdict"])

    def _report(self, gateway: Gateway, offers: list[dict[str, Any]]) -> None:
        """Send a signed verdict where the gateway's is missing, near its end, or says something else."""
        now = self._clock()
        for offer in offers:
            job = self.jobs.find(offer["digest"])
            if job is None or job.state != "done" or job.report is None or self._outdated(job, now):
                continue
            try:
                said = statement(job.report, job.digest)
                if not self._due(offer, said, now):
                    continue
                self._sent[job.digest] = now
                raw = self._signed(said, now)
                gateway.query("verdict", verdict=raw)
            except (*CONNECTION, WireError):
                raise
            except EdgeprivError as error:
                LOG.warning("no verdict on %s: %s", job.name, error)
                self.metrics.rejected.labels("verdict").inc()
                continue
            (self.folder / "reports" / f"{job.digest.hex()}.verdict").write_bytes(raw)
            self.metrics.verdicts.inc()

    def _due(self, offer: dict[str, Any], said: dict[str, Any], now: float) -> bool:
        expires, life = offer.get("expires", 0), self.config.audit.verdict_days * DAY_S
        fresh = isinstance(expires, int | float) and expires - now > RENEW_SHARE * life
        recently = now - self._sent.get(offer["digest"], -1e18) < max(10.0, self.config.risk.poll_s * 3)
        return not (fresh and says(offer.get("verdict_bytes"), said)) and not recently

    def _signed(self, said: dict[str, Any], now: float) -> bytes:
        serial = self.jobs.next_serial(now)
        return verdict_bytes(said, serial=serial, now=now, days=self.config.audit.verdict_days, sign=self._sign)

    def _rounds(self, gateway: Gateway) -> None:
        """Audit rounds; what the gateway refuses of one of them does not end the service."""
        try:
            self.rounds.step(gateway)
        except (*CONNECTION, WireError):
            raise
        except EdgeprivError as error:
            LOG.warning("a round is not reported: %s", error)
            self.metrics.rejected.labels("round").inc()

    def _watch(self, gateway: Gateway) -> None:
        """Compare the fleet's released outputs with the audits; a refusal is asked about again later."""
        now = self._clock()
        if now - self._refused < REFUSED_WAIT_S or now - self._watched < self.config.drift.every_s:
            return
        self._watched = now
        try:
            told = gateway.query("windows")
        except (TemporaryError, UnavailableError, WireError):
            raise
        except EdgeprivError as error:
            LOG.warning("no drift alerts: %s", error)
            self._refused = now
            return
        windows = told.get("windows")
        self._drift.take(windows if isinstance(windows, list) else [])
        self._drift.take_models(told.get("models"))
        done = self.jobs.listed("WHERE state = 'done'")
        audited = [Audited(job.digest, job.name, (job.report or {}).get("class_counts", [])) for job in done]
        before = set(self.alerts)
        found = self._drift.look(audited)
        for one in found:
            self.metrics.drift.labels(one.model, one.digest[:12]).set(one.index)
            if one.alert and one.key not in before:
                LOG.warning("released outputs of %s drift from the audit: index %.2f", one.model, one.index)
                self.metrics.alerts.inc()
        keep_drift(self.folder, found)

    @property
    def alerts(self) -> dict[str, Drift]:
        """Models whose released outputs drift from their audit now, by digest (by name: an older gateway)."""
        return self._drift.alerts
