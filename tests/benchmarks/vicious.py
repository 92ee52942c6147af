"""Vicious classifiers: the attack's table, the policies, the detector, the indicator and the audit's time.

    python tests/benchmarks/vicious.py --json                       everything at CPU scale, within 20 minutes
    python tests/benchmarks/vicious.py                              the same as tables to read
    python tests/benchmarks/vicious.py --part detection --json      one part
    python tests/benchmarks/vicious.py --calibrate                  print new weights for the shipped detector
    python tests/benchmarks/vicious.py --part table --full --device cuda   WRN-28 on whole data sets
    python tests/benchmarks/vicious.py --part public-code --public-code CLONE --public-python PYTHON
                                       the paper's public code beside ours on the same work (it needs piq, torchvision)

Models are trained here; nothing is compared with numbers from elsewhere. ``--cache`` keeps measured models, so that a
run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from vicious_files import verdicts_of_files
from vicious_models import (
    SIDE,
    Work,
    calibrating_entries,
    honest_entries,
    judging_entries,
    measure_set,
    open_data,
    references,
)
from vicious_small_probes import accusations
from vicious_tables import as_tables

from edgepriv.datasets import load
from edgepriv.device.indicator import OutputIndicator
from edgepriv.device.release import parse_policy
from edgepriv.risk.reconstruction.attack import digit_attributes, padded, run_attack
from edgepriv.risk.reconstruction.audit import AuditRequest, audit_outputs
from edgepriv.risk.reconstruction.calibration import SHIPPED, Calibration
from edgepriv.risk.reconstruction.decoders import DecoderSettings
from edgepriv.risk.reconstruction.detectors import log_softmax
from edgepriv.risk.reconstruction.hardening import harden
from edgepriv.risk.reconstruction.indicator_fit import fit_indicator
from edgepriv.risk.reconstruction.leakage import AuditSettings, Bench, Probe
from edgepriv.risk.reconstruction.networks import mlp
from edgepriv.risk.reconstruction.onnx_writer import write_onnx
from edgepriv.risk.reconstruction.supplied_model import SuppliedModel
from edgepriv.risk.reconstruction.verdict import against, reference_scores
from edgepriv.risk.reconstruction.vicious import Recipe, TrainingSet, train

SCHEMA = "edgepriv.vicious-benchmark/1"
USED = ("ridge", "ridge_log_softmax", "trained")
POLICIES = ("argmax", "softmax:1", "softmax:2", "softmax:3", "topk:3", "unsafe_raw_logits")


def say(text):
    print(text, file=sys.stderr, flush=True)


class Named:
    """A release as a function, for comparisons that are no shipped policy."""

    def __init__(self, name, function):
        self.name, self._function = name, function

    def bits(self, k):
        return 32.0 * k

    def apply(self, logits):
        return np.asarray(self._function(logits), np.float32).astype(np.float64)


UNROUNDED = Named("unrounded softmax", lambda z: np.exp(log_softmax(z)))
LOG_SOFTMAX = Named("log-softmax", log_softmax)


# --- the table: data sets x outputs --------------------------------------------------------------------------


def table(args):
    kinds = (("mnist", False), ("cifar10", False), ("mnist", True))
    with work_of(args).pool() as pool:
        waiting = {kind: pool.submit(table_rows, args, *kind) for kind in (kinds[1], kinds[0], kinds[2])}
        return [row for kind in kinds for row in waiting[kind].result()]


def table_rows(args, data, attributes):
    """One data set with each kind of outputs; the honest twin is trained once."""
    rows, bench = [], table_bench(args, data)
    for outputs in ("raw", "softmax", "softmax, decoder reads logarithms"):
        rows.append(table_row(args, data, outputs, bench, attributes=attributes))
        say(json.dumps(rows[-1]))
    return rows


def table_bench(args, data):
    """Pictures to score on; the training pictures help to estimate the covariance behind R, nothing else."""
    training, test = (load(args.data / data, split=split) for split in ("train", "test"))
    side = 32 if args.full else test.images.shape[1]
    images, held = (padded(part.images, side) for part in (training, test))
    return Bench(Probe(data, held, test.labels), AuditSettings(4000, None), further=images)


def table_row(args, data, outputs, bench, *, attributes):
    # coloured pictures take longer to learn; the reconstruction's weight falls, so that the task has the last word
    images, epochs = (10_000, 14) if data == "cifar10" else (args.images, args.epochs)
    training = load(args.data / data, split="train", limit=None if args.full else images)
    seen, _, logarithms = outputs.partition(",")
    recipe = Recipe(outputs=seen, epochs=epochs, device=args.device, schedule="cosine", last_weight=args.last_weight)
    if logarithms:
        recipe = replace(recipe, decoder_view="logarithms")
    if args.full:
        width = "wrn28-1" if data == "mnist" else "wrn28-5"
        recipe = replace(recipe, architecture=width, augment=True, epochs=args.epochs)
    images = padded(training.images, bench.images.shape[1])
    targets, wanted = training.labels, bench.labels
    if attributes:
        targets, wanted = digit_attributes(targets), digit_attributes(wanted)
    prepared = TrainingSet.of(images, targets, classes=None if attributes else 10)
    name = f"{data}{'-attributes' if attributes else ''}-{seen}{'-logarithms' if logarithms else ''}"
    out = args.cache / f"table-{name}-{epochs}-{len(images)}{'-full' if args.full else ''}"
    twin = out.with_name(out.name.replace("softmax", "raw").replace("-logarithms", "")) / "honest.state.safetensors"
    if seen == "softmax" and twin.is_file():
        out.mkdir(parents=True, exist_ok=True)  # the honest twin of both is the same model
        shutil.copy(twin, out)
    found = run_attack(recipe, prepared, bench, wanted, out, progress=say).as_dict()
    scores = {
        f"{key}_{who}": found[who][key]
        for key in ("ssim", "psnr_db", "risk_r")
        for who in ("reconstruction", "class_mean")
    }
    return {
        "data": data + (" attributes" if attributes else ""),
        "outputs": outputs,
        "architecture": recipe.architecture,
        "training_images": len(images),
        "epochs": recipe.epochs,
        "accuracy_honest": found["accuracy"]["honest"],
        "accuracy_vicious": found["accuracy"]["vicious"],
        "explained_variance": found["reconstruction"]["explained_variance"],
        **scores,
        "r_record": {k: v for k, v in found["record"].items() if k in {"dtype", "ridge", "images_in_covariance"}},
        "scored_images": len(bench.images) - bench.cut,
        "accuracy_images": len(bench.images),
    }


# --- the sets that calibrate and judge -----------------------------------------------------------------------


def differences(models, found):
    values = {name: [one.values for one in models_] for name, models_ in found.items()}
    return [against(m["features"], values[m["architecture"]], known=True) for m in models]


def calibrate(args):
    from sklearn.linear_model import LogisticRegression

    found = references(work_of(args), part="calibrate references")
    entries = calibrating_entries(300) + honest_entries(100, many=False)
    models = measure_set(entries, "calibrate", work_of(args), found)
    bad = np.array([not m["stratum"].startswith("honest") for m in models])
    x = np.array([[d[name] for name in USED] for d in differences(models, found)])
    scale = x.std(0)
    fitted = LogisticRegression(C=10.0).fit(x / scale, bad)
    weights = {name: float(w / s) for name, w, s in zip(USED, fitted.coef_[0], scale, strict=True)}
    shipped = Calibration(weights, float(fitted.intercept_[0]))
    scores = np.array([shipped.score(d) for d in differences(models, found)])
    threshold = max(0.0, float((scores[~bad].max() + scores[bad].min()) / 2))
    return {
        "weights": weights,
        "bias": shipped.bias,
        "threshold": threshold,
        "honest_largest": float(scores[~bad].max()),
        "vicious_smallest": float(scores[bad].min()),
        "models": {"honest": int((~bad).sum()), "vicious": int(bad.sum())},
    }


def auc(honest, vicious):
    h, v = np.asarray(honest)[:, None], np.asarray(vicious)[None]
    return float(((v > h) + 0.5 * (v == h)).mean())


def auc_with_interval(honest, vicious, *, rounds=2000, seed=0):
    """AUC with a 95 % bootstrap interval over models."""
    if not len(vicious):
        return None
    generator = np.random.default_rng(seed)
    h, v = np.asarray(honest), np.asarray(vicious)
    values = [
        auc(h[generator.integers(0, len(h), len(h))], v[generator.integers(0, len(v), len(v))]) for _ in range(rounds)
    ]
    low, high = np.quantile(values, [0.025, 0.975])
    return {"auc": auc(h, v), "interval": [float(low), float(high)], "models": len(v)}


def work_of(args):
    return Work(args.data / "mnist", args.cache, args.workers)


def judged_models(args):
    found = references(work_of(args))
    entries = judging_entries(1700, args.attack_epochs) + honest_entries(1500, many=True)
    return found, measure_set(entries, "judge", work_of(args), found)


def detection(args):
    found, models = judged_models(args)
    rows = []
    for model, difference in zip(models, differences(models, found), strict=True):
        limits = reference_scores([one.values for one in found[model["architecture"]]], known=True)
        score = SHIPPED.score(difference)
        flagged = score > SHIPPED.threshold and score > max(limits) and model["margin"] > 0
        rows.append(
            {
                **{k: v for k, v in model.items() if k not in {"logits", "features", "file"}},
                "score": score,
                "flagged": flagged,
            }
        )
    honest = [r for r in rows if r["stratum"].startswith("honest")]
    worked = [r for r in rows if r.get("succeeded")]
    failed = [r for r in rows if r.get("succeeded") is False]
    values = [r["score"] for r in honest]
    strata = {
        name: {
            "all": auc_with_interval(values, [r["score"] for r in rows if r["stratum"] == name]),
            "successful": auc_with_interval(values, [r["score"] for r in worked if r["stratum"] == name]),
            "successful_flagged": sum(r["flagged"] for r in worked if r["stratum"] == name),
            "failed": sum(r["stratum"] == name for r in failed),
            "failed_flagged": sum(r["flagged"] for r in failed if r["stratum"] == name),
        }
        for name in ("strong", "weak", "softmax", "adapted")
    }
    pooled = [r["score"] for r in worked if r["stratum"] in {"strong", "weak"}]
    return {
        "honest": len(honest),
        "false_positives": [r["stratum"] for r in honest if r["flagged"]],
        "pooled_strong_and_weak": auc_with_interval(values, pooled),
        "strata": strata,
        "escaped": [
            {key: r[key] for key in ("stratum", "attack", "own_explained_variance", "score", "accuracy")}
            for r in worked
            if not r["flagged"]
        ],
        "threshold": SHIPPED.threshold,
        "models": rows,
    }


def files(args):
    """The verdict of the command on files, some of each stratum."""
    return verdicts_of_files(judged_models(args)[1], work_of(args))


def indicator(args):
    """AUC of the device's per-output indicator, one output and a window of 50."""
    references_, models = judged_models(args)
    device = OutputIndicator.from_bytes(fit_indicator([one.outputs for one in references_["cnn"]], window=50))
    found = {}
    generator = np.random.default_rng(0)
    for model in models:
        if model["architecture"] != "cnn":
            continue
        distance = device.distances(np.array(model["logits"], np.float32))
        windows = distance[generator.integers(0, len(distance), (200, 50))].mean(1)
        stratum = model["stratum"]
        groups = ["honest"] if stratum.startswith("honest") else [stratum]
        if stratum in {"strong", "weak", "softmax"}:
            groups.append("vicious")
        for group in groups:
            found.setdefault(group, []).append((distance, windows))
    honest_one, honest_many = (np.concatenate([f[i] for f in found["honest"]]) for i in (0, 1))
    rows = {}
    for group, values in found.items():
        one, many = (np.concatenate([f[i] for f in values]) for i in (0, 1))
        rows[group] = {
            "models": len(values),
            "auc_one_output": auc(honest_one[::7], one[::7]),
            "auc_window_of_50": auc(honest_many, many),
            "windows_flagged": float((many > device.threshold).mean()),
        }
    return rows


