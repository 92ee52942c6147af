"""The gateway's one work loop: receive, handle and commit, acknowledge, grant, serve, keep house.

Everything that touches the store or a key happens in this loop; the threads beside it only wait for a network (MQTT,
webhooks) or read metrics. `Gateway.step` does one turn without waiting, so that a simulator can run it; `serve` runs
it as a process. A batch that cannot be committed is dropped whole and nothing of it was acknowledged; what it left in
memory is replaced by what the store holds before anything else is done, however long the store stays away.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import sqlite3
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepriv.errors import EdgeprivError, TemporaryError
from edgepriv.keys import load_identity, load_public
from edgepriv.mqtt import Inbound, open_link
from edgepriv.notify import Notifier
from edgepriv.wire import topics
from gateway import outputs
from gateway.answers import Desk
from gateway.commands import CommandQueue
from gateway.database import open_database
from gateway.downlink import Downlink
from gateway.health import HealthServer
from gateway.ingest import Handled, Ingest
from gateway.metrics import Metrics
from gateway.models import HELD, Models
from gateway.presence import Presence
from gateway.rollout import Plan
from gateway.root import QUESTION, root_of
from gateway.roster import Roster
from gateway.round_driver import RoundDriver
from gateway.sessions import Sessions
from gateway.store import STORE_FAILED, Store
from gateway.transfers import Transfers
from gateway.uplink import Uplink
from gateway.watch import Watch
from gateway.webhook import Webhook

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from edgepriv.keys import Identity
    from edgepriv.mqtt import Link
    from gateway.config import Config

log = logging.getLogger("gateway")
STOP_S = 5.0
FAILED_PAUSE_S = 0.5
LOOP_STUCK_S = 30.0
QUIET_KINDS = {"chunk", "fetch"}


def open_store(config: Config, *, create: bool = True) -> Store:
    """Open the store that a configuration names."""
    state = config.gateway.state
    if create:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
    database = open_database(state / "gateway.db", config.store.url_file)
    return Store(database, state, max_bytes=config.store.max_bytes, min_free_bytes=config.store.min_free_bytes)


class Gateway:
    """All parts of one gateway, joined."""

    def __init__(
        self,
        config: Config,
        link: Link,
        store: Store,
        *,
        clock: Callable[[], float] = time.time,
        metrics: Metrics | None = None,
    ) -> None:
        self.config, self.link, self.store, self._clock = config, link, store, clock
        now = clock()
        identity = load_identity(config.gateway.identity)
        self.name = identity.name
        self.roster = Roster(config.gateway.trust, load_public(config.gateway.owner), store, now=now)
        self.roster.check_self(identity)
        self.sessions = Sessions(identity, self.roster, store)
        self.transfers = Transfers(store, config.ingest)
        self.downlink = Downlink(link, self.sessions)
        self.presence = Presence(store)
        self.models = Models(store, self.roster, config.models)
        self.desk = Desk(store, self.roster, self.downlink, self.models)
        self._put_back: list[tuple[str, Any]] = []
        settings = dict(config.rounds)
        self.rounds = RoundDriver(
            store, self.roster, self.transfers, settings, self._put_later, clock, lambda: link.max_packet_bytes
        )
        self.desk.weights = self.rounds.weights
        self.desk.add(QUESTION, {"gateway"}, self.rounds.root.answer)
        self.desk.add("reference", {"risk", "device"}, self.rounds.references.answer)
        self.uplink = self._make_uplink(identity)
        self.ingest = Ingest(
            store, self.roster, self.sessions, self.transfers, self.presence, self.desk,
            rounds=self.rounds, window_s=config.outputs.window_s, max_frame_bytes=config.ingest.max_frame_bytes,
        )  # fmt: skip
        self.metrics = metrics or Metrics()
        self.commands = CommandQueue(store)
        self._register_commands()
        self.webhook = _webhook(config)
        self.totals: Counter[str] = Counter()
        self.watch = Watch(self)
        self._last = {"second": 0.0, "house": now, "publish": now, "status": 0.0, "watch": 0.0}
        self.last_turn = time.monotonic()
        self.failed_batch = ""
        self._must_recover = False
        link.subscribe(topics.up_filter(config.gateway.shard))

    def _make_uplink(self, identity: Identity) -> Uplink | None:
        """The session with the root, where ``[rounds] root`` names one."""
        found = root_of(self.rounds.settings, identity.name)
        if found is None:
            return None
        root, shard = found
        return Uplink(identity, self.roster, self.rounds, self.link, root=root, shard=shard, clock=self._clock)

    def _put_later(self, party: str, message: Any) -> None:
        self._put_back.append((party, message))

    # --- one turn -----------------------------------------------------------------------------------------

    def step(self, packets: list[Inbound] | None = None) -> bool:
        """One turn without waiting; True when there was something to do."""
        packets = self.link.receive(self.config.ingest.batch) if packets is None else packets
        try:
            if self._must_recover:
                self._recover()
            return self._step(packets, self._clock())
        except STORE_FAILED as error:
            self._note_failure(error)
            if self.uplink:
                self.uplink.store_failed(error, packets, self._clock())
            return False
        finally:
            self.last_turn = time.monotonic()

    def _step(self, packets: list[Inbound], now: float) -> bool:
        if self.uplink:
            mine = [p for p in packets if p.topic == self.uplink.topic]
            packets = [p for p in packets if p.topic != self.uplink.topic]
            self._ask_root(self.uplink, mine, now)
        if packets:
            self._handle(packets, now)
        self._turn(now)
        for party, grant in self.transfers.grants(now):
            self.downlink.put(party, grant)
        sent = self.downlink.pump()
        return bool(packets or sent)

    def _ask_root(self, uplink: Uplink, packets: list[Inbound], now: float) -> None:
        for packet in packets:
            uplink.take(packet, now)
        uplink.step(now)
        self._release_replies()

    def _handle(self, packets: list[Inbound], now: float) -> None:
        began = time.perf_counter()
        handled = self.ingest.handle(packets, now)
        self._release_replies()
        self.failed_batch = ""
        self.metrics.batch_seconds.observe(time.perf_counter() - began)
        for packet, one in zip(packets, handled, strict=True):
            self._note(packet, one)

    def _release_replies(self) -> None:
        """After a commit: what was promised may leave now."""
        for party, message in [*self.ingest.take_replies(), *self._put_back]:
            self.downlink.put(party, message)
        self._put_back.clear()

    def _note_failure(self, error: Exception) -> None:
        """A batch was rolled back: nothing is done before memory is again what the store holds."""
        log.error("a batch could not be stored: %s", error)
        self.metrics.batch_failures.inc()
        self.failed_batch = str(error)
        self._must_recover = True
        time.sleep(FAILED_PAUSE_S)

    def _recover(self) -> None:
        """Forget what a failed batch left in memory; every party repeats what was not acknowledged."""
        self._put_back.clear()
        self.sessions.forget()
        self.transfers.load()
        self.rounds.recover()
        self._must_recover = False
        self._release_replies()

    def _note(self, packet: Inbound, one: Handled) -> None:
        self.metrics.received_bytes.inc(len(packet.payload))
        self.metrics.messages.labels(one.kind, one.outcome).inc()
        self.totals[f"{one.kind}_{one.outcome}"] += 1
        if one.outcome == "rejected":
            self.metrics.rejected.labels(one.reason).inc()
            self.totals[f"rejected_{one.reason}"] += 1
        elif one.outcome == "not-acknowledged":
            self.metrics.not_acknowledged.inc()
        level = logging.DEBUG if one.kind in QUIET_KINDS and one.outcome != "rejected" else logging.INFO
        fields = {"party": one.party, "kind": one.kind, "outcome": one.outcome, "reason": one.reason, "bytes": one.size}
        log.log(level, "%s %s %s%s", one.party, one.kind, one.outcome, one.reason and f" ({one.reason})", extra=fields)

    # --- what is due from time to time --------------------------------------------------------------------

    def _turn(self, now: float) -> None:
        due = [
            ("second", 0.5, self._each_second),
            ("publish", self.config.outputs.publish_every_s, self._publish),
            ("house", 60.0, self._keep_house),
            ("watch", 5.0, self.watch.turn),
            ("status", 2.0, self._write_status),
        ]
        for name, every_s, action in due:
            if now - self._last[name] >= every_s or now < self._last[name]:
                self._last[name] = now
                action(now)
                self._release_replies()

    def _each_second(self, now: float) -> None:
        if self.roster.reload(now):
            log.warning("trust list version %d is in force", self.roster.trust.version)
            self.rounds.trust_changed()
        with self.store.batch():
            self.transfers.flush()
        self.presence.flush()
        self.rounds.tick(now)
        self.commands.tick(now)
        self._gauges(now)

    def _publish(self, now: float) -> None:
        settings = self.config.outputs
        if not settings.publish_mqtt and self.webhook is None:
            return
        windows = outputs.finished(self.store.database, before=now - settings.grace_s)
        if not windows or (settings.publish_mqtt and not self.link.connected):
            return
        document, raw = self._document(windows)
        while len(raw) > self.link.max_packet_bytes and len(windows) > 1:  # long model names: in several packets
            windows = windows[: len(windows) // 2]
            document, raw = self._document(windows)
        if settings.publish_mqtt and not self.link.send(f"{topics.ROOT}/{self.name}/out/windows", raw):
            return
        if self.webhook is not None:
            self.webhook.put(document)
        with self.store.batch():
            outputs.mark_published(self.store.database, windows)
        self.metrics.windows_published.inc(len(windows))

    def _document(self, windows: list[dict[str, Any]]) -> tuple[dict[str, Any], bytes]:
        document = {"schema": outputs.SCHEMA, "gateway": self.name, "windows": windows}
        return document, json.dumps(document, separators=(",", ":")).encode()

    def _keep_house(self, now: float) -> None:
        expired = self.store.expire(now - self.config.store.max_age_days * 86_400, now=now)
        if expired:
            log.info("closed %d epochs that are older than the age limit", expired)
        with self.store.batch():
            self.transfers.expire(now)
            self.models.advance_rollouts(self.rounds.active_devices(now), now)

    def _gauges(self, now: float) -> None:
        m = self.metrics
        m.connected.set(self.link.connected)
        m.store_bytes.set(self.store.used_bytes)
        m.store_limit_bytes.set(self.store.max_bytes)
        m.transfers.set(len(self.transfers))
        m.credits.set(self.transfers.open_credits)
        m.downlink.set(self.downlink.waiting)
        m.downlink_dropped.set(self.downlink.dropped)
        m.sent.set(self.downlink.sent)
        m.trust_version.set(self.roster.trust.version)
        m.trust_expires.set(self.roster.trust.expires)
        m.webhook_dropped.set(self.webhook.dropped if self.webhook else 0)
        m.loop.set(now)

    # --- status -------------------------------------------------------------------------------------------

    def _write_status(self, now: float) -> None:
        """A file that `edgepriv-gateway status` and the pages read; replaced whole, never half-written."""
        path = self.config.gateway.state / "status.json"
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(self.status(now)))
        fresh.replace(path)

    def status(self, now: float) -> dict[str, Any]:
        """How the daemon is, in plain figures."""
        count = self.store.database.query
        return {
            "schema": "edgepriv.gateway-status/1",
            "gateway": self.name,
            "pid": os.getpid(),
            "at": now,
            "connected": self.link.connected,
            "ready": not self.readiness(),
            "failed": self.readiness(),
            "trust": {
                "version": self.roster.trust.version,
                "expires": self.roster.trust.expires,
                "error": self.roster.last_error,
            },
            "store": {
                "bytes": self.store.used_bytes,
                "limit_bytes": self.store.max_bytes,
                "frames": count("SELECT count(*) FROM frames WHERE erased = 0")[0][0],
                "outputs": count("SELECT count(*) FROM outputs WHERE erased = 0")[0][0],
                "epochs": count("SELECT count(*) FROM epochs WHERE closed = 0")[0][0],
            },
            "devices": count("SELECT count(*) FROM devices WHERE party LIKE 'dev-%'")[0][0],
            "transfers": len(self.transfers),
            "rounds": {"running": self.rounds.running, **self.rounds.conductor.counters},
            "totals": dict(sorted(self.totals.items())),
            "webhook": {"waiting": self.webhook.waiting, "dropped": self.webhook.dropped} if self.webhook else None,
        }

    def metrics_text(self) -> bytes:
        """See Probe."""
        return self.metrics.text()

    def health(self) -> dict[str, str]:
        """See Probe."""
        stuck = time.monotonic() - self.last_turn
        return {"loop": f"the work loop has not turned for {stuck:.0f} s"} if stuck > LOOP_STUCK_S else {}

    def readiness(self) -> dict[str, str]:
        """See Probe."""
        failed = dict(self.health())
        if not self.link.connected:
            failed["broker"] = "not connected"
        if self.failed_batch:
            failed["store"] = self.failed_batch
        elif self.store.used_bytes >= self.store.max_bytes:
            failed["store"] = "the byte limit is reached: nothing is acknowledged"
        if self.roster.trust.expires <= self._clock():
            failed["trust"] = "the trust list has expired"
        return failed

    # --- commands -----------------------------------------------------------------------------------------

    def _register_commands(self) -> None:
        on = self.commands.on
        on("erase", lambda a, who, now: dict(self.store.erase(a["device"], a["before"], actor=who, now=now)))
        on("round-start", lambda a, _who, now: {"round": self.rounds.start(a, now)})
        on("round-stop", self._stop_round)
        on("round-weights", lambda a, *_: self.rounds.set_weights(Path(a["path"]), a["model"], a.get("over", ())))
        on(
            "round-reference",
            lambda a, _who, now: self.rounds.references.add_files(Path(a["update"]), Path(a["statement"]), now),
        )
        on("model-add", self._add_model)
        on("model-rollout", self._begin_rollout)
        on("model-halt", lambda a, who, now: self._with_model(a, lambda d: self.models.halt(d, actor=who, now=now)))
        on(
            "model-offer",
            lambda a, who, now: self._with_model(a, lambda d: self.models.offer_again(d, actor=who, now=now)),
        )
        on(
            "model-rollback",
            lambda a, who, now: self.models.roll_back(self.models.find(a["model"]), actor=who, now=now),
        )

    def _add_model(self, args: dict[str, Any], actor: str, now: float) -> dict[str, Any]:
        path = Path(args["path"])
        options = {"name": args["name"], "version": args["version"], "only_judge": bool(args.get("only_judge"))}
        before = [m["digest"] for m in self.models.listed(now)]
        digest = self.models.add(path, **options, actor=actor, now=now)
        (added,) = [m for m in self.models.listed(now) if m["digest"] == digest]
        told = {name: added[name] for name in ("digest", "id", "version", "state")}
        return {**told, "held": added["state"] == HELD, "unchanged": digest in before}

    def _with_model(self, args: dict[str, Any], change: Callable[[bytes], None]) -> dict[str, Any]:
        digest = self.models.find(args["model"])
        change(digest)
        return {"digest": digest}

    def _begin_rollout(self, args: dict[str, Any], actor: str, now: float) -> dict[str, Any]:
        digest = self.models.find(args["model"])
        plan = {k: v for k, v in args.items() if k != "model"}
        if "stages" in plan:
            plan["stages"] = tuple(plan["stages"])
        self.models.begin_rollout(digest, Plan(**plan), actor=actor, now=now)
        return {"digest": digest}

    def _stop_round(self, args: dict[str, Any], _actor: str, now: float) -> dict[str, Any]:
        self.rounds.stop(args["round"], str(args.get("reason", "stopped")), now)
        return {"round": args["round"]}

    # --- the end ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Commit what is open, send what waits for a moment, and let go of everything."""
        deadline = time.monotonic() + STOP_S
        with suppress(EdgeprivError, sqlite3.Error), self.store.batch():
            self.transfers.flush()
        with suppress(EdgeprivError, sqlite3.Error):
            self.presence.flush()
        self.downlink.pump()
        while self.downlink.waiting and self.link.connected and time.monotonic() < deadline - STOP_S / 2:
            time.sleep(0.02)
            self.downlink.pump()
        with suppress(EdgeprivError, sqlite3.Error, OSError):
            self._write_status(self._clock())
        self.transfers.close()
        self.downlink.close()
        if self.webhook is not None:
            self.webhook.close()
        self.watch.close()
        self.link.close()
        self.store.close()


