"""Models for devices: which bytes are offered to whom, and which are withheld until the risk service has judged them.

Rules: a model is an object in the store, offered by its SHA-256. With ``require_verdict`` a model without a verdict
that is signed by a risk key of the trust list, names exactly these bytes and has not expired is withheld from devices
(never from the risk service, which must see it to judge it); so is one that was not judged for every release policy
that ``[models] policies`` names. A halted model is withheld from everybody else. The
device checks the verdict again: the gateway is not trusted with this, it only does not waste the device's time.

A rollout (`gateway.rollout`) offers a model to a growing share of the devices and halts by itself when too many report
a failure; a model without one is offered to all. The first version of an id is offered when it is added; a further one
is held until its rollout begins, or `models offer` offers it to all, also where those before it were halted; a fresh
shipment of a version that was halted or rolled back stays so. Rolling back withholds a version from everybody,
so that the newest earlier one that is on offer is theirs again; a device that has confirmed the newer version keeps it,
because it takes no older one. An id and version name one set of bytes for ever: adding the same file again changes
nothing, other bytes are refused, and so are known bytes under another name. Devices report with the query ``report``
of kind ``model``: ``{"good", "reason"}``.

A *shipment* or *delivery* (`edgepriv.wire.delivery`) holds a protected model, whose true bytes the gateway cannot see.
Its manifest, signed by the owner or an issuer, names the digest that each level will run; the verdicts inside it speak
of those. It is withheld unless there is at least one, and every one is valid, good and of one of these digests. A
renewed delivery (other permissions, a fresh time stamp) may come under the same id and version: it runs the same bytes.

A verdict's bytes: CBOR ``[body, signature]``, the body a byte string (CBOR map) with ``model`` (SHA-256 of the bytes),
``verdict``, ``policy`` (names joined by commas), ``serial``, ``issued``, ``expires`` (Unix seconds), and what only
devices compare: ``purifier``, ``output``, ``scale``, ``mean``, ``colour``; Ed25519 for the use ``verdict``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv import files
from edgepriv.errors import AuthenticationError, DataError, EdgeprivError, MissingFileError, WireError
from edgepriv.wire import cbor
from edgepriv.wire.delivery import read_label
from gateway import rollout
from gateway.rollout import Plan, Rollout, from_fields
from gateway.store import unpack

if TYPE_CHECKING:
    from pathlib import Path

    from edgepriv.wire.delivery import Label
    from gateway.config import ModelsSection
    from gateway.roster import Roster
    from gateway.store import Store

KIND = "model"
OFFERED, HALTED, TO_JUDGE, HELD = "offered", "halted", "only to be judged", "held until its rollout begins"
ROLLED_BACK = "rolled back"
VERDICT_USE = "verdict"
GOOD_VERDICT = "low leakage"
MAX_VERDICT_BYTES = 64 << 10
MOST_NUMBER = 1 << 53


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the risk service says of exactly these bytes."""

    model: bytes
    verdict: str
    policy: str
    serial: int
    issued: int
    expires: int

    @property
    def good(self) -> bool:
        """Whether it admits a model, as far as its word goes."""
        return self.verdict == GOOD_VERDICT


def read_verdict(raw: bytes, roster: Roster, sender: str, now: float) -> Verdict:
    """Check a verdict's signature and fields.

    Raises:
        WireError: malformed.
        AuthenticationError: not signed by ``sender``.
        TrustError: ``sender`` is no risk service that is trusted now.
    """
    match cbor.decode(raw, max_bytes=MAX_VERDICT_BYTES):
        case [bytes() as body, bytes() as signature]:
            pass
        case _:
            raise WireError("not a verdict")
    party = roster.party(sender, now)
    if party.role != "risk":
        raise AuthenticationError("only a risk service signs verdicts")
    party.verify(VERDICT_USE, body, signature)
    fields = cbor.decode_map(body, max_bytes=MAX_VERDICT_BYTES)
    wanted = {"model": bytes, "verdict": str, "policy": str, "serial": int, "issued": int, "expires": int}
    if any(type(fields.get(name)) is not kind for name, kind in wanted.items()) or len(fields["model"]) != 32:
        raise WireError("a verdict lacks a field")
    if any(not 0 <= fields[name] <= MOST_NUMBER for name in ("serial", "issued", "expires")):
        raise WireError("a verdict's serial or time is out of range")
    return Verdict(**{name: fields[name] for name in wanted})


