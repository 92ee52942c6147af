"""Models on a device: stage, verify, self-test, switch atomically, roll back. No network, thread or clock of its own.

State machine, one small file (``state.json``) that is replaced atomically; everything else is immutable folders:

* ``current`` is what runs; ``last_good`` stays pinned on the disk as long as it is allowed (``min_version``, revoked).
* ``stage`` unpacks a bundle beside them; ``verify`` checks signatures, version, permission and the verdict against
  the exact bytes that will run; ``self_test`` runs golden inputs (accuracy, latency, memory); ``switch`` makes it
  current *on trial*; ``confirm`` ends the trial and only then raises ``min_version``.
* A failure at any point leaves ``current`` as it was, stores the reason and reports it; the same bundle is not tried
  again. A cut of power leaves one of the states above: `recover` rolls an unconfirmed trial back after two attempts.
* Health is local golden inference, never connectivity: a bad network must not roll a good model back.

What a delivery holds: `packing`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import files
from edgepriv.device import packing
from edgepriv.device.infer import load_spec
from edgepriv.device.verdicts import check_verdict, verdict_path
from edgepriv.errors import DataError, EdgeprivError, MissingFileError, RefusedError, TrustError
from edgepriv.selective_encryption import bundle_files, manifest
from edgepriv.selective_encryption.restore import open_level

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from edgepriv.device.verdicts import Release
    from edgepriv.keys import Identity
    from edgepriv.selective_encryption.restore import Restored

    Runner = Callable[[Restored], Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]]

PERMISSION, CARRIER = "permission", "carrier.onnx"
MAX_REASONS = 32
MAX_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom the device believes, from its pinned ``trust.cbor``.

    ``release``: what a verdict must have been reached for.
    """

    issuers: Collection[bytes]
    risk_keys: Collection[bytes]
    require_verdict: bool = False
    revoked: Collection[str] = ()
    release: Release | None = None


@dataclass(frozen=True, slots=True)
class State:
    """The whole durable state."""

    current: str = ""
    last_good: str = ""
    trial: str = ""
    attempts: int = 0
    min_version: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    floor_s: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """One self-test. ``quality`` is an accuracy (``unit`` empty) or a PSNR (``unit`` dB)."""

    quality: float
    unit: str
    latency_s: float
    rss_bytes: int


