"""The n-dimensional L2 Laplace mechanism on latent codes: clip, add noise, rescale (arXiv 2202.05469, section "noise").

A mechanism K is epsilon-metric-private when P[K(z) in S] <= exp(epsilon * ||z - z'||) * P[K(z') in S] for all z, z', S
(Chatzikokolakis et al. 2013). The noise has density proportional to exp(-epsilon * ||v||): a Gamma(n, 1/epsilon) radius
times a uniform direction, which is not the same as Laplace noise on each coordinate. numpy only; randomness is an
argument, and neither codes nor noise are ever logged.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["add_noise", "clip", "epsilon_for_ratio", "noise_sd", "rescale", "sample_noise"]


def sample_noise(count: int, dim: int, epsilon: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw ``count`` vectors of ``dim`` coordinates with density proportional to exp(-epsilon * ||v||)."""
    _check_epsilon(epsilon)
    direction = rng.standard_normal((count, dim))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    direction *= rng.gamma(dim, 1.0 / epsilon, (count, 1))
    return direction


def clip(codes: NDArray[np.floating], radius: float) -> NDArray[np.float64]:
    """Scale each row of ``codes`` [m, n] down to L2 norm at most ``radius``; this is what bounds the local epsilon."""
    if not (radius > 0 and math.isfinite(radius)):
        raise ConfigError(f"the clip radius must be a positive number, not {radius}")
    codes = np.asarray(codes, dtype=np.float64)
    norms = np.linalg.norm(codes, axis=1, keepdims=True)
    clipped: NDArray[np.float64] = codes * np.minimum(1.0, radius / np.maximum(norms, 1e-12))
    return clipped


def noise_sd(dim: int, epsilon: float) -> float:
    """Standard deviation of one coordinate of the noise: sqrt(n + 1) / epsilon."""
    _check_epsilon(epsilon)
    return math.sqrt(dim + 1) / epsilon


def epsilon_for_ratio(noise_ratio: float, dim: int, latent_rms: float) -> float:
    """The metric epsilon whose noise is ``noise_ratio`` times ``latent_rms``, the codes' spread per coordinate."""
    if not (noise_ratio > 0 and math.isfinite(noise_ratio)):
        raise ConfigError(
            f"the noise ratio must be a positive number, not {noise_ratio}",
            hint="2 is the default; 1 is twice as little noise and was caught by the released-set attack",
        )
    if not latent_rms > 0:
        raise ConfigError("the latent codes of the calibration images are all zero: the VAE has collapsed")
    return math.sqrt(dim + 1) / (noise_ratio * latent_rms)


def add_noise(codes: NDArray[np.floating], epsilon: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return ``codes`` [m, n] with fresh noise of the metric epsilon added to each row."""
    return np.asarray(codes, dtype=np.float64) + sample_noise(len(codes), codes.shape[1], epsilon, rng)


def rescale(codes: NDArray[np.floating], epsilon: float) -> NDArray[np.float64]:
    """Bring noised codes back to about unit variance, the decoder's home; independent of the data (post-processing)."""
    return np.asarray(codes, dtype=np.float64) / math.sqrt(1.0 + noise_sd(codes.shape[1], epsilon) ** 2)


def _check_epsilon(epsilon: float) -> None:
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ConfigError(
            f"epsilon must be a positive number, not {epsilon}",
            hint="give --noise-ratio instead: epsilon alone has no meaning across two VAEs",
        )
