"""Labelled images from the places users keep them, torch-free.

A *spec* is ``digits`` (scikit-learn's scans), a folder or file of MNIST IDX files, CIFAR-10 binary batches,
a folder with one sub-folder of images a class, or an ``.npz`` release with ``images`` and ``labels``. Nothing is
downloaded. Formats: MNIST IDX (big-endian header 0x803 / 0x801), CIFAR-10 binary (1 label byte + 3,072 bytes).
"""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, is_zipfile

import numpy as np

from edgepriv.errors import DataError, MissingDependencyError, MissingFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
MAX_PIXELS = 100_000_000
CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32
UNREADABLE = (  # what numpy and zipfile raise on changed bytes
    OSError, ValueError, KeyError, EOFError, RuntimeError, TypeError, AttributeError, OverflowError, MemoryError,
    struct.error, zlib.error, BadZipFile,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dataset:
    """Images uint8 [n, height, width, channels] with labels int64 [n] and one name a class."""

    name: str
    images: np.ndarray[Any, np.dtype[np.uint8]]
    labels: np.ndarray[Any, np.dtype[np.int64]]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)


def load(spec: str | Path, *, split: str = "train", limit: int | None = None) -> Dataset:
    """Load a data set.

    Args:
        spec: ``digits`` or a path, see the module.
        split: ``train`` or ``test``; ``all`` joins both, ``whole`` keeps the order in which they lie. Digits, files and
            folders of pictures are split 80 : 20 by a fixed rule.
        limit: keep only the first ``limit`` images.

    Raises:
        MissingFileError: nothing is there.
        DataError: something is there, but it is not a data set of a known form.
    """
    if split not in {"train", "test", "all", "whole"}:
        raise DataError(f"unknown split {split!r}", hint="use train, test, all or whole")
    if split == "all" or (split == "whole" and _comes_in_two_parts(spec)):
        data = _join(load(spec, split="train"), load(spec, split="test"))
    elif str(spec) == "digits":
        data = _part(_digits(), split)
    else:
        data = _load_path(Path(spec), split)
    if limit is not None:
        data = Dataset(data.name, data.images[:limit], data.labels[:limit], data.class_names)
    if len(data) == 0:
        raise DataError(f"{spec}: no images in the {split} part")
    return data


def _load_path(path: Path, split: str) -> Dataset:
    if not path.exists():
        raise MissingFileError(f"no such data set: {path}", hint="name 'digits', a folder or a file that exists")
    if path.is_file():
        return _part(_load_file(path), split)
    for finder in (_find_idx, _find_cifar):
        found = finder(path, split)
        if found is not None:
            return found
    release = path / "release.npz"
    if release.is_file():
        return _part(_npz(release), split)
    return _part(_image_folder(path), split)


def _comes_in_two_parts(spec: str | Path) -> bool:
    """Whether the data set itself says which images are for training: MNIST and CIFAR folders do."""
    path = Path(spec)
    return path.is_dir() and any(finder(path, "train") is not None for finder in (_find_idx, _find_cifar))


def _load_file(path: Path) -> Dataset:
    if path.suffix == ".npz":
        return _npz(path)
    raw = _read(path)
    if raw[:4] == b"\x00\x00\x08\x03":
        labels = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
        return _idx(path, labels)
    if raw and len(raw) % CIFAR_RECORD_BYTES == 0:
        return _cifar([path])
    raise DataError(f"{path} is neither IDX nor CIFAR-10 binary nor a release", hint="see edgepriv/datasets.py")


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise MissingFileError(f"no such file: {path}")
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _find_idx(folder: Path, split: str) -> Dataset | None:
    prefix = "train" if split == "train" else "t10k"
    for suffix in ("", ".gz"):
        images = folder / f"{prefix}-images-idx3-ubyte{suffix}"
        if images.is_file():
            return _idx(images, folder / f"{prefix}-labels-idx1-ubyte{suffix}")
    return None


def _idx(images_path: Path, labels_path: Path) -> Dataset:
    raw, raw_labels = _read(images_path), _read(labels_path)
    try:
        magic, n, height, width = struct.unpack_from(">IIII", raw)
        label_magic, n_labels = struct.unpack_from(">II", raw_labels)
    except struct.error as error:
        raise DataError(f"{images_path}: IDX header is cut short") from error
    size = n * height * width
    if magic != 0x803 or label_magic != 0x801 or n != n_labels or len(raw) != 16 + size or len(raw_labels) != 8 + n:
        raise DataError(f"{images_path} and {labels_path} are not a pair of IDX files")
    images = np.frombuffer(raw, np.uint8, size, 16).reshape(n, height, width, 1)
    labels = np.frombuffer(raw_labels, np.uint8, n, 8).astype(np.int64)
    classes = int(labels.max()) + 1 if n else 0
    return Dataset(images_path.parent.name, images, labels, tuple(str(i) for i in range(classes)))


