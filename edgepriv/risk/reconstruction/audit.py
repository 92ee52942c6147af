"""The audit of any classifier as a file: outputs, policies, references, verdict, in one call.

Rules: the release policies come as callables (:class:`~edgepriv.risk.reconstruction.auditors.Pipeline`), so that what
is judged is what the device does; the file is opened in a child process; every limit that was reached is in ``notes``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgepriv.errors import ConfigError, DataError
from edgepriv.risk.reconstruction.detectors import DetectorSettings, Evidence, evidence
from edgepriv.risk.reconstruction.graph_roles import UnsupportedGraphError
from edgepriv.risk.reconstruction.indicator_fit import fit_indicator
from edgepriv.risk.reconstruction.leakage import AuditSettings, Bench, Probe
from edgepriv.risk.reconstruction.networks import classifier
from edgepriv.risk.reconstruction.onnx_reader import GRAPH_FAILURES, import_graph
from edgepriv.risk.reconstruction.references import (
    Architecture,
    UntrainableError,
    check_imported,
    check_trained,
    imported,
    named,
    stand_ins,
    times_shown,
    train_references,
)
from edgepriv.risk.reconstruction.supplied_model import WITHOUT_NETWORK
from edgepriv.risk.reconstruction.verdict import DEFAULT_MAX_EXPLAINED_VARIANCE, judge, least_margin, too_weak_to_accuse
from edgepriv.risk.reconstruction.vicious import TrainingSet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from edgepriv.risk.reconstruction.auditors import Pipeline
    from edgepriv.risk.reconstruction.leakage import Pictures, PolicyLeakage
    from edgepriv.risk.reconstruction.supplied_model import SuppliedModel
    from edgepriv.risk.reconstruction.verdict import Verdict

SCHEMA = "edgepriv.audit-outputs/1"
MAX_INDICATOR_CLASSES = 100  # its file holds a matrix for each class


@dataclass(frozen=True, slots=True)
class OutputAudit:
    """One audit: ``as_dict`` is the JSON report, ``pictures`` what a person sees, ``indicator`` a file for devices."""

    model: str
    sha256: str
    verdict: Verdict
    policies: tuple[PolicyLeakage, ...]
    features: dict[str, float | None] | None
    architecture: str
    record: dict[str, Any]
    notes: tuple[str, ...]
    duration_s: float
    probe: str = ""
    class_counts: tuple[int, ...] = ()
    indicator: bytes = b""

    @property
    def largest_leakage(self) -> float:
        """Largest explained variance over the audited policies."""
        return max(policy.score.explained_variance for policy in self.policies)

    @property
    def pictures(self) -> dict[str, Pictures]:
        """Input, reconstruction and class mean by policy, uint8 [n, h, w, c] each."""
        return {policy.policy: policy.pictures for policy in self.policies}

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, schema ``edgepriv.audit-outputs/1``."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "sha256": self.sha256,
            **self.verdict.as_dict(),
            "policies": [policy.as_dict() for policy in self.policies],
            "features": self.features,
            "architecture": self.architecture,
            "record": self.record,
            "class_counts": list(self.class_counts),
            "notes": list(self.notes),
            "duration_s": round(self.duration_s, 2),
        }


@dataclass(frozen=True, slots=True)
class AuditRequest:
    """How to audit.

    Attributes:
        settings: pictures and auditors.
        references: how many honest models to train; 0 for none.
        reference_images: at most so many pictures train a reference.
        architecture: name from :mod:`networks`, or None to read it from the file.
        weights: safetensors file that belongs to the named architecture: its outputs must be the file's.
        limit: explained variance above which leakage is called high.
        reference_work_s: processor time that references of the file's own architecture may take, by an estimate; above
            it the small stand-ins are trained.
    """

    settings: AuditSettings = field(default_factory=AuditSettings)
    references: int = 5
    reference_images: int = 12_000
    architecture: str | None = None
    weights: Path | None = None
    limit: float = DEFAULT_MAX_EXPLAINED_VARIANCE
    reference_work_s: float = 24 * 3600.0


def audit_outputs(
    model: SuppliedModel,
    probe: Probe,
    pipelines: Sequence[Pipeline],
    request: AuditRequest | None = None,
    *,
    reference_data: Probe | None = None,
    progress: Callable[[str], None] | None = None,
) -> OutputAudit:
    """Audit a model file under release policies.

    Args:
        model: the file.
        probe: pictures that the model was not trained on.
        pipelines: release policies to judge.
        request: auditors, references, limits.
        reference_data: labelled pictures to train references on, apart from the probe; None trains none. They are in
            the covariance behind R too.
        progress: gets one line a step.

    Raises:
        DataError: the file or the pictures cannot be audited; the message says why.
    """
    if not pipelines:
        raise ConfigError("an audit needs at least one release policy")
    try:
        return _audited(model, probe, pipelines, request or AuditRequest(), reference_data, progress or _silent)
    except np.linalg.LinAlgError as error:
        raise DataError(
            f"{model.path}: the auditors cannot compute with its outputs: {error}",
            hint="outputs without any spread, or far beyond those of a classifier",
        ) from error


def _silent(_line: str) -> None:
    """Show no progress."""


def _audited(
    model: SuppliedModel,
    probe: Probe,
    pipelines: Sequence[Pipeline],
    request: AuditRequest,
    reference_data: Probe | None,
    say: Callable[[str], None],
) -> OutputAudit:
    started = time.monotonic()
    bench = Bench(probe, request.settings, further=None if reference_data is None else reference_data.images)
    say(f"{model.path.name}: {len(bench.images)} pictures of {probe.name}")
    outputs = model.outputs(bench.images)
    bench.check_outputs(outputs)
    notes = list(bench.notes)
    if model.isolation != WITHOUT_NETWORK:
        notes.append(model.isolation)
    leakages = _leakages(bench, outputs, pipelines, say)
    if looks_like_probabilities(outputs):
        notes.append("the model ends in a softmax of its own: policies see these scores as logits")
    found, references, architecture = _compare(model, bench, outputs, request, reference_data, notes, say)
    verdict = _judged(found, references, leakages, architecture, request)
    name = architecture.name if architecture else "not compared"
    record = bench.scale.record.as_dict() | {"pictures": len(bench.images), "limit": request.limit}
    record["isolation"] = model.isolation
    duration = time.monotonic() - started
    classes = outputs.argmax(1) if bench.attributes is None else np.zeros(0, np.int64)
    counts = np.bincount(classes, minlength=outputs.shape[1] if len(classes) else 0)
    return OutputAudit(
        model.path.name,
        model.sha256,
        verdict,
        tuple(leakages),
        found.values if found else None,
        name,
        record,
        tuple(notes),
        duration,
        probe.name,
        tuple(counts.tolist()),
        _indicator([reference.outputs for reference in references if bench.attributes is None]),
    )


def _indicator(outputs: Sequence[NDArray[np.float32]]) -> bytes:
    """Return the file by which a device tells honest outputs, nothing without references or with many classes."""
    fits = len(outputs) > 1 and 2 <= outputs[0].shape[1] <= MAX_INDICATOR_CLASSES
    return fit_indicator(outputs) if fits else b""


def _leakages(
    bench: Bench, outputs: NDArray[np.float32], pipelines: Sequence[Pipeline], say: Callable[[str], None]
) -> list[PolicyLeakage]:
    found = []
    for pipeline in pipelines:
        found.append(bench.leakage(outputs, pipeline))
        say(f"{pipeline.name}: explained variance {found[-1].score.explained_variance:.3f}")
    return found


def _judged(
    found: Evidence | None,
    references: Sequence[Evidence],
    leakages: Sequence[PolicyLeakage],
    architecture: Architecture | None,
    request: AuditRequest,
) -> Verdict:
    known, doubt = architecture is not None and architecture.known, ""
    if found is not None and references:
        margin = least_margin(found, references, known=known)
        doubt = too_weak_to_accuse(len(references), len(found.available), margin)
    return judge(
        found.values if found else None,
        [reference.values for reference in references],
        _judged_leakage(leakages, compared=bool(references)),
        known=known,
        limit=request.limit,
        doubt=doubt,
    )


def _judged_leakage(leakages: Sequence[PolicyLeakage], *, compared: bool) -> float:
    """Return the largest explained variance among the policies that the verdict counts.

    Every model's raw logits leak. Where references show that this one's leak no more than theirs, an ``unsafe_`` policy
    is there for comparison and does not count, unless nothing else was asked for.
    """
    safe = [leakage for leakage in leakages if not leakage.policy.startswith("unsafe_")]
    return max(leakage.score.explained_variance for leakage in (safe if compared and safe else leakages))


def looks_like_probabilities(outputs: NDArray[np.float32]) -> bool:
    """True where every row is non-negative and sums to one."""
    return bool(outputs.min() >= 0 and np.allclose(outputs.sum(1), 1, atol=1e-3))


def _compare(
    model: SuppliedModel,
    bench: Bench,
    outputs: NDArray[np.float32],
    request: AuditRequest,
    reference_data: Probe | None,
    notes: list[str],
    say: Callable[[str], None],
) -> tuple[Evidence | None, list[Evidence], Architecture | None]:
    """Measure the detector's features of the model and of freshly trained references."""
    if reference_data is None or reference_data.labels is None or request.references < 1:
        notes.append("no reference models were trained: the cause of a leak stays unknown")
        return None, [], None
    settings = DetectorSettings(trained=request.settings.trained)
    if (reference_data.attributes is None) != (bench.attributes is None):
        raise DataError("the pictures and those that train references must both have classes or both attributes")
    targets = reference_data.labels if reference_data.attributes is None else reference_data.attributes
    data = TrainingSet.of(
        reference_data.images[: request.reference_images],
        targets[: request.reference_images],
        classes=outputs.shape[1],
    )
    network, architecture, references = _trained(model, bench, outputs, data, request, settings, notes, say)
    return evidence(bench, outputs, network, settings), references, architecture


