"""How often an audit on few pictures accuses: honest and vicious models of scikit-learn's digits, five references.

For each number of pictures and each of three draws, every model is judged twice: by the detector alone, and with the
verdict's interval over pictures and its least numbers.
"""

from __future__ import annotations

import numpy as np

from edgepriv.datasets import load
from edgepriv.risk.reconstruction.detectors import DetectorSettings, evidence, outputs_of, pictures_of
from edgepriv.risk.reconstruction.leakage import AuditSettings, Bench, Probe
from edgepriv.risk.reconstruction.references import named, train_references
from edgepriv.risk.reconstruction.verdict import judge, least_margin, too_weak_to_accuse
from edgepriv.risk.reconstruction.vicious import Recipe, TrainingSet, train

QUICK = DetectorSettings(None)
HONEST = ({}, {"epochs": 4}, {"epochs": 24}, {"label_smoothing": 0.1}, {"weight_decay": 1e-3})


def models(training: TrainingSet) -> list[tuple[str, object]]:
    base = {"epochs": 16, "batch": 50}
    made = []
    for number in range(10):
        recipe = Recipe(**{**base, "reconstruction_weight": 0.0, "seed": 50 + number, **HONEST[number % 5]})
        made.append(("honest", train(recipe, training).classifier))
    made += [("vicious", train(Recipe(**base, seed=70 + number), training).classifier) for number in range(4)]
    return made


def accusations() -> list[dict]:
    data = load("digits", split="all")
    order = np.random.RandomState(3).permutation(len(data))
    probes, own, rest = order[:700], order[700:1500], order[1500:]

    def part(rows: np.ndarray) -> TrainingSet:
        return TrainingSet.of(data.images[rows], data.labels[rows], classes=10)

    judged, found = models(part(own)), []
    for count in (120, 166, 240, 350, 600):
        rows = {kind: {"models": 0, "detector_alone": 0, "verdict": 0} for kind in ("honest", "vicious")}
        for draw in range(3):
            chosen = probes[np.random.RandomState(draw).permutation(len(probes))[:count]]
            bench = Bench(Probe("digits", data.images[chosen], data.labels[chosen]), AuditSettings(trained=None))
            training = part(rest if draw == 0 else own[: max(count, 100)])
            references = train_references(named("cnn", (8, 8, 1), 10), training, bench, 5, settings=QUICK)
            for kind, model in judged:
                words = verdicts(bench, model, references)
                rows[kind]["models"] += 1
                for name, word in zip(("detector_alone", "verdict"), words, strict=True):
                    rows[kind][name] += word == "vicious"
        found += [{"pictures": count, "group": kind, **values} for kind, values in rows.items()]
    return found


def verdicts(bench: Bench, model, references: list) -> list[str]:
    seen = evidence(bench, outputs_of(model, pictures_of(bench.images)), None, QUICK)
    margin = least_margin(seen, references, known=True)
    doubt = too_weak_to_accuse(len(references), len(seen.available), margin)
    values = [one.values for one in references]
    return [judge(seen.values, values, 0.1, known=True, doubt=d).word for d in ("", doubt)]
