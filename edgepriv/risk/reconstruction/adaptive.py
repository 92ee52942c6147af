"""An attacker who knows the shipped detector: the detector's score as a differentiable term of the training loss.

Used to judge the detector, never to calibrate it. In every batch the random-feature ridge decoder is fitted in closed
form on three quarters and scored on the rest, so that the gradient flows through the auditor itself; the trained
decoder and the fine-tuning are not differentiable here and stay unknown to this attacker's loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from edgepriv.risk.reconstruction.auditors import GENERATOR_SEED, RANDOM_FEATURES, RIDGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgepriv.risk.reconstruction.calibration import Calibration

AUDIT_IMAGES = 4500  # the ridge penalty is scaled from the audit's fitting part to a batch


class BatchAuditor:
    """The shipped ridge decoder as a torch function of one batch."""

    def __init__(self, outputs: int) -> None:
        generator = np.random.default_rng(GENERATOR_SEED)
        drawn = generator.standard_normal((outputs, RANDOM_FEATURES)) / np.sqrt(outputs)
        self._weights = torch.from_numpy(drawn).float()
        self._bias = torch.from_numpy(generator.standard_normal(RANDOM_FEATURES)).float()

    def explained_variance(self, z: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Within-class explained variance of flattened pictures x [n, d], rebuilt from outputs z [n, k]."""
        cut = len(z) * 3 // 4
        standard = (z - z[:cut].mean(0)) / (z[:cut].std(0) + 1e-3)
        hidden = torch.relu(standard @ self._weights.to(z) + self._bias.to(z))
        phi = torch.cat([torch.ones_like(z[:, :1]), standard, hidden], 1)
        penalty = RIDGE * cut / AUDIT_IMAGES * torch.eye(phi.shape[1]).to(z)
        solution = torch.linalg.solve(phi[:cut].T @ phi[:cut] + penalty, phi[:cut].T @ x[:cut])
        copies = phi[cut:] @ solution
        member = torch.nn.functional.one_hot(y[:cut], z.shape[1]).to(z)
        means = (member.T @ x[:cut]) / member.sum(0).clamp_min(1)[:, None]
        value: torch.Tensor = 1 - ((x[cut:] - copies) ** 2).sum() / ((x[cut:] - means[y[cut:]]) ** 2).sum()
        return value


def effective_rank(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Differentiable twin of :func:`detectors.effective_rank`."""
    member = torch.nn.functional.one_hot(y, z.shape[1]).to(z)
    centred = z - (member @ ((member.T @ z) / member.sum(0).clamp_min(1)[:, None]))
    covariance = centred.T @ centred / len(z)
    return torch.trace(covariance) ** 2 / (covariance**2).sum().clamp_min(1e-12)


def detector_loss(
    calibration: Calibration, reference: dict[str, float], outputs: int, weight: float = 1.0
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a loss term: softplus of the detector's score on the batch.

    Args:
        calibration: of the shipped detector.
        reference: mean features of honest models, which this attacker trained for himself.
        outputs: number of the classifier's outputs.
        weight: of the term.
    """
    auditor = BatchAuditor(outputs)

    def loss(logits: torch.Tensor, pictures: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x, logs = pictures.flatten(1), torch.log_softmax(logits, 1)
        seen = {
            "ridge": auditor.explained_variance(logits, x, targets),
            "ridge_log_softmax": auditor.explained_variance(logs, x, targets),
            "effective_rank": effective_rank(logits, targets),
            "log_spread": torch.log(logits.std(0).mean() + 1e-12),
        }
        score = torch.as_tensor(calibration.bias).to(logits)
        for name, value in seen.items():
            score = score + calibration.weights.get(name, 0.0) * (value - reference[name])
        return weight * torch.nn.functional.softplus(score)

    return loss