def _trained(
    model: SuppliedModel,
    bench: Bench,
    outputs: NDArray[np.float32],
    data: TrainingSet,
    request: AuditRequest,
    settings: DetectorSettings,
    notes: list[str],
    say: Callable[[str], None],
) -> tuple[nn.Module | None, Architecture, list[Evidence]]:
    """Train references of the model's own architecture; of others where it is unknown, or can be no honest pattern."""
    network, architecture = _open_architecture(model, bench, outputs, request, len(data.pictures), notes)
    if request.architecture is not None or network is None:
        return network, architecture, _references(architecture, data, bench, request, settings, say)
    try:
        references = _references(architecture, data, bench, request, settings, say)
        check_trained(references, bench, outputs)
    except (UntrainableError, *GRAPH_FAILURES) as error:
        notes.append(f"{error}; references of other architectures stand in")
        say(notes[-1])
        others = stand_ins(data.shape, outputs.shape[1])
        return None, others, _references(others, data, bench, request, settings, say)
    return network, architecture, references


def _references(
    architecture: Architecture,
    data: TrainingSet,
    bench: Bench,
    request: AuditRequest,
    settings: DetectorSettings,
    say: Callable[[str], None],
) -> list[Evidence]:
    return train_references(
        architecture,
        data,
        bench,
        request.references,
        settings=settings,
        device=request.settings.device,
        progress=say,
    )


