"""A leakage ceiling without an attack: the approximate Bayesian Cramer-Rao bound of one update.

The released vector u(x) is read as a noisy measurement of the D pixels, linearised at the canary, with a Gaussian
prior from public images:

    J = du/dx,   V = (J^T Sigma^-1 J + Lambda^-1)^-1,   PSNR = -10 log10(trace(V) / D)

What it is not (printed with every result, :data:`CAVEAT`): a certificate. Rules: deterministic; no attack is run;
noise must be above zero, otherwise the bound is infinite by construction.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgepriv.errors import DataError
from edgepriv.federated.torch_trainer import is_statistic
from edgepriv.risk.gradient_leakage import statistics
from edgepriv.risk.gradient_leakage.simulate import Simulation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgepriv.federated.local_recipe import LocalRecipe
    from edgepriv.risk.gradient_leakage.simulate import Simulated

CAVEAT = (
    "A local linearisation at this canary with a diagonal Gaussian prior and known labels: an indicator of risk, "
    "not a certificate. A generative prior, box constraints or several rounds can beat it; it speaks about this "
    "canary, not about anybody's private images."
)
MAX_JACOBIAN_BYTES = 4 << 30
MAX_PIXELS = 1024
SUBSPACE_PIXELS = 128
UNIFORM_VARIANCE = 1 / 12


@dataclass(frozen=True, slots=True)
class Bound:
    """The ceiling in dB of the mean squared error.

    Attributes:
        psnr_db: no attack in this model does better on average; infinite without noise.
        floor_db: what the prior alone gives.
        per_image_psnr_db: from each image's own block of V.
        explained_variance: 1 - trace(V) / trace(Lambda): 0 the update says nothing, 1 everything.
        rank: directions of the images that the update says more about than the prior does.
        dimensions: D, or the size of the subspace.
        subspace: how many low frequencies per channel side were kept (0 = all pixels); the attacker is then
            taken to know all the others, so the ceiling stays a ceiling.
        seconds: time taken.
    """

    psnr_db: float
    floor_db: float
    per_image_psnr_db: tuple[float, ...]
    explained_variance: float
    rank: int
    dimensions: int
    subspace: int
    seconds: float
    caveat: str = field(default=CAVEAT, repr=False)

    def record(self) -> dict[str, Any]:
        """Return plain values for JSON; infinity as ``None``."""
        values = asdict(self)
        values["psnr_db"] = None if math.isinf(self.psnr_db) else self.psnr_db
        values["per_image_psnr_db"] = [None if math.isinf(v) else v for v in self.per_image_psnr_db]
        return values


@dataclass(frozen=True, slots=True)
class Jacobian:
    """J by tensor group [rows, dimensions], reusable for many noise levels."""

    groups: dict[str, NDArray[np.float64]]
    prior_variance: NDArray[np.float64]
    n_images: int
    pixels: int
    subspace: int
    seconds: float
    norm: float


def jacobian(
    model: nn.Module,
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    recipe: LocalRecipe,
    public: NDArray[np.float32] | None,
    *,
    subspace: int = 0,
    clients: int = 1,
    momentum: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
) -> Jacobian:
    """Differentiate the update with respect to the canary images.

    Args:
        model: the global model.
        images: the canaries [n, c, h, w] in 0..1, in the order of training.
        labels: [n].
        recipe: what the device does.
        public: [m, c, h, w] images of the same kind, for the prior; ``None``: every value of 0..1 is as likely
            (variance 1/12).
        subspace: 0 for every pixel; else only the ``subspace`` x ``subspace`` lowest DCT frequencies a channel.
        clients: the update is the mean over this many devices (an aggregate).
        momentum: buffers before the round, where the recipe carries them.
        device: a torch device.

    Raises:
        DataError: the Jacobian would not fit into 4 GB; the hint names the subspace.
    """
    began = time.perf_counter()
    basis = _basis(images.shape[2], images.shape[3], subspace)
    channels, per_image = images.shape[1], images.shape[1] * basis.shape[0]
    simulation = Simulation(model, recipe, clients=clients, momentum=momentum, device=device)
    size = sum(p.numel() for p in simulation.trained.values()) + 2 * sum(
        layer.running_mean.numel() for layer in simulation.layers.values()
    )
    dimensions = len(images) * per_image
    if 8 * size * dimensions > MAX_JACOBIAN_BYTES:
        raise DataError(
            f"the Jacobian of {size} values by {dimensions} pixels is larger than {MAX_JACOBIAN_BYTES >> 30} GB",
            hint="use fewer canaries, or a subspace of low frequencies",
        )
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    to_pixels = torch.from_numpy(basis.astype(np.float32)).to(device)
    offsets = torch.zeros(len(images), channels, basis.shape[0], device=device, requires_grad=True)
    shifted = x + (offsets @ to_pixels).reshape(x.shape)
    classes = _classes(model, x)
    targets = nn.functional.one_hot(torch.from_numpy(labels).to(device), classes).float()
    released = _released(simulation, simulation.update(shifted, targets))
    groups = _differentiate(released, offsets)
    prior = np.tile(_prior_variance(public, channels, basis), len(images))
    norm = math.sqrt(sum(float((v.detach().double() ** 2).sum()) for v in released.values()))
    seconds = time.perf_counter() - began
    return Jacobian(groups, prior, len(images), channels * images.shape[2] * images.shape[3], subspace, seconds, norm)


def _prior_variance(
    public: NDArray[np.float32] | None, channels: int, basis: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the variance of one image's coefficients [channels * kept] before anything is sent."""
    if public is None:
        return np.full(channels * len(basis), UNIFORM_VARIANCE)
    flat = public.reshape(len(public), channels, -1).astype(np.float64) @ basis.T
    return np.asarray((flat.var(axis=0) + 1e-4).ravel(), np.float64)


