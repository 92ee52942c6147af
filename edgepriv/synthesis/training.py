"""Train a VAE: plainly or by DP-SGD (opacus), seeded, resumable after each epoch, on any torch device.

Rules: each epoch draws from a generator seeded by (seed, epoch), so a resumed run ends with the same weights; a
checkpoint names the digest of its data, so that no run goes on with weights that saw other records; it
is one safetensors file, readable by its owner only, because weights that saw private records leak.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgepriv import files
from edgepriv.errors import ConfigError, DataError, MissingDependencyError
from edgepriv.synthesis.vae import Vae, VaeConfig, vae_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    Progress = Callable[[int, int], None]

__all__ = [
    "DpSgd",
    "check_device",
    "load_vae",
    "noise_multiplier_for",
    "save_vae",
    "to_tensor",
    "train_vae",
    "use_threads",
]

FORMAT = "edgepriv.vae/1"


@dataclass(frozen=True, slots=True)
class DpSgd:
    """Train by DP-SGD to (epsilon, delta) under add-or-remove-one; gradients are clipped to ``max_grad_norm``."""

    epsilon: float
    delta: float = 1e-5
    max_grad_norm: float = 1.0


def use_threads(count: int) -> None:
    """Set how many CPU threads torch uses in this process."""
    torch.set_num_threads(count)


def check_device(name: str) -> None:
    """Refuse a torch device that is not there, before anything is computed.

    Raises:
        ConfigError: torch does not know it, or was not built for it.
    """
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"torch cannot use the device {name!r}", hint="cpu; cuda or mps where torch was built for them"
        ) from error


def to_tensor(images: NDArray[np.uint8], device: str = "cpu") -> torch.Tensor:
    """Images uint8 [n, h, w, c] as float32 [n, c, h, w] in 0..1."""
    return torch.tensor(images.transpose(0, 3, 1, 2), device=device).float() / 255.0


def train_vae(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    config: VaeConfig,
    *,
    seed: int,
    device: str = "cpu",
    dp: DpSgd | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Vae:
    """Train on images uint8 [n, h, w, c] and labels [n]; resume from ``checkpoint`` where it exists.

    Raises:
        DataError: fewer images than latent dimensions, or a shape that is not the configuration's.
        ConfigError: the checkpoint belongs to another configuration or other data.
    """
    _check(images, labels, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = Vae(config).to(device)
    if config.kind == "conv" and dp is None:  # the same sums in an order that a CPU computes faster
        vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = _DpTrainer(vae, dp, len(images), seed) if dp else _PlainTrainer(vae, seed)
    origin = _origin(images, labels, config, seed, dp) if checkpoint else {}
    start = _resume(checkpoint, trainer, origin) if checkpoint and checkpoint.exists() else 0
    x, y = to_tensor(images, device), torch.tensor(labels, device=device)
    vae.train()
    for epoch in range(start, config.epochs):
        trainer.epoch(x, y, epoch)
        if checkpoint:
            _write(checkpoint, trainer.state(), {**origin, "epoch": epoch + 1})
        if progress:
            progress(epoch + 1, config.epochs)
    vae.eval()
    if not all(torch.isfinite(p).all() for p in vae.parameters()):
        raise DataError("the VAE's training diverged", hint="lower the learning rate")
    return vae


def _adamw(parameters: list[torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW, fused where the device can: some torch versions refuse at the first step alone, so one is tried."""
    trial = torch.nn.Parameter(torch.zeros(1, device=parameters[0].device))
    trial.grad = torch.zeros_like(trial)
    try:
        torch.optim.AdamW([trial], fused=True).step()
    except RuntimeError:
        return torch.optim.AdamW(parameters, lr=learning_rate)
    return torch.optim.AdamW(parameters, lr=learning_rate, fused=True)


