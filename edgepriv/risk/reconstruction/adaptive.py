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


def batch_features(
    auditor: BatchAuditor, logits: torch.Tensor, pictures: torch.Tensor, targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the detector's differentiable features of one batch; lower than the audit's, which sees more pictures."""
    x = pictures.flatten(1)
    return {
        "ridge": auditor.explained_variance(logits, x, targets),
        "ridge_log_softmax": auditor.explained_variance(torch.log_softmax(logits, 1), x, targets),
    }


def honest_level(
    auditor: BatchAuditor, network: torch.nn.Module, pictures: torch.Tensor, targets: torch.Tensor, batch: int
) -> dict[str, float]:
    """Mean batch features of an honest model that this attacker trained for himself: what he aims at."""
    network.eval()
    found: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        for at in range(0, len(pictures) - batch + 1, batch):
            x, y = pictures[at : at + batch], targets[at : at + batch]
            found.append(batch_features(auditor, network(x), x, y))
    return {name: float(torch.stack([one[name] for one in found]).mean()) for name in found[0]}


def detector_loss(
    calibration: Calibration, level: dict[str, float], outputs: int, weight: float = 1.0
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a loss term: softplus of the detector's score on the batch.

    Args:
        calibration: of the shipped detector; the trained decoder's weight is put on the ridge, which stands in for it.
        level: of an honest model, from :func:`honest_level` with the same batch size.
        outputs: number of the classifier's outputs.
        weight: of the term.
    """
    auditor = BatchAuditor(outputs)
    weights = {"ridge": calibration.weights.get("ridge", 0.0) + calibration.weights.get("trained", 0.0)}
    weights["ridge_log_softmax"] = calibration.weights.get("ridge_log_softmax", 0.0)

    def loss(logits: torch.Tensor, pictures: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = batch_features(auditor, logits, pictures, targets)
        score = torch.as_tensor(calibration.bias).to(logits)
        for name, value in found.items():
            score = score + weights[name] * (value - level[name])
        return weight * torch.nn.functional.softplus(score)

    return loss