def affordable_subspace(shape: tuple[int, ...]) -> int:
    """Return 0 (every pixel) for up to 1,024 pixels, else as many frequencies as keep the bound at seconds."""
    n, channels, height, width = shape
    if n * channels * height * width <= MAX_PIXELS:
        return 0
    return max(1, min(height, width, math.isqrt(max(1, SUBSPACE_PIXELS // (n * channels)))))


def bound(
    jac: Jacobian, sigmas: Mapping[str, float] | float, *, shares_statistics: bool = True, clip: float | None = None
) -> Bound:
    """Return the ceiling for a noise.

    Args:
        jac: see :func:`jacobian`.
        sigmas: noise std by tensor name, or one for all. A tensor that is not named is not sent.
        shares_statistics: whether BatchNorm's statistics are sent at all.
        clip: L2 norm to which the update was scaled down, where it was longer.
    """
    began = time.perf_counter()
    factor = 1.0 if clip is None or jac.norm <= clip else clip / jac.norm
    total = np.zeros((len(jac.prior_variance),) * 2)
    infinite = False
    for name, block in jac.groups.items():
        if is_statistic(name) and not shares_statistics:
            continue
        sigma = sigmas if isinstance(sigmas, float | int) else sigmas.get(name)
        if sigma is None:
            continue
        if sigma <= 0:
            infinite = True
            continue
        total += (factor / float(sigma)) ** 2 * (block.T @ block)
    return _from_information(jac, total, infinite=infinite, seconds=jac.seconds + time.perf_counter() - began)


def _from_information(jac: Jacobian, total: NDArray[np.float64], *, infinite: bool, seconds: float) -> Bound:
    prior = jac.prior_variance
    root = np.sqrt(prior)
    # symmetric form: V = L^(1/2) (I + L^(1/2) F L^(1/2))^-1 L^(1/2), well conditioned for any noise
    values, vectors = np.linalg.eigh(root[:, None] * total * root[None, :])
    values = np.clip(values, 0, None)
    variances = prior * ((vectors**2) @ (1 / (1 + values)))
    pixels = jac.n_images * jac.pixels
    per_image = variances.reshape(jac.n_images, -1).sum(1) / jac.pixels
    if infinite:
        variances, per_image = np.zeros_like(variances), np.zeros_like(per_image)
    return Bound(
        psnr_db=_db(float(variances.sum()) / pixels),
        floor_db=_db(float(prior.sum()) / pixels),
        per_image_psnr_db=tuple(_db(float(v)) for v in per_image),
        explained_variance=float(1 - variances.sum() / prior.sum()),
        rank=int((values > 1).sum()),
        dimensions=len(prior),
        subspace=jac.subspace,
        seconds=seconds,
    )


def _released(simulation: Simulation, simulated: Simulated) -> dict[str, Tensor]:
    """Return u(x) by tensor name, running statistics included as changes of the buffers."""
    released = dict(simulated.changes)
    for layer, recorded in simulated.statistics.items():
        recorder = simulation.layers[layer]
        gain = 1 / statistics.noise_gain(simulation.momenta[layer], len(recorder.records))
        released[f"{layer}.running_mean"] = gain * (recorded.mean - recorder.running_mean)
        released[f"{layer}.running_var"] = gain * (recorded.variance - recorder.running_var)
    return released


def _differentiate(released: Mapping[str, Tensor], offsets: Tensor) -> dict[str, NDArray[np.float64]]:
    """Return du/dx by the double-backward trick: g(v) = J^T v is linear in v, so its D gradients are J's columns."""
    dummies = {name: torch.zeros_like(value, requires_grad=True) for name, value in released.items()}
    product = torch.stack([(released[name] * v).sum() for name, v in dummies.items()]).sum()
    (pulled,) = torch.autograd.grad(product, offsets, create_graph=True)
    entries = pulled.reshape(-1)
    columns: dict[str, list[NDArray[np.float32]]] = {name: [] for name in dummies}
    for index in range(entries.numel()):
        last = index == entries.numel() - 1
        found = torch.autograd.grad(entries[index], list(dummies.values()), retain_graph=not last, allow_unused=True)
        for (name, dummy), column in zip(dummies.items(), found, strict=True):
            value = torch.zeros_like(dummy) if column is None else column
            columns[name].append(value.detach().cpu().numpy().ravel())
    return {name: np.stack(rows, axis=1).astype(np.float64) for name, rows in columns.items()}


def _basis(height: int, width: int, subspace: int) -> NDArray[np.float64]:
    """Return orthonormal rows [kept, height * width]: the identity, or the lowest 2-D DCT-II frequencies."""
    if not subspace:
        return np.eye(height * width)
    if subspace > min(height, width):
        raise DataError(f"a subspace of {subspace} frequencies does not fit {height}x{width} pixels")
    rows, columns = _dct(height, subspace), _dct(width, subspace)
    both: NDArray[np.float64] = np.einsum("ah,bw->abhw", rows, columns)
    return both.reshape(subspace * subspace, height * width)


def _dct(size: int, kept: int) -> NDArray[np.float64]:
    frequency, position = np.arange(kept)[:, None], np.arange(size)[None]
    rows = np.sqrt(2 / size) * np.cos(np.pi * (position + 0.5) * frequency / size)
    rows[0] /= np.sqrt(2)
    return np.asarray(rows, np.float64)


def _classes(model: nn.Module, x: Tensor) -> int:
    twin, _ = statistics.instrument(model, training=False)
    with torch.no_grad():
        return int(twin.to(x.device)(x[:1]).shape[1])


def _db(mse: float) -> float:
    return float("inf") if mse <= 0 else -10 * math.log10(mse)
