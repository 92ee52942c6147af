"""Few pictures or few references are no ground for an accusation: honest models measured on small probe sets."""

import numpy as np
import pytest
import torch

from edgepriv.datasets import load
from edgepriv.device.release import parse_policy
from edgepriv.errors import DataError
from edgepriv.risk.reconstruction.audit import AuditRequest, audit_outputs
from edgepriv.risk.reconstruction.detectors import DetectorSettings, Evidence, evidence, outputs_of, pictures_of
from edgepriv.risk.reconstruction.leakage import AuditSettings, Bench, Probe
from edgepriv.risk.reconstruction.references import named, train_references
from edgepriv.risk.reconstruction.supplied_model import SuppliedModel
from edgepriv.risk.reconstruction.verdict import judge, least_margin, too_weak_to_accuse
from edgepriv.risk.reconstruction.vicious import TrainingSet

QUICK = DetectorSettings(None)


def verdicts(pairs, count, draw):
    """Words with and without the guard on ``count`` pictures, by model."""
    data = load("digits", split="test")
    rows = np.random.RandomState(draw).permutation(len(data))[:count]
    training = load("digits", split="train", limit=max(count, 100))
    bench = Bench(Probe("few digits", data.images[rows], data.labels[rows]), AuditSettings(trained=None))
    prepared = TrainingSet.of(training.images, training.labels, classes=10)
    references = train_references(named("cnn", (8, 8, 1), 10), prepared, bench, 5, settings=QUICK)
    values = [reference.values for reference in references]
    found = {}
    for name, pair in pairs.items():
        seen = evidence(bench, outputs_of(pair.classifier, pictures_of(bench.images)), None, QUICK)
        margin = least_margin(seen, references, known=True)
        doubt = too_weak_to_accuse(len(references), len(seen.available), margin)
        found[name] = [judge(seen.values, values, 0.1, known=True, doubt=d) for d in ("", doubt)]
    return found


def test_an_honest_model_is_not_accused_on_166_pictures_where_an_unguarded_detector_accuses_it(digit_models):
    torch.set_num_threads(1)
    _, pairs = digit_models
    found = [verdicts(pairs, 166, draw) for draw in range(3)]
    assert any(one["honest"][0].word == "vicious" for one in found)  # without the guard: the positive control
    assert all(one["honest"][1].word != "vicious" for one in found)
    for one in found:
        assert one["vicious"][1].word == "high leakage"  # withheld, not accused
        assert "cause unknown" in one["vicious"][1].reason


def test_with_enough_pictures_the_vicious_model_is_still_accused(digit_models):
    _, pairs = digit_models
    found = verdicts(pairs, 350, 0)
    assert found["vicious"][1].word == "vicious"
    assert found["honest"][1].word != "vicious"


def test_two_references_accuse_nobody(digit_models, digits_probes):
    folder, _ = digit_models

    request = AuditRequest(settings=AuditSettings(trained=None), references=2)
    model = SuppliedModel.find(folder / "vicious.onnx")
    found = audit_outputs(
        model, digits_probes[0], [parse_policy("argmax")], request, reference_data=digits_probes[1]
    ).verdict
    assert found.word == "high leakage"
    assert "2 honest models are too few" in found.reason


def seen(error, pictures, spread, seed):
    generator = np.random.default_rng(seed)
    lost = error * (1 + spread * generator.standard_normal(pictures))
    return Evidence({"ridge": 1 - error}, {"ridge": lost}, np.ones(pictures), np.zeros((1, 2), np.float32))


def test_the_margin_grows_with_the_pictures_and_with_the_difference():
    references = [seen(0.6 + 0.01 * at, 400, 0.3, at) for at in range(5)]
    few = [seen(0.6 + 0.01 * at, 20, 0.3, at) for at in range(5)]
    margins = [least_margin(seen(error, 400, 0.3, 9), references, known=True) for error in (0.6, 0.5, 0.4)]
    assert margins == sorted(margins)
    assert margins[0] < 0 < margins[2]
    assert least_margin(seen(0.5, 20, 0.3, 9), few, known=True) < margins[1]


@pytest.mark.parametrize(("references", "pictures", "margin"), [(2, 500, 9.0), (5, 59, 9.0), (5, 500, -0.1)])
def test_each_reason_for_doubt_is_said(references, pictures, margin):
    assert too_weak_to_accuse(references, pictures, margin)
    assert not too_weak_to_accuse(3, 60, 0.1)


def test_a_probe_of_a_few_pictures_is_refused_before_anything_is_trained():
    with pytest.raises(DataError, match="too few"):
        Bench(Probe("tiny", np.zeros((59, 8, 8, 1), np.uint8), None))
