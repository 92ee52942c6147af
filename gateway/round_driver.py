"""Drives federated rounds: hands messages, offers and uploads to `gateway.conductor` and carries out what it answers.

What the conductor wants stored is written into the same transaction as the batch that caused it, and its answers leave
after the commit. A complete upload is a row of ``uploads`` until the conductor drops it, so that a restart finds it.
Settings of rounds come from ``[rounds]`` of gateway.toml; ``edgepriv-gateway rounds start`` opens one.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepriv.errors import ConfigError, DataError, EdgeprivError, RefusedError, WireError
from edgepriv.federated.lineage import name_models, named_models
from edgepriv.primitives import random_bytes
from edgepriv.wire import cbor
from edgepriv.wire.messages import Ack
from edgepriv.wire.rounds import RoundResult, step_message
from edgepriv.wire.update import decode_update
from gateway.conductor import Conductor
from gateway.references import References, sender_names
from gateway.root import Root, shard_names
from gateway.round_plan import RoundPlan
from gateway.round_ports import DropUpload, OpenUpload, Tell
from gateway.round_start import check_packets
from gateway.sampling import choose_devices
from gateway.store import store_failed, unpack
from gateway.transfers import PARTIAL, Transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from edgepriv.wire.messages import Offer, RoundMessage
    from edgepriv.wire.trust import TrustList
    from gateway.parted import PartedRound
    from gateway.roster import Roster
    from gateway.round_ports import Outgoing
    from gateway.round_record import RoundRecord
    from gateway.store import Store
    from gateway.transfers import Transfers

log = logging.getLogger("gateway.rounds")
HEAD = "rounds_head"
DRIVER_KEYS = {
    "auto",
    "pause_s",
    "min_devices",
    "active_s",
    "model",
    "weights",
    "shards",
    "root",
    "root_shard",
    "references",
}
FIXED_BY_DRIVER = {"round", "base", "base_bytes", "tensors", "seed", "population", "part", "reference", "reference_by"}
MAX_WEIGHTS_BYTES = 1 << 30


class RoundTable:
    """What rounds need stored, in the gateway's own store."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock

    def save(self, round_number: int, raw: bytes, part: str = "") -> None:
        """Replace the bytes of a running round or part, within the running transaction or in one of its own."""
        now = self._clock()
        with self._store.batch():
            if part:
                self._save_part(round_number, raw, part)
                return
            self._store.database.execute(
                "INSERT INTO rounds (number, state, record, snapshot, started, updated) VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (number) DO UPDATE SET state = excluded.state, snapshot = excluded.snapshot,"
                " updated = excluded.updated",
                (round_number, str(cbor.decode(raw, max_bytes=256 << 20)["state"]), cbor.encode({}), raw, now, now),
            )

    def _save_part(self, number: int, raw: bytes, part: str) -> None:
        run = self._store.database.execute
        run("DELETE FROM round_parts WHERE number = ? AND part = ?", (number, part))
        if raw:
            run("INSERT INTO round_parts (number, part, snapshot) VALUES (?, ?, ?)", (number, part, raw))

    def load(self) -> list[bytes]:
        """Bytes of the rounds that are not closed, and of their parts."""
        rows = self._store.database.query("SELECT snapshot FROM rounds WHERE snapshot IS NOT NULL ORDER BY number")
        rows += self._store.database.query("SELECT snapshot FROM round_parts ORDER BY number, part")
        return [bytes(raw) for (raw,) in rows]

    def close(self, record: RoundRecord) -> None:
        """Keep the record for ever and forget the bytes."""
        body = {f.name: _plain(getattr(record, f.name)) for f in dataclasses.fields(record)}
        with self._store.batch():
            self._store.database.execute(
                "UPDATE rounds SET state = ?, record = ?, snapshot = NULL, updated = ? WHERE number = ?",
                (record.outcome, cbor.encode(body), record.ended, record.round),
            )
            self._store.database.execute("DELETE FROM round_parts WHERE number = ?", (record.round,))

    def record(self, number: int) -> dict[str, Any]:
        """The record of an ended round; empty where there is none."""
        rows = self._store.database.query("SELECT record FROM rounds WHERE snapshot IS NULL AND number = ?", (number,))
        return dict(unpack(rows[0][0])) if rows else {}

    def newest(self) -> dict[str, Any]:
        """The record of the last round that succeeded; empty where none has."""
        rows = self._store.database.query(
            "SELECT record FROM rounds WHERE snapshot IS NULL AND state = 'done' ORDER BY number DESC LIMIT 1"
        )
        return dict(unpack(rows[0][0])) if rows else {}

    def last(self) -> dict[str, Any]:
        """The record of the last round that has ended; empty where none has."""
        rows = self._store.database.query(
            "SELECT record FROM rounds WHERE snapshot IS NULL ORDER BY number DESC LIMIT 1"
        )
        return dict(unpack(rows[0][0])) if rows else {}

    def ended(self) -> int:
        """How many rounds have ended."""
        return int(self._store.database.query("SELECT count(*) FROM rounds WHERE snapshot IS NULL")[0][0])

    def records(self) -> list[dict[str, Any]]:
        """Records of ended rounds, oldest first."""
        rows = self._store.database.query("SELECT record FROM rounds WHERE snapshot IS NULL ORDER BY number")
        return [unpack(raw) for (raw,) in rows]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