class ModelStore:
    """The models of one device under ``folder``.

    Args:
        folder: private to the device.
        identity: opens permissions.
        trust: whom to believe.
        log: takes one line for each event.
    """

    def __init__(
        self, folder: Path, identity: Identity, trust: Trust, *, log: Callable[[str], None] = lambda _: None
    ) -> None:
        self.folder, self.identity, self.trust, self._log = folder, identity, trust, log
        (folder / "versions").mkdir(parents=True, exist_ok=True, mode=0o700)
        self.state = self._read()

    # --- durable state ---------------------------------------------------------------------------------------

    def _read(self) -> State:
        path = self.folder / "state.json"
        if not path.is_file():
            return State()
        try:
            return State(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} is damaged", hint="remove the folder and fetch the model again") from error

    def _write(self, state: State) -> None:
        """Replace the state file; after this returns, a cut of power cannot lose it."""
        files.replace(self.folder / "state.json", json.dumps(asdict(state)).encode())
        self.state = state

    def raise_floor(self, seconds: int) -> None:
        """Note the latest time that a trusted signature stated; it never goes back."""
        if seconds > self.state.floor_s:
            self._write(replace(self.state, floor_s=seconds))

    def _refuse(self, name: str, reason: str) -> None:
        """Remember why this delivery under this permission was refused; a new permission may be tried."""
        refused = self._with_reason(name, reason)
        self._write(replace(self.state, refused=refused, trial="", attempts=0))
        self._log(f"model {name[:12]} refused: {reason}")

    def _with_reason(self, name: str, reason: str) -> dict[str, str]:
        path = self._place(name) / PERMISSION
        attempt = _attempt(name, path.read_bytes() if path.is_file() else None)
        return dict(list({**self.state.refused, attempt: reason}.items())[-MAX_REASONS:])

    # --- one delivery, step by step --------------------------------------------------------------------------

    def stage(self, delivery: Path, permission: bytes | None = None) -> str:
        """Unpack a fetched delivery beside the running model; returns its name (SHA-256 of the file, hex).

        Raises:
            RefusedError: it was refused before.
            DataError: not a delivery, or the disk has no room for it.
        """
        name = packing.file_digest(delivery).hex()
        attempt = _attempt(name, permission)
        if attempt in self.state.refused:
            raise RefusedError(f"this delivery was refused before: {self.state.refused[attempt]}")
        place = self._place(name)
        if not place.is_dir():
            size = delivery.stat().st_size
            if shutil.disk_usage(self.folder).free < 2 * size:
                raise DataError(f"no room to stage {size} bytes", hint="free the disk; the running model is untouched")
            part = place.with_name(place.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            packing.unpack(delivery, part)
            files.rename(part, place)
        if permission is not None:
            files.replace(place / PERMISSION, permission)
        return name

    def verify(self, name: str) -> None:
        """Check everything that can be checked without running it.

        Raises:
            EdgeprivError: the reason; the caller refuses the delivery.
        """
        paper, _ = self._papers(name)
        body = self._delivery(name)
        lowest = self.state.min_version.get(paper.name, 0)
        if paper.binding.version < lowest:
            raise TrustError(f"version {paper.binding.version} is older than {lowest}, which ran here before")
        running = self._version(self.state.current, paper.name)
        if running is not None and paper.binding.version <= running and name != self.state.current:
            raise TrustError(f"version {paper.binding.version} does not follow the running version {running}")
        if name in self.trust.revoked or paper.binding.carrier.hex() in self.trust.revoked:
            raise TrustError("the model is revoked")
        for file_name, digest in body["files"].items():
            if packing.file_digest(self._place(name) / file_name) != digest:
                raise DataError(f"{file_name} is not the file that was signed", hint="fetch the model again")
        self.open_judged(name).wipe()

    def self_test(self, name: str, run: Runner, *, clock: Callable[[], float], rss: Callable[[], int]) -> Measured:
        """Run the golden inputs on exactly the bytes that will run; never the network.

        Args:
            name: a verified delivery.
            run: makes a function ``inputs -> logits`` from a restored model.
            clock: monotonic seconds.
            rss: resident bytes of this process.

        Raises:
            RefusedError: too inaccurate, too slow or too large.
        """
        golden = packing.Golden.decode((self._place(name) / packing.GOLDEN).read_bytes())
        limits = packing.Limits(**self._delivery(name)["limits"])
        infer = run(self.open(name))
        infer(golden.inputs[:1])  # the first inference pays for lazy set-up
        times, scores = [], []
        for number, one in enumerate(golden.inputs):
            began = clock()
            output = infer(one[None])
            times.append(clock() - began)
            scores.append(golden.score(number, output))
        unit = "" if golden.labelled else "dB"
        found = Measured(float(np.mean(scores)), unit, float(np.median(times)), rss())
        _judge(found, limits)
        return found

    def switch(self, name: str) -> None:
        """Make a tested delivery the running one, on trial; one atomic write."""
        state = self.state
        last_good = state.current if state.current != name else state.last_good
        self._write(replace(state, current=name, last_good=last_good, trial=name, attempts=0))
        self._log(f"model {name[:12]} runs on trial")

    def confirm(self) -> None:
        """End the trial after a health pass: only now older versions become forbidden."""
        state = self.state
        if not state.trial:
            return
        paper, _ = self._papers(state.current)
        lowest = {**state.min_version, paper.name: paper.binding.version}
        self._write(replace(state, trial="", attempts=0, min_version=lowest))
        self.raise_floor(paper.issued_s)
        self._log(f"model {state.current[:12]} is confirmed")
        self._clean()

    def roll_back(self, reason: str) -> str:
        """Give up the trial: the last good model runs again, if it is still allowed; returns what runs.

        Raises:
            RefusedError: nothing is left that may run.
        """
        bad, good = self.state.current, self.state.last_good
        refused = self._with_reason(bad, reason)
        allowed = bool(good) and self._allowed(good)
        self._write(replace(self.state, current=good if allowed else "", trial="", attempts=0, refused=refused))
        self._log(f"model {bad[:12]} rolled back: {reason}")
        if not allowed:
            raise RefusedError(f"rolled back ({reason}), and no good model is left", hint="fetch a model")
        return good

    def recover(self) -> str:
        """After a start: finish or undo what a cut of power left; returns what runs ("" if nothing)."""
        for part in (self.folder / "versions").glob("*.part"):
            shutil.rmtree(part, ignore_errors=True)
        state = self.state
        if state.trial and state.attempts >= MAX_ATTEMPTS:
            return self.roll_back("the device went down twice during the trial")
        if state.trial:
            self._write(replace(state, attempts=state.attempts + 1))
        return self.state.current

    def install(
        self,
        delivery: Path,
        permission: bytes | None,
        run: Runner,
        *,
        clock: Callable[[], float],
        rss: Callable[[], int],
    ) -> Measured:
        """Stage, verify, test and switch; any failure is stored as the reason, and ``current`` stays.

        Raises:
            EdgeprivError: the reason.
        """
        name = self.stage(delivery, permission)
        try:
            self.verify(name)
            measured = self.self_test(name, run, clock=clock, rss=rss)
        except EdgeprivError as error:
            self._refuse(name, str(error))
            self._clean()
            raise
        self.switch(name)
        return measured

    # --- what runs -------------------------------------------------------------------------------------------

    def open(self, name: str = "") -> Restored:
        """Open a staged delivery (default: the current one) with its permission, in memory.

        Raises:
            EdgeprivError: see `restore.open_level`; no session can start on decoys.
        """
        name = name or self.state.current
        if not name:
            raise MissingFileError("no model is installed", hint="edgepriv model pull")
        paper, signed = self._papers(name)
        stored = bundle_files.read_stored(self._place(name), paper)
        permission = self._place(name) / PERMISSION
        if not permission.is_file():
            raise TrustError("no permission for this model", hint="ask the owner: edgepriv grant")
        now_s = max(self.state.floor_s, paper.issued_s)
        return open_level(signed, permission.read_bytes(), stored, self.identity, self.trust.issuers, now_s=now_s)

    def open_judged(self, name: str = "") -> Restored:
        """As `open`; where the owner's policy demands it, only with a good verdict on these bytes and this release."""
        name = name or self.state.current
        restored = self.open(name)
        if self.trust.require_verdict:
            path, keys = verdict_path(self._place(name), restored.level), self.trust.risk_keys
            about: dict[str, Any] = {"release": self.trust.release}
            try:
                about["spec"] = load_spec(self._place(name) / CARRIER)
                self.raise_floor(check_verdict(path, restored.digest, keys, self.state.floor_s, **about))
            except BaseException:
                restored.wipe()
                raise
        return restored

    def report(self) -> dict[str, Any]:
        """What the device tells about its models: what runs, and why others do not."""
        paper = self._papers(self.state.current)[0] if self.state.current else None
        return {
            "model": paper.name if paper else "",
            "version": paper.binding.version if paper else 0,
            "digest": self.state.current,
            "trial": bool(self.state.trial),
            "refused": dict(self.state.refused),
        }

    # --- parts -----------------------------------------------------------------------------------------------

    def revoked(self) -> bool:
        """Whether the owner has revoked what runs."""
        return bool(self.state.current) and not self._allowed(self.state.current)

    def place(self) -> Path:
        """Folder of the current model."""
        return self._place(self.state.current)

    def _place(self, name: str) -> Path:
        return self.folder / "versions" / name

    def _papers(self, name: str) -> tuple[manifest.Manifest, bytes]:
        return bundle_files.read_manifest(self._place(name), self.trust.issuers)

    def _delivery(self, name: str) -> dict[str, Any]:
        path = self._place(name) / packing.SIGNED_LIST
        if not path.is_file():
            raise DataError(f"the delivery lacks {packing.SIGNED_LIST}")
        return packing.read_list(path.read_bytes(), self.trust.issuers, (bundle_files.MANIFEST, packing.GOLDEN))

    def _version(self, name: str, model: str) -> int | None:
        if not name:
            return None
        paper, _ = self._papers(name)
        return paper.binding.version if paper.name == model else None

    def _allowed(self, name: str) -> bool:
        """Whether the last good model may run again: still there, not revoked, not below ``min_version``."""
        try:
            paper, _ = self._papers(name)
        except EdgeprivError:
            return False
        revoked = name in self.trust.revoked or paper.binding.carrier.hex() in self.trust.revoked
        return not revoked and paper.binding.version >= self.state.min_version.get(paper.name, 0)

    def _clean(self) -> None:
        """Remove staged folders that are neither running nor pinned."""
        keep = {self.state.current, self.state.last_good, self.state.trial}
        for place in (self.folder / "versions").iterdir():
            if place.name not in keep:
                shutil.rmtree(place, ignore_errors=True)


def _attempt(name: str, permission: bytes | None) -> str:
    """What a refusal is filed under: the delivery, and which permission it came with."""
    return name if permission is None else f"{name}:{hashlib.sha256(permission).hexdigest()[:16]}"


def _judge(found: Measured, limits: packing.Limits) -> None:
    if found.unit and found.quality < limits.min_psnr_db:
        raise RefusedError(f"self-test: {found.quality:.2f} dB is below {limits.min_psnr_db:.2f} dB")
    if not found.unit and found.quality < limits.min_accuracy:
        raise RefusedError(f"self-test: accuracy {found.quality:.3f} is below {limits.min_accuracy:.3f}")
    if found.latency_s > limits.max_latency_s:
        raise RefusedError(f"self-test: {1e3 * found.latency_s:.1f} ms is over {1e3 * limits.max_latency_s:.1f} ms")
    if found.rss_bytes > limits.max_rss_bytes:
        raise RefusedError(f"self-test: {found.rss_bytes} bytes of memory are over {limits.max_rss_bytes}")
