"""The report on an image cipher: the usual metrics, judged as statistics and not by eye.

Columns: ``fresh``, labelled key freshness (each message has its own id: what an observer of the product sees);
``pinned``, labelled plaintext sensitivity (one id for both pictures of a pair, which the product never does: says
whether a changed pixel spreads); ``key``, labelled key sensitivity (two keys that differ in one bit). Pinned is judged
for the strong profile, whose claim it is, and printed for the others. Each column is measured for the whole cipher and
for layers 1 and 2 alone.

Judgement: each test counts, over at least 200 pairs, how often a value leaves its two-sided 5 % interval, and tests
the pooled NPCR and UACI; every p-value is held against 0.1 % divided by the number of judged tests in the report, so a
perfect cipher fails a whole report once in a thousand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgepriv import primitives
from edgepriv.cipher import layers, quality
from edgepriv.cipher.cipher import FrameSealer, apply_layers, frame_keys
from edgepriv.cipher.picture import DTYPES, MAX_CHANNELS
from edgepriv.errors import ConfigError, DataError, EdgeprivError
from edgepriv.wire.envelope import BODY_OFFSET, HEADER_BYTES, MAX_BYTES, META_BYTES
from edgepriv.wire.epoch import AUTH_SIGNATURE, EpochRecord, SignedEpoch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

SCHEMA = "edgepriv.cipher-report/1"
FAMILY_ALPHA = 0.001
PAIR_ALPHA = 0.05
MIN_PAIRS = 200
MIN_BYTES = 1024
LEVELS = (0.05, 0.01, 0.001)
LABELS = {"fresh": "key freshness", "pinned": "plaintext sensitivity", "key": "key sensitivity"}


class Cipher(Protocol):
    """A cipher on the bench: bytes of an image in, as many bytes out."""

    def encrypt(self, image: Bytes, key: bytes, mid: bytes) -> Bytes:
        """Encrypt uint8 [h, w] or [h, w, c] under a 32-byte key and a 32-byte message id to an array of its size."""
        ...


class Product:
    """The sealed frame of a profile: the AEAD ciphertext without description, synthetic value and tags."""

    def __init__(self, profile: str, alg: primitives.Alg) -> None:
        self.profile = profile
        self._skip = BODY_OFFSET + META_BYTES + (layers.SYNTHETIC_BYTES if profile == "flep3-strong" else 0)
        record = EpochRecord(
            1, "dev-bench", "gateway-bench", bytes(16), 0, 0, 1, 1, alg, profile, AUTH_SIGNATURE, (), b"", b""
        )
        self._epoch = SignedEpoch(record, b"", bytes(32))

    def encrypt(self, image: Bytes, key: bytes, mid: bytes) -> Bytes:
        """See Cipher."""
        # encrypt() uses neither the session nor the identity: those make the MAC or signature after it.
        sealer = FrameSealer(key, self._epoch, None, None)  # type: ignore[arg-type]
        view, _ = sealer.encrypt(image, counter=0, mid=mid)
        return np.frombuffer(view[self._skip : self._skip + image.size], np.uint8).reshape(image.shape)


class LayersAlone:
    """Layers 1 and 2 of a profile without the AEAD."""

    def __init__(self, profile: str, alg: primitives.Alg) -> None:
        self.profile, self._alg = profile, alg
        self._skip = layers.SYNTHETIC_BYTES if profile == "flep3-strong" else 0

    def encrypt(self, image: Bytes, key: bytes, mid: bytes) -> Bytes:
        """See Cipher."""
        flat = np.ascontiguousarray(image).reshape(-1)
        out = np.empty(flat.size + self._skip, np.uint8)
        keys = frame_keys(key, mid, bytes(HEADER_BYTES), self.profile)
        apply_layers(flat, self.profile, self._alg, keys, out)
        return out[self._skip :].reshape(image.shape)


class Foreign:
    """Another's cipher: what it gives is checked, and what it raises is told in one line."""

    def __init__(self, cipher: Cipher, name: str) -> None:
        if not callable(getattr(cipher, "encrypt", None)):
            raise ConfigError(f"{name} has no encrypt(image, key, mid)")
        self._cipher, self._name = cipher, name

    def encrypt(self, image: Bytes, key: bytes, mid: bytes) -> Bytes:
        """See Cipher."""
        try:
            out: Any = self._cipher.encrypt(image.copy(), key, mid)
        except EdgeprivError:
            raise
        except Exception as error:
            raise ConfigError(f"{self._name}.encrypt raised {type(error).__name__}: {error}") from error
        if not isinstance(out, np.ndarray) or out.dtype != np.uint8 or out.shape != image.shape:
            got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else f"a {type(out).__name__}"
            raise ConfigError(
                f"{self._name}.encrypt returned {got}",
                hint=f"a numpy array of uint8 and of the image's shape {image.shape}",
            )
        return out


