"""A release is data like any other: devices train on it in a round, and the risk service audits models with it."""

import hashlib
import json
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from edgepriv import cli, datasets
from edgepriv.device.release import parse_policy
from edgepriv.errors import EdgeprivError
from edgepriv.federated.head import accuracy, new_head, train_head
from edgepriv.federated.local_recipe import LocalRecipe
from edgepriv.keys import Identity
from edgepriv.risk.config import load_config
from edgepriv.risk.service import RiskService
from edgepriv.risk.signed_verdict import VERDICT_USE
from edgepriv.wire import cbor
from firmware_sim.release import write_model


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Digits as files: public, private and unseen; and a release of the private ones made by the command."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("site")
    data = datasets.load("digits", split="all")
    order = np.random.default_rng(2).permutation(len(data))
    for name, rows in (("pub", order[:600]), ("private", order[600:1400]), ("unseen", order[1400:])):
        np.savez(path / f"{name}.npz", images=data.images[rows], labels=data.labels[rows])
    argv = ["synthesize", "--data", path / "private.npz", "--public-data", path / "pub.npz", "--test-data"]
    argv += [path / "unseen.npz", "--no-audit", "--threads", 1, "--out", path / "release"]
    with pytest.raises(SystemExit) as ended:
        cli.run(cli.root, "edgepriv", [str(a) for a in argv])
    assert ended.value.code == 0
    return path


def pixels(data):
    return data.images.reshape(len(data), -1).astype(np.float32) / np.float32(255)


def test_four_devices_that_train_on_the_release_reach_nearly_what_the_private_records_give(site):
    unseen = datasets.load(site / "unseen.npz", split="all")
    recipe = LocalRecipe(learning_rate=0.5, batch_size=16, epochs=3)
    reached = {}
    for name in ("private.npz", "release"):
        data = datasets.load(site / name, split="all")
        head = new_head(10, 64)
        for round_number in range(3):
            shares = np.array_split(np.arange(len(data)), 4)
            updates = [
                train_head(head, pixels(data)[rows], data.labels[rows], recipe, seed=round_number) for rows in shares
            ]
            head = {key: head[key] + sum(u[key] for u in updates) / 4 for key in head}
        reached[name] = accuracy(head, pixels(unseen), unseen.labels)
    assert reached["private.npz"] > 0.9
    assert reached["release"] > reached["private.npz"] - 0.05


class AtOnce:
    """An executor that runs in this thread."""

    def submit(self, fn, /, *args):
        future = Future()
        future.set_result(fn(*args))
        return future

    def shutdown(self, wait=True, *, cancel_futures=False):
        pass


class Gateway:
    """A gateway that offers one model and takes verdicts."""

    def __init__(self, raw):
        self.raw, self.digest, self.verdicts = raw, hashlib.sha256(raw).digest(), []

    def query(self, what, **args):
        if what == "models":
            offer = {"digest": self.digest, "id": "digits", "size": len(self.raw), "verdict_bytes": b"", "expires": 0}
            return {"models": [offer]}
        if what == "verdict":
            self.verdicts.append(args["verdict"])
            return {"accepted": True}
        raise EdgeprivError(f"no {what} here")

    def fetch_object(self, ref, size, *, max_bytes):
        assert ref == self.digest[: len(ref)]
        return self.raw

    def close(self):
        pass


@pytest.mark.parametrize(("policy", "words"), [("argmax", "low leakage"), ("unsafe_raw_logits", "high leakage")])
def test_the_risk_service_audits_an_offered_model_with_the_release_as_its_probe(site, tmp_path, policy, words):
    """The service's own configuration names the release; the private pictures are not where it runs."""
    real = datasets.load(site / "private.npz", split="all")
    head = train_head(new_head(10, 64), pixels(real), real.labels, LocalRecipe(0.5, 16, 5), seed=0)
    gateway, key = Gateway(write_model(tmp_path / "m.onnx", head).read_bytes()), Identity.new("risk", "lab")
    (tmp_path / "risk.toml").write_text(
        '[risk]\nidentity = "k"\nowner = "o"\ntrust = "t"\ngateway = "gateway-main"\nstate = "state"\n'
        f'[broker]\nurl = "mqtt://127.0.0.1:1"\n[audit]\nprobe = "{site / "release"}"\npolicies = ["{policy}"]\n'
        'auditors = "ridge"\nreferences = 0\n'
    )
    config = load_config(tmp_path / "risk.toml")
    service = RiskService(config, lambda: gateway, key.sign, [parse_policy(policy)], AtOnce())
    for _ in range(6):
        service.step()
    (job,) = service.jobs.listed()
    assert job.state == "done", job.error
    report = json.loads((service.folder / "reports" / f"{gateway.digest.hex()}.json").read_text())
    assert report["verdict"] == words
    assert report["record"]["pictures"] == len(datasets.load(site / "release", split="all")) // 2  # the other trains
    body, signature = cbor.decode(gateway.verdicts[0], max_bytes=65536)
    key.public.verify(VERDICT_USE, body, signature)
    told = cbor.decode_map(body, max_bytes=65536)
    assert (told["model"], told["verdict"]) == (gateway.digest, words)


def test_a_map_from_outputs_to_pixels_ranks_models_on_the_release_as_on_real_data(site):
    """Explained variance of pixels from what a model returns: logits give much, the first choice little, on both."""
    bench, training = (datasets.load(site / "release", split=part) for part in ("test", "train"))
    assert len(bench) >= 300
    real = datasets.load(site / "private.npz", split="all")
    unseen = datasets.load(site / "unseen.npz", split="all")
    head = train_head(new_head(10, 64), pixels(real), real.labels, LocalRecipe(0.5, 16, 5), seed=0)
    for fit, test in ((training, bench), (real, unseen)):
        shown = {}
        for name, release in (("logits", lambda z: z), ("argmax", lambda z: np.eye(10)[z.argmax(1)])):
            z, y = (release(flat(part) @ head["head.weight"].T + head["head.bias"]) for part in (fit, test))
            shown[name] = explained(z, flat(fit), y, flat(test))
        assert shown["logits"] > shown["argmax"]


def flat(part):
    return part.images.reshape(len(part.images), -1).astype(np.float64) / 255.0


def explained(z, x, z_test, x_test):
    """Share of the pixels' variance that a ridge map from the outputs explains on other pictures."""
    design, asked = (np.hstack([np.ones((len(v), 1)), v]) for v in (z, z_test))
    weights = np.linalg.solve(design.T @ design + 1e-3 * np.eye(design.shape[1]), design.T @ x)
    return 1.0 - ((x_test - asked @ weights) ** 2).sum() / ((x_test - x.mean(axis=0)) ** 2).sum()
