"""Data sets from where users keep them, and what is said when they are not what they seem."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from edgepriv import datasets
from edgepriv.errors import DataError, MissingFileError


def idx(folder, n=10, prefix="train", pack=False):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (n, 5, 4)).astype(np.uint8), (np.arange(n) % 3).astype(np.uint8)
    for name, raw in (
        (f"{prefix}-images-idx3-ubyte", struct.pack(">IIII", 0x803, n, 5, 4) + images.tobytes()),
        (f"{prefix}-labels-idx1-ubyte", struct.pack(">II", 0x801, n) + labels.tobytes()),
    ):
        (folder / (name + (".gz" if pack else ""))).write_bytes(gzip.compress(raw) if pack else raw)
    return images, labels


@pytest.mark.parametrize("pack", [False, True])
def test_idx_files(tmp_path, pack):
    images, labels = idx(tmp_path / "m", pack=pack)
    idx(tmp_path / "m", 4, "t10k", pack=pack)
    data = datasets.load(tmp_path / "m")
    assert np.array_equal(data.images[..., 0], images)
    assert np.array_equal(data.labels, labels)
    assert data.images.shape == (10, 5, 4, 1)
    assert data.labels.dtype == np.int64
    assert len(datasets.load(tmp_path / "m", split="test")) == 4
    assert len(datasets.load(tmp_path / "m", split="all")) == 14
    assert len(datasets.load(tmp_path / "m", split="whole")) == 14
    assert len(datasets.load(tmp_path / "m", limit=3)) == 3
    one = tmp_path / "m" / f"train-images-idx3-ubyte{'.gz' if pack else ''}"
    assert len(datasets.load(one)) + len(datasets.load(one, split="test")) == 10


@pytest.mark.parametrize("cut", [4, 15, 30])
def test_cut_idx_files_are_refused(tmp_path, cut):
    idx(tmp_path / "m")
    path = tmp_path / "m" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError):
        datasets.load(tmp_path / "m")


def test_a_damaged_gzip_is_refused(tmp_path):
    idx(tmp_path / "m", pack=True)
    path = tmp_path / "m" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError):
        datasets.load(tmp_path / "m")


def test_labels_that_are_missing_are_named(tmp_path):
    idx(tmp_path / "m")
    (tmp_path / "m" / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(MissingFileError, match="labels"):
        datasets.load(tmp_path / "m")


def test_cifar_batches(tmp_path):
    rng = np.random.default_rng(1)
    records = rng.integers(0, 256, (6, 3073)).astype(np.uint8)
    records[:, 0] %= 10
    (tmp_path / "data_batch_1.bin").write_bytes(records[:4].tobytes())
    (tmp_path / "data_batch_2.bin").write_bytes(records[4:].tobytes())
    data = datasets.load(tmp_path)
    assert data.images.shape == (6, 32, 32, 3)
    assert data.images[2, 5, 7].tolist() == records[2, 1:].reshape(3, 32, 32)[:, 5, 7].tolist()
    assert data.labels.tolist() == records[:, 0].tolist()
    (tmp_path / "batches.meta.txt").write_text("cat dog\n")
    records[:, 0] = 3
    (tmp_path / "data_batch_1.bin").write_bytes(records.tobytes())
    with pytest.raises(DataError, match="out of range"):
        datasets.load(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(records.tobytes()[:-1])
    with pytest.raises(DataError, match="whole"):
        datasets.load(tmp_path)


def test_an_image_folder_has_one_class_a_sub_folder(tmp_path):
    for label, name in enumerate(("ant", "bee")):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(np.full((4, 6, 3), 50 * label + i, np.uint8)).save(tmp_path / name / f"{i}.png")
    data = datasets.load(tmp_path, split="all")
    assert data.class_names == ("ant", "bee")
    assert sorted(data.labels.tolist()) == [0] * 5 + [1] * 5
    assert all(image.max() // 50 == label for image, label in zip(data.images, data.labels, strict=True))
    Image.fromarray(np.zeros((4, 7, 3), np.uint8)).save(tmp_path / "bee" / "9.png")
    with pytest.raises(DataError, match="differ in size"):
        datasets.load(tmp_path)


def test_a_release_file(tmp_path):
    path = tmp_path / "release.npz"
    np.savez(path, images=np.zeros((10, 3, 3), np.uint8), labels=np.arange(10) % 2)
    assert datasets.load(tmp_path, split="all").images.shape == (10, 3, 3, 1)
    assert datasets.load(path, split="whole").labels.tolist() == [0, 1] * 5  # in the file's order
    assert datasets.load(path, split="all").labels.tolist() == [0, 1, 0, 1, 1, 0, 1, 0, 0, 1]
    path.write_bytes(path.read_bytes()[:300])  # cut short
    with pytest.raises(DataError, match="not a release"):
        datasets.load(path)
    np.savez(path, images=np.zeros((10, 3, 3), np.float32), labels=np.arange(10) % 2)
    with pytest.raises(DataError):
        datasets.load(path)
    np.savez(path, images=np.array([{}], object), labels=np.zeros(1, int))
    with pytest.raises(DataError):  # an object array is a pickle: never opened
        datasets.load(path)


def test_digits_are_split_by_a_fixed_rule():
    train, test = datasets.load("digits"), datasets.load("digits", split="test")
    assert len(train) + len(test) == 1797
    assert train.images.max() == 255
    assert len(datasets.load("digits", split="all")) == 1797


def test_what_is_not_there_or_no_data_set_is_said(tmp_path):
    with pytest.raises(MissingFileError):
        datasets.load(tmp_path / "nowhere")
    with pytest.raises(DataError):
        datasets.load(tmp_path)
    with pytest.raises(DataError, match="split"):
        datasets.load("digits", split="half")
    (tmp_path / "x.bin").write_bytes(b"12345")
    with pytest.raises(DataError):
        datasets.load(tmp_path / "x.bin")


def test_the_public_sets(data_dir):
    mnist = datasets.load(data_dir / "mnist", limit=100)
    assert mnist.images.shape == (100, 28, 28, 1)
    assert len(mnist.class_names) == 10


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16"])
def test_pictures_of_any_mode_become_one_or_three_channels(tmp_path, mode):
    path = tmp_path / "x.png"
    if mode == "I;16":
        Image.fromarray(np.full((4, 5), 300, np.uint16)).save(path)
    else:
        Image.new("RGB", (5, 4), (10, 200, 30)).convert(mode).save(path)
    got = datasets.read_image(path)
    assert got.dtype == np.uint8
    assert got.shape == (4, 5, 1 if mode in {"L", "1", "I;16"} else 3)


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    with pytest.raises(MissingFileError):
        datasets.read_image(tmp_path / "none.png")
    for raw in (b"", b"text", b"\x89PNG\r\n\x1a\n" + bytes(40)):
        (tmp_path / "x.png").write_bytes(raw)
        with pytest.raises(DataError):
            datasets.read_image(tmp_path / "x.png")


def test_pictures_of_more_than_eight_bits_give_their_high_bytes_or_are_refused(tmp_path):
    deep = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(datasets.read_image(tmp_path / "deep.png")[..., 0], deep >> 8)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="float"):
        datasets.read_image(tmp_path / "float.tif")
