"""One audit in a process of its own: what the service hands to its pool, or to Ray."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from concurrent.futures import Executor
    from pathlib import Path

    from edgepriv.risk.config import AuditSection
    from edgepriv.risk.reconstruction.auditors import Pipeline
    from edgepriv.risk.reconstruction.leakage import Probe

SMALL_TEST_PART = 1000  # below it, all of the auditor's pictures are halved instead


@dataclass(frozen=True, slots=True)
class AuditTask:
    """A model file to audit, and with what; ``name`` is what the report calls it, else the file's name."""

    model: Path
    settings: AuditSection
    pipelines: tuple[Pipeline, ...]
    name: str = ""


@dataclass(frozen=True, slots=True)
class AuditAnswer:
    """What a worker found: report, page, pictures, the device's indicator file; or the error and if it is final.

    An error that is not final is the machine's or the network's, not the model's.
    """

    report: dict[str, Any] | None = None
    html: str = ""
    grids: tuple[tuple[str, bytes], ...] = ()
    indicator: bytes = b""
    error: str = ""
    final: bool = False


def run_task(task: AuditTask) -> AuditAnswer:
    """Audit one model; every error of edgepriv becomes words."""
    import torch

    from edgepriv.errors import EdgeprivError, TemporaryError, UnavailableError

    torch.set_num_threads(task.settings.threads)
    try:
        return _audited(task)
    except (TemporaryError, UnavailableError, OSError) as error:
        return AuditAnswer(error=str(error))
    except EdgeprivError as error:
        return AuditAnswer(error=str(error), final=True)


def _audited(task: AuditTask) -> AuditAnswer:
    from edgepriv.risk.audit_settings import purifier_digests
    from edgepriv.risk.pictures import grid_png
    from edgepriv.risk.prepared_model import PreparedModel
    from edgepriv.risk.reconstruction.audit import AuditRequest, audit_outputs
    from edgepriv.risk.reconstruction.decoders import DecoderSettings
    from edgepriv.risk.reconstruction.leakage import AuditSettings
    from edgepriv.risk.reconstruction.supplied_model import OpeningLimits
    from edgepriv.risk.report import audit_html

    chosen = task.settings
    limits = OpeningLimits(
        memory_bytes=int(chosen.memory_mb * 2**20),
        max_model_bytes=int(chosen.max_model_mb * 2**20),
        threads=chosen.threads,
    )
    trained = None
    if chosen.auditors != "ridge":
        trained = DecoderSettings(form=chosen.auditors, epochs=chosen.decoder_epochs, device=chosen.device)
    request = AuditRequest(
        settings=AuditSettings(chosen.images, trained, device=chosen.device),
        references=chosen.references,
        reference_images=chosen.reference_images,
        limit=chosen.max_explained_variance,
    )
    bench, training = _two_parts(chosen.probe)
    model = PreparedModel.prepared(task.model, chosen, limits=limits)
    audit = audit_outputs(model, bench, task.pipelines, request, reference_data=training)
    audit = replace(audit, model=task.name or audit.model)
    shown = [(n, grid_png([p.inputs, p.reconstructions, p.class_means])) for n, p in audit.pictures.items()]
    (purifier,) = set(purifier_digests(task.pipelines))
    report = {**audit.as_dict(), "judged": model.judged(purifier)}
    return AuditAnswer(report, audit_html(audit), tuple(shown), audit.indicator)


def _two_parts(spec: str) -> tuple[Probe, Probe]:
    """Return the auditor's own pictures to measure on and to train references on: no picture is in both."""
    from edgepriv import datasets
    from edgepriv.risk.reconstruction.leakage import Probe

    test, train = datasets.load(spec, split="test"), datasets.load(spec, split="train")
    if len(test) >= SMALL_TEST_PART:
        return Probe(test.name, test.images, test.labels), Probe(train.name, train.images, train.labels)
    whole = datasets.load(spec, split="all")
    order = np.random.RandomState(2).permutation(len(whole))
    halves = [order[: len(order) // 2], order[len(order) // 2 :]]
    first, second = (Probe(whole.name, whole.images[rows], whole.labels[rows]) for rows in halves)
    return first, second


def open_pool(settings: AuditSection) -> Executor:
    """Return an executor with the configured number of workers.

    Raises:
        MissingDependencyError: ``executor = "ray"`` without the ``ray`` extra.
        UnavailableError: no cluster where ``ray_address`` says.
    """
    if settings.executor == "ray":
        from edgepriv.risk.ray_pool import RayPool

        return RayPool(settings)
    from edgepriv.risk.pool import ProcessPool

    return ProcessPool(settings.workers)
