"""A permission that expires closes the running session; a bad clock does not, and a new permission opens it again."""

import dataclasses
import time

import pytest
from device_site import World, device_config
from gateway_site import Site
from model_site import Maker

from edgepriv.device.config import ModelConfig, RunConfig
from edgepriv.device.model_keeper import CHECK_S
from edgepriv.device.start import assemble
from edgepriv.device.time_floor import TimeFloor
from edgepriv.errors import TrustError

HOUR = 3600.0


class Camera:
    """One device with a protected model, over a gateway; ``monotonic`` is in the test's hand."""

    def __init__(self, folder, lasts):
        self.site = Site(folder / "site", devices=("cam1",))
        self.maker = Maker(self.site.owner, now=int(time.time()))
        self.maker.write(folder / "eye")
        self.permission = folder / "permission"
        self.grant(lasts)
        self.model = ModelConfig(folder / "eye" / "carrier.onnx", self.permission)
        self.world = World(self.site, None)
        self.monotonic = 0.0
        self.start()

    def grant(self, lasts):
        self.permission.write_bytes(self.maker.permission(1, self.site.keys["dev-cam1"], lasts=int(lasts)))

    def start(self):
        source = {"kind": "simulated", "data": "digits", "rows": list(range(900)), "height": 48, "width": 64}
        config = device_config(self.site, "dev-cam1", self.model.path, run=RunConfig(interval_s=1.0), source=source)
        config = dataclasses.replace(config, model=self.model)
        self.runtime = assemble(
            config, folder=self.site.folder, clock=lambda: self.site.now, link=self.world.broker.link(),
            monotonic=lambda: self.monotonic,
        )  # fmt: skip
        self.world.devices["dev-cam1"] = self.runtime

    def pass_time(self, seconds, turns=100):
        """Let the device's uptime pass; returns the frames that were taken meanwhile."""
        before = self.runtime.counters["captured"]
        self.monotonic += seconds
        for _ in range(turns):
            self.world.turn()
        return self.runtime.counters["captured"] - before


@pytest.fixture
def camera(tmp_path):
    made = Camera(tmp_path, 3 * HOUR)
    yield made
    made.world.close()


def test_the_session_closes_within_an_hour_of_expiry_and_no_frame_is_taken_after_it(camera):
    assert camera.pass_time(0) > 0
    assert camera.pass_time(2 * HOUR) > 0
    assert camera.pass_time(CHECK_S) == 0
    assert camera.runtime.stages.inferer.closed
    assert camera.runtime.status(0.0).counters["model_closed"] == 1
    assert camera.pass_time(5 * HOUR) == 0
    assert camera.runtime.stages.spool.pending() == 0  # what was taken before is still delivered


def test_a_new_permission_opens_the_model_again_while_the_device_runs(camera):
    camera.pass_time(4 * HOUR)
    assert camera.runtime.stages.inferer.closed
    camera.grant(50 * HOUR)
    assert camera.pass_time(CHECK_S) > 0
    assert camera.runtime.status(0.0).counters["model_closed"] == 0


def test_a_permission_that_was_renewed_in_time_is_never_missed(camera):
    camera.grant(50 * HOUR)
    assert camera.pass_time(4 * HOUR) > 0
    assert camera.pass_time(CHECK_S) > 0


def test_a_clock_that_jumps_ahead_expires_nothing_and_one_that_jumps_back_revives_nothing(camera):
    camera.site.now += 40_000
    camera.world.turn()
    assert camera.pass_time(HOUR) > 0
    camera.pass_time(3 * HOUR)
    assert camera.runtime.stages.inferer.closed
    camera.site.now -= 40_000
    assert camera.pass_time(CHECK_S) == 0


def test_a_restart_does_not_set_the_floor_back(camera):
    camera.pass_time(4 * HOUR)
    camera.runtime.finish()
    with pytest.raises(TrustError, match="expired"):
        camera.start()


def test_the_floor_only_rises(tmp_path):
    now = [100.0]
    floor = TimeFloor(tmp_path / "floor", monotonic=lambda: now[0])
    floor.raise_to(5_000)
    floor.raise_to(4_000)
    now[0] += 60
    assert floor.now() == 5_060
    floor.save()
    now[0] = 0.0  # a reboot
    assert TimeFloor(tmp_path / "floor", monotonic=lambda: now[0]).now() == 5_060
    (tmp_path / "floor").write_text("rubbish")
    assert TimeFloor(tmp_path / "floor", monotonic=lambda: now[0]).now() == 0
