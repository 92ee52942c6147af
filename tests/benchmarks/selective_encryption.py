#!/usr/bin/env python
"""Selective encryption measured: a VGG-style network on CIFAR-10 attacked in every way, and a denoiser in five levels.

Without flags (within 20 minutes on two cores): trains the network, protects 8 % of its convolution weights, prints the
protect-audit document, the table share x selection x masked accuracy, and the start-up of an 80 MB VGG19 stack.
``--denoise`` runs the DnCNN part alone. ``--full --device cuda`` takes the networks of the paper's size, VGG19 and
DnCNN-17, trained and attacked on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edgepriv import datasets
from edgepriv.keys import Identity
from edgepriv.selective_encryption import calibrate, carrier, protection, startup
from edgepriv.selective_encryption.attack.audit import Opened
from edgepriv.selective_encryption.attack.document import Subject, document, table
from edgepriv.selective_encryption.calibrate import Samples
from edgepriv.selective_encryption.select import architectures, compute
from edgepriv.selective_encryption.select.scores import random_scores
from edgepriv.selective_encryption.select.scoring import unit_scores

TABLE_SHARES = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
SHARE, SECRET, MODEL_ID = 0.08, b"b" * 32, b"benchmark-model!"
DATA = os.environ.get("EDGEPRIV_TEST_DATA", str(Path(__file__).resolve().parents[3] / "shared" / "data"))


def log(text: str) -> None:
    print(f"[{time.process_time():7.1f} s CPU] {text}", file=sys.stderr, flush=True)


def cifar(split: str, limit: int | None) -> Samples:
    data = datasets.load(Path(DATA) / "cifar10", split=split, limit=limit)
    x = ((data.images.astype(np.float32) / 255 - 0.47) / 0.25).transpose(0, 3, 1, 2)
    return Samples("classify", np.ascontiguousarray(x, np.float32), data.labels)


def start_small(network: nn.Module) -> None:
    """Half the usual scale: under BatchNorm the learned part of the weights then outgrows the random start."""
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
            with torch.no_grad():
                part.weight.mul_(0.5)


def train_classifier(network: nn.Module, data: Samples, *, epochs: int, device: str) -> None:
    torch.manual_seed(0)
    start_small(network)
    network.to(device, memory_format=torch.channels_last).train()
    x = torch.from_numpy(data.x).to(device, memory_format=torch.channels_last)
    y = torch.from_numpy(data.y).to(device)
    steps = len(x) // 128 * epochs
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        for pick in torch.randperm(len(x), device=device)[: len(x) // 128 * 128].split(128):
            part = torch.where(torch.rand(len(pick), 1, 1, 1, device=device) < 0.5, x[pick], x[pick].flip(3))
            down, right = torch.randint(0, 9, (2,)).tolist()
            part = functional.pad(part, (4,) * 4)[:, :, down : down + 32, right : right + 32]
            optimizer.zero_grad()
            functional.cross_entropy(network(part), y[pick]).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            schedule.step()


def photographs() -> np.ndarray:
    """Gray photographs that scikit-image ships, as [n, 1, 64, 64] tiles in [0, 1]."""
    import skimage.data

    tiles = []
    for name in ("camera", "coins", "moon", "brick", "grass", "gravel", "astronaut", "coffee", "chelsea", "rocket"):
        picture = getattr(skimage.data, name)()
        gray = picture.mean(2) if picture.ndim == 3 else picture
        height, width = (size // 64 * 64 for size in gray.shape)
        grid = gray[:height, :width].reshape(height // 64, 64, width // 64, 64).swapaxes(1, 2)
        tiles.append(grid.reshape(-1, 1, 64, 64))
    return (np.concatenate(tiles) / 255).astype(np.float32)


def denoise_samples(clean: np.ndarray, seed: int, sigma: float = 25.0) -> Samples:
    noise = np.random.default_rng(seed).standard_normal(clean.shape)
    return Samples("denoise", (clean + sigma / 255 * noise).astype(np.float32), clean)


def train_denoiser(network: nn.Module, clean: np.ndarray, *, steps: int, device: str, sigma: float = 25.0) -> None:
    torch.manual_seed(0)
    network.to(device, memory_format=torch.channels_last).train()
    x = torch.from_numpy(clean).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        part = x[torch.randint(len(x), (12,), device=device)]
        noisy = (part + sigma / 255 * torch.randn_like(part)).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        functional.mse_loss(network(noisy), part).backward()
        optimizer.step()
        schedule.step()


def denoise_report(*, depth: int, width: int, steps: int, device: str = "cpu", full: bool = False) -> dict:
    """DnCNN in five levels: PSNR of each, the highest bit-exact."""
    tiles = np.random.default_rng(0).permutation(photographs())
    network = architectures.build("dncnn17") if full else architectures.DnCnn(depth=depth, width=width)
    train_denoiser(network, tiles[48:], steps=steps, device=device)
    plain, _ = carrier.fold_batchnorm(carrier.normalised(architectures.to_onnx(network, (1, 64, 64))))
    layers = carrier.layers(plain)
    train, test = denoise_samples(tiles[48:176], 1), denoise_samples(tiles[:48], 2)
    scores, used = unit_scores(plain, layers, "fisher", task="denoise", x=train.x, y=train.y)
    made = protection.draft(plain, layers, scores, SHARE, secret=SECRET, model_id=MODEL_ID)
    best, noisy = calibrate.quality(made.whole(), test), test.floor
    targets = [noisy + share * (best - noisy) for share in (-0.25, 0.2, 0.45, 0.7)]
    plans = protection.plan_levels(made, [*targets, None], test, log=log)
    whole = calibrate.outputs(made.partial(made.choice.units), test.x)
    return {
        "share": made.share,
        "selection": used,
        "noisy_psnr_db": noisy,
        "plain_psnr_db": best,
        "masked_psnr_db": calibrate.quality(made.partial(0), test),
        "levels": [{"level": n, "target": p.target, "psnr_db": p.quality} for n, p in enumerate(plans, 1)],
        "highest_bit_exact": bool(np.array_equal(whole, calibrate.outputs(made.whole(), test.x))),
    }


def vgg19_stack() -> object:
    """The 16 convolutions of VGG19 with random weights, 80.1 MB."""
    network = architectures.Vgg(width=64)
    model = carrier.normalised(architectures.to_onnx(network, (3, 32, 32)))
    return carrier.fold_batchnorm(model)[0]


def startup_report(*, runs: int = startup.RUNS) -> dict:
    """CPU time to a ready session: plain file by path, 8 % of kernels restored at all levels, whole-file AEAD."""
    model = vgg19_stack()
    layers = carrier.layers(model)
    plain = carrier.file_bytes(model, "plain", external=False)
    made = protection.draft(
        model, layers, random_scores(layers, 0), SHARE, secret=SECRET, model_id=MODEL_ID, kind="dprm"
    )
    total = made.choice.units
    plans = [protection.LevelPlan(None, None, total * k // 5) for k in range(1, 6)]
    issuer = Identity.new("owner", "benchmark")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for mode, chosen in (("levels", plans), ("full", plans[-1:])):
            bundle = protection.finish(
                made,
                chosen,
                issuer,
                model_id=MODEL_ID,
                version=1,
                mode=mode,
                name="vgg19",
                now_s=0,
                about={},
            )
            startup.prepare(place / mode, bundle, issuer, plain)
        starts = [("plain", place / "levels"), ("protected", place / "levels"), ("protected", place / "full")]
        times = startup.median_cpu_s(starts, runs=runs)
    found = dict(zip(("plain", "levels", "full"), times, strict=True))
    return {
        "model_mb": sum(map(len, plain.values())) / 1e6,
        "kernels": total,
        "cpu_ms": {name: round(1e3 * value, 1) for name, value in found.items()},
        "ratio": found["levels"] / found["plain"],
        "whole_file_aead_ratio": found["full"] / found["plain"],
    }


def five_targets(chance: float, plain: float) -> list[float | None]:
    """Four targets evenly between chance and the plain model, then all of it."""
    return [*(chance + share * (plain - chance) for share in (0.35, 0.55, 0.75, 0.9)), None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=Path, help="Use (or write) the trained weights here.")
    parser.add_argument("--denoise", action="store_true", help="Only the DnCNN part.")
    parser.add_argument("--startup", action="store_true", help="Only the start-up part.")
    parser.add_argument("--no-table", action="store_true")
    flags = parser.parse_args()
    compute.use(flags.threads, flags.device)
    if flags.denoise:
        steps = 20_000 if flags.full else 300
        result = denoise_report(depth=8, width=24, steps=steps, device=flags.device, full=flags.full)
    elif flags.startup:
        result = startup_report()
    else:
        result = classify_report(flags)
    print(json.dumps(result, indent=1) if flags.json else json.dumps(result))


def trained_network(flags: argparse.Namespace, data: Samples) -> nn.Module:
    network = architectures.build("vgg19-cifar" if flags.full else "vgg-cifar")
    if flags.weights is not None and flags.weights.is_file():
        return architectures.with_weights("vgg19-cifar" if flags.full else "vgg-cifar", flags.weights)
    train_classifier(network, data, epochs=flags.epochs or (60 if flags.full else 14), device=flags.device)
    network.cpu().eval()
    if flags.weights is not None:
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, str(flags.weights))
    return network


def classify_report(flags: argparse.Namespace) -> dict:
    data, test = cifar("train", None), cifar("test", 2000)
    original = carrier.normalised(architectures.to_onnx(trained_network(flags, data), (3, 32, 32)))
    plain, _ = carrier.fold_batchnorm(original)
    layers = carrier.layers(plain)
    some = data.head(1000)
    scores, _ = unit_scores(plain, layers, "fisher", task="classify", x=some.x, y=some.y)
    made = protection.draft(plain, layers, scores, SHARE, secret=SECRET, model_id=MODEL_ID)
    quality = calibrate.quality(made.whole(), test, threads=flags.threads)
    masked = calibrate.quality(made.partial(0), test, threads=flags.threads)
    log(f"plain {quality:.3f}, masked {masked:.3f} at a share of {made.share:.4f}")
    plans = protection.plan_levels(made, five_targets(test.floor, quality), test, threads=flags.threads, log=log)
    timed = startup_report()
    log(f"start-up ratio {timed['ratio']:.2f}")
    ends = (1, len(plans) - 1)  # the lowest level and the highest below the whole model
    opened = [Opened(n, plans[n - 1].quality, made.hidden_after(plans[n - 1].count)) for n in ends]
    result = document(
        Subject(original, layers, made.choice.selected, "mixture", made.share, opened),
        data,
        test,
        masked_quality=masked,
        plain_quality=quality,
        levels=[{"level": n, "target": p.target, "accuracy": p.quality} for n, p in enumerate(plans, 1)],
        startup_ratio=timed["ratio"],
        seeds=flags.seeds,
        log=log,
    )
    result["startup"] = timed
    if not flags.no_table:
        result["table"] = selection_table(plain, layers, some, test, scores, flags.threads)
    result["cpu_s"] = round(time.process_time(), 1)
    return result


def selection_table(plain, layers, some: Samples, test: Samples, fisher_scores, threads: int) -> list[dict]:
    """Masked accuracy by share, selection and budget rule, 1,000 test images, published decoys."""
    judged = test.head(1000)
    scores = {"fisher": fisher_scores, "random": random_scores(layers, 0)}
    for name, steps in (("magnitude", None), ("pss", 30), ("decoy-gates", 100)):
        scores[name] = unit_scores(
            plain, layers, name, task="classify", x=some.x, y=some.y, steps=steps, threads=threads
        )[0]
        log(f"scores of {name}")

    def judge(model) -> float:
        files = next(iter(carrier.file_bytes(model, "m", external=False).values()))
        return calibrate.quality(files, judged, threads=threads)

    return table(plain, layers, scores, TABLE_SHARES, judge)


if __name__ == "__main__":
    main()
