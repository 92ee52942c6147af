"""The commands: make keys, sign the list, seal an image, open it; and each refusal with its exit code."""

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edgepriv.cli import root
from edgepriv.errors import (
    AuthenticationError,
    ConfigError,
    DataError,
    KeyFileError,
    MissingFileError,
    TrustError,
    WireError,
)


def call(*args):
    result = CliRunner().invoke(root, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def site(tmp_path):
    """A folder with an owner, a device, a gateway, a recipient and a signed list."""
    call("owner", "new", "--out", tmp_path / "owner")
    for role, name in (("device", "cam1"), ("gateway", "one"), ("recipient", "ann"), ("recipient", "eve")):
        call("keys", "new", "--role", role, "--name", name, "--out", tmp_path / f"{name}.key")
    listed = [tmp_path / f"{name}.key.pub" for name in ("cam1", "one", "ann")]
    call("owner", "sign", *listed, "--key", tmp_path / "owner/owner.key", "--trust", tmp_path / "trust.cbor")
    return tmp_path


def trust_flags(site):
    return ["--trust", site / "trust.cbor", "--owner", site / "owner/owner.key.pub"]


def seal(site, image, *extra):
    out = site / "sealed.epf"
    call("seal", image, "--key", site / "cam1.key", "--gateway", "one", "--out", out, *trust_flags(site), *extra)
    return out


def open_(site, sealed, out, key="ann.key"):
    return call("open", sealed, "--key", site / key, "--out", out, "--json", *trust_flags(site))


def images():
    random = np.random.default_rng(0)
    yield "gray", random.integers(0, 256, (31, 45), dtype=np.uint8)
    yield "rgb", random.integers(0, 256, (31, 45, 3), dtype=np.uint8)
    yield "rgba", random.integers(0, 256, (9, 7, 4), dtype=np.uint8)
    yield "gray16", random.integers(0, 65536, (31, 45), dtype=np.uint16)


@pytest.mark.parametrize(("name", "pixels"), list(images()))
@pytest.mark.parametrize("profile", ["flep3", "flep3-strong", "aead"])
def test_a_png_comes_back_with_identical_pixels(site, name, pixels, profile):
    Image.fromarray(pixels).save(site / "in.png")
    sealed = seal(site, site / "in.png", "--profile", profile)
    document = json.loads(open_(site, sealed, site / "out.png"))
    assert document["schema"] == "edgepriv.open/1"
    assert document["device"] == "dev-cam1"
    assert np.array_equal(np.asarray(Image.open(site / "out.png")), pixels)


def test_a_compressed_file_comes_back_byte_identical(site):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(site / "in.jpg")
    sealed = seal(site, site / "in.jpg", "--as-is")
    open_(site, sealed, site / "out.jpg")
    assert (site / "out.jpg").read_bytes() == (site / "in.jpg").read_bytes()


def test_float_pixels_travel_as_npy_and_refuse_to_be_png(site):
    pixels = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    np.save(site / "in.npy", pixels)
    sealed = seal(site, site / "in.npy")
    open_(site, sealed, site / "out.npy")
    assert np.array_equal(np.load(site / "out.npy"), pixels)
    with pytest.raises(DataError, match="without loss"):
        open_(site, sealed, site / "out.png")


def png_file(depth, kind, row, width=4):
    """A PNG of one row, by hand: Pillow writes no 16-bit colour."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" + row)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))
        for tag, data in (*chunks, (b"IEND", b""))
    )


def saved(pixels, kind, **options):
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, kind, **options)
    return out.getvalue()


LOSSY = {
    "16-bit RGB": ("png", lambda: png_file(16, 2, bytes(range(24))), "16 bits"),
    "16-bit RGBA": ("png", lambda: png_file(16, 6, bytes(range(32))), "16 bits"),
    "16-bit gray and alpha": ("png", lambda: png_file(16, 4, bytes(range(16))), "16 bits"),
    "32-bit integers": ("tif", lambda: saved(np.zeros((4, 4)).astype(np.int32), "TIFF"), "cut to 8|rescaled"),
    "signed": ("tif", lambda: saved(np.zeros((4, 4), np.uint16), "TIFF", tiffinfo={339: 2}), "rescaled"),
    "CMYK TIFF": ("tif", lambda: saved(Image.new("CMYK", (4, 4)), "TIFF"), "CMYK"),
    "CMYK JPEG": ("jpg", lambda: saved(Image.new("CMYK", (8, 8)), "JPEG"), "CMYK"),
    "16-bit PPM": ("ppm", lambda: b"P6 2 2 65535\n" + bytes(range(24)), "rescaled"),
    "other scale": ("pgm", lambda: b"P5 2 2 100\n" + bytes(4), "rescaled"),
    "two pictures": (
        "tif",
        lambda: saved(Image.new("L", (4, 4)), "TIFF", save_all=True, append_images=[Image.new("L", (4, 4))]),
        "2 pictures",
    ),
    "JPEG 2000": ("jp2", lambda: saved(Image.new("L", (32, 32)), "JPEG2000"), "not decoded"),
}


@pytest.mark.parametrize("name", LOSSY)
def test_what_decoding_would_change_is_refused_and_travels_as_it_is(site, name):
    ending, make, words = LOSSY[name]
    image = site / f"in.{ending}"
    image.write_bytes(make())
    with pytest.raises(DataError, match=words) as raised:
        seal(site, image)
    assert "--as-is" in raised.value.hint
    assert ".npy" in raised.value.hint
    sealed = seal(site, image, "--as-is")
    out = site / f"out.{ending}"
    open_(site, sealed, out)
    assert out.read_bytes() == image.read_bytes()


KEPT = {
    "16-bit gray PNG": ("png", lambda: png_file(16, 0, bytes(range(8))), np.arange(8, dtype=np.uint8).view(">u2")),
    "16-bit gray TIFF": ("tif", lambda: saved(np.arange(4, dtype=np.uint16)[None] * 999, "TIFF"), [0, 999, 1998, 2997]),
    "16-bit PGM": ("pgm", lambda: b"P5 4 1 65535\n" + bytes(range(8)), np.arange(8, dtype=np.uint8).view(">u2")),
    "float TIFF": ("tif", lambda: saved(np.float32([[0, 0.1, 1e9, -3]]), "TIFF"), np.float32([0, 0.1, 1e9, -3])),
    "2-bit gray": ("png", lambda: png_file(2, 0, b"\x1b"), [0, 85, 170, 255]),
    "transparent gray": (
        "png",
        lambda: saved(np.uint8([[7, 8, 9, 7]]), "PNG", transparency=7),
        [[7, 7, 7, 0], [8, 8, 8, 255], [9, 9, 9, 255], [7, 7, 7, 0]],
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_deep_and_transparent_pictures_keep_every_value(site, name):
    ending, make, values = KEPT[name]
    (site / f"in.{ending}").write_bytes(make())
    open_(site, seal(site, site / f"in.{ending}"), site / "out.npy")
    assert np.load(site / "out.npy")[0].tolist() == np.asarray(values).tolist()


def test_the_name_of_an_opened_file_tells_what_it_holds(site):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(site / "in.jpg")
    sealed = seal(site, site / "in.jpg", "--as-is")
    for wrong in ("out.png", "out.npy", "out.tif"):
        with pytest.raises(DataError, match="jpeg file") as raised:
            open_(site, sealed, site / wrong)
        assert raised.value.hint == "--out out.jpg"
        assert not (site / wrong).exists()
    for right in ("out.JPG", "out.jpeg", "out.bin", "out"):
        open_(site, sealed, site / right)
        assert (site / right).read_bytes() == (site / "in.jpg").read_bytes()
    np.save(site / "in.npy", np.zeros((4, 4, 2), np.uint8))
    sealed = seal(site, site / "in.npy")
    with pytest.raises(DataError, match="4x4x2 uint8") as raised:
        open_(site, sealed, site / "out.png")
    assert raised.value.hint == "use .npy"


def test_files_that_cannot_be_written_and_broken_arrays_are_clear_errors(site):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(site / "in.png")
    sealed = seal(site, site / "in.png")
    for out in (site / "none/x.npy", site / "none/x.png"):
        with pytest.raises(ConfigError, match="no folder"):
            open_(site, sealed, out)
    with pytest.raises(ConfigError, match="cannot write"):
        call("owner", "sign", site / "one.key.pub", "--key", site / "owner/owner.key", "--trust", site / "none/t.cbor")
    with pytest.raises(ConfigError, match="cannot make the folder"):
        call("owner", "new", "--out", site / "in.png/owner")
    np.save(site / "0d.npy", np.uint8(5))
    with pytest.raises(DataError, match="two or three axes"):
        seal(site, site / "0d.npy")
    raw = (site / "0d.npy").read_bytes()
    for broken in (b"", b"PK\x03\x04", raw[:20], raw[:-1], raw.replace(b"()", b"(9999999999999,)")):
        (site / "broken.npy").write_bytes(broken)
        with pytest.raises(DataError, match="not an array file"):
            seal(site, site / "broken.npy")


def test_refusals_are_clear_errors(site):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(site / "in.png")
    sealed = seal(site, site / "in.png")
    with pytest.raises(TrustError, match="not addressed to op-eve"):
        open_(site, sealed, site / "out.png", key="eve.key")
    with pytest.raises(WireError):
        open_(site, site / "in.png", site / "out.png")
    raw = bytearray(sealed.read_bytes())
    raw[-20] ^= 1
    (site / "bent.epf").write_bytes(raw)
    with pytest.raises(AuthenticationError):
        open_(site, site / "bent.epf", site / "out.png")
    assert not (site / "out.png").exists()
    (site / "text.png").write_text("no image")
    with pytest.raises(DataError, match="not an image"):
        seal(site, site / "text.png")
    with pytest.raises(MissingFileError):
        seal(site, site / "none.png")


def test_a_key_that_others_can_read_is_refused(site):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(site / "in.png")
    (site / "cam1.key").chmod(0o644)
    with pytest.raises(KeyFileError, match="read by others"):
        seal(site, site / "in.png")


def test_a_rolled_back_list_is_refused_by_device_and_recipient(site):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(site / "in.png")
    old = (site / "trust.cbor").read_bytes()
    sealed = seal(site, site / "in.png")
    call("owner", "revoke", "dev-cam1", "--key", site / "owner/owner.key", "--trust", site / "trust.cbor")
    with pytest.raises(TrustError, match="revoked"):
        seal(site, site / "in.png")
    with pytest.raises(TrustError, match="revoked"):
        open_(site, sealed, site / "out.png")
    (site / "trust.cbor").write_bytes(old)
    with pytest.raises(TrustError, match="older"):
        open_(site, sealed, site / "out.png")


def test_the_owner_refuses_slips(site):
    owner = ["--key", site / "owner/owner.key", "--trust", site / "trust.cbor"]
    call("keys", "new", "--role", "device", "--name", "cam1", "--out", site / "other.key")
    with pytest.raises(TrustError, match="other keys"):
        call("owner", "sign", site / "other.key.pub", *owner)
    call("owner", "sign", site / "other.key.pub", "--replace", *owner)
    with pytest.raises(TrustError, match="not in the trust list"):
        call("owner", "revoke", "dev-none", *owner)
    call("owner", "revoke", "dev-cam1", *owner)
    with pytest.raises(TrustError, match="revoked"):
        call("owner", "sign", site / "other.key.pub", *owner)
    with pytest.raises(ConfigError, match="not the owner"):
        call("owner", "sign", "--key", site / "one.key", "--trust", site / "trust.cbor")
    with pytest.raises(KeyFileError, match="exists"):
        call("owner", "new", "--out", site / "owner")


def test_a_policy_file_is_checked_and_signed(site):
    owner = ["--key", site / "owner/owner.key", "--trust", site / "trust.cbor"]
    policy = site / "policy.toml"
    policy.write_text('["*"]\nprofiles = ["aead"]\nrequire_verdict = true\n')
    call("owner", "sign", "--policy", policy, *owner)
    document = json.loads(call("owner", "show", *owner, "--json"))
    assert document["policy"] == {"*": {"profiles": ["aead"], "require_verdict": True}}
    assert document["version"] == 2
    for text in ('["*"]\nprofile = ["aead"]\n', '["*"]\nalgs = ["rot13"]\n', "x = 1\n", "[", '["*"]\nmax_frames = 0\n'):
        policy.write_text(text)
        with pytest.raises(ConfigError):
            call("owner", "sign", "--policy", policy, *owner)


def test_errors_reach_the_shell_as_one_line_and_an_exit_code(site):
    args = [
        "open",
        "none.epf",
        "--key",
        "ann.key",
        "--out",
        "x.png",
        "--trust",
        "trust.cbor",
        "--owner",
        "owner/owner.key.pub",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "edgepriv", *args], cwd=site, capture_output=True, text=True, check=False
    )
    assert done.returncode == 66
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("edgepriv: cannot read")
