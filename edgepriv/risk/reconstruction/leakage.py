"""Leakage of one model's outputs under one release policy, on a bench that every model of a comparison shares.

Rules: the decoder is fitted on one part of the images and scored on another; the score of a policy is the *largest*
over all auditors; where pictures are larger than 32 pixels a side, the target is their block average, which the record
says. Without labels the model's own classes stand in for them: then what leaks through the class itself is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.errors import DataError
from edgepriv.risk.reconstruction.auditors import MessageTable, closed_form_decoders
from edgepriv.risk.reconstruction.decoders import DecoderSettings, TrainedDecoder
from edgepriv.risk.reconstruction.measure import DEFAULT_RIDGE, PixelScale, Score, score

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from edgepriv.risk.reconstruction.auditors import Decoder, Pipeline

    Array = NDArray[np.float64]

MAX_SIDE = 32
MIN_IMAGES = 60
SHOWN = 10
FIT_SHARE = 0.75
MAX_METRIC_IMAGES = 12_000


@dataclass(frozen=True, slots=True)
class Probe:
    """The auditor's own pictures, not used to train the model under audit.

    Attributes:
        name: of the data set, kept in records.
        images: uint8 [n, h, w, c].
        labels: class of each, int64 [n], or None where unknown. For attributes: one class a combination.
        attributes: 0/1 attributes of each, [n, a], for a model of attributes; None for a model of classes.
    """

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    attributes: NDArray[np.int64] | None = None

    @classmethod
    def of_attributes(cls, name: str, images: NDArray[np.uint8], attributes: NDArray[np.int64]) -> Probe:
        """Make a probe for a model of 0/1 attributes [n, a]: what the class mean is elsewhere is each combination's."""
        return cls(name, images, attributes @ (2 ** np.arange(attributes.shape[1])), attributes)


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """What the auditors may use.

    Attributes:
        max_images: pictures used, a quarter of them for scoring.
        trained: form of the trained decoder (``conv``, ``mlp``) or None for closed-form auditors alone.
        ridge: of the covariance in R.
    """

    max_images: int = 6000
    trained: DecoderSettings | None = field(default_factory=DecoderSettings)
    ridge: float = DEFAULT_RIDGE
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Pictures:
    """What a person sees: uint8 [n, h, w, c] each, row i of all three is one picture."""

    inputs: NDArray[np.uint8]
    reconstructions: NDArray[np.uint8]
    class_means: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PolicyLeakage:
    """What one release policy lets through, over the strongest auditor."""

    policy: str
    bits: float
    score: Score
    accuracy: float | None
    auditor: str
    by_auditor: dict[str, float]
    pictures: Pictures

    def as_dict(self) -> dict[str, Any]:
        """Return the entry of ``audit outputs --json``."""
        low, high = self.score.explained_variance_interval
        return {
            "policy": self.policy,
            "bits": round(self.bits, 3),
            "explained_variance": self.score.explained_variance,
            "explained_variance_interval": [low, high],
            "ssim": self.score.ssim,
            "psnr_db": self.score.psnr_db,
            "risk_r": self.score.risk_r,
            "accuracy": self.accuracy,
            "auditor": self.auditor,
            "by_auditor": self.by_auditor,
        }