@dataclass(frozen=True, slots=True)
class Test:
    """One judged or printed statistic."""

    subject: str  # whole | layers
    column: str  # fresh | pinned | key
    name: str
    value: float
    interval: quality.Interval
    failures: int
    trials: int
    p: float
    judged: bool

    def as_dict(self, threshold: float) -> dict[str, Any]:
        """For the JSON document."""
        return {
            "subject": self.subject,
            "column": self.column,
            "label": LABELS[self.column],
            "test": self.name,
            "mean": self.value,
            "interval_05": [self.interval.low, self.interval.high],
            "outside_05": self.failures,
            "of": self.trials,
            "p": self.p,
            "judged": self.judged,
            "pass": self.p >= threshold,
        }


@dataclass(slots=True)
class ImageReport:
    """All tests on one picture, and what is drawn of it."""

    path: str
    image: Bytes
    note: str = ""
    tests: list[Test] = field(default_factory=list)
    pictures: dict[str, Bytes] = field(default_factory=dict)


def seeded(seed: int | None) -> Callable[[int], bytes]:
    """Bytes from the operating system, or, for a repeatable report, from a seed."""
    if seed is None:
        return primitives.random_bytes
    return np.random.default_rng(seed).bytes


def subjects_of(profile: str, alg: primitives.Alg) -> dict[str, tuple[Cipher, bool]]:
    """Our cipher's two subjects, each with whether its pinned column is judged."""
    strong = profile == "flep3-strong"
    whole: dict[str, tuple[Cipher, bool]] = {"whole": (Product(profile, alg), strong)}
    if profile != "aead":
        whole["layers"] = (LayersAlone(profile, alg), strong)
    return whole


def bytes_of(path: str, pixels: NDArray[Any]) -> tuple[Bytes, str]:
    """The bytes [h, w, c] that are measured, and a note where a pixel is more than one byte.

    Raises:
        DataError: not an image that could be sealed, or one too small for the metrics.
    """
    if pixels.ndim not in {2, 3}:
        raise DataError(f"{path}: a picture has two or three axes, not {pixels.ndim}: {pixels.shape}")
    if not pixels.size:
        raise DataError(f"{path}: a picture of shape {pixels.shape} has no area")
    dtype = DTYPES.get(pixels.dtype.name)
    if dtype is None:
        raise DataError(f"{path}: pixels of type {pixels.dtype} cannot be sealed", hint=f"use {', '.join(DTYPES)}")
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if channels > MAX_CHANNELS:
        raise DataError(f"{path}: a picture of {channels} channels: at most {MAX_CHANNELS} can be sealed")
    if pixels.nbytes > MAX_BYTES:
        raise DataError(f"{path}: {pixels.nbytes} bytes are more than can be sealed", hint=f"at most {MAX_BYTES}")
    image = np.ascontiguousarray(pixels, dtype).view(np.uint8)
    if image.size < MIN_BYTES:
        raise DataError(f"{path}: {image.size} bytes are too few for the metrics", hint=f"at least {MIN_BYTES}")
    cube = image if image.ndim == 3 else image[:, :, None]
    if dtype.itemsize == 1:
        return cube, ""
    said = (
        f"{pixels.dtype.name} {list(pixels.shape)} is measured as its bytes, low byte first: uint8 {list(image.shape)}"
    )
    return cube, said


