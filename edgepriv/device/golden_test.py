"""The self-test of a model on golden inputs: accuracy or PSNR, time and memory of one inference. Never the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgepriv.device.packing import Golden, Limits

    Infer = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Measured:
    """One self-test. ``quality`` is an accuracy (``unit`` empty) or a PSNR (``unit`` dB)."""

    quality: float
    unit: str
    latency_s: float
    rss_bytes: int


def measure(golden: Golden, infer: Infer, *, clock: Callable[[], float], rss: Callable[[], int]) -> Measured:
    """Run every golden input once."""
    infer(golden.inputs[:1])  # the first inference pays for lazy set-up
    times, scores = [], []
    for number, one in enumerate(golden.inputs):
        began = clock()
        output = infer(one[None])
        times.append(clock() - began)
        scores.append(golden.score(number, output))
    unit = "" if golden.labelled else "dB"
    return Measured(float(np.mean(scores)), unit, float(np.median(times)), rss())


def judge(found: Measured, limits: Limits) -> None:
    """Raise RefusedError where the limits are not kept."""
    if found.unit and found.quality < limits.min_psnr_db:
        raise RefusedError(f"self-test: {found.quality:.2f} dB is below {limits.min_psnr_db:.2f} dB")
    if not found.unit and found.quality < limits.min_accuracy:
        raise RefusedError(f"self-test: accuracy {found.quality:.3f} is below {limits.min_accuracy:.3f}")
    if found.latency_s > limits.max_latency_s:
        raise RefusedError(f"self-test: {1e3 * found.latency_s:.1f} ms is over {1e3 * limits.max_latency_s:.1f} ms")
    if found.rss_bytes > limits.max_rss_bytes:
        raise RefusedError(f"self-test: {found.rss_bytes} bytes of memory are over {limits.max_rss_bytes}")
