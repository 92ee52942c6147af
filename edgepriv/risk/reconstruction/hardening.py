"""Every defence that an operator may choose, made from one model and compared in one table.

Rules: the release policy is the control, the others are options beside it; each row states what it costs in accuracy
and what the strongest auditor still rebuilds, measured on pictures that none of the defences was fitted on. Our own
designs, not the paper's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edgepriv.errors import DataError
from edgepriv.risk.reconstruction.audit import reference_models
from edgepriv.risk.reconstruction.defences import Purifier, retrain_last_layer
from edgepriv.risk.reconstruction.detectors import outputs_of, pictures_of
from edgepriv.risk.reconstruction.graph_roles import UnsupportedGraphError
from edgepriv.risk.reconstruction.indicator_fit import fit_indicator, windows_flagged
from edgepriv.risk.reconstruction.leakage import Bench
from edgepriv.risk.reconstruction.onnx_reader import GRAPH_FAILURES, import_graph
from edgepriv.risk.reconstruction.vicious import TrainingSet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from edgepriv.risk.reconstruction.audit import AuditRequest
    from edgepriv.risk.reconstruction.auditors import Pipeline
    from edgepriv.risk.reconstruction.leakage import PolicyLeakage, Probe
    from edgepriv.risk.reconstruction.onnx_reader import ImportedNetwork
    from edgepriv.risk.reconstruction.supplied_model import SuppliedModel

SCHEMA = "edgepriv.harden/1"
PURIFIED_IMAGES = 4000


@dataclass(frozen=True, slots=True)
class Row:
    """One defence under one release policy.

    Attributes:
        defence: ``none``, ``purified S``, ``last layer anew`` or ``indicator``.
        policy: what is released after it.
        bits: bound on one inference.
        accuracy: of the released answers.
        accuracy_cost: below the model's own argmax.
        explained_variance: of the strongest auditor; for the indicator over the outputs that it lets through.
        released: share of outputs that leave; below 1 for the indicator alone.
        auditor: the strongest one.
    """

    defence: str
    policy: str
    bits: float
    accuracy: float
    accuracy_cost: float
    explained_variance: float
    released: float
    auditor: str


@dataclass(frozen=True, slots=True)
class Hardening:
    """The table, the files that put each option to work, and what could not be made and why."""

    model: str
    sha256: str
    rows: tuple[Row, ...]
    purifier: bytes
    indicator: bytes
    retrained: ImportedNetwork | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "sha256": self.sha256,
            "defences": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }


class Purified:
    """A release policy behind a purifier, as an auditor sees it."""

    def __init__(self, pipeline: Pipeline, purifier: Purifier) -> None:
        self._pipeline, self._purifier, self.name = pipeline, purifier, pipeline.name

    def bits(self, k: int) -> float:
        """Return the policy's bound: purifying adds no messages."""
        return self._pipeline.bits(k)

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return what the receiver gets."""
        return self._pipeline.apply(self._purifier.apply(logits))


class _Table:
    """Collects rows, each against the model's own accuracy."""

    def __init__(self, bench: Bench, outputs: NDArray[np.float32], say: Callable[[str], None]) -> None:
        assert bench.labels is not None  # noqa: S101 - harden refuses pictures without labels
        self._bench, self.say = bench, say
        self._own = float((outputs.argmax(1) == bench.labels)[bench.cut :].mean())
        self.rows: list[Row] = []

    def add(self, defence: str, outputs: NDArray[np.float32], pipeline: Pipeline, *, released: float = 1.0) -> None:
        self.keep(defence, self._bench.leakage(outputs, pipeline), released)

    def keep(self, defence: str, leak: PolicyLeakage, released: float) -> None:
        accuracy = float(leak.accuracy or 0.0)
        variance = leak.score.explained_variance
        cost = self._own - accuracy
        self.rows.append(Row(defence, leak.policy, leak.bits, accuracy, cost, variance, released, leak.auditor))
        self.say(f"{defence}, {leak.policy}: explained variance {variance:.3f}, accuracy {accuracy:.3f}")


