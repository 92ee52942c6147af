"""Seal an image on a device and open it as a recipient. Run: python seal_and_open.py"""

import time

import numpy as np

from edgepriv import DeviceEpoch, Identity, open_frame
from edgepriv.wire.trust import TrustList

device, gateway, ann = (Identity.new(r, n) for r, n in (("device", "cam1"), ("gateway", "g"), ("recipient", "ann")))
now = time.time()
parties = (device.public, gateway.public, ann.public)
trust = TrustList(version=1, issued=int(now), expires=int(now) + 3600, parties=parties)  # the owner signs it in a file

epoch = DeviceEpoch.open(device, trust, "gateway-g", seq=1, now=now)
image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
envelope = epoch.seal(image)
opened = open_frame(envelope, epoch.signed.raw, ann, trust)
assert np.array_equal(opened.pixels, image)
print(f"{len(envelope)} bytes sealed, opened byte for byte")
