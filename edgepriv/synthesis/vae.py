"""The variational auto-encoder: an MLP for small pictures, convolutions for larger ones, optionally label-conditional.

Only layers that opacus can clip one record at a time (no BatchNorm, no transposed convolution): the same network is
trained plainly or by DP-SGD. Loss: binary cross-entropy + beta * KL, summed over pixels, averaged over records.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from edgepriv.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Vae", "VaeConfig", "default_config", "vae_loss"]

Kind = Literal["mlp", "conv"]


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """Shape and training of one VAE; ``classes`` 0 means that labels are not used."""

    height: int
    width: int
    channels: int
    classes: int
    kind: Kind
    latent_dim: int
    hidden: int
    beta: float = 0.2
    epochs: int = 60
    learning_rate: float = 2e-3
    batch_size: int = 64

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint's header."""
        return asdict(self)


def default_config(shape: tuple[int, int, int], classes: int, **changes: Any) -> VaeConfig:
    """The measured defaults for pictures [height, width, channels]; ``changes`` override single fields.

    Raises:
        DataError: the pictures are too small to be pictures.
    """
    height, width, channels = shape
    if height < 4 or width < 4 or channels not in {1, 3}:
        raise DataError(f"pictures of {height}x{width} with {channels} channels cannot be synthesised")
    pixels = height * width * channels
    if pixels <= 100:
        fields: dict[str, Any] = {"kind": "mlp", "latent_dim": 12, "hidden": 256, "epochs": 80, "learning_rate": 3e-3}
    elif pixels <= 400:
        fields = {"kind": "mlp", "latent_dim": 16, "hidden": 192}
    elif channels == 1:
        fields = {"kind": "conv", "latent_dim": 16, "hidden": 16, "epochs": 30, "beta": 1.0}
    else:
        fields = {"kind": "conv", "latent_dim": 8, "hidden": 32, "epochs": 30}  # more leaked more and gained nothing
    fields.update({key: value for key, value in changes.items() if value is not None})
    config = VaeConfig(height=height, width=width, channels=channels, classes=classes, **fields)
    if config.latent_dim < 2:
        raise ConfigError(f"the VAE needs at least 2 latent dimensions, not {config.latent_dim}")
    return config


class Vae(nn.Module):
    """q(z | x, y) and p(x | z, y); images are float32 [m, c, h, w] in 0..1, labels int64 [m]."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        build = _mlp if config.kind == "mlp" else _conv
        self.encoder, self.decoder = build(config)

    def encode(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the codes, each [m, latent_dim]."""
        mean, log_variance = self.encoder(self._with_label_planes(images, labels)).chunk(2, dim=1)
        return mean, log_variance.clamp(-12.0, 6.0)

    def decode(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Logits of the pixels [m, c, h, w]; their sigmoid is the picture."""
        if self.config.classes:
            codes = torch.cat([codes, self._one_hot(labels)], dim=1)
        logits: Tensor = self.decoder(codes)
        return logits

    def forward(self, images: Tensor, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction logits, mean and log-variance; ``noise`` [m, latent_dim] is the sampling's randomness."""
        mean, log_variance = self.encode(images, labels)
        return self.decode(mean + noise * (0.5 * log_variance).exp(), labels), mean, log_variance

    def _one_hot(self, labels: Tensor) -> Tensor:
        return nn.functional.one_hot(labels, self.config.classes).float()

    def _with_label_planes(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.config.kind == "mlp":
            flat = images.flatten(1)
            return torch.cat([flat, self._one_hot(labels)], dim=1) if self.config.classes else flat
        if not self.config.classes:
            return images
        planes = self._one_hot(labels)[:, :, None, None].expand(-1, -1, *images.shape[2:])
        return torch.cat([images, planes], dim=1)


def vae_loss(images: Tensor, logits: Tensor, mean: Tensor, log_variance: Tensor, beta: float) -> Tensor:
    """Mean over records of BCE + beta * KL(q || N(0, I)), each summed over its own dimensions."""
    error = nn.functional.binary_cross_entropy_with_logits(logits, images, reduction="none").flatten(1).sum(1)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(1)
    return (error + beta * divergence).mean()


def _mlp(config: VaeConfig) -> tuple[nn.Module, nn.Module]:
    pixels = config.height * config.width * config.channels
    encoder = nn.Sequential(
        nn.Linear(pixels + config.classes, config.hidden),
        nn.ReLU(),
        nn.Linear(config.hidden, 2 * config.latent_dim),
    )
    decoder = nn.Sequential(
        nn.Linear(config.latent_dim + config.classes, config.hidden),
        nn.ReLU(),
        nn.Linear(config.hidden, pixels),
        nn.Unflatten(1, (config.channels, config.height, config.width)),
    )
    return encoder, decoder


def _conv(config: VaeConfig) -> tuple[nn.Module, nn.Module]:
    wide, half = config.hidden, (_halved(config.height), _halved(config.width))
    quarter = (_halved(half[0]), _halved(half[1]))
    flat = 2 * wide * quarter[0] * quarter[1]
    encoder = nn.Sequential(
        nn.Conv2d(config.channels + config.classes, wide, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(wide, 2 * wide, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(flat, 2 * config.latent_dim),
    )
    decoder = nn.Sequential(
        nn.Linear(config.latent_dim + config.classes, flat),
        nn.ReLU(),
        nn.Unflatten(1, (2 * wide, *quarter)),
        nn.Upsample(size=half),
        nn.Conv2d(2 * wide, wide, 3, padding=1),
        nn.ReLU(),
        nn.Upsample(size=(config.height, config.width)),
        nn.Conv2d(wide, config.channels, 3, padding=1),
    )
    return encoder, decoder


def _halved(size: int) -> int:
    return (size + 1) // 2
