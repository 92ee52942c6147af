"""The per-output indicator in the device's own step: honest outputs leave, a vicious model's are counted and held."""

from __future__ import annotations

import json

import numpy as np
import pytest
from device_site import World, classifier
from gateway_site import Site

from edgepriv.device.config import ReleaseConfig


def reference(path, *, threshold: float):
    """A reference file: honest shapes lie near zero, whitened by the identity."""
    k = 3
    content = {
        "schema": "edgepriv.output-indicator/2",
        "centres": np.zeros((k, k)).tolist(),
        "whitening": np.tile(np.eye(k), (k, 1, 1)).tolist(),
        "threshold": threshold,
        "window": 2,
    }
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(("threshold", "refuse", "leave"), [(1e6, True, 10), (1e-6, False, 10), (1e-6, True, 1)])
def test_suspicious_outputs_are_counted_and_held_where_the_configuration_says_so(tmp_path, threshold, refuse, leave):
    world = World(Site(tmp_path), classifier(tmp_path / "model"))
    release = ReleaseConfig(indicator=reference(tmp_path / "i.json", threshold=threshold), refuse_suspicious=refuse)
    device = world.device(release=release)
    world.run()
    assert device.counters["accepted"] == leave
    assert len(world.stored("outputs")) == leave
    assert device.counters["suspicious_outputs"] == (0 if threshold > 1 else 9)
    world.close()