def check_pairs(pairs: int) -> None:
    """Refuse fewer pairs than can be judged (DataError)."""
    if pairs < MIN_PAIRS:
        raise DataError(f"{pairs} pairs are too few to judge", hint=f"at least {MIN_PAIRS}")


def measure(
    path: str,
    image: NDArray[Any],
    subjects: dict[str, tuple[Cipher, bool]],
    *,
    pairs: int = MIN_PAIRS,
    random: Callable[[int], bytes] = primitives.random_bytes,
) -> ImageReport:
    """Measure every subject on one picture ([h, w] or [h, w, c]; wider types as their bytes).

    Raises:
        DataError: a picture as in `bytes_of`, or fewer than 200 pairs.
    """
    cube, note = bytes_of(path, image)
    check_pairs(pairs)
    report = ImageReport(path, cube, note)
    for name, (cipher, pinned_judged) in subjects.items():
        for column in ("fresh", "pinned"):
            judged = column == "fresh" or pinned_judged
            singles = _Singles(cube, random) if column == "fresh" else None
            drawn = list(_pairs(cube, cipher, column, pairs, random, singles))
            report.tests += _pair_tests(name, column, cube.size, drawn, judged=judged)
            if singles and singles.first is not None:
                report.tests += singles.tests(name)
                report.pictures[name] = singles.first
        report.tests += _key_tests(name, cube, cipher, pairs, random)
    return report


def _pairs(
    image: Bytes,
    cipher: Cipher,
    column: str,
    pairs: int,
    random: Callable[[int], bytes],
    singles: _Singles | None,
) -> Iterator[tuple[float, float]]:
    """NPCR and UACI of ciphertexts of a picture and of the same with one lowest bit changed."""
    key, places = random(32), np.random.default_rng(np.frombuffer(random(8), np.uint64))
    for _ in range(pairs):
        changed = image.copy()
        changed.reshape(-1)[int(places.integers(image.size))] ^= 1
        first = random(32)
        second = first if column == "pinned" else random(32)
        a = cipher.encrypt(image, key, first).copy()
        if singles:
            singles.add(a)
        b = cipher.encrypt(changed, key, second)
        yield quality.npcr(a, b), quality.uaci(a, b)


def _pair_tests(
    subject: str, column: str, n: int, values: list[tuple[float, float]], *, judged: bool
) -> Iterator[Test]:
    intervals = {"npcr": quality.npcr_interval, "uaci": quality.uaci_interval}
    for i, (name, interval_of) in enumerate(intervals.items()):
        series = [value[i] for value in values]
        yield _counted(subject, column, name, series, interval_of(n, PAIR_ALPHA), judged=judged)
        pooled, mean = interval_of(n * len(series), PAIR_ALPHA), float(np.mean(series))
        sd = (pooled.high - pooled.low) / 2 / quality.NORMAL.inv_cdf(1 - PAIR_ALPHA / 2)
        z = (mean - (pooled.high + pooled.low) / 2) / sd
        outside = int(mean not in pooled)
        yield Test(subject, column, f"{name} pooled", mean, pooled, outside, 1, quality.two_sided_p(z), judged)


def _counted(
    subject: str, column: str, name: str, series: list[float], interval: quality.Interval, *, judged: bool
) -> Test:
    failures = sum(value not in interval for value in series)
    p = quality.tail_at_least(failures, len(series), PAIR_ALPHA)
    return Test(subject, column, name, float(np.mean(series)), interval, failures, len(series), p, judged)


