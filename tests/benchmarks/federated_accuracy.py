"""Accuracy of federated rounds on MNIST, non-IID over 20 devices: plain, masked, private, attacked, defended.

    python tests/benchmarks/federated_accuracy.py --json [--rounds 20] [--data FOLDER] [--plot accuracy.png]

Each device has pictures of five classes only. All runs go through the product's own participant, round state machine
and aggregator (without a network); the head is a softmax over the 784 pixels. Epsilon is by the gateway's accountant
over all rounds at delta 1e-5; the private runs use distributed noise under masks, so it holds against the gateway.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from round_fleet import Fleet  # noqa: E402

from edgepriv import datasets  # noqa: E402
from edgepriv.federated.head import accuracy, new_head, train_head  # noqa: E402
from edgepriv.federated.local_recipe import head_recipe  # noqa: E402
from edgepriv.federated.local_update import LocalUpdate  # noqa: E402
from edgepriv.wire.update import encode_update  # noqa: E402

DEVICES, EACH, CLASSES_EACH, ATTACKERS = 20, 600, 5, 4
RECIPE = {"learning_rate": 0.05, "batch_size": 32, "epochs": 2, "batch_normalisation": "frozen"}
RUNS = {
    "plain": {},
    "masked": {"privacy": "masked"},
    "int8": {"encoding": "int8"},
    "topk 10 %": {"encoding": "topk", "keep": 0.1},
    "private, noise 1": {"privacy": "masked", "noise": "distributed", "noise_multiplier": 1.0, "clip": 1.0},
    "private, noise 4": {"privacy": "masked", "noise": "distributed", "noise_multiplier": 4.0, "clip": 1.0},
    "20 % sign flip": {"attack": "sign-flip"},
    "20 % sign flip, trimmed": {"attack": "sign-flip", "rule": "trimmed"},
    "20 % sign flip, median": {"attack": "sign-flip", "rule": "median"},
    "20 % sign flip, FLTrust": {"attack": "sign-flip", "rule": "fltrust"},
    "20 % label flip": {"attack": "label-flip"},
    "20 % label flip, trimmed": {"attack": "label-flip", "rule": "trimmed"},
    "20 % label flip, median": {"attack": "label-flip", "rule": "median"},
    "20 % label flip, FLTrust": {"attack": "label-flip", "rule": "fltrust"},
    "20 % scaling": {"attack": "scaling"},
    "20 % scaling, clip 2": {"attack": "scaling", "clip": 2.0},
}


def shards(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Rows of each device: few classes each."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(DEVICES):
        classes = rng.choice(10, CLASSES_EACH, replace=False)
        out.append(rng.choice(np.flatnonzero(np.isin(labels, classes)), EACH, replace=False))
    return out


def trainer(x: np.ndarray, y: np.ndarray, attack: str):
    factor = {"sign-flip": -4.0, "scaling": -100.0, "label-flip": 4.0}.get(attack, 1.0)
    y = (y + 1) % 10 if attack == "label-flip" else y  # and sent at four times its length, as the flipped sign is

    def train(weights, settings):
        delta = train_head(weights, x, y, settings.recipe, seed=settings.seed)
        return LocalUpdate({n: v * np.float32(factor) for n, v in delta.items()}, len(y))

    return train


def run(name: str, data: dict[str, np.ndarray], rounds: int, seed: int) -> dict[str, object]:
    """All rounds of one row of the table."""
    options = {"clip": 1e4, "fraction_bits": 14, **RUNS[name]}
    attack = str(options.pop("attack", ""))
    rows = shards(data["y"], seed)
    trainers = [trainer(data["x"][r], data["y"][r], attack if i < ATTACKERS else "") for i, r in enumerate(rows)]
    options["max_weight"] = 1 if "noise" in options else EACH
    curve, epsilon, head = [], 0.0, new_head(10, 784)
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(Path(folder), trainers)
        for device in list(fleet.devices.values())[:ATTACKERS] if attack else ():
            device.clips = False
        for number in range(1, rounds + 1):
            if options.get("rule") == "fltrust":
                root = np.random.default_rng(9).choice(len(data["y"]), 300, replace=False)
                anchor = train_head(head, data["x"][root], data["y"][root], head_recipe(**RECIPE), seed=number)
                options["reference"] = fleet.conductor.add_model(encode_update(anchor))
            fleet.open(fleet.plan(head, round=number, training=RECIPE, quorum=10, min_cohort=DEVICES, **options))
            record = fleet.run()
            if record.outcome != "done":
                return {"run": name, "accuracy": None, "reason": record.reason}
            head, epsilon = fleet.weights(record), record.epsilon
            curve.append(round(accuracy(head, data["test_x"], data["test_y"]), 4))
    return {"run": name, "accuracy": curve[-1], "epsilon": round(epsilon, 2) if epsilon else None, "curve": curve}


def plot(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 5.5))
    colours = plt.get_cmap("tab20").colors
    shown = [row for row in rows if row["accuracy"] is not None]
    for colour, row in zip(colours, sorted(shown, key=lambda row: -row["accuracy"]), strict=False):
        label = f"{row['run']} (epsilon {row['epsilon']})" if row["epsilon"] else str(row["run"])
        dash = "--" if "flip" in label or "scaling" in label else "-"  # dashed: with attackers
        label = f"{row['accuracy']:.3f} {label}"
        axis.plot(range(1, len(row["curve"]) + 1), row["curve"], dash, color=colour, label=label)
    axis.set(
        xlabel="round",
        ylabel="accuracy on 10,000 held-out digits",
        ylim=(0, 1),
        xticks=range(0, len(shown[0]["curve"]) + 1, 5),
    )
    axis.set_title("dashed: 20 % of the devices attack")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    folder = args.data or Path(os.environ.get("EDGEPRIV_TEST_DATA", ROOT.parent / "shared" / "data")) / "mnist"
    train, test = datasets.load(str(folder), split="train"), datasets.load(str(folder), split="test")
    flat = lambda d: d.images.reshape(len(d.images), -1).astype(np.float32) / 255
    data = {"x": flat(train), "y": train.labels, "test_x": flat(test), "test_y": test.labels}
    rows = []
    for name in RUNS:
        rows.append(run(name, data, args.rounds, args.seed))
        print(f"{name:<26} {rows[-1]['accuracy']}", file=sys.stderr)
    if args.plot:
        plot(rows, args.plot)
    document = {
        "schema": "edgepriv.bench-federated-accuracy/1",
        "devices": DEVICES,
        "rounds": args.rounds,
        "runs": rows,
    }
    print(json.dumps(document, indent=None if args.json else 2))


if __name__ == "__main__":
    main()
