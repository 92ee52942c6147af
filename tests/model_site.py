"""Protected models for tests: an owner, a judge, versions of one tiny classifier, their deliveries and shipments."""

from __future__ import annotations

import datetime as dt
import time
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from edgepriv.device.models import ModelStore, Trust
from edgepriv.device.packing import Golden, Limits, pack
from edgepriv.device.shipments import permission_name
from edgepriv.device.verdicts import Release
from edgepriv.keys import Identity
from edgepriv.selective_encryption import carrier, levels, manifest, protection
from edgepriv.selective_encryption import delivery as metadata
from edgepriv.selective_encryption.select.scores import random_scores
from edgepriv.wire import cbor, delivery

if TYPE_CHECKING:
    from pathlib import Path

NOW = 1_900_000_000
LASTS_S = 10_000
MODEL_ID = b"m" * 16
TOML = 'id = "eye"\nwidth = 8\nheight = 8\nlabels = ["a", "b", "c", "d", "e"]\n'


def tiny_model(batch="n"):
    """Convolution, ReLU, mean, MatMul: 3 x 8 x 8 in, 5 logits out."""
    rng = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(rng.normal(size=(32, 3, 3, 3)).astype(np.float32), "w"),
        numpy_helper.from_array(rng.normal(size=(32, 5)).astype(np.float32), "m"),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["p"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["p", "m"], ["y"]),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [info("y", TensorProto.FLOAT, [batch, 5])],
        tensors,
    )
    return carrier.normalised(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


class Maker:
    """The owner's side: versions of one model, permissions, verdicts, deliveries."""

    def __init__(self, issuer=None, risk=None, *, now=NOW, external=False, levels=1):
        self.issuer = issuer or Identity.new("owner", "maker")
        self.risk = risk or Identity.new("risk", "judge")
        self.now, self.external, self.levels, self.plain = now, external, levels, tiny_model()
        self.inputs = np.random.default_rng(1).normal(size=(6, 3, 8, 8)).astype(np.float32)
        session = ort.InferenceSession(self.plain.SerializeToString())
        self.labels = session.run(None, {"x": self.inputs})[0].argmax(1)
        self.bundles, self.permissions = {}, {}

    def bundle(self, version=1):
        """One version of the protected model; made once."""
        if version not in self.bundles:
            layers = carrier.layers(self.plain)
            made = protection.draft(
                self.plain, layers, random_scores(layers, 0), 0.6, secret=b"s" * 32, model_id=MODEL_ID,
                external=self.external,
            )  # fmt: skip
            shares = range(1, self.levels + 1)
            plans = [protection.LevelPlan(None, None, made.choice.units * n // self.levels) for n in shares]
            options = {"model_id": MODEL_ID, "version": version, "mode": "levels", "name": "eye", "about": {}}
            self.bundles[version] = protection.finish(made, plans, self.issuer, now_s=self.now + version, **options)
        return self.bundles[version]

    def files(self, version=1):
        """The bundle's folder, with the model's description."""
        bundle = self.bundle(version)
        return {"manifest.cbor": bundle.manifest, "model.toml": TOML.encode(), **bundle.files}

    def write(self, folder: Path, version=1):
        """Write the bundle's folder."""
        folder.mkdir()
        for name, content in self.files(version).items():
            (folder / name).write_bytes(content)

    def verdict(self, version=1, word="low leakage", *, model=None, expires=LASTS_S, risk=None, **changed):
        """A signed verdict on the bytes that will run (or on others); a changed field that is None is left out."""
        digest = model or self.bundle(version).decoded.levels[0].digest
        fields = {
            "model": digest, "verdict": word, "policy": "argmax", "purifier": b"", "output": ["", "y"],
            "scale": [1 / 255], "mean": [0.0], "colour": "RGB", "serial": 1, "issued": self.now,
            "expires": self.now + expires, **changed,
        }  # fmt: skip
        body = cbor.encode({name: value for name, value in fields.items() if value is not None})
        return cbor.encode([body, (risk or self.risk).sign("verdict", body)])

    def delivery(self, version, *, limits=None, labels=None, verdict="good", issuer=None, toml=TOML):
        """A delivery's bytes."""
        golden = Golden(self.inputs, self.labels if labels is None else labels)
        statement = self.verdict(version) if verdict == "good" else verdict
        files = {**self.files(version), "model.toml": toml.encode()}
        verdicts = {} if statement is None else {"verdict.cbor": statement}
        return pack(files, golden, limits or Limits(min_accuracy=0.9), issuer or self.issuer, verdicts=verdicts)

    def permission(self, version, device, *, lasts=LASTS_S, level=None):
        """A permission for a device's keys, for the highest level unless told otherwise."""
        level = level or self.levels
        key = (version, device.public.x25519, lasts, level)
        if key not in self.permissions:
            bundle = self.bundle(version)
            opens = levels.key_at(bundle.key, MODEL_ID, self.levels, level)
            self.permissions[key] = manifest.grant(
                bundle.decoded.binding, level, opens, device.public, self.issuer,
                now_s=self.now, expires_s=self.now + lasts,
            )  # fmt: skip
        return self.permissions[key]

    def hidden_rows(self, version=1):
        """The true bytes of every encrypted kernel: what may never lie on a device's disk."""
        bundle = self.bundle(version)
        names = [entry.name for entry in bundle.decoded.files]
        masked = carrier.from_files({name: bytes(bundle.files[name]) for name in names})
        (layer,) = carrier.layers(self.plain)
        pairs = zip(carrier.weight_rows(self.plain, layer), carrier.weight_rows(masked, layer), strict=True)
        return [row.tobytes() for row, other in pairs if (row != other).any()]

    def trust(self, **more):
        """What a device of this owner believes, that releases under argmax."""
        known = [self.issuer.public.ed25519], [self.risk.public.ed25519]
        return Trust(*known, **{"require_verdict": True, "release": Release("argmax"), **more})


def runner(restored):
    """See `edgepriv.device.protected.runner`."""
    session = restored.session(ort)
    return lambda x: session.run(None, {"x": x})[0]


def install(store, maker, folder, raw, version, *, permission=None, rss=lambda: 1, clock=time.perf_counter):
    """Install a delivery in a store."""
    path = folder / "delivery"
    path.write_bytes(raw)
    permission = maker.permission(version, store.identity) if permission is None else permission
    return store.install(path, permission, runner, clock=clock, rss=rss)


def new_store(maker, folder, **trust):
    """A store of a new device."""
    return ModelStore(folder, Identity.new("device", "cam1"), maker.trust(**trust))


def answers(store, maker):
    """Whether what runs gives the plain model's answers."""
    return np.array_equal(runner(store.open())(maker.inputs).argmax(1), maker.labels)


class Repository:
    """The owner's delivery repository; `ship` makes what a gateway hands to devices."""

    def __init__(self, maker, folder: Path):
        self.maker, self.folder = maker, folder

    def ship(self, version, *devices, name="eye.delivery", age=dt.timedelta(0), **options):
        """Publish a version and write its shipment with permissions for devices; returns the file."""
        source = self.folder / "new.delivery"
        self.folder.mkdir(exist_ok=True)
        source.write_bytes(self.maker.delivery(version, **options))
        metadata.publish(
            self.folder / "repository", source, name, self.maker.issuer, self.folder / "tuf.json",
            now=dt.datetime.now(dt.timezone.utc) - age, custom={"version": version},
        )  # fmt: skip
        files = {permission_name(d.public.x25519): self.maker.permission(version, d) for d in devices}
        path = self.folder / f"eye-{len(list(self.folder.iterdir()))}.shipment"
        with path.open("wb") as stream:
            shipped = metadata.shipped_files(self.folder / "repository", name)
            delivery.write(stream, delivery.SHIPMENT, {**files, **shipped})
        return path


# A device's process that opens the store of a folder, for tests that kill it in the middle of something.
CHILD_START = """
import sys, time
from pathlib import Path
import numpy as np
from edgepriv.device.models import ModelStore, Trust
from edgepriv.device.verdicts import Release
from edgepriv.keys import load_identity
folder = Path(sys.argv[1])
known = [(folder / "issuer").read_bytes()], [(folder / "risk").read_bytes()]
trust = Trust(*known, require_verdict=True, release=Release("argmax"))
store = ModelStore(folder / "s", load_identity(folder / "device.key"), trust)
def run(restored):
    restored.wipe()
    labels = iter([0] + list(np.load(folder / "labels.npy")))
    return lambda x: np.eye(5)[[next(labels)]]
"""