class _Singles:
    """Entropy, chi-square, correlation and, where there are bytes enough, local entropy of single ciphertexts."""

    def __init__(self, image: Bytes, random: Callable[[int], bytes]) -> None:
        self.first: Bytes | None = None
        self._chooser = np.random.default_rng(np.frombuffer(random(8), np.uint64))
        self._measures: dict[str, tuple[Callable[[Bytes], float], quality.Interval]] = {
            "entropy": (quality.entropy, quality.entropy_interval(image.size, PAIR_ALPHA)),
            "chi-square": (quality.chi_square, quality.chi_square_interval(PAIR_ALPHA)),
        }
        for d in "hvd":
            if (n := quality.adjacent_pairs(image, d)) >= MIN_BYTES:
                interval = quality.correlation_interval(n, PAIR_ALPHA)
                self._measures[f"correlation {d}"] = (partial(quality.correlation, direction=d), interval)
        if image.size >= quality.LOCAL_BLOCKS * quality.LOCAL_BLOCK_BYTES:
            local = partial(quality.local_entropy, random=self._chooser)
            self._measures["local entropy"] = (local, quality.local_entropy_interval(PAIR_ALPHA))
        self._values: dict[str, list[float]] = {name: [] for name in self._measures}

    def add(self, ciphertext: Bytes) -> None:
        """Measure one ciphertext; the first is kept for the page."""
        self.first = ciphertext if self.first is None else self.first
        for name, (function, _) in self._measures.items():
            self._values[name].append(function(ciphertext))

    def tests(self, subject: str) -> Iterator[Test]:
        """The judged tests."""
        for name, (_, interval) in self._measures.items():
            yield _counted(subject, "fresh", name, self._values[name], interval, judged=True)


def _key_tests(
    subject: str, image: Bytes, cipher: Cipher, pairs: int, random: Callable[[int], bytes]
) -> Iterator[Test]:
    """The same picture and id under two keys that differ in one bit."""
    values = []
    for i in range(pairs):
        key, mid = bytearray(random(32)), random(32)
        a = cipher.encrypt(image, bytes(key), mid).copy()
        key[i % 32] ^= 1 << (i // 32 % 8)
        b = cipher.encrypt(image, bytes(key), mid)
        values.append((quality.npcr(a, b), quality.uaci(a, b)))
    yield from _pair_tests(subject, "key", image.size, values, judged=True)


def document(reports: list[ImageReport], *, cipher: str, pairs: int) -> dict[str, Any]:
    """Judge all reports together and return the JSON document (see SCHEMA)."""
    threshold = FAMILY_ALPHA / max(1, sum(test.judged for report in reports for test in report.tests))
    return {
        "schema": SCHEMA,
        "cipher": cipher,
        "pairs": pairs,
        "family_alpha": FAMILY_ALPHA,
        "threshold_p": threshold,
        "columns": LABELS,
        "images": [_image_document(report, threshold) for report in reports],
    }


def _image_document(report: ImageReport, threshold: float) -> dict[str, Any]:
    failed = [test for test in report.tests if test.judged and test.p < threshold]
    alone = "fail" if any(test.subject == "layers" for test in failed) else "pass"
    return {
        "path": report.path,
        "shape": list(report.image.shape),
        "note": report.note,
        "verdict": "fail" if failed else "pass",
        "layers_verdict": alone if any(test.subject == "layers" for test in report.tests) else None,
        "failed": [f"{test.subject} {test.column} {test.name}" for test in failed],
        "critical": critical_values(report.image.size),
        "metrics": [test.as_dict(threshold) for test in report.tests],
    }


def critical_values(n: int) -> dict[str, Any]:
    """The critical values for a picture of n bytes at 5 %, 1 % and 0.1 %."""
    rows: dict[str, Any] = {}
    for alpha in LEVELS:
        both = {
            "npcr": quality.npcr_interval(n, alpha),
            "uaci": quality.uaci_interval(n, alpha),
            "entropy": quality.entropy_interval(n, alpha),
            "chi_square": quality.chi_square_interval(alpha),
            "correlation": quality.correlation_interval(n, alpha),
        }
        if n >= quality.LOCAL_BLOCKS * quality.LOCAL_BLOCK_BYTES:
            both["local_entropy"] = quality.local_entropy_interval(alpha)
        rows[f"{alpha:g}"] = {key: [i.low, i.high] for key, i in both.items() if math.isfinite(i.low)}
        rows[f"{alpha:g}"]["npcr_one_sided"] = quality.npcr_one_sided(n, alpha)
    return rows
