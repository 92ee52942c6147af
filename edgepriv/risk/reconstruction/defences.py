"""Two optional defences beside the release policy, each with a price: purified outputs, a last layer trained anew.

Neither is the paper's. Both assume labelled pictures of the operator's own. What they cost in accuracy and leave in
leakage is in the README's table; the bits of the release policy remain the only bound.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgepriv.errors import DataError
from edgepriv.risk.reconstruction.detectors import log_softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgepriv.risk.reconstruction.vicious import TrainingSet


class Purifier:
    """Pulls each output towards the mean output of its class: what is left is the class and a weakened rest.

    Args:
        outputs: outputs of any model on the operator's pictures, [n, k].
        strength: 0 changes nothing, 1 leaves the class's mean output, which is argmax in other words.
    """

    def __init__(self, outputs: NDArray[Any], strength: float) -> None:
        if not 0 <= strength <= 1:
            raise DataError("a purifier's strength is between 0 and 1")
        z = log_softmax(outputs)
        classes = z.argmax(1)
        means = [z[classes == c].mean(0) if (classes == c).any() else z.mean(0) for c in range(z.shape[1])]
        self._centres, self._strength = np.stack(means), strength

    def apply(self, outputs: NDArray[Any]) -> NDArray[np.float32]:
        """Return purified log-softmax values [n, k]; the winning class stays."""
        z = log_softmax(outputs)
        pulled = z + self._strength * (self._centres[z.argmax(1)] - z)
        rows = np.arange(len(z))
        pulled[rows, z.argmax(1)] = np.maximum(pulled[rows, z.argmax(1)], pulled.max(1) + 1e-6)
        return np.asarray(pulled, np.float32)


def retrain_last_layer(network: nn.Module, data: TrainingSet, *, epochs: int = 5, seed: int = 0) -> nn.Module:
    """Return a copy whose last layer was trained anew by cross entropy, all others frozen.

    Args:
        network: a classifier or an imported graph.
        data: the operator's own labelled pictures.
        epochs: passes over them.
        seed: of the fresh weights and the order.

    Raises:
        DataError: the network has no last matrix to train.
    """
    fresh = copy.deepcopy(network).eval()
    parameters = list(fresh.parameters())
    places = [at for at, p in enumerate(parameters) if p.ndim == 2]
    if not places:
        raise DataError("the network has no last matrix to train anew")
    last = parameters[places[-1] :]
    torch.manual_seed(seed)
    nn.init.kaiming_uniform_(last[0])
    for bias in last[1:]:
        nn.init.zeros_(bias)
    for parameter in parameters:
        parameter.requires_grad_(any(parameter is chosen for chosen in last))
    optimiser = torch.optim.Adam(last, 2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.pictures), generator=generator).split(125):  # type: ignore[no-untyped-call]
            loss = functional.cross_entropy(fresh(data.pictures[rows]), data.targets[rows])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    for parameter in parameters:
        parameter.requires_grad_(True)
    return fresh
