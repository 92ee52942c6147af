"""A recipient's commands against the real daemon: list, fetch, open; and what a stranger gets."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from gateway_site import ROOT, Broker, Device, GatewayProcess, LiveParty, Site, frame_digest

from edgepriv.wire.messages import FrameMessage

pytestmark = pytest.mark.system


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    made.broker, made.daemon = Broker(tmp_path, made.port), GatewayProcess(made)
    yield made
    assert made.daemon.stop() == 0
    made.broker.close()


def frames(site, *args, who="op-alice", check=True):
    folder = site.folder
    command = [
        sys.executable, "-m", "edgepriv", "frames", *args, "--json", "--gateway", "gateway-main",
        "--key", str(folder / f"{who}.key"), "--owner", str(folder / "owner.key.pub"),
        "--trust", str(folder / "trust.cbor"), "--broker", f"mqtt://127.0.0.1:{site.port}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    if check:
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    return done


def test_a_recipient_lists_fetches_and_opens_and_a_stranger_sees_nothing(site, tmp_path):
    device = Device(site)
    party = LiveParty(site, device)
    small, large = device.frame(side=50, value=1), device.frame(side=400, value=2)
    party.add(frame_digest(small), lambda: device.seal(FrameMessage(small)))
    offer = device.offer(large, chunk_bytes=65_536)
    party.add(offer.digest, lambda: device.seal(offer))
    party.run(30)
    listed = frames(site, "list")["frames"]
    assert [(row["device"], row["counter"]) for row in listed] == [("dev-cam1", 0), ("dev-cam1", 1)]
    out = tmp_path / "out"
    fetched = frames(site, "fetch", "--all", "--open", "--out", str(out))["frames"]
    from edgepriv.datasets import read_image

    for row, (side, value) in zip(fetched, ((50, 1), (400, 2)), strict=True):
        pixels = np.random.default_rng(value).integers(0, 256, (side, side, 3)).astype(np.uint8)
        assert np.array_equal(read_image(out / row["file"]), pixels)
    again = frames(site, "fetch", "--all", "--open", "--out", str(out))
    assert (again["frames"], again["failed"], len(again["opened_before"])) == ([], [], 2)
    once_more = frames(site, "fetch", "--all", "--open", "--again", "--out", str(out))
    assert [row["file"] for row in once_more["frames"]] == [row["file"] for row in fetched]
    (sealed,) = frames(site, "fetch", listed[0]["digest"][:10], "--out", str(out))["frames"]
    command = [
        sys.executable, "-m", "edgepriv", "open", str(out / sealed["file"]), "--out", str(out / "x.png"),
        "--key", str(site.folder / "op-alice.key"), "--owner", str(site.folder / "owner.key.pub"),
        "--trust", str(site.folder / "trust.cbor"),
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    assert frames(site, "list", who="op-bob")["frames"] == []
    refused = frames(site, "fetch", listed[0]["digest"], "--out", str(out), who="op-bob", check=False)
    assert refused.returncode == 66
    party.close()