# --- policies and defences -----------------------------------------------------------------------------------


def policies(args):
    """Leakage per policy over all auditors on the strong vicious models and on honest ones."""
    data, (_, models) = open_data(args.data / "mnist"), judged_models(args)
    settings = AuditSettings(2000, DecoderSettings(form="conv", epochs=8))
    bench = Bench(Probe("mnist-14", data.bench.images, data.bench.labels), settings)
    rows = {}
    chosen = [("strong", m) for m in models if m["stratum"] == "strong"][:2]
    chosen += [("honest", m) for m in models if m["stratum"] == "honest plain"][:1]
    for kind, model in chosen:
        order = np.random.RandomState(1).permutation(len(data.bench.images))[: len(bench.images)]
        logits = np.array(model["logits"], np.float32)[order]
        for policy in (*map(parse_policy, POLICIES), UNROUNDED, LOG_SOFTMAX):
            leak = bench.leakage(logits, policy)
            row = rows.setdefault((kind, policy.name), {"bits": leak.bits, "ev": [], "accuracy": [], "auditors": {}})
            row["ev"].append(leak.score.explained_variance)
            row["accuracy"].append(leak.accuracy)
            for name, value in leak.by_auditor.items():
                row["auditors"].setdefault(name, []).append(value)
    return [
        {
            "model": kind,
            "policy": name,
            "bits": row["bits"],
            "explained_variance_mean": float(np.mean(row["ev"])),
            "explained_variance_largest": float(max(row["ev"])),
            "accuracy": float(np.mean(row["accuracy"])),
            "by_auditor": {k: float(np.mean(v)) for k, v in row["auditors"].items()},
        }
        for (kind, name), row in rows.items()
    ]