class Models:
    """The models of this gateway; rows of ``objects`` with kind ``model``."""

    def __init__(self, store: Store, roster: Roster, settings: ModelsSection) -> None:
        self._store, self._roster, self._settings = store, roster, settings

    def add(self, path: Path, *, name: str, version: str, actor: str, now: float, only_judge: bool = False) -> bytes:
        """Take a model file into the store; returns its SHA-256. A protected one has a name and version of its own.

        Where anything else of this id is here, and not only to be judged, it is held until its rollout begins. A fresh
        shipment of a version that was halted or rolled back is so, too. A file that is here already under this name
        and version is left alone with its state, rollout and verdict.

        Raises:
            MissingFileError, DataError: nothing there, empty, damaged, a plain model without a name, bytes that are
                here under another name, or a version that is here with other bytes.
            AuthenticationError: a protected model that is signed by nobody who may.
        """
        label, digest = self._read(path)
        if label is not None:
            name, version = name or label.name, version or str(label.version)
        if self._has(digest, name, version, now):
            return digest
        if not name:
            raise DataError(f"{path} does not say which model it is", hint="give --id")
        version = version or "1"
        self._free(name, version, label, now)
        state = TO_JUDGE if only_judge else self._state_of_new(name, version, now)
        meta = {"version": version, "state": state, "verdict": b"", "risk": "", "rollout": {}}
        if label is not None:
            meta |= {"issuer": label.issuer, "runs": list(label.digests), "bundled": list(label.verdicts)}
        self._store.add_object(path, kind=KIND, name=name, meta=meta, now=now)
        self._store.audit(actor, "model-add", {"model": name, "version": version, "digest": digest}, now)
        return digest

    def _has(self, digest: bytes, name: str, version: str, now: float) -> bool:
        """Whether these bytes are here under this name and version, or whatever was left out of the two."""
        found = next((m for m in self.listed(now) if m["digest"] == digest), None)
        if found is None:
            return False
        if (name or found["id"], version or found["version"]) != (found["id"], found["version"]):
            raise DataError(
                f"these bytes are here already, as {found['id']} {found['version']}",
                hint="a file has one id and one version: edgepriv-gateway models list",
            )
        return True

    def _free(self, name: str, version: str, label: Label | None, now: float) -> None:
        """Other bytes may not come under a version that is here, unless they only deliver the same model anew."""
        runs = None if label is None else sorted(label.digests)
        for model in self.listed(now):
            if (model["id"], model["version"]) != (name, version):
                continue
            there = self._meta(model["digest"]).get("runs")
            if runs is None or there is None or sorted(there) != runs:
                hint = "give it a --model-version of its own" if label is None else "publish it as the next version"
                raise DataError(f"{name} {version} is here already with other bytes", hint=hint)

    def _state_of_new(self, name: str, version: str, now: float) -> str:
        """Offered where nothing else of this id was meant for devices; a version that was stopped stays so, too."""
        others = [m for m in self.listed(now) if m["id"] == name and m["state"] != TO_JUDGE]
        same = [m for m in others if m["version"] == version]
        for stopped in (ROLLED_BACK, HALTED):
            if any(m["state"] == stopped for m in same):
                return stopped
        if any(m["stage"] and not m["share"] for m in same):  # its rollout has halted by itself
            return HALTED
        return HELD if others else OFFERED

    def _read(self, path: Path) -> tuple[Label | None, bytes]:
        """Label and SHA-256 of a file; errors as `add`."""
        try:
            if not path.is_file():
                raise MissingFileError(f"no such model: {path}")
            if not path.stat().st_size:
                raise DataError(f"{path} is empty")
            with path.open("rb") as stream:
                label = read_label(stream, self._roster.model_issuers())
            return label, files.sha256(path)
        except OSError as error:
            hint = "the gateway's own user must be able to read it"
            raise DataError(f"cannot read {path}: {error.strerror}", hint=hint) from None

    def listed(self, now: float) -> list[dict[str, Any]]:
        """All models with their state and verdict."""
        rows = self._store.database.query(
            "SELECT digest, name, size, added, meta FROM objects WHERE kind = ? ORDER BY added", (KIND,)
        )
        return [self._describe(bytes(d), name, size, added, unpack(meta), now) for d, name, size, added, meta in rows]

    def _describe(
        self, digest: bytes, name: str, size: int, added: float, meta: dict[str, Any], now: float
    ) -> dict[str, Any]:
        protected = "runs" in meta
        verdict, objection = (self._bundled if protected else self._verdict)(digest, meta, now)
        state = meta.get("state", OFFERED)
        running = from_fields(meta["rollout"]) if meta.get("rollout") else None
        return {
            "id": name, "version": meta.get("version", ""), "digest": digest, "size": size, "added": added,
            "state": state,
            "share": 100 if running is None else (0 if running.state == rollout.HALTED else running.share),
            "stage": stage_text(running) if running else "",
            "protected": protected,
            "verdict": verdict.verdict if verdict else "not audited",
            "verdict_bytes": meta.get("verdict", b""), "risk": meta.get("risk", ""),
            "valid": verdict is not None and verdict.expires > now and not (objection and verdict.good),
            "policy": verdict.policy if verdict else "", "expires": verdict.expires if verdict else 0,
            "withheld": objection or ("" if state == OFFERED else state),
        }  # fmt: skip

    def _verdict(self, digest: bytes, meta: dict[str, Any], now: float) -> tuple[Verdict | None, str]:
        raw = meta.get("verdict", b"")
        if not raw:
            return None, "no verdict of the risk service" if self._settings.require_verdict else ""
        try:
            verdict = read_verdict(raw, self._roster, meta.get("risk", ""), now)
        except Exception as error:
            return None, f"the verdict is not valid: {error}"
        if verdict.model != digest or verdict.expires <= now:
            return verdict, "the verdict has expired" if verdict.model == digest else "the verdict is of other bytes"
        return verdict, self._objection(verdict)

    def _objection(self, verdict: Verdict) -> str:
        """Why a valid verdict does not admit its model; empty where it does."""
        if not self._settings.require_verdict:
            return ""
        if verdict.verdict != GOOD_VERDICT:
            return f"the verdict is {verdict.verdict!r}"
        missing = sorted(set(self._settings.policies) - set(verdict.policy.split(",")))
        return f"it was judged for {verdict.policy}, not for {', '.join(missing)}" if missing else ""

    def _bundled(self, _digest: bytes, meta: dict[str, Any], now: float) -> tuple[Verdict | None, str]:
        """The weakest verdict in a protected model's delivery, and why it is withheld."""
        if meta["issuer"] not in self._roster.model_issuers():
            return None, "its issuer is not trusted any more"
        if not meta["bundled"]:
            needed = self._settings.require_verdict
            return None, "no verdict of the risk service on the bytes that would run" if needed else ""
        known = [self._by_any_risk_service(raw, now) for raw in meta["bundled"]]
        read = sorted((v for v in known if v), key=lambda v: (v.good, v.expires))
        own = [v for v in read if v.model in meta["runs"]]
        weakest = own[0] if own else None
        if len(read) < len(known):
            return weakest, "a verdict in it is not signed by a risk service that is trusted"
        if len(own) < len(read):
            return weakest, "a verdict in it is of other bytes than those that would run"
        if any(v.expires <= now for v in own):
            return weakest, "the verdict has expired"
        return weakest, next(filter(None, map(self._objection, own)), "")

    def _by_any_risk_service(self, raw: bytes, now: float) -> Verdict | None:
        for party in self._roster.trust.with_role("risk"):
            try:
                return read_verdict(raw, self._roster, party.name, now)
            except EdgeprivError:
                continue
        return None

    def offers(self, party: str, role: str, now: float) -> list[dict[str, Any]]:
        """See ModelsPort: all of them for the risk service, those not withheld for a device."""
        listed = self.listed(now)
        return [m for m in listed if role == "risk" or not (m["withheld"] or self._outside(m["digest"], party))]

    def withheld(self, ref: bytes, party: str, role: str, now: float) -> str:
        """See ModelsPort."""
        found = [m for m in self.listed(now) if m["digest"][:16] == ref]
        if role == "risk" or not found:
            return ""
        return str(found[0]["withheld"]) or self._outside(found[0]["digest"], party)

    def _outside(self, digest: bytes, party: str) -> str:
        running = self.rollout_of(digest)
        return "" if running is None or running.offered(party) else "this device is not in the rollout's share yet"

    def take_verdict(self, raw: bytes, sender: str, now: float) -> dict[str, Any]:
        """See ModelsPort; an older serial than the one that is kept is refused."""
        verdict = read_verdict(raw, self._roster, sender, now)
        meta = self._meta(verdict.model)
        if meta.get("verdict"):
            kept = cbor.decode_map(
                cbor.decode(meta["verdict"], max_bytes=MAX_VERDICT_BYTES)[0], max_bytes=MAX_VERDICT_BYTES
            )
            if kept["serial"] > verdict.serial:
                raise WireError("an older verdict than the one that is kept")
        self._set_meta(verdict.model, {**meta, "verdict": raw, "risk": sender})
        self._store.audit(sender, "verdict", {"digest": verdict.model, "verdict": verdict.verdict}, now)
        return {"accepted": True, "model": verdict.model}

    # --- rollouts -----------------------------------------------------------------------------------------

    def rollout_of(self, digest: bytes) -> Rollout | None:
        """The rollout of a model, or None where it is offered to all."""
        fields = self._meta(digest).get("rollout")
        return from_fields(fields) if fields else None

    def begin_rollout(self, digest: bytes, plan: Plan, *, actor: str, now: float) -> None:
        """Offer a model to the first stage's share of the devices."""
        self._set_meta(
            digest, {**self._meta(digest), "state": OFFERED, "rollout": Rollout(digest, plan, now).as_fields()}
        )
        self._store.audit(actor, "rollout-begin", {"digest": digest, "stages": list(plan.stages)}, now)

    def take_report(self, digest: bytes, device: str, *, good: bool, reason: str, now: float) -> None:
        """A device says how a model does; too many failures halt its rollout at once."""
        before = self.rollout_of(digest)
        if before is None:
            return
        after = rollout.report(before, device, good=good, reason=reason[:200])
        self._keep_rollout(digest, before, after, now)

    def advance_rollouts(self, fleet: list[str], now: float) -> None:
        """Go to the next stages where the present ones have passed."""
        for model in self.listed(now):
            before = self.rollout_of(model["digest"])
            if before is not None and not model["withheld"]:
                self._keep_rollout(model["digest"], before, rollout.advance(before, fleet, now), now)

    def _keep_rollout(self, digest: bytes, before: Rollout, after: Rollout, now: float) -> None:
        if after == before:
            return
        self._set_meta(digest, {**self._meta(digest), "rollout": after.as_fields()})
        if (before.state, before.stage) != (after.state, after.stage):
            detail = {"digest": digest, "state": after.state, "share": after.share, "reason": after.reason}
            self._store.audit("gateway", f"rollout-{after.state}", detail, now)

    def halt(self, digest: bytes, *, actor: str, now: float) -> None:
        """Withhold a model from every device that does not run it, and stop its rollout."""
        if running := self.rollout_of(digest):
            self._keep_rollout(digest, running, rollout.halt(running, f"halted by {actor}"), now)
        self.set_state(digest, HALTED, actor=actor, now=now)

    def offer_again(self, digest: bytes, *, actor: str, now: float) -> None:
        """Offer a halted model again; its rollout goes on where it was."""
        if running := self.rollout_of(digest):
            self._keep_rollout(digest, running, rollout.resume(running, now), now)
        self.set_state(digest, OFFERED, actor=actor, now=now)

    def roll_back(self, digest: bytes, *, actor: str, now: float) -> dict[str, Any]:
        """Withhold a version from everybody; the newest earlier one that is on offer is what devices find then.

        Raises:
            MissingFileError: no earlier one is on offer.
        """
        listed = self.listed(now)
        (this,) = [m for m in listed if m["digest"] == digest]
        before = [m for m in listed if m["id"] == this["id"] and m["added"] < this["added"]]
        offered = [m for m in before if m["state"] == OFFERED and not m["withheld"] and m["share"]]
        if not offered:
            raise MissingFileError(
                f"no version of {this['id']} before {this['version']} is on offer",
                hint="edgepriv-gateway models halt withholds this one",
            )
        self.set_state(digest, ROLLED_BACK, actor=actor, now=now)
        kept = offered[-1]
        return {"digest": digest, "offered": kept["digest"], "version": kept["version"], "share": kept["share"]}

    def set_state(self, digest: bytes, state: str, *, actor: str, now: float) -> None:
        """Halt a model or offer it again."""
        self._set_meta(digest, {**self._meta(digest), "state": state})
        self._store.audit(actor, f"model-{state}", {"digest": digest}, now)

    def find(self, name: str) -> bytes:
        """The digest of a model by ``id``, ``id@version`` or the beginning of its digest (MissingFileError if none)."""
        matches = [
            m["digest"]
            for m in self.listed(0.0)
            if name in {m["id"], f"{m['id']}@{m['version']}"} or (len(name) >= 8 and m["digest"].hex().startswith(name))
        ]
        if not matches:
            raise MissingFileError(f"no model {name!r}", hint="edgepriv-gateway models list")
        return bytes(matches[-1])

    def _meta(self, digest: bytes) -> dict[str, Any]:
        rows = self._store.database.query("SELECT meta FROM objects WHERE ref = ? AND kind = ?", (digest[:16], KIND))
        if not rows:
            raise WireError("a verdict of a model that is not here")
        return dict(unpack(rows[0][0]))

    def _set_meta(self, digest: bytes, meta: dict[str, Any]) -> None:
        self._store.database.execute("UPDATE objects SET meta = ? WHERE ref = ?", (cbor.encode(meta), digest[:16]))


def stage_text(running: Rollout) -> str:
    """A rollout in words."""
    good = sum(1 for state, _ in running.reports.values() if state == rollout.GOOD)
    bad = len(running.reports) - good
    words = (
        f"rollout {running.state}: stage {running.stage + 1} of {len(running.plan.stages)}, {good} good, {bad} failed"
    )
    return f"{words}; {running.reason}" if running.reason else words
