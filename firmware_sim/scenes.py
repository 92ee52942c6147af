"""What a simulated camera sees: labelled pictures of a data set at sensor size, with exposure and noise, seeded.

A picture is enlarged to fill most of a 480-pixel square, moved a little, lit unevenly and given sensor noise; the
result is uint8 [480, 640, 3], what a small camera delivers. The label is the picture's, as a person in the field
would give it. Registered as the frame source ``simulated``, so devices run it as they run a camera.
"""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import datasets
from edgepriv.device.capture import Frame
from edgepriv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

HEIGHT, WIDTH = 480, 640
NOISE_BANK = 1 << 21
NOISE_LEVELS = 6.0


class SceneRenderer:
    """Brings small pictures to sensor size; the same seed and index always give the same frame."""

    def __init__(self, seed: int, *, height: int = HEIGHT, width: int = WIDTH) -> None:
        self.height, self.width = height, width
        self._noise = _noise_bank(seed)
        rows, columns = np.mgrid[0:height, 0:width]
        self._vignette = (1 - 0.25 * ((rows / height - 0.5) ** 2 + (columns / width - 0.5) ** 2)).astype(np.float32)
        self._seed = seed

    def __call__(self, picture: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
        """Render one picture [h, w, 1 or 3] to uint8 [height, width, 3]."""
        rng = np.random.default_rng([self._seed, 1, index])
        factor = max(1, int(min(self.height, self.width) * 0.9) // max(picture.shape[:2]))
        large = picture.repeat(factor, axis=0).repeat(factor, axis=1)
        scene = np.full((self.height, self.width, 3), 24, np.float32)
        top = (self.height - large.shape[0]) // 2 + int(rng.integers(-12, 13))
        left = (self.width - large.shape[1]) // 2 + int(rng.integers(-12, 13))
        top, left = max(0, top), max(0, left)
        window = scene[top : top + large.shape[0], left : left + large.shape[1]]
        window[:] = 24 + large[: window.shape[0], : window.shape[1]] * np.float32(0.85)
        scene *= (self._vignette * np.float32(rng.uniform(0.75, 1.15)))[..., None]
        start = int(rng.integers(0, NOISE_BANK - 1))
        noise = self._noise.take(np.arange(start, start + scene.size), mode="wrap").reshape(scene.shape)
        scene += noise
        return np.clip(scene, 0, 255).astype(np.uint8)


@lru_cache(maxsize=4)
def _noise_bank(seed: int) -> NDArray[np.int16]:
    """Sensor noise to draw from; cameras of one seed in one process share it."""
    noise = np.random.default_rng([seed, 0]).normal(0, NOISE_LEVELS, NOISE_BANK)
    return noise.round().astype(np.int16)


@lru_cache(maxsize=4)
def _data(spec: str | Path, split: str) -> datasets.Dataset:
    return datasets.load(spec, split=split)


class SimulatedSource:
    """A camera in front of a data set: rows in order, once or in a loop."""

    def __init__(
        self,
        data: datasets.Dataset,
        rows: list[int],
        *,
        seed: int,
        loop: bool,
        clock: Callable[[], float],
        height: int = HEIGHT,
        width: int = WIDTH,
    ) -> None:
        if not rows or min(rows) < 0 or max(rows) >= len(data):
            raise ConfigError(f"[source] rows must lie in 0..{len(data) - 1}")
        self._data, self._rows, self._loop, self._clock = data, rows, loop, clock
        self._render = SceneRenderer(seed, height=height, width=width)
        self._next, self.exhausted = 0, False

    def read(self) -> Frame | None:
        """See FrameSource."""
        if self._next >= len(self._rows) and not self._loop:
            self.exhausted = True
            return None
        index, self._next = self._next, self._next + 1
        row = self._rows[index % len(self._rows)]
        pixels = self._render(self._data.images[row], index)
        return Frame(pixels, self._clock(), index, int(self._data.labels[row]), name=f"{self._data.name}-{row}")

    def close(self) -> None:
        """See FrameSource."""


def open_source(options: dict[str, Any]) -> SimulatedSource:
    """Factory of the plug-in. Options: ``data`` (a spec), ``split``, ``rows`` (list), ``seed``, ``loop``, sizes."""
    folder, clock = Path(options.pop("folder", ".")), options.pop("clock", time.time)
    spec = str(options.pop("data", "digits"))
    data = _data(spec if spec == "digits" else folder / spec, str(options.pop("split", "all")))
    rows = options.pop("rows", None)
    return SimulatedSource(
        data,
        list(range(len(data))) if rows is None else [int(r) for r in rows],
        seed=int(options.pop("seed", 0)),
        loop=bool(options.pop("loop", False)),
        clock=clock,
        **options,
    )
