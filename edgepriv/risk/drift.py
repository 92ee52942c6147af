"""Do the fleet's released outputs still look like the audited behaviour?

What is compared: the share of each class against the model's behaviour on the auditor's own pictures. Measure:
population stability index, sum of (p - q) ln(p / q) over classes with half an output added to each; 0.1 is usually
called a small and 0.25 a large shift. A shift may be the world's and not the model's: an alert says that the verdict
was reached on other behaviour, no more.

Whose outputs: a gateway tells counts by the digest of the model that ran, and each audited digest is judged by itself.
A gateway of a release before that tells names only: then a name is judged as a whole, against that of its audited
versions which it is nearest to, so that two versions under one name raise no alert by being two. An alert ends at four
fifths of the threshold, not at the threshold itself.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from edgepriv import files

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

PRIOR = 0.5
ENDS_AT = 0.8
FILE = "drift.json"


@dataclass(frozen=True, slots=True)
class Drift:
    """How far one model's released outputs are from the audited ones; ``digest``: empty where only names are known."""

    model: str
    outputs: int
    index: float
    alert: bool
    digest: str = ""

    @property
    def key(self) -> str:
        """What an alert is kept under."""
        return self.digest or self.model


class Audited(NamedTuple):
    """What an audit knows of one model: digest, the name it was offered under, outputs by class."""

    digest: bytes
    name: str
    counts: Sequence[float]


def stability_index(audited: Sequence[float], seen: Mapping[int, float]) -> float:
    """Population stability index between audited class counts and counts by class.

    Classes outside the audited range count as one class that the audit never saw.
    """
    foreign = sum(count for label, count in seen.items() if not 0 <= label < len(audited))
    expected = [*audited, 0.0]
    found = [*(float(seen.get(label, 0.0)) for label in range(len(audited))), foreign]
    total_e, total_f = sum(expected) + PRIOR * len(expected), sum(found) + PRIOR * len(found)
    shares = [((e + PRIOR) / total_e, (f + PRIOR) / total_f) for e, f in zip(expected, found, strict=True)]
    return sum((f - e) * math.log(f / e) for e, f in shares)


class DriftWatch:
    """Counts of released outputs by model over what the gateway shows now (its last day)."""

    def __init__(self, *, min_outputs: int, threshold: float) -> None:
        self._min_outputs, self._threshold = min_outputs, threshold
        self._windows: dict[str, dict[tuple[str, int, int], int]] = defaultdict(dict)
        self._models: dict[bytes, dict[int, float]] | None = None
        self.alerts: dict[str, Drift] = {}

    def take_models(self, rows: Any) -> None:
        """Replace the counts by digest; anything but a list is a gateway that does not tell them."""
        self._models = None
        if not isinstance(rows, list):
            return
        self._models = defaultdict(lambda: defaultdict(float))
        for row in rows:
            match row:
                case {"digest": bytes() as digest, "class": int() as label, "count": int() as count}:
                    self._models[digest][label] += max(0, count)

    def look(self, audited: Sequence[Audited]) -> list[Drift]:
        """Judge all audited models that enough was seen of; `alerts` are those that drift now, by `Drift.key`."""
        found = self._by_digest(audited) if self._models is not None else self._by_name(audited)
        self.alerts = {one.key: one for one in found if one.alert}
        return found

    def _by_digest(self, audited: Sequence[Audited]) -> list[Drift]:
        seen = self._models or {}
        every = (self._drift(model, seen.get(model.digest, {}), model.digest.hex()) for model in audited)
        return [one for one in every if one is not None]

    def _by_name(self, audited: Sequence[Audited]) -> list[Drift]:
        nearest: dict[str, Drift] = {}
        for model in audited:
            one = self._drift(model, self._seen_under(model.name))
            if one is not None and (model.name not in nearest or one.index < nearest[model.name].index):
                nearest[model.name] = one
        return list(nearest.values())

    def _drift(self, model: Audited, seen: Mapping[int, float], digest: str = "") -> Drift | None:
        outputs = int(sum(seen.values()))
        if outputs < self._min_outputs or not sum(model.counts):
            return None
        index = stability_index(model.counts, seen)
        limit = self._threshold * (ENDS_AT if (digest or model.name) in self.alerts else 1.0)
        return Drift(model.name, outputs, index, index > limit, digest)

    def take(self, windows: Iterable[Mapping[str, Any]]) -> int:
        """Replace the counts by the gateway's windows (``edgepriv.windows/1``); returns how many were well formed."""
        self._windows.clear()
        taken = 0
        for window in windows:
            try:
                key = (str(window["device"]), int(window["start"]), int(window["class"]))
                self._windows[str(window["model"])][key] = max(0, int(window["count"]))
            except (KeyError, TypeError, ValueError):
                continue
            taken += 1
        return taken

    def judge(self, model: str, audited: Sequence[float]) -> Drift | None:
        """Compare the counts under a name with one audit's; None where too little was seen."""
        return self._drift(Audited(b"", model, audited), self._seen_under(model))

    def _seen_under(self, name: str) -> dict[int, float]:
        seen: dict[int, float] = defaultdict(float)
        for (_, _, label), count in self._windows.get(name, {}).items():
            seen[label] += count
        return seen


def keep_drift(folder: Path, found: Iterable[Drift]) -> None:
    """Write what was seen last to the state folder, for the commands and pages; only where it changed."""
    path = folder / FILE
    rows = [{**asdict(one), "index": round(one.index, 4)} for one in found]
    raw = json.dumps(rows).encode()
    if not path.is_file() or path.read_bytes() != raw:
        files.replace(path, raw)


def drift_in(folder: Path) -> list[dict[str, Any]]:
    """What the service saw last, as `Drift` rows; empty where it has seen nothing."""
    try:
        rows = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def drift_of(rows: Iterable[Mapping[str, Any]], digest: bytes, name: str) -> dict[str, Any] | None:
    """The row that speaks of one model, by digest or, where only names are known, by name."""
    return next(
        (
            dict(row)
            for row in rows
            if row.get("digest") == digest.hex() or (not row.get("digest") and row.get("model") == name)
        ),
        None,
    )