def _find_cifar(folder: Path, split: str) -> Dataset | None:
    pattern = "data_batch_*.bin*" if split == "train" else "test_batch.bin*"
    paths = sorted(folder.glob(pattern))
    return _cifar(paths) if paths else None


def _cifar(paths: list[Path]) -> Dataset:
    raw = b"".join(_read(path) for path in paths)
    if len(raw) % CIFAR_RECORD_BYTES:
        raise DataError(f"{paths[0]}: {len(raw)} bytes are not whole CIFAR-10 records")
    records = np.frombuffer(raw, np.uint8).reshape(-1, CIFAR_RECORD_BYTES)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    meta = paths[0].parent / "batches.meta.txt"
    names = tuple(meta.read_text().split()) if meta.is_file() else tuple(str(i) for i in range(10))
    labels = records[:, 0].astype(np.int64)
    if len(labels) and labels.max() >= len(names):
        raise DataError(f"{paths[0]}: label {labels.max()} is out of range for {len(names)} classes")
    return Dataset(paths[0].parent.name, np.ascontiguousarray(images), labels, names)


def _npz(path: Path) -> Dataset:
    arrays = read_arrays(path, ("images", "labels"), "a release")
    if len(arrays) < 2:
        raise DataError(f"{path} is not a release", hint="it must hold 'images' and 'labels'")
    images, labels = arrays["images"], arrays["labels"]
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise DataError(f"{path}: images must be uint8 [n, height, width, channels] with one label each")
    if labels.dtype.kind not in "iu" or (len(labels) and int(labels.min()) < 0):
        raise DataError(f"{path}: labels must be whole numbers from 0 on, not {labels.dtype}")
    labels = labels.astype(np.int64)
    classes = int(labels.max()) + 1 if len(labels) else 0
    return Dataset(path.parent.name, images, labels, tuple(str(i) for i in range(classes)))


def read_arrays(path: Path, names: Sequence[str] | None, what: str) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Those of the named arrays (None: all) that an ``.npz`` holds; never unpickles.

    Raises:
        DataError: it is no such file, was cut short, or has changed bytes; ``what`` says what it should have been.
    """
    if not is_zipfile(path):
        raise DataError(f"{path} is not {what}, or was cut short", hint=f"an .npz with {', '.join(names or ())}")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            found = {name: archive[name] for name in (names or archive.files) if name in archive}
    except UNREADABLE as error:
        raise DataError(f"{path} is not {what}, or has changed bytes: {error}") from error
    return {name: values for name, values in found.items() if isinstance(values, np.ndarray)}


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError("'digits' needs scikit-learn", hint="pip install 'edgepriv[demo]'") from error
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    return Dataset("digits", images, bunch.target.astype(np.int64), tuple(str(i) for i in range(10)))


def _image_folder(folder: Path) -> Dataset:
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    rows = [
        (path, label)
        for label, sub in enumerate(classes)
        for path in sorted(sub.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not rows:
        raise DataError(f"{folder} holds no data set", hint="one sub-folder of images a class, IDX or CIFAR files")
    images = [read_image(path) for path, _ in rows]
    if len({image.shape for image in images}) != 1:
        raise DataError(f"{folder}: the images differ in size or channels", hint="bring them to one size first")
    labels = np.array([label for _, label in rows], np.int64)
    return Dataset(folder.name, np.stack(images), labels, tuple(p.name for p in classes))


def read_image(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read one picture as uint8 [height, width, channels] (1 or 3 channels); of 16-bit gray the high bytes.

    Raises:
        MissingFileError: it does not exist.
        DataError: it is not a picture, larger than 100 megapixels, or of 32-bit or float pixels.
    """
    if not path.is_file():
        raise MissingFileError(f"no such image: {path}")
    Image = _pillow()
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise DataError(f"{path}: {opened.width}x{opened.height} is more than {MAX_PIXELS} pixels")
            if opened.mode in {"I", "F"}:
                raise DataError(f"{path} has 32-bit or float pixels", hint="convert it to 8 or 16 bits")
            if opened.mode.startswith("I;16"):
                array = (np.asarray(opened) >> 8).astype(np.uint8)
            else:
                array = np.asarray(opened.convert("L" if opened.mode in {"1", "L"} else "RGB"), np.uint8)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} is not an image that can be read") from error
    return array[..., None] if array.ndim == 2 else array


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("pictures need Pillow", hint="pip install 'edgepriv[images]'") from error
    return Image


def _part(data: Dataset, split: str) -> Dataset:
    if split == "whole":
        return data
    keep: Callable[[int], bool] = (lambda i: i % 5 != 4) if split == "train" else (lambda i: i % 5 == 4)
    rows = np.array([i for i in range(len(data)) if keep(i)], np.int64)
    return Dataset(data.name, data.images[rows], data.labels[rows], data.class_names)


def _join(a: Dataset, b: Dataset) -> Dataset:
    names = a.class_names if len(a.class_names) >= len(b.class_names) else b.class_names
    images = np.concatenate([a.images, b.images])
    return Dataset(a.name, images, np.concatenate([a.labels, b.labels]), names)
