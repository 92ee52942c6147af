"""Purified outputs, an option in front of the release policy: each output is pulled towards the mean of its class.

Our own form of an idea of arXiv 2005.03915, not the paper's network. The operator fits the file on pictures of his own
(``edgepriv harden``); the device only evaluates it, numpy only, outside the supplier's graph. Rules: the winning class
stays, so that accuracy does; the bits of the policy are unchanged, because they bound what any output can tell. What it
leaves of a leak is measured by ``edgepriv harden`` and ``edgepriv audit outputs --purifier``.
File: JSON, schema ``edgepriv.output-purifier/1``, keys ``centres`` [k][k] (mean log-softmax of each class),
``strength`` in [0, 1].
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.device.indicator import log_softmax
from edgepriv.errors import ConfigError, DataError, MissingFileError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from edgepriv.device.infer import Inference
    from edgepriv.device.release import ReleasePolicy

SCHEMA = "edgepriv.output-purifier/1"
MAX_FILE_BYTES = 16 << 20
MAX_CLASSES = 1000


class OutputPurifier:
    """Moves outputs towards the centre of their class.

    Args:
        centres: mean log-softmax of each class, [k, k].
        strength: 0 changes nothing, 1 leaves the centre alone.
        digest: SHA-256 of the file that it was read from, which a verdict names.
    """

    def __init__(self, centres: NDArray[np.float64], strength: float, digest: bytes = b"") -> None:
        self._centres, self._strength, self.digest = centres, strength, digest

    @classmethod
    def from_bytes(cls, raw: bytes) -> OutputPurifier:
        """Read a file's bytes.

        Raises:
            DataError: they are no purifier of this schema.
        """
        if len(raw) > MAX_FILE_BYTES:
            raise DataError("the purifier's file is larger than 16 MiB")
        try:
            content = json.loads(raw)
            if content["schema"] != SCHEMA:
                raise DataError(f"the purifier's file is of another schema than {SCHEMA}")
            centres, strength = np.asarray(content["centres"], np.float64), float(content["strength"])
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise DataError("the purifier's file is not valid") from error
        k = len(centres) if centres.ndim == 2 else 0
        if centres.shape != (k, k) or not 2 <= k <= MAX_CLASSES or not np.isfinite(centres).all():
            raise DataError("the purifier's file is not valid")
        if not 0 <= strength <= 1:
            raise DataError("the purifier's file is not valid: its strength is not between 0 and 1")
        return cls(centres, strength, hashlib.sha256(raw).digest())

    @classmethod
    def load(cls, path: Path) -> OutputPurifier:
        """Read a file (MissingFileError, DataError)."""
        if not path.is_file():
            raise MissingFileError(f"no purifier file: {path}", hint="edgepriv harden writes it")
        return cls.from_bytes(path.read_bytes())

    def apply(self, logits: NDArray[Any]) -> NDArray[np.float32]:
        """Return purified log-softmax values [n, k]; the winning class stays.

        Raises:
            DataError: another number of classes, or NaN.
        """
        if logits.ndim != 2 or logits.shape[1] != len(self._centres) or not np.isfinite(logits).all():
            raise DataError("the outputs are not finite rows of the purifier's number of classes")
        z, rows = log_softmax(logits), np.arange(len(logits))
        winners = z.argmax(1)
        pulled = z + self._strength * (self._centres[winners] - z)
        pulled[rows, winners] = np.maximum(pulled[rows, winners], pulled.max(1) + 1e-6)
        return np.asarray(pulled, np.float32)


class PurifiedPolicy:
    """A release policy for classifiers that sees purified outputs; name and bits are the policy's own."""

    def __init__(self, policy: ReleasePolicy, purifier: OutputPurifier) -> None:
        if policy.task != "classify":
            raise ConfigError(f"a purifier is for classifiers; {policy.name!r} is a policy for {policy.task}")
        self._policy, self._purifier, self.purifier_digest = policy, purifier, purifier.digest
        self.name, self.task, self.decimals = policy.name, policy.task, policy.decimals

    def bits(self, size: int) -> float:
        """See ReleasePolicy."""
        return self._policy.bits(size)

    def release(self, inference: Inference) -> tuple[list[int], ...]:
        """See ReleasePolicy."""
        logits = self._purifier.apply(np.asarray(inference.logits).reshape(1, -1))[0]
        return self._policy.release(replace(inference, logits=logits))

    def apply(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """What the receiver learns of each row, [n, m]."""
        return self._policy.apply(self._purifier.apply(logits))
