"""Stage 3, release: as little of the model's output as the job needs, with a stated bound in bits.

Policies (``name`` in the configuration): ``argmax`` (default) | ``topk:K`` | ``softmax[:DECIMALS]`` |
``unsafe_raw_logits`` for classifiers; ``counts`` | ``boxes:GRID`` for detectors; ``steps:SIZE`` for regression.
Every policy but the unsafe one releases integers, so that the number of distinct messages, and with it the bound on
what any hidden decoder can learn from one inference, is counted and not estimated. The policy is applied outside the
model's graph, because the graph's author may be the attacker. Plug-ins: entry points ``edgepriv.release_policies``.
Source of the bounds: arXiv 2212.04223's setting; H(Y) <= log2 |Y|.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgepriv.errors import ConfigError, DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgepriv.device.infer import Inference

TOPK_DECIMALS = 2
WIDEST_RANKS = 4096  # columns that the audit of topk:K gets for its ranks
SOFTMAX_DECIMALS = 1  # the coarsest that keeps the accuracy: the table of policies in risk/reconstruction/README.md
MAX_COUNT = 99
MAX_BOXES = 20


@dataclass(frozen=True, slots=True)
class Released:
    """What leaves the device for one frame: integer rows as in `edgepriv.wire.output`, and their bound in bits."""

    inference: Inference
    task: str
    policy: str
    bits: float
    decimals: int
    values: tuple[list[int], ...]


class ReleasePolicy(Protocol):
    """A rule that turns outputs into releases."""

    name: str
    task: str
    decimals: int

    def bits(self, size: int) -> float:
        """Upper bound of one release in bits; ``size``: classes of a classifier or detector, values of a regressor."""
        ...

    def release(self, inference: Inference) -> tuple[list[int], ...]:
        """Integer rows for one inference."""
        ...

    def apply(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """What the receiver learns of each row of ``logits`` [n, k], as numbers [n, m]: the auditor's view."""
        ...


