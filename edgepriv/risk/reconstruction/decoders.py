"""The trained auditor: a network that learns to rebuild pixels from released outputs and their logarithms.

Who the attacker is: as in :mod:`auditors`, but with training time. Two forms: transposed convolutions (``conv``) and a
plain network (``mlp``). One tenth of the fitting images is held out to keep the best epoch, so that a decoder that
overfits never reports less than an earlier one. Seeded; CPU or CUDA.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgepriv.risk.reconstruction.auditors import logarithms

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DecoderSettings:
    """How long and with what a decoder is trained."""

    form: str = "conv"
    epochs: int = 6
    batch: int = 50
    learning_rate: float = 3e-3
    seed: int = 0
    device: str = "cpu"


class TransposedDecoder(nn.Module):
    """Linear layer, two transposed convolutions, one convolution, sigmoid; for pictures of any size."""

    def __init__(self, inputs: int, shape: tuple[int, int, int], width: int = 32) -> None:
        super().__init__()
        self._shape, self._width = shape, width
        self._rows, self._columns = -(-shape[0] // 4), -(-shape[1] // 4)
        self.spread = nn.Sequential(
            nn.Linear(inputs, 256),
            nn.LeakyReLU(0.1),
            nn.Linear(256, 2 * width * self._rows * self._columns),
            nn.LeakyReLU(0.1),
        )
        self.grow = nn.Sequential(
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.LeakyReLU(0.1),
            nn.ConvTranspose2d(width, width // 2, 4, 2, 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width // 2, shape[2], 3, padding=1),
        )
        self.mean = nn.Parameter(torch.zeros(shape[2], shape[0], shape[1]))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return pictures [n, c, h, w] in [0, 1]."""
        small = self.spread(z).reshape(len(z), 2 * self._width, self._rows, self._columns)
        return torch.sigmoid(self.grow(small)[:, :, : self._shape[0], : self._shape[1]] + self.mean)


class PlainDecoder(nn.Module):
    """Three linear layers and a sigmoid."""

    def __init__(self, inputs: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self._shape = shape
        pixels = shape[0] * shape[1] * shape[2]
        self.layers = nn.Sequential(
            nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, pixels)
        )
        self.mean = nn.Parameter(torch.zeros(shape[2], shape[0], shape[1]))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return pictures [n, c, h, w] in [0, 1]."""
        height, width, channels = self._shape
        return torch.sigmoid(self.layers(z).reshape(len(z), channels, height, width) + self.mean)


class TrainedDecoder:
    """A decoder network fitted on released outputs.

    Args:
        released: outputs of the audit images, [n, m].
        pixels: those images, [n, h*w*c] in [0, 1].
        shape: height, width, channels of a picture.
        settings: form, epochs, seed, device.
    """

    def __init__(
        self,
        released: Array,
        pixels: NDArray[Any],
        shape: tuple[int, int, int],
        settings: DecoderSettings | None = None,
    ) -> None:
        self._settings = settings or DecoderSettings()
        self._shape = shape
        self._floor = float(released[released > 0].min()) / 2 if np.any(released > 0) else 1.0
        self._logs = logarithms(released) is not None
        view = self._view(released)
        self._centre, self._spread = view.mean(0), view.std(0) + 1e-3
        torch.manual_seed(self._settings.seed)
        form = {"conv": TransposedDecoder, "mlp": PlainDecoder}[self._settings.form]
        self._network = form(view.shape[1], shape).to(self._settings.device)
        self._start_at_the_mean(pixels)
        self._fit(self._tensor(view), self._pictures(pixels))

    def _view(self, released: Array) -> Array:
        best = np.zeros(released.shape)
        best[np.arange(len(best)), released.argmax(1)] = 1.0
        parts = [released, best]
        if self._logs:
            logs = np.log(np.maximum(released, self._floor))
            parts.append(logs - logs.mean(1, keepdims=True))
        return np.concatenate(parts, axis=1)

    def _tensor(self, view: Array) -> torch.Tensor:
        return torch.as_tensor((view - self._centre) / self._spread, dtype=torch.float32, device=self._settings.device)

    def _pictures(self, pixels: NDArray[Any]) -> torch.Tensor:
        pictures = np.asarray(pixels, np.float32).reshape(-1, *self._shape).transpose(0, 3, 1, 2)
        return torch.as_tensor(np.ascontiguousarray(pictures), device=self._settings.device)

    def _start_at_the_mean(self, pixels: NDArray[Any]) -> None:
        """Let the untrained network give the mean picture: from mid-grey, early steps can kill it on dark pictures."""
        mean = self._pictures(np.clip(np.asarray(pixels).mean(0, keepdims=True), 0.01, 0.99))[0]
        with torch.no_grad():
            self._network.mean.copy_(torch.logit(mean))

    def _fit(self, z: torch.Tensor, x: torch.Tensor) -> None:
        held = max(1, len(z) // 10)
        train_z, train_x, held_z, held_x = z[:-held], x[:-held], z[-held:], x[-held:]
        optimiser = torch.optim.Adam(self._network.parameters(), self._settings.learning_rate)
        generator = torch.Generator().manual_seed(self._settings.seed)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, self._settings.epochs))
        best, kept = float("inf"), copy.deepcopy(self._network.state_dict())
        for _ in range(self._settings.epochs):
            for rows in torch.randperm(len(train_z), generator=generator).split(self._settings.batch):  # type: ignore[no-untyped-call]
                loss = nn.functional.mse_loss(self._network(train_z[rows]), train_x[rows])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            schedule.step()
            with torch.no_grad():
                error = float(nn.functional.mse_loss(self._network(held_z), held_x))
            if error < best:
                best, kept = error, copy.deepcopy(self._network.state_dict())
        self._network.load_state_dict(kept)

    def rebuild(self, released: Array) -> Array:
        """Return pixels [n, h*w*c] for released outputs [n, m]."""
        with torch.no_grad():
            pictures = self._network(self._tensor(self._view(released)))
        return np.asarray(pictures.permute(0, 2, 3, 1).reshape(len(released), -1).cpu().numpy(), np.float64)