class _PlainTrainer:
    """AdamW over shuffled batches."""

    def __init__(self, vae: Vae, seed: int) -> None:
        self.vae, self.seed = vae, seed
        self.optimizer: Any = _adamw(list(vae.parameters()), vae.config.learning_rate)
        self.inner: Any = self.optimizer
        self.call: Any = vae

    def batches(self, count: int, draw: torch.Generator) -> Iterator[torch.Tensor]:
        """Yield the rows of each batch."""
        yield from torch.split(torch.randperm(count, generator=draw), self.vae.config.batch_size)

    def epoch(self, x: torch.Tensor, y: torch.Tensor, epoch: int) -> None:
        """Make one pass over the records."""
        draw = torch.Generator().manual_seed(_seed(self.seed, epoch, 0))
        for rows in self.batches(len(x), draw):
            keep = 1.0 if len(rows) else 0.0  # an empty Poisson batch still takes its noisy step
            rows = rows.to(x.device) if len(rows) else torch.zeros(1, dtype=torch.int64, device=x.device)  # noqa: PLW2901
            noise = torch.randn(len(rows), self.vae.config.latent_dim, generator=draw).to(x.device)
            logits, mean, log_variance = self.call(x[rows], y[rows], noise)
            loss = keep * vae_loss(x[rows], logits, mean, log_variance, self.vae.config.beta)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments as named tensors."""
        tensors = {f"model.{key}": value for key, value in self.vae.state_dict().items()}
        for index, slots in self.inner.state_dict()["state"].items():
            tensors.update({f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in slots.items()})
        return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take up weights and moments again."""
        self.vae.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = self._laid_out(int(index), value)
        self.inner.load_state_dict({**self.inner.state_dict(), "state": state})

    def _laid_out(self, index: int, value: torch.Tensor) -> torch.Tensor:
        """A moment in the memory layout of its weight: the fused optimiser walks both side by side."""
        weight = self.inner.param_groups[0]["params"][index]
        return torch.empty_like(weight).copy_(value) if value.shape == weight.shape else value


class _DpTrainer(_PlainTrainer):
    """DP-SGD: Poisson batches, one clipped gradient a record, Gaussian noise on the sum (opacus)."""

    def __init__(self, vae: Vae, dp: DpSgd, count: int, seed: int) -> None:
        super().__init__(vae, seed)
        grad_sample, optimizers = _opacus()
        self.rate = min(1.0, vae.config.batch_size / count)
        steps = vae.config.epochs * _steps_per_epoch(self.rate)
        self.call = grad_sample.GradSampleModule(vae)
        self.optimizer = optimizers.DPOptimizer(
            self.inner,
            noise_multiplier=noise_multiplier_for(dp, self.rate, steps),
            max_grad_norm=dp.max_grad_norm,
            expected_batch_size=vae.config.batch_size,
            generator=None,
        )

    def batches(self, count: int, draw: torch.Generator) -> Iterator[torch.Tensor]:
        """Independent coin flips a record, which is what the accountant assumes."""
        for _ in range(_steps_per_epoch(self.rate)):
            yield torch.nonzero(torch.rand(count, generator=draw) < self.rate).flatten()

    def epoch(self, x: torch.Tensor, y: torch.Tensor, epoch: int) -> None:
        """Make one pass; the optimiser's noise is seeded by (seed, epoch) as everything else is."""
        self.optimizer.generator = torch.Generator(x.device).manual_seed(_seed(self.seed, epoch, 1))
        with warnings.catch_warnings():  # opacus hooks layers whose input needs no gradient; torch warns of that
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            super().epoch(x, y, epoch)
        self.optimizer.zero_grad()


@lru_cache(maxsize=64)
def noise_multiplier_for(dp: DpSgd, rate: float, steps: int) -> float:
    """Gaussian noise over clip norm that spends (epsilon, delta) in ``steps`` Poisson batches of share ``rate``.

    dp-accounting's privacy-loss distribution (tight), by bisection to 1e-3; the returned value never overspends.
    """
    if not dp.epsilon > 0 or not 0 < dp.delta < 1:
        raise ConfigError(f"DP-SGD needs a positive epsilon and a delta below 1, not {dp.epsilon} and {dp.delta}")
    low, high = 0.2, 0.4
    while _spent(high, rate, steps, dp.delta) > dp.epsilon:
        low, high = high, high * 2
        if high > 1000:
            raise ConfigError(f"no noise reaches epsilon {dp.epsilon} in {steps} steps: train for fewer epochs")
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _spent(middle, rate, steps, dp.delta) > dp.epsilon else (low, middle)
    return high