def harden(
    model: SuppliedModel,
    probe: Probe,
    training: Probe | None,
    pipelines: Sequence[Pipeline],
    request: AuditRequest,
    *,
    strengths: Sequence[float] = (0.9,),
    progress: Callable[[str], None] | None = None,
) -> Hardening:
    """Make every optional defence for one model and measure all of them.

    Args:
        model: the file.
        probe: labelled pictures that no defence is fitted on.
        training: labelled pictures of the operator's own, to fit the defences on.
        pipelines: release policies, each measured alone and behind the other defences.
        request: auditors, references for the indicator, limits.
        strengths: of the purifier; the file is made for the last one.
        progress: gets one line a measurement.

    Raises:
        DataError: pictures without labels.
    """
    if probe.labels is None or training is None or training.labels is None:
        raise DataError("the defences are fitted on labelled pictures", hint="give a data set with labels")
    if probe.attributes is not None:
        raise DataError("the defences beside the policy are for classes, not for attributes")
    say = progress or (lambda _line: None)
    bench = Bench(probe, request.settings)
    outputs = model.outputs(bench.images)
    bench.check_outputs(outputs)
    table, notes = _Table(bench, outputs, say), list(bench.notes)
    for pipeline in pipelines:
        table.add("none", outputs, pipeline)
    fitted_on = model.outputs(training.images[:PURIFIED_IMAGES])
    purifiers = [Purifier(fitted_on, strength) for strength in strengths]
    for strength, purifier in zip(strengths, purifiers, strict=True):
        for pipeline in pipelines:
            table.add(f"purified {strength:g}", outputs, Purified(pipeline, purifier))
    images = training.images[: request.reference_images]
    data = TrainingSet.of(images, training.labels[: len(images)], classes=outputs.shape[1])
    retrained = _last_layer(model, bench, data, pipelines, table, notes)
    indicator = _indicator(model, bench, outputs, data, pipelines, request, table, notes)
    return Hardening(
        model.path.name, model.sha256, tuple(table.rows), purifiers[-1].as_bytes(), indicator, retrained, tuple(notes)
    )


def _last_layer(
    model: SuppliedModel,
    bench: Bench,
    data: TrainingSet,
    pipelines: Sequence[Pipeline],
    table: _Table,
    notes: list[str],
) -> ImportedNetwork | None:
    try:
        retrained = retrain_last_layer(import_graph(model, bench.images[:32]), data)
        outputs = outputs_of(retrained, pictures_of(bench.images))
    except (UnsupportedGraphError, *GRAPH_FAILURES) as error:
        notes.append(f"no last layer was trained anew: {error}")
        return None
    for pipeline in pipelines:
        table.add("last layer anew", outputs, pipeline)
    return retrained


def _indicator(
    model: SuppliedModel,
    bench: Bench,
    outputs: NDArray[np.float32],
    data: TrainingSet,
    pipelines: Sequence[Pipeline],
    request: AuditRequest,
    table: _Table,
    notes: list[str],
) -> bytes:
    """Fit the device's indicator and measure what still leaves where it refuses suspicious windows."""
    if request.references < 2 or not 2 <= outputs.shape[1] <= 100:
        notes.append("no indicator was made: it needs two reference models and 2 to 100 classes")
        return b""
    references = reference_models(model, bench, outputs, data, request, notes, table.say)
    raw = fit_indicator([reference.outputs for reference in references])
    held = windows_flagged(raw, outputs)
    left = ~held[bench.cut :]
    for pipeline in pipelines:
        if left.any():
            leak = bench.leakage(outputs, pipeline, scored=left)
            table.keep("indicator", leak, float(left.mean()))
        else:
            notes.append(f"the indicator let nothing through under {pipeline.name}")
    return raw
