"""The report passes what is random, fails what is not, and prints without judging what is no claim."""

import json
import sys

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
    with pytest.raises(DataError, match="9 bytes are too few"):
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


def call(*arguments):
    result = CliRunner().invoke(root, ["cipher", "report", *map(str, arguments)])
    if isinstance(result.exception, Exception):
        raise result.exception
    return result


def test_columns_are_labelled_and_critical_values_and_the_layers_verdict_are_shown_everywhere(tmp_path):
    page = tmp_path / "report.html"
    labels = ("key freshness", "plaintext sensitivity", "key sensitivity")
    short = call("black:40x40", "--seed", 4, "--html", page).stdout
    full = call("black:40x40", "--seed", 4, "--full").stdout
    document = json.loads(call("black:40x40", "--seed", 4, "--json").stdout)
    entry = document["images"][0]
    assert document["columns"] == dict(zip(("fresh", "pinned", "key"), labels, strict=True))
    assert {test["label"] for test in entry["metrics"]} == set(labels)
    assert set(entry["critical"]) == {"0.05", "0.01", "0.001"}
    html = page.read_text()
    for text in (short, full, html):
        assert all(label in text for label in labels)
        for level in ("5 %", "1 %", "0.1 %"):
            assert level in text
        for row in entry["critical"].values():
            low, high = row["uaci"]
            assert f"{low:.5f} to {high:.5f}" in text
        assert "ayers 1 and 2 alone: " in text
    assert "chi square" in full
    assert "chi square" in html
    assert "black:40x40: pass (layers 1 and 2 alone: pass)" in short


def test_a_cipher_without_layers_has_no_verdict_on_them():
    entry = judge({"whole": (report.Product("aead", primitives.AES_GCM), False)})
    assert entry["layers_verdict"] is None


def test_wide_pixels_are_measured_as_bytes_and_the_report_says_so(tmp_path):
    np.save(tmp_path / "wide.npy", np.zeros((32, 40), np.uint16))
    result = call(tmp_path / "wide.npy", "--json", "--seed", 4)
    entry = json.loads(result.stdout)["images"][0]
    assert entry["shape"] == [32, 80, 1]
    assert entry["note"] == "uint16 [32, 40] is measured as its bytes, low byte first: uint8 [32, 80]"
    assert entry["note"] in result.stderr


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((64, 64)), "float64 cannot be sealed"),
        (np.zeros((64, 64), np.int8), "int8 cannot be sealed"),
        (np.zeros((64, 64), bool), "bool cannot be sealed"),
        (np.zeros((64, 64), complex), "complex128 cannot be sealed"),
        (np.zeros(4096, np.uint8), "not 1: "),
        (np.uint8(3), "not 0: "),
        (np.zeros((4, 4, 4, 40), np.uint8), r"not 4: \(4, 4, 4, 40\)"),
        (np.zeros((0, 64), np.uint8), "has no area"),
        (np.zeros((64, 64, 17), np.uint8), "17 channels: at most 16"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_measured_is_a_clear_error(pixels, words, tmp_path):
    np.save(tmp_path / "x.npy", pixels)
    with pytest.raises(DataError, match=words):
        call(tmp_path / "x.npy")


FOREIGN = """
import numpy as np

class NoEncrypt: pass

class Arguments:
    def __init__(self, key): pass

class Raises:
    def encrypt(self, image, key, mid): return 1 // 0

class Bytes:
    def encrypt(self, image, key, mid): return bytes(image.size)

class Flat:
    def encrypt(self, image, key, mid): return image.reshape(-1)

class Wide:
    def encrypt(self, image, key, mid): return image.astype(np.uint16)

class InPlace:
    def encrypt(self, image, key, mid):
        image ^= np.random.default_rng(list(key + mid)).integers(0, 256, image.shape, dtype=np.uint8)
        return image
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("foreign:NoEncrypt", "has no encrypt"),
        ("foreign:Arguments", "TypeError"),
        ("foreign:Raises", "encrypt raised ZeroDivisionError"),
        ("foreign:Bytes", "returned a bytes"),
        ("foreign:Flat", r"returned uint8 \(4096,\)"),
        ("foreign:Wide", "returned uint16"),
        ("foreign:Missing", "AttributeError"),
        ("foreign", "no cipher at foreign"),
        ("..x:y", "no cipher at"),
        ("broken:Thing", "SyntaxError"),
    ],
)
def test_a_foreign_cipher_that_does_not_fit_is_a_clear_error(name, words, tmp_path, monkeypatch):
    (tmp_path / "foreign.py").write_text(FOREIGN)
    (tmp_path / "broken.py").write_text("class")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "foreign", raising=False)
    with pytest.raises(ConfigError, match=words):
        call("black:64x64", "--cipher", name)


def test_a_foreign_cipher_that_works_in_place_spoils_no_picture(tmp_path, monkeypatch):
    (tmp_path / "in_place.py").write_text(FOREIGN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert "black:64x64: pass\n" in call("black:64x64", "--cipher", "in_place:InPlace", "--seed", 4).stdout


def test_flags_are_checked_before_the_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "measure", lambda *a, **k: pytest.fail("it began"))
    with pytest.raises(ConfigError, match="no folder"):
        call("black:64x64", "--html", tmp_path / "none/x.html")
    with pytest.raises(DataError, match="too few"):
        call("black:64x64", "--pairs", 199)
    for arguments in (["report", "black:64x64", "--seed", "-1"], ["bench", "--rounds", "-1"]):
        result = CliRunner().invoke(root, ["cipher", *arguments])
        assert result.exit_code == 2
        assert "is not in the range" in result.output
    np.save(tmp_path / "bad.npy", np.zeros(5))
    with pytest.raises(DataError, match="more than can be sealed"):
        call("black:20000x20000")
    with pytest.raises(DataError):  # the second picture is looked at before the first is measured
        call("black:64x64", tmp_path / "bad.npy")


def test_the_png_writer_is_read_back_by_pillow():
    import io

    from PIL import Image

    for channels in (1, 3, 4):
        pixels = np.random.default_rng(channels).integers(0, 256, (5, 7, channels), dtype=np.uint8)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels.squeeze())