def reference_models(
    model: SuppliedModel,
    bench: Bench,
    outputs: NDArray[np.float32],
    data: TrainingSet,
    request: AuditRequest,
    notes: list[str],
    say: Callable[[str], None],
) -> list[Evidence]:
    """Train honest references of a model's architecture, as an audit does, without judging the model."""
    return _trained(model, bench, outputs, data, request, DetectorSettings(trained=None), notes, say)[2]


def _open_architecture(
    model: SuppliedModel,
    bench: Bench,
    outputs: NDArray[np.float32],
    request: AuditRequest,
    pictures: int,
    notes: list[str],
) -> tuple[nn.Module | None, Architecture]:
    shape = (int(bench.images.shape[1]), int(bench.images.shape[2]), int(bench.images.shape[3]))
    if request.architecture is not None:
        network = None
        if request.weights is not None:
            network = _named_with_weights(request.architecture, request.weights, shape, outputs, bench)
        return network, named(request.architecture, shape, outputs.shape[1])
    try:
        graph = import_graph(model, bench.images[:32])
        pattern = check_imported(
            graph,
            bench,
            outputs,
            memory_bytes=model.limits.memory_bytes,
            work_s=request.reference_work_s,
            pictures=times_shown(request.references, pictures),
        )
    except (UnsupportedGraphError, UntrainableError, *GRAPH_FAILURES) as error:
        notes.append(f"black box only: {error}; references of other architectures stand in")
        return None, stand_ins(shape, outputs.shape[1])
    return graph, imported(pattern)


def _named_with_weights(
    name: str, weights: Path, shape: tuple[int, int, int], outputs: NDArray[np.float32], bench: Bench
) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from edgepriv.risk.reconstruction.detectors import outputs_of, pictures_of

    network = classifier(name, shape, outputs.shape[1])
    try:
        network.load_state_dict(load_file(str(weights)))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(f"{weights} are no weights of {name}: {str(error)[:200]}") from error
    ours = outputs_of(network, pictures_of(bench.images[:32]))
    if not torch.allclose(torch.from_numpy(ours), torch.from_numpy(outputs[:32]), atol=1e-2, rtol=1e-2):
        raise DataError(f"{weights} do not give the outputs of the model under audit")
    return network