def _spent(sigma: float, rate: float, steps: int, delta: float) -> float:
    try:
        from dp_accounting import dp_event, pld
    except ImportError as error:
        raise MissingDependencyError("DP-SGD needs dp-accounting", hint="pip install 'edgepriv[server]'") from error
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
    return float(accountant.compose(event, steps).get_epsilon(delta))


def _seed(seed: int, epoch: int, use: int) -> int:
    """Independent streams for each epoch and use, within torch's 63 bits."""
    return int(np.random.SeedSequence((seed, epoch, use)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _steps_per_epoch(rate: float) -> int:
    return max(1, round(1.0 / rate))


def _opacus() -> tuple[Any, Any]:
    try:
        from opacus import grad_sample, optimizers
    except ImportError as error:
        raise MissingDependencyError("DP-SGD needs opacus", hint="pip install 'edgepriv[server]'") from error
    return grad_sample, optimizers


def _check(images: NDArray[np.uint8], labels: NDArray[np.int64], config: VaeConfig) -> None:
    expected = (config.height, config.width, config.channels)
    if images.ndim != 4 or images.shape[1:] != expected or images.dtype != np.uint8:
        raise DataError(f"the VAE takes uint8 images {expected}, not {images.dtype} {images.shape}")
    if len(images) != len(labels):
        raise DataError(f"{len(images)} images but {len(labels)} labels")
    if len(images) < config.latent_dim:
        raise DataError(
            f"{len(images)} images are fewer than the {config.latent_dim} latent dimensions",
            hint="give more images or a smaller --latent-dim",
        )
    if config.classes and (labels.min() < 0 or labels.max() >= config.classes):
        raise DataError(f"labels must lie in 0..{config.classes - 1}")


def save_vae(path: Path, vae: Vae) -> None:
    """Write the weights and the configuration as one safetensors file, readable by its owner only."""
    tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in vae.state_dict().items()}
    _write(path, tensors, vae.config.as_dict())


def load_vae(path: Path, device: str = "cpu") -> Vae:
    """Read what ``save_vae`` wrote.

    Raises:
        DataError: the file is not a VAE of this format.
    """
    tensors, header = _read(path)
    fields = {k: v for k, v in header.items() if k in VaeConfig.__dataclass_fields__}
    try:
        vae = Vae(VaeConfig(**fields))
        vae.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    except (TypeError, RuntimeError) as error:
        raise DataError(f"{path} does not fit its own configuration") from error
    return vae.to(device).eval()


def _write(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    from safetensors.torch import save

    data = save(tensors, metadata={"format": FORMAT, "config": json.dumps(header)})
    files.replace(path, data, mode=0o600)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        header = json.loads(metadata["config"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a VAE that edgepriv wrote") from error
    return tensors, dict(header)


def _origin(
    images: NDArray[np.uint8], labels: NDArray[np.int64], config: VaeConfig, seed: int, dp: DpSgd | None
) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that goes on from it.

    How it was trained is a part of that: weights trained plainly must never pass for weights trained by DP-SGD. The
    seed of DP-SGD is its noise, so it is not written down.
    """
    data = hashlib.sha256(np.ascontiguousarray(images).tobytes() + labels.tobytes()).hexdigest()
    trained = {"plain": seed} if dp is None else {"dp": [dp.epsilon, dp.delta, dp.max_grad_norm]}
    return {**config.as_dict(), "data": data, "trained": trained}


def _resume(path: Path, trainer: _PlainTrainer, origin: dict[str, Any]) -> int:
    tensors, header = _read(path)
    epoch = int(header.pop("epoch", 0))
    if header != origin:
        raise ConfigError(
            f"{path} belongs to another configuration or other data",
            hint="remove it, or repeat the command that wrote it",
        )
    trainer.restore(tensors)
    return epoch
