"""Stage 1, capture: frames from a camera, files or a plug-in. Camera libraries are imported only when chosen.

A source is any object with ``read() -> Frame | None`` (None: no frame now, or the end when ``exhausted``) and
``close()``. Plug-ins register a factory ``(options: dict) -> FrameSource`` under the entry point group
``edgepriv.frame_sources``. A picture that cannot be read raises DataError; the runtime counts it and goes on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgepriv.datasets import IMAGE_SUFFIXES, read_image
from edgepriv.errors import ConfigError, MissingDependencyError, MissingFileError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Frame:
    """One captured image.

    ``pixels``: uint8, uint16 or float32 [height, width, channels]; ``at``: Unix seconds; ``label``: class index where
    the scene is known (simulation, labelled folders), else None; ``index`` counts captures of this process.
    ``encoded``: the picture's compressed bytes as the camera made them; where given they are sealed, not the pixels.
    ``codec``: what the pixels are, as in `edgepriv.cipher.picture` (``bgr``, ``bayer-rggb``, ...); by default by shape.
    """

    pixels: np.ndarray[Any, Any]
    at: float
    index: int
    label: int | None = None
    name: str = ""
    encoded: bytes | None = None
    codec: str = ""


class FrameSource(Protocol):
    """Where frames come from."""

    exhausted: bool

    def read(self) -> Frame | None:
        """Return the next frame, or None when there is none now."""
        ...

    def close(self) -> None:
        """Release the camera or the files."""
        ...


class DirectorySource:
    """Pictures of a folder in name order, once or in a loop; a sub-folder's name is no label here.

    ``encoded``: frames carry the file's own bytes, so that a JPEG is sealed and sent as small as it is, and a 16-bit
    PNG with all its bits; without it 8 bits of each are captured.
    """

    def __init__(
        self, path: Path, *, loop: bool = False, encoded: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        if not path.is_dir():
            raise MissingFileError(f"no such image folder: {path}", hint="set [source] path")
        self._paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self._paths:
            raise MissingFileError(f"{path} holds no pictures")
        self._next, self._loop, self._clock, self.exhausted = 0, loop, clock, False
        self._encoded = encoded

    def read(self) -> Frame | None:
        """See FrameSource."""
        if self._next >= len(self._paths) and not self._loop:
            self.exhausted = True
            return None
        path = self._paths[self._next % len(self._paths)]
        index, self._next = self._next, self._next + 1
        encoded = path.read_bytes() if self._encoded else None
        return Frame(read_image(path), self._clock(), index, name=path.name, encoded=encoded)

    def close(self) -> None:
        """See FrameSource."""


class OpenCVSource:
    """A video file, a V4L2 camera (``/dev/video0`` or a number) or an RTSP stream."""

    def __init__(self, target: str, *, width: int = 0, height: int = 0, clock: Callable[[], float] = time.time) -> None:
        try:
            import cv2
        except ImportError as error:
            raise MissingDependencyError("video sources need OpenCV", hint="pip install 'edgepriv[camera]'") from error
        self._cv2, self._clock, self._index, self.exhausted = cv2, clock, 0, False
        self._file = Path(target).is_file()
        self._capture = cv2.VideoCapture(int(target) if target.isdigit() else target)
        if not self._capture.isOpened():
            raise UnavailableError(f"cannot open the video source {target}", hint="is the camera plugged in?")
        for key, value in ((cv2.CAP_PROP_FRAME_WIDTH, width), (cv2.CAP_PROP_FRAME_HEIGHT, height)):
            if value:
                self._capture.set(key, value)

    def read(self) -> Frame | None:
        """See FrameSource."""
        ok, image = self._capture.read()
        if not ok:
            self.exhausted = self._file  # a camera may come back, a file does not
            return None
        index, self._index = self._index, self._index + 1
        pixels = self._cv2.cvtColor(image, self._cv2.COLOR_BGR2RGB) if image.ndim == 3 else image[..., None]
        return Frame(pixels, self._clock(), index)

    def close(self) -> None:
        """See FrameSource."""
        self._capture.release()


class PiCameraSource:
    """A Raspberry Pi CSI camera through picamera2, which comes from the Pi's own packages."""

    def __init__(self, *, width: int = 640, height: int = 480, clock: Callable[[], float] = time.time) -> None:
        try:
            from picamera2 import Picamera2
        except ImportError as error:
            raise MissingDependencyError(
                "picamera2 is not importable", hint="apt install python3-picamera2; venv with --system-site-packages"
            ) from error
        self._camera, self._clock, self._index, self.exhausted = Picamera2(), clock, 0, False
        mode = self._camera.create_video_configuration({"size": (width, height), "format": "BGR888"})
        self._camera.configure(mode)
        self._camera.start()

    def read(self) -> Frame | None:
        """See FrameSource."""
        index, self._index = self._index, self._index + 1
        return Frame(np.asarray(self._camera.capture_array("main")), self._clock(), index)

    def close(self) -> None:
        """See FrameSource."""
        self._camera.stop()


def open_source(kind: str, options: dict[str, Any], *, folder: Path, clock: Callable[[], float]) -> FrameSource:
    """Open the source that the configuration names.

    Args:
        kind: ``directory``, ``video``, ``picamera2`` or the name of a plug-in.
        options: the rest of ``[source]``.
        folder: relative paths count from here.
        clock: gives Unix seconds.

    Raises:
        ConfigError: unknown kind or option.
    """
    try:
        if kind == "directory":
            return DirectorySource(folder / options.pop("path", ""), **options, clock=clock)
        if kind == "video":
            return OpenCVSource(str(options.pop("target", "0")), **options, clock=clock)
        if kind == "picamera2":
            return PiCameraSource(**options, clock=clock)
        for plugin in entry_points(group="edgepriv.frame_sources"):
            if plugin.name == kind:
                source: FrameSource = plugin.load()({**options, "folder": str(folder), "clock": clock})
                return source
    except TypeError as error:
        raise ConfigError(f"[source] has an option that {kind!r} does not take: {error}") from error
    names = ["directory", "video", "picamera2", *(p.name for p in entry_points(group="edgepriv.frame_sources"))]
    raise ConfigError(f"unknown frame source {kind!r}", hint=f"use one of {', '.join(names)}")
