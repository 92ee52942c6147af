"""Bad input on the command line: one clear line, what to do, an exit code of its own kind, and never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from device_site import classifier
from main_job import ROOT
from PIL import Image

from edgepriv.cli import main
from edgepriv.demo import site
from edgepriv.keys import Identity
from edgepriv.wire.trust import TrustList, sign_trust

CONFIG, MISSING, DATA, KEYFILE, TRUST, WIRE, AUTHENTICATION, FULL = 78, 66, 65, 72, 67, 76, 77, 74


@pytest.fixture
def place(tmp_path):
    made = site.make_site(tmp_path, 1)
    model = classifier(tmp_path / "model")
    Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(tmp_path / "picture.png")
    config = site.write_device(
        made, "dev-1", "mqtt://127.0.0.1:1", model=model, data="digits", rows=[0, 1], seed=0, frames=2, masked=False
    )
    assert config.is_file()
    return made


@pytest.fixture
def edgepriv(capsys):
    """Run a command in this process as the console script does; any other exception than its exit fails the test."""

    def run(*argv):
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in argv])
        out = capsys.readouterr()
        assert "Traceback" not in out.err + out.out
        return caught.value.code, out.out, out.err

    return run


def trusted(place):
    return ["--owner", place.owner, "--trust", place.trust]


def seal(place, image="picture.png", key=None, **changes):
    options = {"--key": key or place.key("dev-1"), "--gateway": "gateway-site", "--out": place.folder / "sealed.epf"}
    flat = [str(x) for pair in {**options, **changes}.items() for x in pair]
    return ["seal", place.folder / image, *flat, *trusted(place)]


def open_(place, file="sealed.epf", key=None):
    key = key or place.key(site.RECIPIENT)
    return ["open", place.folder / file, "--key", key, "--out", place.folder / "opened.png", *trusted(place)]


def check(place):
    return ["device", "run", "--check", "--config", place.config("dev-1")]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_good_input_is_accepted(place, edgepriv):
    assert edgepriv(*seal(place))[0] == 0
    assert edgepriv(*open_(place))[0] == 0
    assert np.array_equal(np.asarray(Image.open(place.folder / "opened.png")), np.full((40, 30, 3), 90))
    assert edgepriv(*check(place))[0] == 0


@pytest.mark.parametrize("raw", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_an_unreadable_image(place, edgepriv, raw):
    (place.folder / "bad.png").write_bytes(raw)
    code, _, err = edgepriv(*seal(place, "bad.png"))
    assert code == DATA
    assert "bad.png" in err
    assert not (place.folder / "sealed.epf").exists()


def test_files_that_are_not_there(place, edgepriv):
    assert edgepriv(*seal(place, "none.png"))[0] == MISSING
    assert edgepriv(*seal(place, key=place.folder / "none.key"))[0] == MISSING
    assert edgepriv(*open_(place, "none.epf"))[0] == MISSING
    place.trust.unlink()
    assert edgepriv(*seal(place))[0] == MISSING


def test_a_key_that_others_can_read(place, edgepriv):
    place.key("dev-1").chmod(0o644)
    for command in (seal(place), check(place)):
        code, _, err = edgepriv(*command)
        assert code == KEYFILE
        assert "0644" in err
        assert "chmod 600" in err


def test_a_key_file_that_is_none(place, edgepriv):
    place.key("dev-1").write_text("hello")
    assert edgepriv(*seal(place))[0] == KEYFILE


def test_no_error_shows_a_private_key(place, edgepriv):
    path = place.key("dev-1")
    secret = path.read_text().split('ed25519_private = "')[1].split('"')[0]
    path.write_text(path.read_text().replace(secret, secret[:-8]))
    code, out, err = edgepriv(*seal(place))
    assert code == KEYFILE
    assert secret[:12] not in out + err


def test_a_key_that_the_owner_did_not_list(place, edgepriv):
    stranger = Identity.new("device", "1")
    stranger.save(place.folder / "stranger.key")
    code, _, err = edgepriv(*seal(place, key=place.folder / "stranger.key"))
    assert code == TRUST
    assert "other keys" in err


def test_the_wrong_recipients_key_opens_nothing(place, edgepriv):
    edgepriv(*seal(place))
    other = Identity.new("recipient", "other")
    other.save(place.folder / "other.key")
    assert edgepriv(*open_(place, key=place.folder / "other.key"))[0] == TRUST
    assert edgepriv(*open_(place, key=place.key("dev-1")))[0] == TRUST
    impostor = Identity.new("recipient", "site")  # the right name, other keys
    impostor.save(place.folder / "impostor.key")
    assert edgepriv(*open_(place, key=place.folder / "impostor.key"))[0] in {TRUST, AUTHENTICATION}
    assert not (place.folder / "opened.png").exists()


@pytest.mark.parametrize(("at", "code"), [(0, WIRE), (-17, AUTHENTICATION), (-600, AUTHENTICATION)])
def test_a_corrupt_envelope(place, edgepriv, at, code):
    edgepriv(*seal(place))
    path = place.folder / "sealed.epf"
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    got, _, err = edgepriv(*open_(place))
    assert got == code, err
    assert not (place.folder / "opened.png").exists()


@pytest.mark.parametrize("keep", [0, 3, 100, 700, -1])
def test_a_cut_envelope(place, edgepriv, keep):
    edgepriv(*seal(place))
    path = place.folder / "sealed.epf"
    path.write_bytes(path.read_bytes()[:keep])
    assert edgepriv(*open_(place))[0] in {WIRE, AUTHENTICATION}


def sign(place, owner, **changes):
    from edgepriv.keys import load_identity

    parties = tuple(
        load_identity(place.key(name)).public for name in (site.GATEWAY, site.RISK, site.RECIPIENT, "dev-1")
    )
    now = int(time.time())
    trust = TrustList(**{"version": 2, "issued": now - 100, "expires": now + 100, "parties": parties, **changes})
    place.trust.write_bytes(sign_trust(trust, owner))


def test_a_trust_list_that_is_expired_forged_or_damaged(place, edgepriv):
    from edgepriv.keys import load_identity

    owner = load_identity(place.key("owner"))
    sign(place, owner, expires=int(time.time()) - 5)
    for command in (seal(place), check(place)):
        code, _, err = edgepriv(*command)
        assert code == TRUST
        assert "expired" in err
        assert "what to do" in err
    sign(place, Identity.new("owner", "owner"))
    assert edgepriv(*seal(place))[0] == TRUST
    sign(place, owner, revoked=("dev-1",))
    assert edgepriv(*check(place))[0] == TRUST
    place.trust.write_bytes(b"\xff" * 50)
    assert edgepriv(*seal(place))[0] == TRUST


def test_a_trust_list_that_is_rolled_back(place, edgepriv):
    from edgepriv.keys import load_identity

    owner = load_identity(place.key("owner"))
    sign(place, owner, version=7)
    assert edgepriv(*check(place))[0] == 0
    sign(place, owner, version=6)
    code, _, err = edgepriv(*check(place))
    assert code == TRUST
    assert "older than 7" in err


@pytest.mark.parametrize(
    ("old", "new", "code", "says"),
    [
        ("[spool]", "[spool]\nmax_mbs = 3", CONFIG, "max_mb"),
        ("[device]", "[devise]", CONFIG, "device"),
        ("[spool]", "[spool", CONFIG, "TOML"),
        ('policy = "argmax"', 'policy = "argmin"', CONFIG, "topk:K"),
        ('policy = "argmax"', 'policy = "counts"', CONFIG, "detect"),
        ('kind = "simulated"', 'kind = "simulatd"', CONFIG, "simulated"),
        ('data = "digits"', 'data = "nowhere"', MISSING, "nowhere"),
        ("model.onnx", "nodel.onnx", MISSING, "nodel.onnx"),
        ("keys/dev-1.key", "keys/op-site.key", CONFIG, "not of a device"),
        ("keys/owner.key.pub", "keys/dev-1.key.pub", KEYFILE, "owner"),
        ("[spool]", '[spool]\ndrop = "newest"', CONFIG, "oldest"),
    ],
)
def test_a_wrong_device_configuration(place, edgepriv, old, new, code, says):
    path = place.config("dev-1")
    path.write_text(path.read_text() + "\n[spool]\n")
    edit(path, old, new)
    got, _, err = edgepriv(*check(place))
    assert got == code, err
    assert says in err


def test_a_model_that_is_none_or_has_no_description(place, edgepriv):
    model = place.folder / "model" / "model.onnx"
    raw = model.read_bytes()
    model.write_bytes(raw[:50])
    assert edgepriv(*check(place))[0] == DATA
    model.write_bytes(raw)
    model.with_name("model.toml").write_text('id = "x"\nwidht = 3\n')
    code, _, err = edgepriv(*check(place))
    assert code == CONFIG
    assert "width" in err
    model.with_name("model.toml").unlink()
    assert edgepriv(*check(place))[0] == MISSING


def test_a_folder_without_pictures(place, edgepriv):
    path = place.config("dev-1")
    (place.folder / "empty").mkdir()
    text = path.read_text().split("[source]")
    rest = text[1].split("[release]")[1]
    path.write_text(f'{text[0]}[source]\nkind = "directory"\npath = "empty"\n[release]{rest}')
    assert edgepriv(*check(place))[0] == MISSING


def test_a_full_disk_at_the_start(place, edgepriv):
    state = place.folder / "dev-1"
    state.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k,nr_inodes=40", "tmpfs", str(state)]
    if os.getuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    try:
        code, _, err = edgepriv(*check(place))
    finally:
        subprocess.run(["umount", str(state)], check=True)
    assert code == FULL, err
    assert "full" in err


def gateway(*args):
    return subprocess.run(
        [sys.executable, "-m", "gateway", *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip


@pytest.mark.system
@pytest.mark.parametrize(
    ("old", "new", "code", "says"),
    [
        ("window_s", "windows_s", CONFIG, "window_s"),
        ("keys/owner.key.pub", "keys/none.pub", MISSING, "none.pub"),
        ("[broker]", "[broker", CONFIG, "TOML"),
    ],
)
def test_a_wrong_gateway_configuration(place, old, new, code, says):
    config = site.write_gateway(place, "mqtt://127.0.0.1:1", port=1, weights=None, devices=1)
    edit(config, old, new)
    done = gateway("check", "--config", config)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.system
def test_the_console_script_ends_with_the_same_codes(place):
    place.config("dev-1").write_text(place.config("dev-1").read_text().replace("model.onnx", "none.onnx"))
    done = subprocess.run(
        [sys.executable, "-m", "edgepriv", *map(str, check(place))], cwd=ROOT, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == MISSING
    assert done.stderr.splitlines()[0].startswith("edgepriv: no such model")
    assert done.stdout == ""