def _webhook(config: Config) -> Webhook | None:
    settings = config.outputs
    if settings.webhook_url is None:
        return None
    return Webhook(
        settings.webhook_url,
        secret=settings.webhook_secret,
        timeout_s=settings.webhook_timeout_s,
        queue=settings.webhook_queue,
    )


def lock_state(config: Config) -> int:
    """Hold the state folder for this process; the lock ends with it.

    Raises:
        TemporaryError: another gateway runs on the folder.
    """
    config.gateway.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(config.gateway.state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise TemporaryError(
            f"another gateway runs on {config.gateway.state}", hint="stop it, or name another [gateway] state"
        ) from None
    return fd


def serve(config: Config) -> None:
    """Run the gateway until SIGTERM or SIGINT."""
    lock = lock_state(config)
    stop = _stop_on_signals()
    name = load_identity(config.gateway.identity).name
    store = open_store(config)
    swept = store.sweep()
    if swept:
        log.info("deleted %d files that no row names", swept)
    broker = config.broker
    link = open_link(
        broker.url, name, tls=broker.tls, username=broker.username, password_file=broker.password_file,
        inflight=broker.inflight, max_packet_bytes=broker.max_packet_bytes,
    )  # fmt: skip
    gateway = Gateway(config, link, store)
    health = HealthServer(gateway, config.http.host, config.http.port) if config.http.port else None
    notifier = Notifier()
    log.info("%s serves shard %d at %s", name, config.gateway.shard, broker.url)
    notifier.ready()
    try:
        busy = False
        while not stop:
            packets = (
                link.receive(config.ingest.batch)
                if busy
                else link.wait_inbound(0.02 if gateway.downlink.waiting else 0.1)
            )
            busy = gateway.step(packets)
            notifier.alive()
    finally:
        notifier.stopping()
        if health:
            health.close()
        gateway.close()
        os.close(lock)
    log.info("stopped")


def _stop_on_signals() -> list[int]:
    """A list that a SIGTERM or SIGINT fills."""
    stop: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        stop.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return stop
