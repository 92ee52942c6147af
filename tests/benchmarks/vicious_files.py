"""The same verdict by the product's own way: models as files, what `edgepriv audit outputs` does with its defaults.

The set of `vicious_models` is judged in memory with the architecture named; here the graph is read from the file, the
references are drawn from it, and the trained auditor is the command's.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from vicious_models import Work, opened

from edgepriv.device.release import parse_policy
from edgepriv.risk.reconstruction.audit import AuditRequest, audit_outputs
from edgepriv.risk.reconstruction.decoders import DecoderSettings
from edgepriv.risk.reconstruction.leakage import AuditSettings, Probe
from edgepriv.risk.reconstruction.supplied_model import SuppliedModel

if TYPE_CHECKING:
    from pathlib import Path

EACH = {"strong": 2, "weak": 2, "softmax": 2}  # of the others: every adapted one, one of each kind of honest


def chosen(models: list[dict]) -> list[dict]:
    """Some of each stratum, so that the part ends in minutes."""
    taken: dict[str, list[dict]] = {}
    for model in models:
        kind = model["stratum"]
        most = len(models) if kind == "adapted" else EACH.get(kind, 1)
        if len(taken.setdefault(kind, [])) < most:
            taken[kind].append(model)
    return [model for kind in taken.values() for model in kind]


def verdicts_of_files(models: list[dict], work: Work) -> list[dict]:
    """Word, reason and leakage of raw logits for each file."""
    with work.pool() as pool:
        waiting = [pool.submit(_verdict, model, work.cache / model["file"], work) for model in chosen(models)]
        return [one.result() for one in waiting]


def _verdict(model: dict, path: Path, work: Work) -> dict:
    started, data = time.monotonic(), opened(work.folder)
    probe = Probe("mnist-14", data.bench.images, data.bench.labels)
    request = AuditRequest(AuditSettings(6000, DecoderSettings(form="conv", epochs=6)), references=5)
    policies = [parse_policy("argmax"), parse_policy("unsafe_raw_logits")]
    found = audit_outputs(SuppliedModel.find(path), probe, policies, request, reference_data=data.images["references"])
    print(f"{path.name}: {found.verdict.word} {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return {
        "stratum": model["stratum"],
        "attack": model["attack"],
        "worked": model.get("succeeded"),
        "verdict": found.verdict.word,
        "score": found.verdict.detector_score,
        "argmax": found.policies[0].score.explained_variance,
        "raw": found.policies[1].score.explained_variance,
    }
