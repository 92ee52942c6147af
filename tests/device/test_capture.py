"""Frame sources: folders, video files, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from edgepriv.device.capture import DirectorySource, open_source
from edgepriv.errors import ConfigError, DataError, MissingDependencyError, MissingFileError, UnavailableError


def pictures(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((6, 8, 3), 30 * i, np.uint8)).save(folder / f"{i:02}.png")
    return folder


def test_a_folder_gives_its_pictures_in_name_order_and_ends(tmp_path):
    folder = pictures(tmp_path / "in", 3)
    (folder / "notes.txt").write_text("not a picture")
    source = open_source("directory", {"path": "in"}, folder=tmp_path, clock=lambda: 7.0)
    frames = [source.read() for _ in range(3)]
    assert [f.name for f in frames] == ["00.png", "01.png", "02.png"]
    assert [f.index for f in frames] == [0, 1, 2]
    assert {f.at for f in frames} == {7.0}
    assert [f.pixels[0, 0, 0] for f in frames] == [0, 30, 60]
    assert not source.exhausted
    assert source.read() is None
    assert source.exhausted
    source.close()


def test_frames_may_carry_the_files_own_bytes(tmp_path):
    folder = pictures(tmp_path / "in", 1)
    source = open_source("directory", {"path": "in", "encoded": True}, folder=tmp_path, clock=lambda: 7.0)
    frame = source.read()
    assert frame.encoded == (folder / "00.png").read_bytes()
    assert frame.pixels.shape == (6, 8, 3)


def test_a_folder_can_be_read_in_a_loop(tmp_path):
    source = DirectorySource(pictures(tmp_path / "in", 2), loop=True)
    assert [source.read().name for _ in range(5)] == ["00.png", "01.png", "00.png", "01.png", "00.png"]
    assert not source.exhausted


def test_an_unreadable_picture_is_an_error_and_the_next_frame_follows(tmp_path):
    folder = pictures(tmp_path / "in", 3)
    (folder / "01.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    source = DirectorySource(folder)
    assert source.read().name == "00.png"
    with pytest.raises(DataError):
        source.read()
    assert source.read().name == "02.png"


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(MissingFileError):
        DirectorySource(tmp_path / "nowhere")
    with pytest.raises(MissingFileError):
        DirectorySource(tmp_path)


def test_a_video_file_gives_its_frames_in_rgb_and_ends(tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for i in range(5):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[..., 2] = 40 * i + 40  # red in OpenCV's order
        writer.write(frame)
    writer.release()
    source = open_source("video", {"target": str(path)}, folder=tmp_path, clock=lambda: 1.0)
    frames = []
    while (frame := source.read()) is not None:
        frames.append(frame)
    assert source.exhausted
    assert len(frames) == 5
    for i, frame in enumerate(frames):
        assert frame.pixels.shape == (48, 64, 3)
        assert abs(int(frame.pixels[..., 0].mean()) - (40 * i + 40)) < 12
        assert frame.pixels[..., 2].mean() < 12
    source.close()


def test_a_camera_that_is_not_there_is_unavailable(tmp_path):
    pytest.importorskip("cv2")
    with pytest.raises(UnavailableError):
        open_source("video", {"target": str(tmp_path / "nothing.mp4")}, folder=tmp_path, clock=lambda: 0.0)


def test_picamera2_is_asked_for_by_name_where_it_is_missing(tmp_path):
    try:
        import picamera2  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError) as caught:
            open_source("picamera2", {}, folder=tmp_path, clock=lambda: 0.0)
        assert "apt" in caught.value.hint
    else:
        pytest.skip("picamera2 is installed: this machine has a camera stack")


def test_an_unknown_source_or_option_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError) as caught:
        open_source("webcam", {}, folder=tmp_path, clock=lambda: 0.0)
    assert "simulated" in caught.value.hint
    pictures(tmp_path / "in", 1)
    with pytest.raises(ConfigError):
        open_source("directory", {"path": "in", "lopp": True}, folder=tmp_path, clock=lambda: 0.0)
    with pytest.raises(ConfigError):
        open_source("simulated", {"rows": [99_999]}, folder=tmp_path, clock=lambda: 0.0)


def test_the_simulated_camera_is_seeded_and_labelled(tmp_path):
    def frames(seed):
        source = open_source(
            "simulated",
            {"rows": [5, 6, 7], "seed": seed, "height": 60, "width": 80},
            folder=tmp_path,
            clock=lambda: 0.0,
        )
        return [source.read() for _ in range(3)]

    first, again, other = frames(1), frames(1), frames(2)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0].pixels, other[0].pixels)
    assert first[0].pixels.shape == (60, 80, 3)
    assert all(f.label is not None for f in first)
