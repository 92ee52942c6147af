"""One model on one frame: descriptions, preprocessing, detections, and every way in which a model can be wrong."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from device_site import TOML, classifier, detector

from edgepriv.device.capture import Frame
from edgepriv.device.infer import Inferer, ModelSpec, load_spec
from edgepriv.device.release import parse_policy, release
from edgepriv.errors import ConfigError, DataError, MissingFileError


def frame(shape=(8, 8, 1), seed=0):
    return Frame(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8), 0.0, 0)


def test_it_gives_logits_and_features_of_the_prepared_pixels(tmp_path):
    inferer = Inferer.from_file(classifier(tmp_path))
    picture = frame()
    found = inferer(picture)
    assert np.allclose(found.features, picture.pixels.reshape(-1) / 255, atol=1e-6)
    assert found.logits.shape == (3,)
    assert np.array_equal(inferer.run(inferer.prepare(picture))[0][0], found.logits)
    assert inferer.classes == 3
    assert len(inferer.digest) == 32


@pytest.mark.parametrize("colour", ["RGB", "BGR", "gray"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_layout_mean_and_scale(tmp_path, colour, layout, channels):
    inferer = Inferer.from_file(classifier(tmp_path))
    spec = ModelSpec("m", layout=layout, colour=colour, width=8, height=8, mean=(100.0,), scale=(0.5,))
    inferer.spec, inferer._mean, inferer._scale = spec, np.float32([100]), np.float32([0.5])
    picture = frame((8, 8, channels))
    got = inferer.prepare(picture)
    pixels = picture.pixels.astype(float)
    if colour == "gray":
        want = pixels if channels == 1 else pixels @ [0.299, 0.587, 0.114]
        want = want.reshape(8, 8, 1)
    else:
        want = np.repeat(pixels, 3, axis=2) if channels == 1 else pixels
        want = want[..., ::-1] if colour == "BGR" else want
    want = (want - 100) * 0.5
    assert np.allclose(got[0], want.transpose(2, 0, 1) if layout == "NCHW" else want, atol=1e-3)
    assert got.dtype == np.float32


def test_frames_of_changing_size_are_resized(tmp_path):
    inferer = Inferer.from_file(classifier(tmp_path))
    for shape in ((48, 64, 3), (8, 8, 1), (5, 7, 3)):
        assert inferer(frame(shape)).logits.shape == (3,)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('task = "segment"', "task"),
        ('layout = "CHW"', "layout"),
        ('colour = "yuv"', "colour"),
        ("width = 0", "width"),
        ('crop = "random"', "crop"),
        ("widht = 8", "widht"),
        ("mean = [1.0, 2.0]", "mean"),
        ('mean = "dark"', "mean"),
        ('task = "detect"', "labels"),
    ],
)
def test_a_wrong_description_is_a_configuration_error(tmp_path, line, error):
    keep = [row for row in TOML.splitlines() if row.split(" =")[0] != line.split(" =")[0]]
    if "detect" in line:
        keep = [row for row in keep if not row.startswith("labels")]
    path = classifier(tmp_path, "\n".join([*keep, line]) + "\n")
    with pytest.raises(ConfigError, match=error):
        Inferer.from_file(path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(MissingFileError):
        Inferer.from_file(tmp_path / "no.onnx")
    path = classifier(tmp_path)
    path.with_name("model.toml").unlink()
    with pytest.raises(MissingFileError):
        load_spec(path)


def test_bytes_that_are_no_model_are_refused(tmp_path):
    path = classifier(tmp_path)
    for raw in (b"", b"not onnx", path.read_bytes()[:100]):
        path.write_bytes(raw)
        with pytest.raises(DataError):
            Inferer.from_file(path)


@pytest.mark.parametrize(
    ("line", "hint"), [('logits = "probs"', "logits, features"), ('features = "f"', "features"), ('input = "y"', "")]
)
def test_wrong_names_of_inputs_and_outputs_say_what_there_is(tmp_path, line, hint):
    keep = [row for row in TOML.splitlines() if row.split(" =")[0] != line.split(" =")[0]]
    path = classifier(tmp_path, "\n".join([*keep, line]) + "\n")
    with pytest.raises((ConfigError, DataError)) as caught:
        Inferer.from_file(path)
    assert hint in caught.value.hint


def test_a_provider_that_does_not_run_is_logged_and_the_next_is_used(tmp_path, caplog):
    path = classifier(tmp_path, TOML + 'providers = ["NoSuchExecutionProvider", "CPUExecutionProvider"]\n')
    with caplog.at_level(logging.WARNING):
        inferer = Inferer.from_file(path)
    assert "NoSuchExecutionProvider" in caplog.text
    assert inferer(frame()).logits.shape == (3,)
    path.with_name("model.toml").write_text(TOML + 'providers = ["NoSuchExecutionProvider"]\n')
    with pytest.raises(DataError, match="does not run"):
        Inferer.from_file(path)


def test_a_model_for_another_size_does_not_run(tmp_path):
    path = classifier(tmp_path, TOML.replace("height = 8", "height = 9"))
    with pytest.raises(DataError):
        Inferer.from_file(path)


LABELS = 'labels = ["cat", "dog", "cow"]\n'


def test_a_detector_gives_boxes_above_its_threshold_and_their_bound_counts_all_its_labels(tmp_path):
    path = detector(
        tmp_path, [[0, 0, 0.5, 0.5], [0.2, 0.2, 1, 1], [0, 0, 1, 1]], [0.9, 0.8, 0.2], [2, 0, 1], toml_extra=LABELS
    )
    found = Inferer.from_file(path)(frame())
    assert found.box_classes.tolist() == [2, 0]
    assert found.box_labels == 3
    counts = release(parse_policy("counts"), found)
    assert counts.values == ([0, 1], [2, 1])
    assert counts.bits == pytest.approx(3 * np.log2(100))
    assert release(parse_policy("boxes:10"), found).values == ([0, 2, 2, 9, 9], [2, 0, 0, 4, 4])


@pytest.mark.parametrize(
    ("boxes", "scores", "classes"),
    [
        ([[np.nan, 0, 1, 1]], [0.9], [0]),
        ([[0, 0, 1, 1]], [np.nan], [0]),
        ([[0, 0, np.inf, 1]], [0.9], [0]),
        ([[0, 0, 1, 1]], [0.9], [3]),
        ([[0, 0, 1, 1]], [0.9], [-1]),
    ],
)
def test_detections_that_no_honest_detector_gives_are_refused(tmp_path, boxes, scores, classes):
    inferer = Inferer.from_file(detector(tmp_path, boxes, scores, classes, toml_extra=LABELS))
    with pytest.raises(DataError):
        inferer(frame())
