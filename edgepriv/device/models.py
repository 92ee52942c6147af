"""Models on a device: stage, verify, self-test, switch atomically, roll back. No network, thread or clock of its own.

State machine, one small file (``state.json``) that is replaced atomically; everything else is immutable folders:

* ``current`` is what runs; ``last_good`` stays pinned on the disk as long as it is allowed (``min_version``, revoked).
* What is tried is a `Candidate`: a delivery as one permission opens it. ``stage`` unpacks the delivery beside what
  runs and keeps the permission in memory; ``verify`` checks signatures, version, permission and the verdict against
  the exact bytes that will run; ``self_test`` runs golden inputs (accuracy, latency, memory); ``switch`` writes the
  permission under its own name and makes it current *on trial*; ``confirm`` ends the trial and only then raises
  ``min_version``. A renewed permission that opens the same bytes of a confirmed model has nothing to try.
* A failure at any point leaves ``current`` and its trial as they were, stores the reason and reports it; the same
  candidate is not tried again, unless what stopped it may pass (`PASSING`).
* A cut of power leaves one of the states above: `recover`, which the runtime calls at each start, rolls an unconfirmed
  trial back after two attempts. A trial that nothing can replace goes on; only revocation leaves no model.
* Health is local golden inference, never connectivity: a bad network must not roll a good model back.

What a delivery holds: `packing`. The state, its file and the locks between runtime and installer: `model_state`.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgepriv import files
from edgepriv.device import packing
from edgepriv.device.golden_test import judge, measure
from edgepriv.device.infer import load_spec
from edgepriv.device.model_state import Candidate, State, StateFile
from edgepriv.device.verdicts import check_verdict, verdict_path
from edgepriv.errors import (
    DataError,
    EdgeprivError,
    MissingDependencyError,
    MissingFileError,
    RefusedError,
    StorageFullError,
    TemporaryError,
    TrustError,
)
from edgepriv.selective_encryption import bundle_files, manifest
from edgepriv.selective_encryption.restore import open_level

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from edgepriv.device.golden_test import Infer, Measured
    from edgepriv.device.verdicts import Release
    from edgepriv.keys import Identity
    from edgepriv.selective_encryption.restore import Restored

    Runner = Callable[[Restored], Infer]

PERMISSION, CARRIER = "permission", "carrier.onnx"
MAX_ATTEMPTS = 2
PASSING = (TemporaryError, StorageFullError, MissingDependencyError)


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
        self._file = StateFile(folder)
        self.state = self._file.read()

    # --- durable state ---------------------------------------------------------------------------------------

    def _change(self, change: Callable[[State], State]) -> None:
        """Change the state as it lies on the disk; ``change`` may raise, and nothing is written then."""
        with self._file.changing():
            before = self._file.read()
            self.state = before
            after = change(before)
            if after != before:
                self._file.write(after)
            self.state = after

    def raise_floor(self, seconds: int) -> None:
        """Note the latest time that a trusted signature stated; it never goes back."""
        if seconds > self.state.floor_s:
            self._change(lambda state: replace(state, floor_s=max(seconds, state.floor_s)))

    @property
    def current(self) -> Candidate:
        """What runs; its name is empty where nothing does."""
        return self._current(self.state)

    def _current(self, state: State) -> Candidate:
        return self._kept(state.current, state.permission)

    def _kept(self, name: str, chosen: str) -> Candidate:
        path = self._permission_path(name, chosen)
        return Candidate(name, path.read_bytes() if name and path.is_file() else None)

    def _permission_path(self, name: str, chosen: str) -> Path:
        return self._place(name) / (f"{PERMISSION}-{chosen}" if chosen else PERMISSION)

    # --- one delivery, step by step --------------------------------------------------------------------------

    def stage(self, delivery: Path, permission: bytes | None = None) -> Candidate:
        """Unpack a fetched delivery beside the running model; without a permission the running one's is taken.

        Raises:
            RefusedError: it was refused before.
            StorageFullError: the disk has no room for it.
            DataError: not a delivery.
        """
        name = packing.file_digest(delivery).hex()
        if permission is None and name == self.state.current:
            permission = self.current.permission
        candidate = Candidate(name, permission)
        if candidate.attempt in self.state.refused:
            raise RefusedError(f"this delivery was refused before: {self.state.refused[candidate.attempt]}")
        if name not in {self.state.current, self.state.last_good} or not self._whole(name):
            packing.unpack_over(delivery, self._place(name), keep=f"{PERMISSION}*")
        return candidate

    def _whole(self, name: str) -> bool:
        try:
            self._check_files(name, self._delivery(name))
        except EdgeprivError:
            return False
        return True

    def _check_files(self, name: str, body: dict[str, Any]) -> None:
        for file_name, digest in body["files"].items():
            if packing.file_digest(self._place(name) / file_name) != digest:
                raise DataError(f"{file_name} is not the file that was signed", hint="fetch the model again")

    def verify(self, candidate: Candidate, model: str = "") -> None:
        """Check everything that can be checked without running it; ``model``: the only one that is wanted.

        Raises:
            EdgeprivError: the reason; the caller refuses the candidate.
        """
        name = candidate.name
        paper, _ = self._papers(name)
        body = self._delivery(name)
        if model and paper.name != model:
            raise TrustError(f"this is the model {paper.name!r}, and {model!r} is followed")
        lowest = self.state.min_version.get(paper.name, 0)
        if paper.binding.version < lowest:
            raise TrustError(f"version {paper.binding.version} is older than {lowest}, which ran here before")
        running = self._version(self.state.current, paper.name)
        if running is not None and paper.binding.version <= running and name != self.state.current:
            raise TrustError(f"version {paper.binding.version} does not follow the running version {running}")
        if self._is_revoked(name):
            raise TrustError("the model is revoked")
        self._check_files(name, body)
        self._check_newer(candidate)
        self.open_judged(candidate).wipe()

    def _check_newer(self, candidate: Candidate) -> None:
        """What carries permissions may not bring back one that the owner has replaced since."""
        old, new = self._permission(self.current), self._permission(candidate)
        if candidate.name == self.state.current and old and new and new.issued_s < old.issued_s:
            raise TrustError("the permission is older than the one in use", hint="edgepriv grant makes a new one")

    def _permission(self, candidate: Candidate) -> manifest.Permission | None:
        """The candidate's permission, if it can be read."""
        try:
            return manifest.decode_permission(candidate.permission or b"", self.trust.issuers)
        except EdgeprivError:
            return None

    def self_test(
        self, candidate: Candidate, run: Runner, *, clock: Callable[[], float], rss: Callable[[], int]
    ) -> Measured:
        """Run the golden inputs on exactly the bytes that will run; never the network.

        Args:
            candidate: verified.
            run: makes a function ``inputs -> logits`` from a restored model.
            clock: monotonic seconds.
            rss: resident bytes of this process.

        Raises:
            RefusedError: too inaccurate, too slow or too large.
            EdgeprivError: it does not run at all.
        """
        golden = packing.Golden.decode((self._place(candidate.name) / packing.GOLDEN).read_bytes())
        limits = packing.Limits(**self._delivery(candidate.name)["limits"])
        found = measure(golden, run(self.open(candidate)), clock=clock, rss=rss)
        judge(found, limits)
        return found

    def switch(self, candidate: Candidate) -> None:
        """Make a tested candidate the running one, on trial; one atomic write."""
        if candidate.permission is not None:
            files.replace(self._permission_path(candidate.name, candidate.chosen), candidate.permission)

        def change(state: State) -> State:
            running = self._current(state)
            if candidate.attempt == running.attempt:
                return state
            if not state.trial and self._same_bytes(candidate, running):
                return replace(state, permission=candidate.chosen)
            after = replace(
                state, current=candidate.name, permission=candidate.chosen, trial=candidate.name, attempts=0
            )
            if state.trial or not state.current:  # what is unproven is no last good model
                return after
            return replace(after, last_good=state.current, good_permission=state.permission)

        self._change(change)
        trial = " on trial" if self.state.trial else " under a new permission"
        self._log(f"model {candidate.name[:12]} runs{trial}")

    def _same_bytes(self, one: Candidate, other: Candidate) -> bool:
        """Whether two permissions open the same level of the same delivery."""
        old, new = self._permission(one), self._permission(other)
        return one.name == other.name and old is not None and new is not None and old.level == new.level

    def confirm(self, opened: Candidate | None = None) -> None:
        """End the trial after a health pass (of ``opened``): only now older versions become forbidden."""

        def change(state: State) -> State:
            running = self._current(state)
            if not state.trial or (opened is not None and opened.attempt != running.attempt):
                return state
            paper, _ = self._papers(state.current)
            lowest = {**state.min_version, paper.name: paper.binding.version}
            floor = max(state.floor_s, paper.issued_s)
            after = replace(state, trial="", attempts=0, min_version=lowest, floor_s=floor)
            return after.accepting(running.attempt)

        before = self.state
        self._change(change)
        if self.state != before and not self.state.trial:
            self._log(f"model {self.state.current[:12]} is confirmed")
            self._clean()

    def roll_back(self, reason: str, tried: Candidate | None = None) -> str:
        """Give up what runs (if it still is ``tried``): the last good model runs again; returns what runs.

        Raises:
            MissingFileError: nothing runs.
            RefusedError: nothing else may run. What runs stays, and on trial the reason is kept.
        """
        bad = tried or self.current
        if not bad.name:
            raise MissingFileError("no model is installed", hint="edgepriv model pull")

        def change(state: State) -> State:
            if self._current(state).attempt != bad.attempt:
                return state  # another one was installed meanwhile
            good = self._kept(state.last_good, state.good_permission)
            if good.attempt != bad.attempt and self._allowed(good.name) and (state.trial or self._opens(good)):
                return _returned(state, bad, reason)
            return state.refusing(bad.attempt, reason) if state.trial else state

        self._change(change)
        if self.current.attempt == bad.attempt:
            raise RefusedError(f"{reason}: no good model is left to go back to, so it stays", hint="fetch a model")
        self._log(f"model {bad.name[:12]} rolled back: {reason}")
        return self.state.current

    def withdraw(self, reason: str) -> str:
        """Stop what the owner has revoked: the last good model runs in its place; returns what runs.

        Raises:
            RefusedError: no good model is left, and none runs.
        """

        def change(state: State) -> State:
            bad = self._current(state)
            if not state.current or not self._is_revoked(state.current):
                return state
            if self._allowed(state.last_good):
                return _returned(state, bad, reason)
            return replace(state.refusing(bad.attempt, reason), current="", permission="", trial="", attempts=0)

        bad = self.current
        self._change(change)
        self._log(f"model {bad.name[:12]} is withdrawn: {reason}")
        if not self.state.current:
            raise RefusedError(f"withdrawn ({reason}), and no good model is left", hint="fetch a model")
        return self.state.current

    def recover(self) -> str:
        """At a start of the runtime: finish or undo what a cut of power left; returns what runs ("" if nothing).

        A start that neither confirms nor rolls back a trial was a failed one; it is counted here and nowhere else.
        """
        with self._file.alone() as alone:
            if alone:
                for part in (self.folder / "versions").glob("*.part"):
                    shutil.rmtree(part, ignore_errors=True)
        tried = self.current
        if self.state.trial and self.state.attempts >= MAX_ATTEMPTS:
            with contextlib.suppress(RefusedError):  # nothing else may run: it goes on being tried
                return self.roll_back("the device went down twice during the trial", tried)
        self._change(lambda state: replace(state, attempts=state.attempts + 1) if state.trial else state)
        return self.state.current

    @contextlib.contextmanager
    def installing(self) -> Iterator[None]:
        """For the time of an installation: nobody else unpacks or cleans up here (TemporaryError: somebody does)."""
        with self._file.alone() as alone:
            if not alone:
                raise TemporaryError("another installation is under way", hint="try again when it has ended")
            self.state = self._file.read()
            yield

    def install(
        self,
        delivery: Path,
        permission: bytes | None,
        run: Runner,
        *,
        clock: Callable[[], float],
        rss: Callable[[], int],
        model: str = "",
    ) -> Measured:
        """Stage, verify, test and switch; any failure is stored as the reason, and ``current`` stays.

        Raises:
            EdgeprivError: the reason; one of `PASSING` is not stored.
        """
        with self.installing():
            candidate = self.stage(delivery, permission)
            try:
                self.verify(candidate, model)
                measured = self.self_test(candidate, run, clock=clock, rss=rss)
            except EdgeprivError as error:
                if not isinstance(error, PASSING):
                    self._refuse(candidate, str(error))
                self._clean()
                raise
            self.switch(candidate)
            return measured

    def _refuse(self, candidate: Candidate, reason: str) -> None:
        """Remember why; what runs, and its trial, are another matter."""
        self._change(lambda state: state.refusing(candidate.attempt, reason))
        self._log(f"model {candidate.name[:12]} refused: {reason}")

    # --- what runs -------------------------------------------------------------------------------------------

    def open(self, candidate: Candidate | None = None) -> Restored:
        """Open a staged candidate (default: the current one), in memory.

        Raises:
            EdgeprivError: see `restore.open_level`; no session can start on decoys.
        """
        candidate = candidate or self.current
        if not candidate.name:
            raise MissingFileError("no model is installed", hint="edgepriv model pull")
        paper, signed = self._papers(candidate.name)
        stored = bundle_files.read_stored(self._place(candidate.name), paper)
        if candidate.permission is None:
            raise TrustError("no permission for this model", hint="ask the owner: edgepriv grant")
        now_s = max(self.state.floor_s, paper.issued_s)
        return open_level(signed, candidate.permission, stored, self.identity, self.trust.issuers, now_s=now_s)

    def _opens(self, candidate: Candidate) -> bool:
        try:
            self.open(candidate).wipe()
        except EdgeprivError:
            return False
        return True

    def open_judged(self, candidate: Candidate | None = None) -> Restored:
        """As `open`; where the owner's policy demands it, only with a good verdict on these bytes and this release."""
        candidate = candidate or self.current
        restored = self.open(candidate)
        if self.trust.require_verdict:
            place, keys = self._place(candidate.name), self.trust.risk_keys
            about: dict[str, Any] = {"release": self.trust.release}
            try:
                about["spec"] = load_spec(place / CARRIER)
                self.raise_floor(
                    check_verdict(
                        verdict_path(place, restored.level), restored.digest, keys, self.state.floor_s, **about
                    )
                )
            except BaseException:
                restored.wipe()
                raise
        return restored

    def report(self) -> dict[str, Any]:
        """What the device tells about its models: what runs, and why others do not."""
        paper = None
        with contextlib.suppress(EdgeprivError):  # damaged, or its issuer is not believed any more
            paper = self._papers(self.state.current)[0] if self.state.current else None
        return {
            "model": paper.name if paper else "",
            "version": paper.binding.version if paper else 0,
            "digest": self.state.current,
            "attempt": self.current.attempt,
            "trial": bool(self.state.trial),
            "refused": dict(self.state.refused),
        }

    # --- parts -----------------------------------------------------------------------------------------------

    def revoked(self) -> bool:
        """Whether the owner has revoked what runs."""
        return bool(self.state.current) and self._is_revoked(self.state.current)

    def place(self, candidate: Candidate | None = None) -> Path:
        """Folder of a candidate (default: the current one)."""
        return self._place((candidate or self.current).name)

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
        """Version of what runs, if it is this model and can be read."""
        try:
            paper, _ = self._papers(name)
        except EdgeprivError:
            return None
        return paper.binding.version if paper.name == model else None

    def _is_revoked(self, name: str) -> bool:
        """Whether the owner believes in it no longer: digest or issuer. A damaged one is not revoked."""
        try:
            paper, _ = self._papers(name)
        except TrustError:
            return True
        except EdgeprivError:
            return name in self.trust.revoked
        return name in self.trust.revoked or paper.binding.carrier.hex() in self.trust.revoked

    def _allowed(self, name: str) -> bool:
        """Whether the last good model may run again: still there, not revoked, not below ``min_version``."""
        try:
            paper, _ = self._papers(name)
        except EdgeprivError:
            return False
        return not self._is_revoked(name) and paper.binding.version >= self.state.min_version.get(paper.name, 0)

    def _clean(self) -> None:
        """Remove what is neither running nor pinned, unless somebody else installs."""
        with self._file.alone() as alone:
            if not alone:
                return
            state = self.state = self._file.read()
            kept = {(state.current, state.permission), (state.last_good, state.good_permission)}
            for place in (self.folder / "versions").iterdir():
                if place.name not in {name for name, _ in kept}:
                    packing.remove(place)
            paths = {self._permission_path(name, chosen) for name, chosen in kept if name}
            for place in {path.parent for path in paths}:
                for path in set(place.glob(f"{PERMISSION}*")) - paths:
                    path.unlink()


def _returned(state: State, bad: Candidate, reason: str) -> State:
    """The last good model runs again."""
    after = replace(state, current=state.last_good, permission=state.good_permission, trial="", attempts=0)
    return after.refusing(bad.attempt, reason)
