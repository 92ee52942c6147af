"""The report passes what is random, fails what is not, and prints without judging what is no claim."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from edgepriv import primitives
from edgepriv.cipher import report
from edgepriv.cipher.report_page import png
from edgepriv.cli import root
from edgepriv.errors import ConfigError, DataError

BLACK = np.zeros((64, 64, 3), np.uint8)


def judge(subjects, image=BLACK, seed=11):
    measured = report.measure("picture", image, subjects, random=report.seeded(seed))
    return report.document([measured], cipher="c", pairs=200)["images"][0]


class OneStep:
    """Wraps a cipher and spoils its output in one way."""

    def __init__(self, spoil):
        self.inner, self.spoil = report.Product("flep3", primitives.AES_GCM), spoil

    def encrypt(self, image, key, mid):
        return self.spoil(self.inner.encrypt(image, key, mid).copy())


@pytest.mark.parametrize("profile", ["flep3", "flep3-strong", "aead"])
@pytest.mark.parametrize("image", [BLACK, np.full((40, 30), 255, np.uint8)], ids=["black", "white"])
def test_every_profile_passes_on_constant_pictures(profile, image):
    entry = judge(report.subjects_of(profile, primitives.AES_GCM), image)
    assert entry["verdict"] == "pass", entry["failed"]


def test_camera_and_black_pass_with_the_layers_alone():
    from skimage import data

    for image in (data.camera(), np.zeros((512, 512), np.uint8)):
        entry = judge(report.subjects_of("flep3", primitives.AES_GCM), image)
        assert entry["verdict"] == entry["layers_verdict"] == "pass", entry["failed"]
        assert {t["test"] for t in entry["metrics"] if t["subject"] == "layers"} >= {
            "entropy",
            "chi-square",
            "correlation h",
            "local entropy",
        }


def test_the_pinned_column_is_judged_for_the_strong_profile_only():
    for profile, judged in (("flep3", False), ("flep3-strong", True)):
        entry = judge(report.subjects_of(profile, primitives.AES_GCM))
        pinned = [t for t in entry["metrics"] if t["column"] == "pinned"]
        assert pinned
        assert all(t["judged"] is judged for t in pinned)
        assert all(t["pass"] is judged for t in pinned if t["test"] == "npcr pooled")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda c: c & 0xFE, "entropy"),
        (lambda c: np.sort(c.reshape(-1)).reshape(c.shape), "correlation"),
        (lambda c: np.resize(np.arange(256, dtype=np.uint8), c.size).reshape(c.shape), "chi-square"),
        (lambda c: np.where(np.arange(c.size).reshape(c.shape) % 50 == 0, 0, c).astype(np.uint8), "npcr"),
        (lambda c: c // 2 + 64, "uaci"),
    ],
    ids=["low bit lost", "sorted", "too even", "fixed bytes", "narrow"],
)
def test_a_spoiled_cipher_fails_by_name(spoil, expected):
    entry = judge({"whole": (OneStep(spoil), False)})
    assert entry["verdict"] == "fail"
    assert any(expected in name for name in entry["failed"])


def test_npcr_that_is_too_high_fails_too():
    class Alternating:
        calls = 0

        def encrypt(self, image, key, mid):
            Alternating.calls += 1
            half = np.random.default_rng(Alternating.calls).integers(0, 128, image.shape, dtype=np.uint8)
            return half + np.uint8(128) * np.uint8(Alternating.calls % 2)

    entry = judge({"whole": (Alternating(), False)})
    assert "whole fresh npcr pooled" in entry["failed"]
    assert all(t["mean"] == 100 for t in entry["metrics"] if t["column"] == "fresh" and t["test"] == "npcr")


def test_small_pictures_and_few_pairs_are_refused():
    with pytest.raises(DataError, match="1024"):
        report.measure("x", np.zeros((3, 3), np.uint8), {})
    with pytest.raises(DataError, match="too few"):
        report.measure("x", BLACK, {}, pairs=199)


def test_the_command_writes_json_and_a_page_and_measures_other_ciphers(tmp_path, monkeypatch):
    page = tmp_path / "report.html"
    args = ["cipher", "report", "black:64x64x3", "--seed", "4", "--json", "--html", str(page)]
    result = CliRunner().invoke(root, args)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["schema"] == "edgepriv.cipher-report/1"
    assert document["images"][0]["verdict"] == "pass"
    assert page.read_text().count("data:image/png;base64") == 3
    (tmp_path / "none_at_all.py").write_text(
        "class Identity:\n    def encrypt(self, image, key, mid):\n        return image\n"
    )
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(root, ["cipher", "report", "black:64x64", "--cipher", "none_at_all:Identity", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["images"][0]["verdict"] == "fail"
    result = CliRunner().invoke(root, ["cipher", "report", "black:64x64", "--cipher", "no_such:Thing"])
    assert isinstance(result.exception, ConfigError)


def test_the_command_has_words_for_people():
    for extra, words in (([], "lowest p"), (["--full"], "chi-square")):
        result = CliRunner().invoke(root, ["cipher", "report", "black:40x40", "--seed", "4", *extra])
        assert result.exit_code == 0
        assert "black:40x40: pass" in result.stdout
        assert words in result.stdout


def test_the_png_writer_is_read_back_by_pillow():
    import io

    from PIL import Image

    for channels in (1, 3, 4):
        pixels = np.random.default_rng(channels).integers(0, 256, (5, 7, channels), dtype=np.uint8)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels.squeeze())