class RoundDriver:
    """Joins the conductor with transfers and the downlink; all calls come from the work loop."""

    def __init__(
        self,
        store: Store,
        roster: Roster,
        transfers: Transfers,
        settings: dict[str, Any],
        put: Callable[[str, Any], None],
        clock: Callable[[], float],
        packet_bytes: Callable[[], int] = lambda: MAX_WEIGHTS_BYTES,
    ) -> None:
        self._store, self._roster, self._transfers, self._put, self._clock = store, roster, transfers, put, clock
        self._packet_bytes = packet_bytes
        self.settings = check_settings(settings)
        self._pruned, self._not_started = -1, ""
        shard_names(self.settings)
        sender_names(self.settings)
        self.table = RoundTable(store, clock)
        self._offers: dict[tuple[str, bytes], Offer] = {}
        self._progressed: dict[tuple[str, bytes], float] = {}
        self._next_auto = 0.0
        self.root, self.references = Root(self), References(self, store)
        self.conductor = self._restore()
        if not self.head() and settings.get("weights"):
            self.set_weights(Path(str(settings["weights"])), str(settings.get("model", "model")))

    def _restore(self) -> Conductor:
        folder = self._store.folder / "rounds"
        folder.mkdir(parents=True, exist_ok=True)
        conductor = Conductor(folder, self.table, self._roster.trust)
        conductor.deferred = True
        rows = self._store.database.query("SELECT digest, path FROM uploads")
        staged = {bytes(digest): self._store.blobs / path for digest, path in rows}
        with self._store.batch():
            self._carry_out(conductor.resume(self._clock(), staged))
        return conductor

    def recover(self) -> None:
        """Start again from the store after a transaction failed."""
        self._offers.clear()
        self.conductor = self._restore()

    def trust_changed(self) -> None:
        """Another trust list is in force."""
        self.conductor.trust = self._roster.trust

    # --- what ingest hands in -----------------------------------------------------------------------------

    def offered(self, party: str, offer: Offer, now: float) -> None:
        """See RoundsPort."""
        self._transfers.check(offer)
        if offer.what == PARTIAL:
            self.conductor.shard_objection(offer.round, party)
            self._transfers.offer(party, offer, now)
            return
        self._offers[party, offer.digest] = offer
        self._carry_out(self.conductor.on_offer(party, offer, now))

    def progressed(self, party: str, digest: bytes, now: float) -> None:
        """See RoundsPort; passed on once a second."""
        if now - self._progressed.get((party, digest), 0.0) >= 1.0:
            self._progressed[party, digest] = now
            self.conductor.on_progress(party, digest, now)

    def uploaded(self, transfer: Transfer, path: Path, now: float) -> None:
        """See RoundsPort."""
        if transfer.what == PARTIAL:
            self._take_partial(transfer, path, now)
            return
        self._store.database.execute(
            "INSERT INTO uploads (round, party, digest, path, size, meta, state, received)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (round, party) DO UPDATE SET digest = excluded.digest, path = excluded.path",
            (
                transfer.round, transfer.party, transfer.digest, transfer.path, transfer.incoming.size,
                cbor.encode(transfer.meta), "staged", now,
            ),
        )  # fmt: skip
        self._transfers.detach(transfer)
        self._carry_out(self.conductor.on_complete(transfer.party, transfer.digest, path, now))

    def _take_partial(self, transfer: Transfer, path: Path, now: float) -> None:
        """A shard's partial sum is staged: it is in the round's durable sum, or refused, before it is acknowledged."""
        outcome, reason = "stored", ""
        try:
            self._carry_out(self.conductor.take_shard(transfer.round, transfer.party, path, now))
        except (WireError, DataError, ConfigError) as error:
            outcome, reason = "rejected", str(error)[:400]
        self._transfers.drop(transfer)
        self._put(transfer.party, Ack(transfer.digest, outcome, reason))

    def stepped(self, party: str, message: RoundMessage, now: float) -> None:
        """See RoundsPort."""
        self._carry_out(self.conductor.on_message(party, message, now))

    def flush(self) -> None:
        """See RoundsPort."""
        self.conductor.flush()

    def tick(self, now: float) -> None:
        """Let time pass; opens the next round where ``auto`` is set. Runs in a transaction of its own."""
        if not (self.conductor.rounds or self.conductor.over or self.settings.get("auto")):
            return
        with self._store.batch():
            self._carry_out(self.conductor.tick(now))
            self._prune()
            if self.settings.get("auto") and now >= self._next_auto and not self.running:
                self._next_auto = now + float(self.settings.get("pause_s", 10.0))
                self._open_automatically(now)

    def _open_automatically(self, now: float) -> None:
        enough = self.root.shards or len(self.active_devices(now)) >= int(self.settings.get("min_devices", 1))
        if not enough or not self.head() or self.settings.get("root"):
            return
        try:
            self.start({}, now)
        except EdgeprivError as error:  # a spent budget or a missing reference: the operator's, not the daemon's end
            if store_failed(error):
                raise
            if str(error) != self._not_started:
                log.warning("no round was started: %s", error)
            self._not_started = str(error)

    def _prune(self) -> None:
        """Weights of rounds long past are deleted, so that the disk does not grow with the number of rounds."""
        ended = self._pruned if self.running else self.table.ended()
        if ended != self._pruned:
            self._pruned = ended
            head = {self.newest_head()["digest"]} if self.head() else set()
            self.conductor.prune_models(head | self.references.kept())

    @property
    def trust(self) -> TrustList:
        """The trust list in force."""
        return self._roster.trust

    @property
    def running(self) -> list[int]:
        """Numbers of rounds that have not ended."""
        return [number for number, current in self.conductor.rounds.items() if current.record is None]

    # --- what the operator asks ---------------------------------------------------------------------------

    def head(self) -> dict[str, Any]:
        """The global weights that the next round begins with: ``digest``, ``size``, ``model``."""
        return dict(self._store.meta(HEAD) or {})

    def set_weights(self, path: Path, model: str, over: Sequence[str] = ()) -> dict[str, Any]:
        """Make a file of weights the base of the next round (DataError where it is none).

        ``over``: SHA-256 (hex) of the models that it is for; devices that run another one neither train nor use it.
        """
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        named_models(decode_update(raw, max_bytes=MAX_WEIGHTS_BYTES).meta)
        raw = name_models(raw, [bytes.fromhex(digest) for digest in over]) if over else raw
        last = self.last_number()
        head = {"digest": self.conductor.add_model(raw), "size": len(raw), "model": model, "round": last}
        self._store.set_meta(HEAD, head)
        return head

    def active_devices(self, now: float) -> list[str]:
        """Devices that were heard lately and are still trusted."""
        since = now - float(self.settings.get("active_s", 120.0))
        rows = self._store.database.query("SELECT party FROM devices WHERE last_seen >= ? ORDER BY party", (since,))
        listed = {p.name for p in self._roster.trust.with_role("device")}
        return [name for (name,) in rows if name in listed]

    def start(self, changes: dict[str, Any], now: float) -> int:
        """Open a round over the active devices; returns its number.

        Raises:
            RefusedError: there are no weights or no devices, or a round is running.
            ConfigError: a setting does not fit.
        """
        head = self.newest_head()
        if self.settings.get("root"):
            raise RefusedError(f"this gateway is a shard of {self.settings['root']}", hint="start rounds there")
        if not head:
            raise RefusedError(
                "there are no global weights yet", hint="edgepriv-gateway rounds weights FILE --model ID"
            )
        if self.running:
            raise RefusedError(f"round {self.running[0]} is running", hint="wait for it, or stop it: rounds stop")
        settings = {**self.settings, **check_settings(changes)}
        if names := self.root.shards:
            return self._start_sharded(settings, head, names, now)
        devices = list(changes.get("devices", ())) or self.active_devices(now)
        if not devices:
            raise RefusedError("no device has been heard lately", hint="edgepriv-gateway status")
        if settings.get("rule") == "fltrust":
            found = self.references.current(head["digest"], now)
            settings |= {"reference": found.update, "reference_by": found.sender}
        if changes.get("devices"):  # chosen by hand: nothing was drawn, so nothing is amplified
            settings |= {"participation": "all", "sample_share": 1.0}
        plan = self._plan(settings, head, len(devices))
        self._open(plan, choose_devices(devices, plan.participation, plan.sample_share), now)
        return plan.round

    def _open(self, plan: RoundPlan, devices: list[str], now: float) -> None:
        check_packets(plan, devices, self._packet_bytes())
        with self._store.batch():
            self._carry_out(self.conductor.open_round(plan, devices, now))

    def _start_sharded(self, settings: dict[str, Any], head: dict[str, Any], names: tuple[str, ...], now: float) -> int:
        plan = self._plan(settings, head, 0)
        if plan.rule != "mean" or plan.late != "drop":
            raise ConfigError("rounds over shards are plain sums of this round", hint='rule = "mean", late = "drop"')
        with self._store.batch():
            self._carry_out(self.conductor.open_sharded(plan, names, now))
        return plan.round

    def _plan(self, settings: dict[str, Any], head: dict[str, Any], population: int) -> RoundPlan:
        tensors = decode_update(
            self.conductor.model_path(head["digest"]).read_bytes(), max_bytes=MAX_WEIGHTS_BYTES
        ).tensors
        rows = tuple([name, list(array.shape)] for name, array in tensors.items())
        chosen = {k: v for k, v in settings.items() if k not in DRIVER_KEYS}
        if chosen.get("adaptive_clip") and head.get("clip"):
            chosen["clip"] = head["clip"]  # where the rounds on these weights have brought it
        return RoundPlan(
            round=max(self.last_number(), self.root.highest) + 1,
            model=head["model"],
            base=head["digest"],
            base_bytes=head["size"],
            tensors=rows,
            seed=random_bytes(32),
            population=population,
            **chosen,
        )

    def stop(self, number: int, reason: str, now: float) -> None:
        """Abort a round."""
        with self._store.batch():
            self._carry_out(self.conductor.cancel(number, reason, now))

    def _adopt_result(self) -> None:
        """The weights of the last round that succeeded are the base of the next."""
        newest, head = self.table.newest(), self.head()
        if newest and head and newest["publish"] != "partial" and newest["round"] > head.get("round", 0):
            head = {**head, "digest": newest["after"], "size": newest["after_bytes"], "round": newest["round"]}
            head["clip"] = newest.get("clip_after") or head.get("clip", 0.0)
            self._store.set_meta(HEAD, head)

    def newest_head(self) -> dict[str, Any]:
        """`head`, after the last round that succeeded."""
        self._adopt_result()
        return self.head()

    def last_number(self) -> int:
        """The highest number of a round here."""
        return int(self._store.database.query("SELECT coalesce(max(number), 0) FROM rounds")[0][0])

    # --- as a shard of a root (`gateway.uplink`) ----------------------------------------------------------

    def latest_part(self) -> tuple[int, str, str]:
        """Number of the latest part, ``running``, ``done`` or ``out``, and why; zero and ``new`` before the first."""
        rows = self._store.database.query("SELECT number, state, record FROM rounds ORDER BY number DESC LIMIT 1")
        if not rows:
            return 0, "new", ""
        number, state, record = rows[0]
        if state == "done":
            return number, "done", ""
        return (number, "out", str(unpack(record).get("reason", ""))) if state == "aborted" else (number, "running", "")

    def partial(self) -> tuple[int, bytes, Path, int] | None:
        """Number, digest, file and size of the latest part's partial sum, where there is one."""
        number, state, _ = self.latest_part()
        if state != "done":
            return None
        record = self.table.record(number)
        path = self.conductor.model_path(bytes(record["after"]))
        if record["round"] != number or record["publish"] != "partial" or not path.exists():
            return None
        return number, bytes(record["after"]), path, int(record["after_bytes"])

    def open_part(self, plan: RoundPlan, devices: list[str], now: float) -> None:
        """Run this shard's part of the root's round (errors as `start`)."""
        chosen = choose_devices(devices, plan.participation, plan.sample_share)
        if not chosen:
            raise RefusedError("no device of this shard has been heard lately")
        self._open(plan, chosen, now)

    def leave_part(self, running_at_root: int, now: float) -> None:
        """Stop a part that the root no longer waits for."""
        for number in self.running:
            if number != running_at_root:
                self.stop(number, "the root has ended the round", now)

    def adopt(self, head: dict[str, Any]) -> None:
        """The root's weights are here: they are the base of the next round, and the devices of the last are told."""
        kept = {k: head[k] for k in ("digest", "size", "model", "round")}
        with self._store.batch():
            self._store.set_meta(HEAD, kept)
            record = self.table.record(kept["round"])
            if record.get("outcome") != "done":
                return
            told = RoundResult(
                "done", "", kept["digest"], kept["size"], int(head.get("participants", 0)), record["privacy"],
                float(head.get("epsilon", 0.0)), float(head.get("delta", 0.0)),
            )  # fmt: skip
            for device in {name.split("~", 1)[0] for name in record["participants"]}:
                self._put(device, step_message(kept["round"], "result", told))

    def carry_out_parts(self, parent: PartedRound, now: float) -> None:
        """What follows after a part has ended."""
        self._carry_out(self.conductor.parts.carry_out(parent, parent.advance(), now))
        self.conductor.flush()

    def weights(self, ref: bytes) -> tuple[Path, int] | None:
        """Global weights by the beginning of their digest."""
        for path in self.conductor.models.glob(f"{ref.hex()}*"):
            if len(path.name) == 64:
                return path, path.stat().st_size
        return None

    # --- what the conductor answers -----------------------------------------------------------------------

    def _carry_out(self, outgoing: Iterable[Outgoing]) -> None:
        for action in outgoing:
            match action:
                case Tell(device, message):
                    self._put(device, message)
                case OpenUpload(device, digest, _):
                    if offer := self._offers.get((device, digest)):
                        self._transfers.offer(device, offer, self._clock())
                case DropUpload(device, digest):
                    self._drop(device, digest)

    def _drop(self, device: str, digest: bytes) -> None:
        self._offers.pop((device, digest), None)
        self._progressed.pop((device, digest), None)
        self._transfers.drop_digest(device, digest)
        rows = self._store.database.query(
            "SELECT path, size FROM uploads WHERE party = ? AND digest = ?", (device, digest)
        )
        self._store.database.execute("DELETE FROM uploads WHERE party = ? AND digest = ?", (device, digest))
        for path, size in rows:
            (self._store.blobs / path).unlink(missing_ok=True)
            self._store.release(size)


def check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Check the names in ``[rounds]``; values are checked by the plan."""
    known = {f.name for f in dataclasses.fields(RoundPlan)} - FIXED_BY_DRIVER | DRIVER_KEYS
    for key in settings:
        if key not in known and key != "devices":
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"[rounds]: unknown key {key!r}", hint=hint)
    return {k: v for k, v in settings.items() if k != "devices"}
