"""Digits, a small BatchNorm network and updates of our own trainer."""

from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgepriv import datasets  # noqa: E402
from edgepriv.federated.torch_trainer import train_locally  # noqa: E402
from edgepriv.risk import models  # noqa: E402

torch.set_num_threads(1)  # two on a busy machine are ten times slower


@dataclass
class Digits:
    private: np.ndarray
    private_labels: np.ndarray
    public: np.ndarray
    public_labels: np.ndarray

    def network(self, seed, name="cnn-bn"):
        torch.manual_seed(seed)
        return models.build(name, 10, 1, 8)

    def client(self, model, recipe, n, seed=0):
        """Train on n private images; return the update, the images and labels in the order of training."""
        rows = np.random.default_rng(seed).choice(len(self.private), n, replace=False)
        update = train_locally(model, self.private[rows], self.private_labels[rows], recipe, seed=seed)
        rows = rows[update.order[:n]]
        return update.tensors, self.private[rows], self.private_labels[rows]


@pytest.fixture(scope="session")
def digits():
    data = datasets.load("digits", split="all")
    x = (data.images.transpose(0, 3, 1, 2) / 255).astype(np.float32)
    return Digits(x[:898], data.labels[:898], x[898:], data.labels[898:])
