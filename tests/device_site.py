"""Tiny ONNX models and device configurations for tests of the device."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgepriv.device.config import (
    DeviceConfig,
    IdentityConfig,
    ModelConfig,
    ReleaseConfig,
    RoundsConfig,
    RunConfig,
    SealConfig,
    SpoolConfig,
)
from edgepriv.device.start import assemble
from edgepriv.mqtt import BrokerSettings
from firmware_sim.faults import MemoryBroker

if TYPE_CHECKING:
    from pathlib import Path

TOML = 'id = "tiny"\nwidth = 8\nheight = 8\ncolour = "gray"\nlabels = ["a", "b", "c"]\nfeatures = "features"\n'


def save_model(path: Path, nodes, outputs, constants=(), side=8, channels=1) -> Path:
    """Write a one-input model; ``outputs``: (name, type, shape)."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, side, side])],
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def classifier(folder: Path, toml: str = TOML, *, bias=(0.0, 0.0, 0.0)) -> Path:
    """logits = W x + bias over 64 gray pixels, with the pixels as features."""
    weight = np.random.default_rng(3).normal(0, 1, (64, len(bias))).astype(np.float32)
    path = save_model(
        folder / "model.onnx",
        [
            helper.make_node("Flatten", ["x"], ["features"]),
            helper.make_node("MatMul", ["features", "w"], ["h"]),
            helper.make_node("Add", ["h", "b"], ["logits"]),
        ],
        [("logits", TensorProto.FLOAT, [1, len(bias)]), ("features", TensorProto.FLOAT, [1, 64])],
        [("w", weight), ("b", np.asarray(bias, np.float32))],
    )
    path.with_name("model.toml").write_text(toml)
    return path


def detector(folder: Path, boxes, scores, classes, toml_extra: str = "") -> Path:
    """A detector that always finds the same boxes (plus nothing of the picture)."""
    boxes = np.asarray(boxes, np.float32).reshape(1, -1, 4)
    path = save_model(
        folder / "model.onnx",
        [
            helper.make_node("ReduceMean", ["x"], ["m"], keepdims=0),
            helper.make_node("Mul", ["m", "zero"], ["z"]),
            helper.make_node("Add", ["bx", "z"], ["boxes"]),
            helper.make_node("Add", ["sc", "z"], ["scores"]),
            helper.make_node("Identity", ["cl"], ["classes"]),
        ],
        [
            ("boxes", TensorProto.FLOAT, list(boxes.shape)),
            ("scores", TensorProto.FLOAT, [1, boxes.shape[1]]),
            ("classes", TensorProto.INT64, [1, boxes.shape[1]]),
        ],
        [
            ("bx", boxes),
            ("sc", np.asarray(scores, np.float32).reshape(1, -1)),
            ("cl", np.asarray(classes, np.int64).reshape(1, -1)),
            ("zero", np.float32(0)),
        ],
    )
    toml = 'id = "finder"\ntask = "detect"\nwidth = 8\nheight = 8\ncolour = "gray"\n' + toml_extra
    path.with_name("model.toml").write_text(toml)
    return path


def device_config(site, name: str, model: Path, broker: str = "mqtt://127.0.0.1:1", **changes) -> DeviceConfig:
    """A device of a gateway test site; ``changes`` replace whole sections."""
    sections = {
        "device": IdentityConfig(
            key=site.folder / f"{name}.key",
            trust=site.folder / "trust.cbor",
            owner=site.folder / "owner.key.pub",
            gateway="gateway-main",
            state=site.folder / name,
        ),
        "broker": BrokerSettings(broker),
        "model": ModelConfig(model),
        "source": {"kind": "simulated", "data": "digits", "rows": list(range(40)), "height": 48, "width": 64},
        "release": ReleaseConfig(),
        "seal": SealConfig(),
        "spool": SpoolConfig(commit_frames=2),
        "rounds": RoundsConfig(take_part=False),
        "run": RunConfig(frames=10, status_s=5.0),
    }
    return DeviceConfig(**{**sections, **changes})


class World:
    """One gateway and some devices in this process over a bad network, driven by one clock."""

    def __init__(self, site, model: Path, *, seed=0, faults=None, max_packet_bytes=262_144):
        self.site, self.model = site, model
        site.now = float(int(time.time()))
        options = {"faults": faults} if faults else {}
        self.broker = MemoryBroker(seed=seed, clock=lambda: site.now, max_packet_bytes=max_packet_bytes, **options)
        self.gateway = site.gateway(self.broker.link())
        self.devices = {}

    def device(self, name="dev-cam1", **changes):
        config = device_config(self.site, name, self.model, **changes)
        made = assemble(config, folder=self.site.folder, clock=lambda: self.site.now, link=self.broker.link())
        self.devices[name] = made
        return made

    def turn(self, seconds=0.05):
        for device in self.devices.values():
            device.step()
        self.gateway.step()
        self.site.now += seconds

    def run(self, *, turns=2000, seconds=0.05, until=None):
        until = until or self.settled
        for _ in range(turns):
            self.turn(seconds)
            if until():
                return
        counts = {n: (d.counters, d.stages.spool.counters(), d.stages.spool.pending()) for n, d in self.devices.items()}
        raise AssertionError(f"did not settle: {counts} {self.gateway.totals}")

    def settled(self):
        return all(not d.capturing and d.stages.spool.pending() == 0 for d in self.devices.values())

    def stored(self, table="frames"):
        query = f"SELECT e.party, e.epoch_id, t.counter FROM {table} t JOIN epochs e ON e.id = t.epoch"
        return sorted((p, bytes(e), c) for p, e, c in self.gateway.store.database.query(query))

    def restart_gateway(self):
        self.gateway.link.cut()
        self.gateway.close()
        self.gateway = self.site.gateway(self.broker.link())

    def close(self):
        for device in self.devices.values():
            if device.stages.link.connected:
                device.finish()
        self.gateway.link.cut()
        self.gateway.close()
