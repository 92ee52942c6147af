"""Sealing: nothing readable on the disk, a new epoch when one is due, and none of its keys after the process."""

from __future__ import annotations

import time

import numpy as np
import pytest

from edgepriv.cipher.cipher import FrameOpener
from edgepriv.device.config import RunConfig, SealConfig
from edgepriv.errors import EdgeprivError
from edgepriv.wire import envelope
from edgepriv.wire.epoch import read_epoch


def spooled(world, **changes):
    device = world.device(**changes)
    device.stages.link.cut()
    while device.capturing:
        world.turn()
    return device


def test_neither_pixels_nor_outputs_nor_the_models_name_are_readable_on_the_disk(world):
    source = {"kind": "directory", "path": "pictures"}
    folder = world.site.folder / "pictures"
    folder.mkdir()
    from PIL import Image

    marker = np.frombuffer(b"PLAINTEXT-OF-A-PICTURE!!" * 900, np.uint8).reshape(90, 80, 3)
    Image.fromarray(marker).save(folder / "a.bmp")
    Image.fromarray(marker.repeat(4, axis=0)).save(folder / "b.bmp")
    device = spooled(world, source=source, run=RunConfig())
    assert device.counters["accepted"] == 2
    waiting = device.stages.spool.waiting(9)
    assert [w.kind for w in waiting] == ["output", "frame", "output", "frame"]
    state = world.site.folder / "dev-cam1"
    raw = b"".join(path.read_bytes() for path in sorted(state.rglob("*")) if path.is_file())
    for w in waiting:
        assert device.stages.spool.payload(w.digest) in raw or w.size > 4000
    assert len(raw) > marker.nbytes
    for secret in (b"PLAINTEXT", b"OF-A-PICTURE", b"argmax", b"classify", b"tiny"):
        assert secret not in raw
    assert b"PLAINTEXT" in marker.tobytes()  # the search does find what is there


def test_a_cameras_own_bytes_are_sealed_as_they_are_with_their_time(world):
    from PIL import Image

    folder = world.site.folder / "pictures"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 80, 3), np.uint8)).save(folder / "a.jpg")
    device = spooled(world, source={"kind": "directory", "path": "pictures", "encoded": True}, run=RunConfig())
    (waiting,) = [w for w in device.stages.spool.waiting(9) if w.kind == "frame"]
    record = device.stages.spool.epoch_record(waiting.epoch)
    picture = FrameOpener(record, world.site.keys["op-alice"], world.site.trust_list()).open(
        device.stages.spool.payload(waiting.digest)
    )
    assert (picture.codec, picture.blob) == ("jpeg", (folder / "a.jpg").read_bytes())
    assert abs(picture.taken - world.site.now) < 3600


def test_every_item_names_a_record_that_was_durable_before_it(world):
    device = spooled(world, seal=SealConfig(frames_per_epoch=3))
    rows = device.stages.spool._db.execute("SELECT id, kind, digest, epoch FROM items ORDER BY id").fetchall()
    seen = set()
    for _, kind, digest, epoch in rows:
        if kind == "epoch":
            seen.add(digest)
        assert epoch in seen
    frames = [r for r in rows if r[1] == "frame"]
    counters = [envelope.parse(device.stages.spool.payload(r[2])).counter for r in frames]
    assert counters == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    numbers = [read_epoch(device.stages.spool.payload(d), world.site.trust).record.seq for d in seen]
    assert sorted(numbers) == [1, 2, 3, 4]


def test_outputs_alone_are_sealed_when_images_are_off(world):
    device = spooled(world, seal=SealConfig(images=False))
    assert {w.kind for w in device.stages.spool.waiting(99)} == {"output"}


def test_no_file_of_a_stopped_device_opens_its_frames_and_the_recipients_key_does(world):
    device = spooled(world, run=RunConfig(frames=2))
    frames = [device.stages.spool.payload(w.digest) for w in device.stages.spool.waiting(9) if w.kind == "frame"]
    record = device.stages.spool.epoch_record(device.stages.sealer.epoch_digest)
    for name in ("dev-cam1", "dev-cam2", "gateway-main", "risk-lab", "op-bob"):
        with pytest.raises(EdgeprivError):
            FrameOpener(record, world.site.keys[name], world.site.trust)
    opener = FrameOpener(record, world.site.keys["op-alice"], world.site.trust)
    assert [opener.open(raw).pixels.shape for raw in frames] == [(48, 64, 3)] * 2


def test_a_clock_that_jumps_back_opens_a_new_epoch(world):
    device = world.device(run=RunConfig(frames=4))
    world.run(until=lambda: device.counters["captured"] == 2)
    device._last_frame = -1e18
    world.site.now = time.time() - 4000
    world.run()
    assert device.counters["epochs"] == 2