def defences(args):
    """Every defence for one strong model in one table: accuracy cost and leakage, closed-form auditors."""
    data = open_data(args.data / "mnist")
    pair = train(Recipe(epochs=12, schedule="cosine", seed=4242), data.parts["judge"])
    probe = Probe("mnist-14", data.bench.images, data.bench.labels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "strong.onnx"
        write_onnx(pair.classifier, (SIDE, SIDE, 1), 10, path)
        pipelines = [parse_policy(name) for name in ("argmax", "softmax:1", "softmax:2", "unsafe_raw_logits")]
        request = AuditRequest(AuditSettings(2000, None), references=5)
        own = data.images["references"]
        found = harden(SuppliedModel.find(path), probe, own, pipelines, request, strengths=(0.5, 0.9), progress=say)
    return found.as_dict()["defences"]


def timing(args):
    """Seconds of an audit against the number of pictures and the model's size; no references, ridge and trained."""
    test = load(args.data / "mnist", split="test")
    rows = []
    for hidden, count in ((256, 1000), (256, 3000), (256, 6000), (2048, 3000), (8192, 3000)):
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            path = Path(folder) / "m.onnx"
            write_onnx(mlp((28, 28, 1), 10, hidden=hidden), (28, 28, 1), 10, path)
            for form in (None, "conv"):
                trained = DecoderSettings(form=form) if form else None
                request = AuditRequest(settings=AuditSettings(count, trained), references=0)
                started, cpu = time.monotonic(), time.process_time()
                audit_outputs(
                    SuppliedModel.find(path), Probe("mnist", test.images, test.labels),
                    [parse_policy("argmax"), parse_policy("unsafe_raw_logits")], request,
                )  # fmt: skip
                rows.append(
                    {
                        "parameters": 784 * hidden + hidden * 11 + 10,
                        "pictures": count,
                        "auditors": f"ridge and {form}" if form else "ridge",
                        "wall_s": time.monotonic() - started,
                        "cpu_s": time.process_time() - cpu,
                    }
                )
    return rows


def public_code(args):
    """Seconds of one epoch of joint training, WRN-28-1 with augmentation: the paper's public code, and ours."""
    if args.public_code is None:
        return {"left_out": "the paper's public code is not on this machine: --public-code names a clone of it"}
    pictures = args.cache / "public-code.npz"
    training = load(args.data / "mnist", split="train", limit=1250)
    np.savez(pictures, images=padded(training.images, 32), labels=training.labels)
    worker = Path(__file__).with_name("vicious_public_code.py")
    found = {}
    for name, python, extra in (
        ("public code", args.public_python or sys.executable, [str(args.public_code)]),
        ("ours", sys.executable, []),
    ):
        command = [python, str(worker), str(pictures), *extra]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=worker.parents[2])
        found[name] = json.loads(done.stdout.splitlines()[-1])
        say(json.dumps({name: found[name]}))
    found["times_as_fast"] = found["public code"]["cpu_s"] / found["ours"]["cpu_s"]
    return found