def shrink(images: NDArray[np.uint8], side: int = MAX_SIDE) -> NDArray[np.float32]:
    """Return pixels in [0, 1], block-averaged by a whole factor until no side is above ``side``."""
    n, height, width, channels = images.shape
    factor = -(-max(height, width) // side)
    rows, columns = height // factor, width // factor
    cut = images[:, : rows * factor, : columns * factor].astype(np.float32) / 255
    blocks = cut.reshape(n, rows, factor, columns, factor, channels).mean(axis=(2, 4))
    return np.asarray(blocks, np.float32)


class Bench:
    """Pictures split into a fitting and a scoring part, with their class means and metric.

    Args:
        probe: the auditor's pictures.
        settings: how many of them, which auditors.
        further: pictures of the same kind for the mean and covariance behind R alone, uint8 [n, h, w, c]: nothing is
            fitted or scored on them.

    Raises:
        DataError: too few pictures to say anything.
    """

    def __init__(
        self, probe: Probe, settings: AuditSettings | None = None, *, further: NDArray[np.uint8] | None = None
    ) -> None:
        self.settings = settings or AuditSettings()
        if len(probe.images) < MIN_IMAGES:
            raise DataError(
                f"{probe.name}: {len(probe.images)} pictures are too few for an audit",
                hint=f"give at least {MIN_IMAGES}; the covariance behind R needs more than there are pixels",
            )
        order = np.random.RandomState(1).permutation(len(probe.images))[: self.settings.max_images]
        self.images = probe.images[order]
        self.labels = None if probe.labels is None else probe.labels[order]
        self.attributes = None if probe.attributes is None else probe.attributes[order]
        self.probe_name = probe.name
        small = shrink(self.images)
        self.shape = (int(small.shape[1]), int(small.shape[2]), int(small.shape[3]))
        self.pixels = small.reshape(len(small), -1)
        self.cut = int(len(order) * FIT_SHARE)
        self.scale = PixelScale(
            self._metric_pixels(further), self.shape, probe.name, ridge=self.settings.ridge, device=self.settings.device
        )

    def _metric_pixels(self, further: NDArray[np.uint8] | None) -> NDArray[np.float32]:
        """Return the pictures behind R: the bench's own, and others where these are fewer than the pixels."""
        lacking = MAX_METRIC_IMAGES - len(self.pixels)
        if further is None or further.shape[1:] != self.images.shape[1:] or lacking < 1:
            return self.pixels
        more = shrink(further[:lacking])
        return np.concatenate([self.pixels, more.reshape(len(more), -1)])

    @property
    def notes(self) -> list[str]:
        """Limits of this bench that a report must name."""
        notes = []
        if self.shape[:2] != self.images.shape[1:3]:
            notes.append(f"pictures were averaged to {self.shape[0]}x{self.shape[1]} before they were compared")
        if not self.scale.well_estimated:
            found = self.scale.record.images_in_covariance
            notes.append(f"R is not given: {found} pictures are too few for {self.pixels.shape[1]} pixels")
        if self.labels is None:
            notes.append("no labels: classes are the model's own; accuracy and leakage through the class are unknown")
        if self.attributes is not None:
            notes.append(
                "attributes: leakage is beyond each combination's mean picture; the detector was fitted on classes"
            )
        return notes

    def groups(self, outputs: NDArray[Any]) -> NDArray[np.int64]:
        """Return each picture's class: its label, or the model's own answer where labels are unknown."""
        return np.asarray(outputs.argmax(1), np.int64) if self.labels is None else self.labels

    def baseline(self, groups: NDArray[np.int64]) -> Array:
        """Return the mean image of each scoring picture's class, taken from the fitting part."""
        table = MessageTable(groups[: self.cut, None], self.pixels[: self.cut])
        return table.rebuild(groups[self.cut :, None])

    def check_outputs(self, outputs: NDArray[Any]) -> None:
        """Refuse outputs that do not belong to these pictures (DataError)."""
        if outputs.ndim != 2 or len(outputs) != len(self.images) or not np.isfinite(outputs).all():
            raise DataError("outputs must be finite numbers [n, k], one row a picture")
        if self.attributes is not None:
            if outputs.shape[1] != self.attributes.shape[1]:
                raise DataError(f"it has {outputs.shape[1]} outputs for {self.attributes.shape[1]} attributes")
            return
        if self.labels is not None and (self.labels.min() < 0 or self.labels.max() >= max(outputs.shape[1], 2)):
            raise DataError(
                f"labels reach from {self.labels.min()} to {self.labels.max()}; it has {outputs.shape[1]} outputs",
                hint="use pictures of the classes it was trained for; --targets for a model of attributes",
            )

    def decoders(self, released: Array) -> Iterator[tuple[str, Decoder]]:
        """Yield every auditor fitted on the fitting part of the released outputs."""
        fit = self.pixels[: self.cut]
        table = False
        for name, decoder in closed_form_decoders(released[: self.cut], fit):
            table = table or name == "message table"
            yield name, decoder
        # where messages are so few that their table is the best decoder, a network has nothing to add
        if self.settings.trained is not None and not table:
            trained = TrainedDecoder(released[: self.cut], fit, self.shape, self.settings.trained)
            yield f"trained {self.settings.trained.form}", trained

    def leakage(
        self,
        outputs: NDArray[np.float32],
        pipeline: Pipeline,
        *,
        groups: NDArray[np.int64] | None = None,
        scored: NDArray[np.bool_] | None = None,
    ) -> PolicyLeakage:
        """Fit every auditor on what a policy releases and return the strongest one's scores.

        Args:
            outputs: the model's outputs on ``self.images``, [n, k].
            pipeline: the release policy.
            groups: classes for the baseline where they are neither labels nor the model's answer (attributes).
            scored: which of the scoring pictures count, where a defence holds some outputs back; None: all.
        """
        if groups is None:
            self.check_outputs(outputs)
        released = np.asarray(pipeline.apply(outputs), np.float64)
        if released.ndim != 2 or len(released) != len(outputs) or not np.isfinite(released).all():
            raise DataError(f"the policy {pipeline.name} released something that is no finite [n, m] array")
        rows = np.ones(len(outputs) - self.cut, bool) if scored is None else scored
        baseline = self.baseline(self.groups(outputs) if groups is None else groups)[rows]
        truth = self.pixels[self.cut :][rows]
        found: dict[str, float] = {}
        best: tuple[float, str, Array] | None = None
        available = ((truth - baseline) ** 2).sum()
        for name, decoder in self.decoders(released):
            copies = decoder.rebuild(released[self.cut :][rows])
            found[name] = float(1 - ((truth - copies) ** 2).sum() / available)
            if best is None or found[name] > best[0]:
                best = (found[name], name, copies)
        assert best is not None  # noqa: S101 - the ridge decoder always applies
        return PolicyLeakage(
            pipeline.name,
            pipeline.bits(outputs.shape[1]),
            score(truth, best[2], baseline, self.scale),
            self._accuracy(outputs, released, rows) if groups is None else None,
            best[1],
            found,
            self._pictures(truth, best[2], baseline),
        )

    def _accuracy(self, outputs: NDArray[Any], released: Array, rows: NDArray[np.bool_]) -> float | None:
        right = self.right(released[:, : outputs.shape[1]])
        return None if right is None else float(right[self.cut :][rows].mean())

    def right(self, scores: NDArray[Any]) -> Array | None:
        """Return how right each picture's answer is: 0 or 1, or the share of right attributes; None without labels."""
        if self.attributes is not None:
            return np.asarray(((scores >= 0) == self.attributes).mean(1), np.float64)
        return None if self.labels is None else np.asarray(scores.argmax(1) == self.labels, np.float64)

    def skill(self, scores: NDArray[Any], outputs: NDArray[Any]) -> tuple[float, float]:
        """Return shares of right answers, these and a constant one's; without labels ``outputs`` say the truth."""
        if self.attributes is not None:
            share = self.attributes.mean(0)
            return float(((scores >= 0) == self.attributes).mean()), float(np.maximum(share, 1 - share).mean())
        truth = self.groups(outputs)
        return float((scores.argmax(1) == truth).mean()), float(np.bincount(truth).max() / len(truth))

    def _pictures(self, truth: NDArray[Any], copies: Array, baseline: Array) -> Pictures:
        def bytes_of(rows: NDArray[Any]) -> NDArray[np.uint8]:
            levels = np.round(np.clip(rows[:SHOWN], 0, 1) * 255)
            return np.asarray(levels.reshape(-1, *self.shape), np.uint8)

        return Pictures(bytes_of(truth), bytes_of(copies), bytes_of(baseline))
