"""Two suppliers offer the site a classifier: one honest, one trained to leak. The risk service has to tell.

The models are trained by ``edgepriv redteam`` on public pictures (the parts of the data that no device holds) while
the devices capture; then they are offered through the gateway, which withholds whatever has no good verdict.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv.demo import processes, site
from edgepriv.errors import TemporaryError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgepriv.demo.processes import Child

MODELS = {"honest": "supplier-a", "vicious": "supplier-b"}
EPOCHS = 40
PATIENCE_S = 240.0


@dataclass(frozen=True, slots=True)
class Suppliers:
    """Training in progress and where its models will lie."""

    child: Child
    folder: Path


def start_suppliers(children: processes.Children, probe: Path, folder: Path, seed: int) -> Suppliers:
    """Begin to train both models in a process of their own."""
    command = ["edgepriv", "redteam", "train-vicious", "--data", str(probe.parent), "--out", str(folder)]
    command += ["--epochs", str(EPOCHS), "--seed", str(seed), "--json"]
    return Suppliers(children.start("suppliers", processes.python_command(*command)), folder)


def offer(suppliers: Suppliers, gateway: Callable[..., dict[str, Any]]) -> dict[str, str]:
    """Wait for the training and offer both models; returns digest by model id."""
    if suppliers.child.process.wait(PATIENCE_S):
        raise TemporaryError("the suppliers' training failed", hint=f"its log: {suppliers.child.log}")
    offered = {}
    for kind, name in MODELS.items():
        added = gateway("models", "add", str(suppliers.folder / f"{kind}.onnx"), "--id", name)
        offered[name] = str(added["digest"])
    return offered


def await_verdicts(
    gateway: Callable[..., dict[str, Any]], offered: dict[str, str], progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Wait until the gateway holds a verdict on each offered model; returns its list by model id."""
    deadline, shown = time.monotonic() + PATIENCE_S, -1
    while time.monotonic() < deadline:
        listed = {m["id"]: m for m in gateway("models", "list")["models"] if m["digest"] in offered.values()}
        judged = sum(bool(m["verdict_bytes"]) for m in listed.values())
        if judged != shown:
            shown = judged
            progress(f"the risk service has judged {judged} of {len(offered)} offered models")
        if judged == len(offered):
            return listed
        time.sleep(1.0)
    raise TemporaryError("the risk service did not judge the offered models in time")


def reports(place: site.Site, offered: dict[str, str], listed: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The risk service's own reports with their pictures, and what the gateway does with each model."""
    folder = place.folder / "risk" / "reports"
    found = []
    for name, digest in offered.items():
        report = json.loads((folder / f"{digest}.json").read_text())
        pictures = [
            {"policy": p["policy"], "png": (folder / f"{digest}.{p['policy'].replace(':', '-')}.png").read_bytes()}
            for p in report["policies"]
        ]
        withheld = str(listed[name]["withheld"] or "")
        found.append({"id": name, "report": report, "pictures": pictures, "withheld": withheld})
    return found
