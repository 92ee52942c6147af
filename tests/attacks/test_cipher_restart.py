"""Identical images never give identical envelopes, also when one real interpreter follows the other on one state."""

import subprocess
import sys
import textwrap

import numpy as np
from device_site import classifier
from PIL import Image

from edgepriv.cipher import container
from edgepriv.demo.site import GATEWAY, make_site
from edgepriv.device.spool import Spool
from edgepriv.keys import load_identity
from edgepriv.wire import envelope as wire
from edgepriv.wire.epoch import read_epoch, unwrap_content
from edgepriv.wire.trust import read_trust

FRAMES = 3
RUN_A_DEVICE = textwrap.dedent("""
    import dataclasses, sys, time
    from pathlib import Path
    from edgepriv.device.bench import bench_config
    from edgepriv.device.loop import OfflineLink
    from edgepriv.device.start import assemble
    home, frames = Path(sys.argv[1]), int(sys.argv[2])
    config = bench_config(home, home / "model/model.onnx", gateway=sys.argv[3], device="dev-1", threads=1)
    source = {"kind": "directory", "path": str(home / "pictures"), "loop": True}
    runtime = assemble(dataclasses.replace(config, source=source), folder=home, clock=time.time, link=OfflineLink())
    for _ in range(frames):
        assert runtime.step()
    runtime.finish()
""")


def no_two_alike(found, identity, trust):
    """Over (record, envelope): nothing that the cipher's security rests on was drawn twice."""
    records = {record: read_epoch(record, trust).record for record, _ in found}
    assert len({record.epoch_id for record in records.values()}) == len(records) == 2
    assert len({unwrap_content(record, identity) for record in records.values()}) == 2
    envelopes = [wire.parse(raw) for _, raw in found]
    assert len({envelope.mid for envelope in envelopes}) == len(found)
    assert len({envelope.commitment for envelope in envelopes}) == len(found)
    assert len({bytes(envelope.ciphertext) for envelope in envelopes}) == len(found)
    assert len({bytes(raw) for _, raw in found}) == len(found)


def test_a_device_that_restarts_on_its_state_repeats_nothing(tmp_path):
    site = make_site(tmp_path, 1)
    classifier(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.full((20, 30, 3), 77, np.uint8)).save(tmp_path / "pictures/same.png")
    for _ in range(2):
        subprocess.run([sys.executable, "-c", RUN_A_DEVICE, tmp_path, str(FRAMES), GATEWAY], check=True, timeout=240)
    spool = Spool(tmp_path / "bench/spool", max_bytes=1 << 26)
    frames = [item for item in spool.waiting(100) if item.kind == "frame"]
    found = [(spool.epoch_record(item.epoch), spool.payload(item.digest)) for item in frames]
    spool.close()
    assert len(found) == 2 * FRAMES
    trust = read_trust(site.trust.read_bytes(), load_identity(site.key("owner")).public.ed25519, now=0)
    no_two_alike(found, load_identity(site.key("op-site")), trust)
    seqs = {read_epoch(record, trust).record.seq for record, _ in found}
    assert len(seqs) == 2  # the number of the epoch survived the restart and was counted up


def test_the_seal_command_run_twice_repeats_nothing(tmp_path):
    site = make_site(tmp_path, 1)
    Image.fromarray(np.full((20, 30, 3), 77, np.uint8)).save(tmp_path / "same.png")
    found = []
    for i in range(2):
        out = tmp_path / f"{i}.epf"
        arguments = ["seal", "same.png", "--key", site.key("dev-1"), "--gateway", GATEWAY, "--out", out]
        arguments += ["--trust", site.trust, "--owner", site.owner]
        subprocess.run([sys.executable, "-m", "edgepriv", *arguments], cwd=tmp_path, check=True, timeout=240)
        found.append(container.unpack(out.read_bytes()))
    trust = read_trust(site.trust.read_bytes(), load_identity(site.key("owner")).public.ed25519, now=0)
    no_two_alike(found, load_identity(site.key("op-site")), trust)
