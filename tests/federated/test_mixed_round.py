"""One round for both kinds of device: torch trains the whole model here, numpy only the head there."""

from __future__ import annotations

import numpy as np
import pytest
from round_fleet import Fleet

from edgepriv.federated.head import BIAS, WEIGHT, HeadTrainer
from edgepriv.federated.local_update import LocalUpdate

torch = pytest.importorskip("torch")


def _model():
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("body", torch.nn.Linear(8, 5))
    model.add_module("relu", torch.nn.ReLU())
    model.add_module("head", torch.nn.Linear(5, 3))
    return model


class WholeModelTrainer:
    """What a device with torch plugs in: load the round's weights, train all of it."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __call__(self, weights, settings):
        from edgepriv.federated.torch_trainer import train_locally

        model = _model()
        model.load_state_dict({n: torch.from_numpy(np.array(v)) for n, v in weights.items()})
        update = train_locally(model, self.x, self.y, settings.recipe, seed=settings.seed)
        return LocalUpdate(dict(update.tensors), update.n_examples)


@pytest.mark.parametrize("privacy", ["clear", "masked"])
def test_head_trainers_and_whole_model_trainers_share_a_round(tmp_path, privacy):
    rng, model = np.random.default_rng(1), _model()
    x, y = rng.standard_normal((4, 20, 8)).astype(np.float32), rng.integers(0, 3, (4, 20))
    with torch.no_grad():
        features = [torch.relu(model.body(torch.from_numpy(part))).numpy() for part in x]
    trainers = [WholeModelTrainer(x[i], y[i]) for i in (0, 1)] + [HeadTrainer(features[i], y[i]) for i in (2, 3)]
    base = {n: v.detach().numpy().copy() for n, v in model.state_dict().items()}
    fleet = Fleet(tmp_path, trainers)
    training = {"learning_rate": 0.1, "batch_size": 5}
    fleet.open(fleet.plan(base, privacy=privacy, training=training, fraction_bits=20, max_weight=20, clip=10.0))
    record = fleet.run()
    assert len(record.participants) == 4, record
    new = fleet.weights(record)
    sent = [trainer(base, _settings(fleet, i)).tensors for i, trainer in enumerate(trainers)]
    body = np.mean([s["body.weight"] for s in sent[:2]], axis=0)
    head = np.mean([s[WEIGHT] for s in sent], axis=0)
    assert np.allclose(new["body.weight"] - base["body.weight"], body, atol=1e-5)
    assert np.allclose(new[WEIGHT] - base[WEIGHT], head, atol=1e-5)
    assert np.allclose(new[BIAS] - base[BIAS], np.mean([s[BIAS] for s in sent], axis=0), atol=1e-5)


def _settings(fleet, index):
    from edgepriv.federated.local_update import RoundSettings
    from edgepriv.federated.participant import _recipe

    opened = fleet.conductor.rounds[1].opened
    return RoundSettings(_recipe(opened), 1, index + 1)
