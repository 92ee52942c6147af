"""List what a gateway keeps for you, fetch it and open it.

Run: python fetch_frames.py BROKER_URL GATEWAY op-ann.key owner.key.pub trust.cbor
"""

import sys
import tempfile
import time
from pathlib import Path

from edgepriv import GatewayClient, OpenedFrames, TrustFile, load_identity, open_frame

if len(sys.argv) != 6:
    sys.exit(__doc__)
url, gateway, key, owner, trust_path = sys.argv[1:]
me = load_identity(Path(key))
seen = Path(tempfile.gettempdir()) / "edgepriv-trust-version"
trust = TrustFile(Path(trust_path), Path(owner), seen, clock=time.time).current()
opened = OpenedFrames(Path(key + ".opened"))  # a frame that comes again is refused
with GatewayClient(url, me, trust, gateway) as client:
    for frame in client.frames():
        picture = open_frame(client.fetch(frame), client.epoch_record(frame.record), me, trust, opened=opened)
        print(frame.device, frame.counter, picture.pixels.shape)
