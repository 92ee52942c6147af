"""The detector's parts: the differentiable twin of the auditor, the verdict's rules, the optional defences."""

import numpy as np
import pytest
import torch

from edgepriv.errors import DataError
from edgepriv.risk.reconstruction.adaptive import AUDIT_IMAGES, BatchAuditor, detector_loss
from edgepriv.risk.reconstruction.auditors import RIDGE, RidgeDecoder, logarithms
from edgepriv.risk.reconstruction.calibration import SHIPPED, Calibration
from edgepriv.risk.reconstruction.defences import Purifier, retrain_last_layer
from edgepriv.risk.reconstruction.detectors import effective_rank
from edgepriv.risk.reconstruction.measure import explained_variance
from edgepriv.risk.reconstruction.networks import classifier
from edgepriv.risk.reconstruction.verdict import judge
from edgepriv.risk.reconstruction.vicious import TrainingSet, accuracy


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(0)
    z, y = generator.normal(size=(400, 6)), generator.integers(0, 6, 400)
    x = np.clip(0.5 + 0.1 * z @ generator.normal(size=(6, 30)) + generator.normal(0, 0.05, (400, 30)), 0, 1)
    return z, x, y


def test_the_differentiable_auditor_is_the_shipped_one(batch):
    z, x, y = batch
    slow = RidgeDecoder(z[:300], x[:300], ridge=RIDGE * 300 / AUDIT_IMAGES)
    means = np.stack([x[:300][y[:300] == c].mean(0) for c in range(6)])
    expected = explained_variance(x[300:], slow.rebuild(z[300:]), means[y[300:]])
    tensors = torch.from_numpy(z), torch.from_numpy(x), torch.from_numpy(y)
    found = BatchAuditor(6).explained_variance(*tensors)
    assert float(found) == pytest.approx(expected, abs=0.02)
    assert expected > 0.5


def test_an_attacker_can_follow_the_gradient_of_the_detector(batch):
    z, x, y = batch
    loss = detector_loss(SHIPPED, {"ridge": 0.1, "ridge_log_softmax": 0.1}, 6)
    logits = torch.from_numpy(z).float().requires_grad_()
    value = loss(logits, torch.from_numpy(x).float().reshape(400, 1, 5, 6), torch.from_numpy(y))
    value.backward()
    assert float(value.detach()) > 1
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0


def test_effective_rank_counts_directions():
    generator = np.random.default_rng(0)
    flat = generator.normal(size=(2000, 1)) @ np.ones((1, 5))
    assert effective_rank(flat, np.zeros(2000, np.int64)) == pytest.approx(1, abs=0.01)
    assert effective_rank(generator.normal(size=(4000, 5)), np.zeros(4000, np.int64)) == pytest.approx(5, abs=0.1)


def test_wide_outputs_are_fitted_by_the_dual_with_the_same_numbers(monkeypatch, batch):
    z, x, _ = batch
    narrow = RidgeDecoder(z[:300], x[:300]).rebuild(z[300:])
    monkeypatch.setattr("edgepriv.risk.reconstruction.auditors.WIDE", 10)
    assert np.allclose(RidgeDecoder(z[:300], x[:300]).rebuild(z[300:]), narrow, atol=1e-9)


def test_logarithms_undo_a_softmax_and_leave_logits_alone(batch):
    z = batch[0]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert np.allclose(logarithms(p), z - z.mean(1, keepdims=True))
    assert logarithms(z) is None
    assert logarithms(np.eye(6)) is None


def leaking(amount):
    return {"ridge": amount, "ridge_log_softmax": amount, "trained": amount}


REFERENCES = [leaking(v) for v in (0.38, 0.40, 0.35, 0.41, 0.39)]


def test_vicious_is_said_against_references_alone():
    high = judge(leaking(0.6), REFERENCES, 0.6, known=True)
    assert (high.word, high.p_value) == ("vicious", None)
    assert judge(leaking(0.6), [], 0.6, known=True).word == "high leakage"
    assert judge(leaking(0.41), REFERENCES, 0.41, known=True).word == "high leakage"
    assert judge(leaking(0.41), REFERENCES, 0.01, known=True).word == "low leakage"


def test_stand_ins_are_compared_by_the_most_leaking_of_them():
    mixed = [*REFERENCES, leaking(0.55)]
    assert judge(leaking(0.6), mixed, 0.6, known=False).word == "high leakage"


def test_a_feature_that_was_not_measured_counts_like_the_ridges():
    calibration = Calibration({"ridge": 10.0, "trained": 10.0}, -1.0)
    assert calibration.score({"ridge": 0.2, "trained": None}) == pytest.approx(3.0)


def test_a_purifier_keeps_the_winner_and_weakens_the_rest(batch):
    logits = batch[0] * 2
    for strength in (0.0, 0.5, 1.0):
        out = Purifier(logits, strength).apply(logits)
        assert (out.argmax(1) == logits.argmax(1)).all()
    constant = Purifier(logits, 1.0).apply(logits)
    assert len(np.unique(np.round(constant, 3), axis=0)) <= 6
    with pytest.raises(DataError):
        Purifier(logits, 1.5)


def test_a_retrained_last_layer_keeps_the_others_and_works(digits_probes):
    probe = digits_probes[1]
    data = TrainingSet.of(probe.images[:600], probe.labels[:600])
    torch.manual_seed(0)
    network = classifier("mlp", (8, 8, 1), 10)
    fresh = retrain_last_layer(network, data, epochs=10)
    old, new = list(network.parameters()), list(fresh.parameters())
    assert torch.equal(old[0], new[0])
    assert not torch.equal(old[-2], new[-2])
    with torch.no_grad():
        assert accuracy(fresh(data.pictures), data.targets) > 0.7
