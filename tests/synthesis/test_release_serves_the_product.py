"""A release is data like any other: devices train on it in a round, and the risk service probes models with it."""

import numpy as np
import pytest
import torch

from edgepriv import cli, datasets
from edgepriv.federated.head import accuracy, new_head, train_head
from edgepriv.federated.local_recipe import LocalRecipe


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


def test_the_risk_service_takes_the_release_as_probe_and_it_ranks_models_as_real_data_do(site):
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
