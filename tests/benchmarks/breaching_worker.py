"""Run attacks of JonasGeiping/breaching on updates that the benchmark wrote; runs in an environment of its own.

Usage: PYTHON breaching_worker.py FOLDER: every *.case.npz in it gets its *.result.npz.
The environment needs breaching, hydra-core, omegaconf, lpips, torchvision and torch; edgepriv comes by PYTHONPATH for
the architecture alone. Where torchvision's compiled part does not fit the installed torch it is left out: the attacks
do not use it.
"""

import json
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch


def main() -> None:
    torch.set_num_threads(1)
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [n for n in sys.modules if n.startswith("torchvision")]:
            del sys.modules[name]
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    import breaching

    for path in sorted(Path(sys.argv[1]).glob("*.case.npz")):
        with np.load(path, allow_pickle=False) as case:
            images, seconds = _attack(breaching, case)
        np.savez(path.with_name(path.name.replace(".case.", ".result.")), images=images, seconds=seconds)


def _attack(breaching, case):
    from omegaconf import OmegaConf

    from edgepriv.risk import models

    spec = json.loads(str(case["spec"]))
    torch.manual_seed(spec["seed"])
    model = models.build(spec["architecture"], 10, spec["shape"][1], spec["shape"][2])
    names = [name for name, _ in model.named_parameters()]
    weights = [torch.tensor(case[f"weight/{name}"]) for name in names]
    cfg = breaching.get_config(overrides=[f"attack={spec['attack']}"])
    cfg.attack.optim.max_iterations = spec["iterations"]
    cfg.attack.optim.callback = spec["iterations"]
    cfg.attack.init = "randn"
    if "total_variation" in cfg.attack.regularization:
        cfg.attack.regularization.total_variation.scale = spec["total_variation"]
        if "double_opponents" in cfg.attack.regularization.total_variation:
            cfg.attack.regularization.total_variation.double_opponents = False
    if spec["steps"] > 1 and "features" in cfg.attack.regularization:
        OmegaConf.set_struct(cfg, False)
        del cfg.attack.regularization["features"]  # it measures features of one step only and fails on updates
    setup = {"dtype": torch.float, "device": torch.device("cpu")}
    attacker = breaching.attacks.prepare_attack(model, torch.nn.CrossEntropyLoss(), cfg.attack, setup)
    payload, shared = _exchange(spec, weights, [torch.tensor(case[f"delta/{n}"]) for n in names], case["labels"])
    began = time.perf_counter()
    found, _ = attacker.reconstruct([payload], [shared], {}, dryrun=False)
    seconds = time.perf_counter() - began
    images = found["data"].detach().clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return images.astype(np.float32), seconds


def _exchange(spec, weights, deltas, labels):
    """Our update in breaching's terms: one step is a gradient, several are an update with its hyperparameters."""
    metadata = types.SimpleNamespace(shape=tuple(spec["shape"][1:]), modality="vision", classes=10)
    payload = {"parameters": weights, "buffers": None, "metadata": metadata}
    y = torch.tensor(labels)
    local = None
    gradients = [-delta / spec["learning_rate"] for delta in deltas]
    if spec["steps"] > 1:
        size = spec["batch_size"]
        local = {
            "lr": spec["learning_rate"],
            "steps": spec["steps"],
            "data_per_step": size,
            "labels": [y[i : i + size] for i in range(0, len(y), size)],
        }
        gradients = deltas
    about = {"num_data_points": len(y), "labels": y, "local_hyperparams": local, "data_key": "inputs"}
    return payload, {"gradients": gradients, "buffers": None, "metadata": about}


if __name__ == "__main__":
    main()
