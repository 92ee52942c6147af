"""Which rounds are due for an audit, what was found about them, and telling the gateway.

Rules: a round is audited once, oldest first, one at a time; what was found is on disk before it is reported; the
weights are believed only if their SHA-256 is the one that the round began with; a round that cannot be audited is
reported with the reason, so that a missing figure is never taken for a small one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

from edgepriv import files
from edgepriv.errors import EdgeprivError, TemporaryError, UnavailableError, WireError
from edgepriv.risk.round_audit import RoundAnswer, RoundTask, run_round_task

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    from edgepriv.risk.config import RiskConfig
    from edgepriv.risk.metrics import RiskMetrics
    from edgepriv.risk.service import Gateway

LOG = logging.getLogger("edgepriv.risk")
REF_BYTES = 16
MAX_ATTEMPTS = 3
TYPES = {
    "round": int, "privacy": str, "before": bytes, "before_bytes": int, "noise": str, "noise_multiplier": float,
    "clip": float, "statistics": str, "training": dict, "devices": int,
}  # fmt: skip


class RoundWatch:
    """Audits of rounds; one step a poll."""

    def __init__(self, config: RiskConfig, pool: Executor, metrics: RiskMetrics) -> None:
        self._config, self._pool, self._metrics = config, pool, metrics
        self.folder = config.risk.state / "rounds"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.active = bool(config.rounds.canaries)
        self._running: tuple[dict[str, Any], Future[RoundAnswer]] | None = None
        self._attempts: dict[int, int] = {}

    def step(self, gateway: Gateway) -> None:
        """Report what is found, start what is due; connection failures go to the caller."""
        self._collect()
        if not self.active:
            return
        for told in self._waiting(gateway):
            if not self._tell(gateway, told) and self._running is None:
                self._start(gateway, told)

    def _waiting(self, gateway: Gateway) -> list[dict[str, Any]]:
        """Ended rounds without a report, the malformed ones left out and counted."""
        try:
            rows = gateway.query("rounds").get("rounds", [])
        except (TemporaryError, UnavailableError, WireError):
            raise
        except EdgeprivError as error:
            LOG.warning("rounds are not audited: %s", error)
            self.active = False
            return []
        good = [row for row in rows if _well_formed(row)] if isinstance(rows, list) else []
        if len(good) < len(rows):
            self._metrics.rejected.labels("round").inc()
        return good

    def _tell(self, gateway: Gateway, told: dict[str, Any]) -> bool:
        """Send what is on disk about this round and these weights; False where nothing is."""
        path = self.folder / f"{told['round']}.json"
        if not path.is_file():
            return False
        kept = json.loads(path.read_text())
        if kept["before"] != told["before"].hex():
            return False
        gateway.query("report", kind="round", subject=str(told["round"]), report=kept["report"])
        LOG.info("round %d: %s", told["round"], kept["report"].get("verdict") or kept["report"].get("error"))
        return True

    def _start(self, gateway: Gateway, told: dict[str, Any]) -> None:
        number, settings = told["round"], self._config.rounds
        limit = int(settings.max_weights_mb * 2**20)
        if not 0 < told["before_bytes"] <= limit:
            self._keep(told, {"error": f"weights of {told['before_bytes']} bytes cannot be had, or are over {limit}"})
            return
        raw = gateway.fetch_object(told["before"][:REF_BYTES], told["before_bytes"], max_bytes=limit)
        if hashlib.sha256(raw).digest() != told["before"]:
            self._metrics.rejected.labels("digest").inc()
            self._failed(told, "the gateway sent other weights than the round began with")
            return
        path = self.folder / "weights.epu"
        path.write_bytes(raw)
        task = RoundTask(told, path, settings, self._config.audit.threads, self._config.audit.device)
        self._running = told, self._pool.submit(run_round_task, task)
        LOG.info("audit of round %d begins", number)

    def _collect(self) -> None:
        if self._running is None or not self._running[1].done():
            return
        told, future = self._running
        self._running = None
        try:
            answer = future.result()
        except Exception as error:  # the worker itself died: the round may be tried again
            answer = RoundAnswer(error=f"the worker ended: {type(error).__name__}")
            self._metrics.rejected.labels("worker").inc()
        if answer.report is not None:
            (self.folder / f"{told['round']}.html").write_text(answer.html, encoding="utf-8")
            self._keep(told, answer.report)
            self._metrics.rounds.labels(answer.report["verdict"]).inc()
        elif answer.final:
            self._keep(told, {"error": answer.error[:300]})
        else:
            self._failed(told, answer.error)

    def _failed(self, told: dict[str, Any], error: str) -> None:
        """Try again, at most three times."""
        self._attempts[told["round"]] = self._attempts.get(told["round"], 0) + 1
        LOG.warning("audit of round %d failed: %s", told["round"], error)
        if self._attempts[told["round"]] >= MAX_ATTEMPTS:
            self._keep(told, {"error": error[:300]})

    def _keep(self, told: dict[str, Any], report: dict[str, Any]) -> None:
        path = self.folder / f"{told['round']}.json"
        kept = {"round": told["round"], "before": told["before"].hex(), "report": report}
        files.replace(path, json.dumps(kept).encode())
        if "error" in report:
            LOG.warning("round %d cannot be audited: %s", told["round"], report["error"])
            self._metrics.rounds.labels("failed").inc()

    def found(self) -> list[dict[str, Any]]:
        """What is on disk, by round."""
        return found_in(self.folder)


def found_in(folder: Any) -> list[dict[str, Any]]:
    """Read the audits of rounds in a folder, by number."""
    rows = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(rows, key=lambda row: int(row["round"]))


def _well_formed(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    for name, kind in TYPES.items():
        # gateway.toml may say clip = 10: a whole number is a number too
        if type(row.get(name)) not in ((int, float) if kind is float else (kind,)):
            return False
    return len(row["before"]) == 32 and row["round"] >= 0 and row["clip"] > 0
