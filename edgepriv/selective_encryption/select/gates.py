"""Scores from trained gates: PSS as published, and gates trained against the decoy itself.

Hard-concrete gate (Louizos et al.; constants of the released PSS code): stretch interval (-0.1, 1.1), temperature
2/3, ``z = clip(1.2 * sigmoid(.) - 0.1, 0, 1)``. The network's own weights stay frozen.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgepriv.selective_encryption.carrier import Layer
    from edgepriv.selective_encryption.select.network import Network
    from edgepriv.selective_encryption.select.scores import Scores

    Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
LOGIT_RANGE = (math.log(0.01), math.log(100.0))
LOSS_CAP = 4.0


def _stretch(s: torch.Tensor) -> torch.Tensor:
    return ((HIGH - LOW) * s + LOW).clamp(0, 1)


def _sampled(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    u = torch.rand(logits.shape, generator=generator).to(logits.device).clamp(1e-6, 1 - 1e-6)
    return _stretch(torch.sigmoid((u.log() - (1 - u).log() + logits) / TEMPERATURE))


def _open_probability(logits: torch.Tensor) -> torch.Tensor:
    """P(z != 0) of the hard-concrete gate."""
    return torch.sigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH))


def pss_gates(
    network: Network,
    layers: Sequence[Layer],
    x: torch.Tensor,
    y: torch.Tensor,
    loss: Loss,
    *,
    steps: int = 120,
    batch: int = 150,
    weight: float = 1e-4,
    seed: int = 0,
) -> Scores:
    """PSS as released: for each layer alone, min over a of CE(f(x; z(a) W)) + L sum P(z != 0), deterministic gates.

    SGD 0.1, momentum 0.9, Nesterov; logits start at N(1, 1e-5) and are clamped to [ln 0.01, ln 100] after each step.

    Returns:
        The logits a_e: a large one keeps its kernel because the model needs it.
    """
    network.eval()
    network.requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(seed)
    scores: Scores = {}
    for layer in layers:
        rows = network.rows(layer.name, layer.units)
        shape = network.weight(layer.name).shape
        logits = torch.normal(1.0, 1e-5, (layer.units, 1), generator=generator).to(rows.device).requires_grad_()
        optimizer = torch.optim.SGD([logits], lr=0.1, momentum=0.9, nesterov=True)
        for _ in range(steps):
            pick = torch.randint(len(x), (min(batch, len(x)),), generator=generator)
            gated = (_stretch(torch.sigmoid(logits)) * rows).reshape(shape)
            cost = loss(network(x[pick], {layer.name: gated}), y[pick])
            cost = cost + weight * _open_probability(logits).sum()
            optimizer.zero_grad()
            cost.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                logits.clamp_(*LOGIT_RANGE)
        scores[layer.name] = logits.detach()[:, 0].double().cpu().numpy()
    network.requires_grad_(requires_grad=True)
    return scores


def decoy_gates(
    network: Network,
    layers: Sequence[Layer],
    x: torch.Tensor,
    y: torch.Tensor,
    loss: Loss,
    *,
    steps: int = 200,
    batch: int = 64,
    weight: float = 3e-3,
    seed: int = 0,
) -> Scores:
    """Gates that optimise the encryption itself, all layers jointly.

    W~ = W (1 - s) + s (mu + sd eps), s hard-concrete; min over the logits of -min(CE, 4) + 3e-3 sum P(s != 0), Adam
    0.1. A large logit says: a decoy here does the most harm.
    """
    network.eval()
    network.requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(seed)
    true = {layer.name: network.rows(layer.name, layer.units) for layer in layers}
    logits = {n: torch.zeros(len(rows), 1, device=rows.device, requires_grad=True) for n, rows in true.items()}
    optimizer = torch.optim.Adam(list(logits.values()), lr=0.1)
    for _ in range(steps):
        pick = torch.randint(len(x), (min(batch, len(x)),), generator=generator)
        mixed = {}
        for name, rows in true.items():
            noise = rows.mean(0) + rows.std(0) * torch.randn(rows.shape, generator=generator).to(rows.device)
            gate = _sampled(logits[name], generator)
            mixed[name] = (rows * (1 - gate) + gate * noise).reshape(network.weight(name).shape)
        harm = loss(network(x[pick], mixed), y[pick])
        used = torch.stack([_open_probability(logit).sum() for logit in logits.values()]).sum()
        cost = functional.relu(LOSS_CAP - harm) + weight * used
        optimizer.zero_grad()
        cost.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    network.requires_grad_(requires_grad=True)
    return {name: logit.detach()[:, 0].double().cpu().numpy() for name, logit in logits.items()}
