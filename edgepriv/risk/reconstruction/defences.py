"""Two optional defences beside the release policy, each with a price: purified outputs, a last layer trained anew.

Neither is the paper's. Both assume labelled pictures of the operator's own. What they cost in accuracy and leave in
leakage is in the README's table; the bits of the release policy remain the only bound.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgepriv.errors import DataError
from edgepriv.risk.reconstruction.detectors import log_softmax
from edgepriv.risk.reconstruction.onnx_reader import ImportedNetwork

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgepriv.risk.reconstruction.vicious import TrainingSet


Network = TypeVar("Network", bound=nn.Module)
PURIFIER_SCHEMA = "edgepriv.output-purifier/1"


class Purifier:
    """Pulls each output towards the mean output of its class: what is left is the class and a weakened rest.

    The device evaluates the file of :meth:`as_bytes` (``edgepriv/device/purify.py``); a test holds the two equal.

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

    def as_bytes(self) -> bytes:
        """Return the file that a device reads."""
        content = {
            "schema": PURIFIER_SCHEMA,
            "centres": np.round(self._centres, 6).tolist(),
            "strength": self._strength,
        }
        return json.dumps(content).encode()

    def apply(self, outputs: NDArray[Any]) -> NDArray[np.float32]:
        """Return purified log-softmax values [n, k]; the winning class stays."""
        z = log_softmax(outputs)
        pulled = z + self._strength * (self._centres[z.argmax(1)] - z)
        rows = np.arange(len(z))
        pulled[rows, z.argmax(1)] = np.maximum(pulled[rows, z.argmax(1)], pulled.max(1) + 1e-6)
        return np.asarray(pulled, np.float32)


def retrain_last_layer(network: Network, data: TrainingSet, *, epochs: int = 5, seed: int = 0) -> Network:
    """Return a copy whose last layer was trained anew by cross entropy, all others frozen.

    Args:
        network: a classifier or an imported graph; it may end in a softmax.
        data: the operator's own labelled pictures.
        epochs: passes over them.
        seed: of the fresh weights and the order.

    Raises:
        DataError: the network has no last matrix to train.
    """
    fresh = copy.deepcopy(network).eval()
    last = last_parameters(fresh)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        bound = (3.0 / max(last[0].shape)) ** 0.5
        last[0].copy_((torch.rand(last[0].shape, generator=generator) * 2 - 1) * bound)
        for bias in last[1:]:
            bias.zero_()
        first = fresh(data.pictures[:64])
        probabilities = bool(first.min() >= 0 and torch.allclose(first.sum(1), torch.ones(len(first)), atol=1e-3))
    for parameter in fresh.parameters():
        parameter.requires_grad_(any(parameter is chosen for chosen in last))
    optimiser = torch.optim.Adam(last, 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.pictures), generator=generator).split(125):  # type: ignore[no-untyped-call]
            outputs = fresh(data.pictures[rows])
            scores = outputs.clamp_min(1e-12).log() if probabilities else torch.log_softmax(outputs, 1)
            optimiser.zero_grad(set_to_none=True)
            functional.nll_loss(scores, data.targets[rows]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    for parameter in fresh.parameters():
        parameter.requires_grad_(True)
    return fresh


def last_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the last weight matrix and its bias: of an imported graph by its nodes, else by their order.

    Raises:
        DataError: there is no matrix.
    """
    if isinstance(network, ImportedNetwork):
        return network.last_parameters()
    parameters = list(network.parameters())
    places = [at for at, p in enumerate(parameters) if p.ndim == 2]
    if not places:
        raise DataError("the network has no last matrix to train anew")
    return parameters[places[-1] :]
