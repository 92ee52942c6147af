"""A synthetic release at work: made before the scenario, seen by its devices, and the probe of its model afterwards.

The generator and the audit of outputs run as the commands that people type (`edgepriv synthesize`,
`edgepriv audit outputs`), each in a process of its own, so that the simulator needs neither of their packages. No risk
service takes part: it makes the same audit of models that a gateway offers it, with such a release as its probe too
(tests/synthesis/test_release_serves_the_product.py).
The release never saw the held-out pictures on which the scenario's accuracy is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import datasets
from edgepriv.demo.processes import python_command
from edgepriv.errors import DataError, TemporaryError
from edgepriv.federated.head import BIAS, WEIGHT
from firmware_sim.fleet import HELD_OUT, MODEL

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from firmware_sim.scenario import Scenario

LIMIT_S = 900.0
CARD_KEYS = (
    "records", "released", "noise_ratio", "epsilon", "delta", "vae_trained_on", "claim", "recommendation", "audit",
)  # fmt: skip
RAW_DATA = b"\x4a"  # protobuf: field 9 (raw_data of an ONNX tensor), length-delimited


def make_release(folder: Path, scenario: Scenario) -> dict[str, Any]:
    """Make ``folder/release`` from the real pictures that are not held out; returns what its card says.

    The generator's seed is the scenario's, so that a scenario repeats. Who knows the seed can remove the noise: a
    release that is given away is made without one.
    """
    digits = datasets.load("digits", split="all")
    private = folder / "private.npz"
    np.savez(private, images=digits.images[HELD_OUT:], labels=digits.labels[HELD_OUT:])
    told = scenario.data
    arguments = ["--data", str(private), "--out", str(folder / "release"), "--noise-ratio", str(told.noise_ratio)]
    arguments += ["--seed", str(scenario.fleet.seed), "--threads", "1", "--json"]
    if told.vae_epochs:
        arguments += ["--vae-epochs", str(told.vae_epochs)]
    if not told.audited:
        arguments.append("--no-audit")
    card = _edgepriv("synthesize", *arguments)
    return {key: card[key] for key in CARD_KEYS}


def probe(folder: Path, data: str, head: Mapping[str, Any]) -> dict[str, Any]:
    """What `edgepriv audit outputs` says of the scenario's model with its trained head, on the pictures of ``data``."""
    model = write_model(folder / "trained.onnx", head)
    arguments = ["--model", str(model), "--data", data, "--auditors", "ridge", "--reference-models", "0", "--json"]
    told = _edgepriv("audit", "outputs", *arguments)
    policies = {
        one["policy"]: {"explained_variance": one["explained_variance"], "ssim": one["ssim"], "right": one["accuracy"]}
        for one in told["policies"]
    }
    same = {key: told[key] for key in ("schema", "sha256", "verdict", "reason", "notes")}
    return {**same, "pictures": told["record"]["pictures"], "policies": policies}


def write_model(path: Path, head: Mapping[str, Any]) -> Path:
    """Write the simulator's model with this head in the place of its classifier of zeros.

    Raises:
        DataError: the shipped model has no such place, or the head another shape.
    """
    raw = MODEL.read_bytes()
    for tensor in (np.ascontiguousarray(head[BIAS], "<f4"), np.ascontiguousarray(head[WEIGHT].T, "<f4")):
        content = tensor.tobytes()
        start = RAW_DATA + _varint(len(content))
        if raw.count(start + bytes(len(content))) != 1:
            raise DataError(f"{MODEL.name} has no classifier of zeros with shape {tensor.shape}")
        raw = raw.replace(start + bytes(len(content)), start + content)
    path.write_bytes(raw)
    return path


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _edgepriv(*arguments: str) -> dict[str, Any]:
    """A command of edgepriv that prints one JSON document."""
    command, environment = python_command("edgepriv", *arguments), {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S, env=environment)
    except subprocess.TimeoutExpired:
        raise TemporaryError(f"edgepriv {arguments[0]} took more than {LIMIT_S:.0f} s") from None
    if done.returncode:
        raise TemporaryError(f"edgepriv {arguments[0]}: {done.stderr.strip()[-500:]}")
    return dict(json.loads(done.stdout))