def small_probes(_args):
    """False and right accusations on few pictures."""
    return accusations()


PARTS = {
    "detection": detection,
    "files": files,
    "policies": policies,
    "indicator": indicator,
    "defences": defences,
    "table": table,
    "timing": timing,
    "small-probes": small_probes,
    "public-code": public_code,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[2]
    default = os.environ.get("EDGEPRIV_TEST_DATA", str(root.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--part", choices=sorted(PARTS), action="append")
    parser.add_argument("--cache", type=Path, default=None, help="keep measured models in this folder")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--full", action="store_true", help="WRN-28, all training pictures: needs a GPU")
    parser.add_argument("--images", type=int, default=6000, help="training pictures of the table's MNIST models")
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--attack-epochs", type=int, default=24, help="of the vicious models that judge the detector")
    parser.add_argument("--last-weight", type=float, default=0.1, help="reconstruction weight left in the last epoch")
    parser.add_argument("--public-code", type=Path, default=None, help="a clone of mmalekzadeh/vicious-classifiers")
    parser.add_argument("--public-python", default=None, help="a Python with torch, torchvision and piq")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of what is timed; workers have one each")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that train")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.epochs = args.epochs or (50 if args.full else 8)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        args.cache = args.cache or Path(scratch)
        args.cache.mkdir(parents=True, exist_ok=True)
        if args.calibrate:
            result = {"schema": SCHEMA, "calibration": calibrate(args)}
        else:
            parts = args.part or list(PARTS)
            result = {"schema": SCHEMA, "side": SIDE, "torch": torch.__version__, "device": args.device}
            spent = result["seconds"] = {}
            for name in parts:
                started, before = time.monotonic(), os.times()
                result[name] = PARTS[name](args)
                cpu = sum(os.times()[:4]) - sum(before[:4])  # with the processes that have ended
                spent[name] = {"wall": time.monotonic() - started, "processor": cpu}
    print(json.dumps(result) if args.json or args.calibrate else as_tables(result))


if __name__ == "__main__":
    main()