def _finite(values: NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise DataError("the model's output holds NaN or infinity", hint="the model or its input scaling is broken")


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Row-wise softmax in float64; refuses NaN and infinity (DataError)."""
    rows = np.atleast_2d(np.asarray(logits, np.float64))
    _finite(rows)
    shifted = np.exp(rows - rows.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), np.float64)


def round_to_sum(probabilities: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Round rows [n, k] to integers that sum to ``total`` (largest remainder; ties to the lower class)."""
    scaled = probabilities * total
    floor = np.floor(scaled).astype(np.int64)
    short = total - floor.sum(axis=1)
    order = np.argsort(-(scaled - floor), axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(order.shape[1])[None, :].repeat(len(order), 0), axis=1)
    return np.asarray(floor + (ranks < short[:, None]), np.int64)


class Argmax:
    """The winning class and nothing else: log2 k bits."""

    name, task, decimals = "argmax", "classify", 0

    def bits(self, size: int) -> float:
        """See ReleasePolicy."""
        return math.log2(size)

    def release(self, inference: Inference) -> tuple[list[int], ...]:
        """See ReleasePolicy."""
        _finite(inference.logits)  # the argmax of NaN is class 0, which would be a false statement
        return ([int(np.argmax(inference.logits)), 0],)

    def apply(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """One-hot rows [n, k]."""
        rows = np.zeros(logits.shape, np.float64)
        np.put_along_axis(rows, np.argmax(logits, axis=1)[:, None], 1.0, axis=1)
        return rows


class TopK:
    """The K best classes in order, scores to two decimals."""

    task, decimals = "classify", TOPK_DECIMALS

    def __init__(self, k: int) -> None:
        self.k, self.name = k, f"topk:{k}"

    def bits(self, size: int) -> float:
        """Ordered choices of classes times non-increasing scores that sum to at most one."""
        k = min(self.k, size)
        return math.log2(math.perm(size, k)) + math.log2(_descending(k, 10**TOPK_DECIMALS))

    def _integers(self, logits: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        p = softmax(logits)
        order = np.argsort(-p, axis=1, kind="stable")[:, : self.k]
        # floor keeps the sum within one and the order non-increasing, which the bound counts on
        scores = np.floor(np.take_along_axis(p, order, axis=1) * 10**TOPK_DECIMALS + 1e-9).astype(np.int64)
        return order, scores

    def release(self, inference: Inference) -> tuple[list[int], ...]:
        """See ReleasePolicy."""
        order, scores = self._integers(inference.logits)
        return tuple([int(c), int(s)] for c, s in zip(order[0], scores[0], strict=True))

    def apply(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """Scores at their classes, zero elsewhere, then the ranks one-hot [n, k + K * k]; of wide ones as numbers."""
        order, scores = self._integers(logits)
        n, size = logits.shape
        dense = np.zeros((n, size), np.float64)
        np.put_along_axis(dense, order, scores / 10**TOPK_DECIMALS, axis=1)
        depth = order.shape[1]
        if depth * size > WIDEST_RANKS:  # one-hot would need gigabytes: 1 for the first place, falling to 1/K
            ranks = np.zeros((n, size), np.float64)
            np.put_along_axis(ranks, order, np.linspace(1, 1 / depth, depth)[None].repeat(n, 0), axis=1)
        else:
            one_hot = np.zeros((n, depth, size), np.float64)
            np.put_along_axis(one_hot, order[:, :, None], 1.0, axis=2)
            ranks = one_hot.reshape(n, -1)
        return np.concatenate([dense, ranks], axis=1)


class RoundedSoftmax:
    """All scores as integers that sum to 10^decimals."""

    task = "classify"

    def __init__(self, decimals: int) -> None:
        self.decimals, self.name = decimals, f"softmax:{decimals}"

    def bits(self, size: int) -> float:
        """log2 of the number of integer vectors with that sum."""
        return math.log2(math.comb(10**self.decimals + size - 1, size - 1))

    def release(self, inference: Inference) -> tuple[list[int], ...]:
        """See ReleasePolicy."""
        scores = round_to_sum(softmax(inference.logits), 10**self.decimals)[0]
        return tuple([c, int(s)] for c, s in enumerate(scores) if s)

    def apply(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """The rounded scores [n, k]."""
        return np.asarray(round_to_sum(softmax(logits), 10**self.decimals) / 10**self.decimals, np.float64)


class UnsafeRawLogits:
    """Everything, as float32 bit patterns: for audits and debugging; the name is the warning."""

    name, task, decimals = "unsafe_raw_logits", "classify", 0

    def bits(self, size: int) -> float:
        """32 bits a class."""
        return 32.0 * size

    def release(self, inference: Inference) -> tuple[list[int], ...]:
        """See ReleasePolicy."""
        _finite(inference.logits)
        patterns = np.asarray(inference.logits, "<f4").reshape(-1).view("<i4")
        return tuple([c, int(v)] for c, v in enumerate(patterns))

    def apply(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """The logits themselves."""
        return np.asarray(logits, np.float64)


class Counts:
    """How many detections of each class, at most 99 each."""

    name, task, decimals = "counts", "detect", 0

    def bits(self, size: int) -> float:
        """log2(100) bits a class."""
        return size * math.log2(MAX_COUNT + 1)

    def release(self, inference: Inference) -> tuple[list[int], ...]:
        """See ReleasePolicy."""
        classes, counts = np.unique(inference.box_classes, return_counts=True)
        return tuple([int(c), min(int(n), MAX_COUNT)] for c, n in zip(classes, counts, strict=True))

    def apply(self, logits: NDArray[Any]) -> NDArray[np.float64]:  # noqa: ARG002
        """Detectors have no logits to audit."""
        raise ConfigError("counts releases detections; audit a classifier's policy instead")


class GridBoxes:
    """At most 20 boxes, corners rounded outwards to a GRID x GRID raster."""

    task, decimals = "detect", 0

    def __init__(self, grid: int) -> None:
        self.grid, self.name = grid, f"boxes:{grid}"

    def bits(self, size: int) -> float:
        """At most 20 boxes of (class, two corners) each."""
        one = size * self.grid**4
        return math.log2(sum(one**n for n in range(MAX_BOXES + 1)))

    def release(self, inference: Inference) -> tuple[list[int], ...]:
        """See ReleasePolicy. Boxes come as fractions of the frame: x0, y0, x1, y1."""
        best = np.argsort(-inference.box_scores, kind="stable")[:MAX_BOXES]
        rows = []
        for i in best:
            box = np.clip(inference.boxes[i], 0, 1) * self.grid
            low = np.minimum(np.floor(box[:2]), self.grid - 1).astype(int)
            high = np.maximum(np.minimum(np.ceil(box[2:]), self.grid).astype(int) - 1, low)
            rows.append([int(inference.box_classes[i]), *map(int, low), *map(int, high)])
        return tuple(sorted(rows))  # sorted, so that the order of scores is not released

    def apply(self, logits: NDArray[Any]) -> NDArray[np.float64]:  # noqa: ARG002
        """Detectors have no logits to audit."""
        raise ConfigError("boxes releases detections; audit a classifier's policy instead")


class Steps:
    """Regression values rounded to a step, within 16 bits each."""

    task, decimals = "regress", 0

    def __init__(self, size: float) -> None:
        self.size, self.name = size, f"steps:{size:g}"

    def bits(self, size: int) -> float:
        """16 bits a value."""
        return 16.0 * size

    def _integers(self, values: NDArray[Any]) -> NDArray[np.int64]:
        _finite(values)
        return np.clip(np.round(np.asarray(values, np.float64) / self.size), -32768, 32767).astype(np.int64)

    def release(self, inference: Inference) -> tuple[list[int], ...]:
        """See ReleasePolicy."""
        return tuple([i, int(v)] for i, v in enumerate(self._integers(inference.logits.reshape(-1))))

    def apply(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """The rounded values."""
        return np.asarray(self._integers(logits) * self.size, np.float64)


@lru_cache(maxsize=64)
def _descending(parts: int, total: int) -> int:
    """Number of non-increasing sequences of ``parts`` non-negative integers with a sum of at most ``total``."""
    # by conjugation: partitions of s <= total into parts of size at most ``parts``
    ways = [1] + [0] * total
    for size in range(1, parts + 1):
        for s in range(size, total + 1):
            ways[s] += ways[s - size]
    return sum(ways)


def release(policy: ReleasePolicy, inference: Inference) -> Released:
    """Apply a policy to one inference and state its bound."""
    size = inference.box_labels or len(inference.logits) or 1
    return Released(inference, policy.task, policy.name, policy.bits(size), policy.decimals, policy.release(inference))


def parse_policy(spec: str) -> ReleasePolicy:
    """Make the policy that a configuration names.

    Raises:
        ConfigError: unknown name or parameter out of range.
    """
    name, _, argument = spec.partition(":")
    if spec == "softmax":
        return RoundedSoftmax(SOFTMAX_DECIMALS)
    plain: dict[str, Any] = {"argmax": Argmax, "unsafe_raw_logits": UnsafeRawLogits, "counts": Counts}
    if name in plain and not argument:
        policy: ReleasePolicy = plain[name]()
        return policy
    try:
        match name:
            case "topk" if 1 <= int(argument) <= 100:
                return TopK(int(argument))
            case "softmax" if 1 <= int(argument) <= 6:
                return RoundedSoftmax(int(argument))
            case "boxes" if 2 <= int(argument) <= 256:
                return GridBoxes(int(argument))
            case "steps" if 0 < float(argument) < math.inf:
                return Steps(float(argument))
    except ValueError:
        pass
    for plugin in entry_points(group="edgepriv.release_policies"):
        if plugin.name == name:
            made: ReleasePolicy = plugin.load()(argument)
            return made
    raise ConfigError(
        f"unknown release policy {spec!r}",
        hint="argmax, topk:K (1-100), softmax[:DECIMALS] (1-6, else 1), counts, boxes:GRID (2-256), steps:SIZE",
    )
