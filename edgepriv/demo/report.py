"""The demo's report: one self-contained HTML page and one JSON document, both from the same outcome."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.demo import site
from edgepriv.demo.train import HIDDEN_CLASSES
from edgepriv.device.release import parse_policy

if TYPE_CHECKING:
    from edgepriv.demo.run import Outcome

SCHEMA = "edgepriv.demo/1"
POLICY = "argmax"
THUMBNAIL = 200
PHOTOGRAPHS = ("astronaut", "coffee", "camera")


def summary(outcome: Outcome, report: Path) -> dict[str, Any]:
    """The document that ``edgepriv demo --json`` ends with."""
    aggregated = sum(row["count"] for row in outcome.outputs)
    return {
        "schema": SCHEMA,
        "frames": {
            "captured": outcome.captured,
            "stored": outcome.stored,
            "lost": outcome.captured - outcome.stored,
            "opened_identical": outcome.opened_identical,
        },
        "outputs": {
            "released": outcome.released,
            "aggregated": aggregated,
            "policy": POLICY,
            "bits_per_inference": round(parse_policy(POLICY).bits(outcome.classes), 3),
        },
        "federated": {
            "rounds": len(outcome.rounds),
            "devices": outcome.options.devices,
            "accuracy_before": round(outcome.accuracies[0], 4),
            "accuracy_after": round(outcome.accuracies[-1], 4),
        },
        "models": [_judged(audit) for audit in outcome.audits],
        "seconds": round(outcome.seconds, 1),
        "report": str(report),
    }


def _judged(audit: dict[str, Any]) -> dict[str, Any]:
    """A model's row: the leakage of what is released, and of raw outputs, as explained variance."""
    leakage = {p["policy"]: round(p["explained_variance"], 4) for p in audit["report"]["policies"]}
    return {
        "id": audit["id"],
        "leakage": leakage[POLICY],
        "leakage_raw": leakage["unsafe_raw_logits"],
        "verdict": audit["report"]["verdict"],
        "withheld": bool(audit["withheld"]),
    }


def _audit_view(audit: dict[str, Any]) -> dict[str, Any]:
    report = audit["report"]
    return {
        "title": audit["id"],
        "verdict": report["verdict"],
        "reason": report["reason"],
        "bad": bool(audit["withheld"]),
        "gateway": f"withheld ({audit['withheld']})" if audit["withheld"] else "offered to devices",
        "policies": report["policies"],
        "pictures": [{"policy": p["policy"], "src": data_url(p["png"])} for p in audit["pictures"]],
    }


def _update_view(view: Any) -> dict[str, Any]:
    """One kind of device: the attack's figures without protection and as configured, and the grid of both."""
    return {
        "title": view.title,
        "open": view.unprotected,
        "shut": view.configured,
        "protection": view.protection,
        "caption": view.caption,
        "src": data_url(view.png),
    }


def write_report(outcome: Outcome) -> Path:
    """Write ``report.html`` into the output folder and return its path."""
    from jinja2 import Environment, select_autoescape

    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=select_autoescape(default_for_string=True)).from_string(template)
    path = outcome.options.out / "report.html"
    path.write_text(page.render(**_context(outcome)), encoding="utf-8")
    return path


def _context(outcome: Outcome) -> dict[str, Any]:
    names = outcome.class_names
    counts: dict[str, list[int]] = {}
    for row in outcome.outputs:
        counts.setdefault(row["device"], [0] * len(names))[row["class"]] += row["count"]
    return {
        "o": outcome,
        "policy": POLICY,
        "bits": parse_policy(POLICY).bits(len(names)),
        "classes": len(names),
        "class_names": names,
        "outputs": dict(sorted(counts.items())),
        "hidden": HIDDEN_CLASSES,
        "round_privacy": outcome.rounds[0]["privacy"] if outcome.rounds else "clear",
        "frames": [*map(_sample, outcome.samples), *_photographs(outcome)],
        "chart": accuracy_chart(outcome.accuracies),
        "audits": [_audit_view(audit) for audit in outcome.audits],
        "updates": [_update_view(view) for view in outcome.updates],
    }


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """A frame of the fleet: the sealed column shows the bytes that the gateway stored."""
    plain, opened, sealed = sample["plain"], sample["opened"], sample["sealed"]
    return {
        "title": sample["device"],
        "plain": picture(plain),
        "sealed": picture(bytes_as_picture(sealed, plain.shape)),
        "opened": picture(opened),
        "bytes": len(sealed),
        "by": site.RECIPIENT,
        "identical": bool(np.array_equal(plain, opened)),
    }


def _photographs(outcome: Outcome) -> list[dict[str, Any]]:
    """scikit-image's photographs through the same cipher with the same parties' keys."""
    from skimage import data

    from edgepriv.cipher.cipher import open_frame
    from edgepriv.cipher.epochs import DeviceEpoch
    from edgepriv.keys import load_identity, load_public
    from edgepriv.wire.trust import read_trust

    place = site.Site(outcome.options.out / "site", ())
    trust = read_trust(place.trust.read_bytes(), load_public(place.owner).ed25519, now=time.time())
    device, recipient = load_identity(place.key("dev-1")), load_identity(place.key(site.RECIPIENT))
    epoch = DeviceEpoch.open(device, trust, site.GATEWAY, seq=1 << 30, now=time.time())
    rows = []
    for name in PHOTOGRAPHS:
        plain = np.ascontiguousarray(getattr(data, name)())
        sealed = epoch.seal(plain)
        opened = open_frame(sealed, epoch.signed.raw, recipient, trust).pixels
        row = {"device": name, "plain": plain, "sealed": sealed, "opened": opened}
        rows.append(_sample(row))
    return rows


def bytes_as_picture(raw: bytes, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The first bytes of an envelope, laid out like the picture that it holds."""
    size = int(np.prod(shape))
    return np.resize(np.frombuffer(raw, np.uint8)[:size], shape)


def picture(pixels: np.ndarray[Any, Any]) -> str:
    """A picture as a data URL, thinned to a thumbnail by taking every n-th pixel (so noise stays noise)."""
    import io

    from PIL import Image

    step = max(1, max(pixels.shape[:2]) // THUMBNAIL)
    thin = np.ascontiguousarray(pixels[::step, ::step])
    buffer = io.BytesIO()
    Image.fromarray(thin[..., 0] if thin.ndim == 3 and thin.shape[2] == 1 else thin).save(buffer, "PNG")
    return data_url(buffer.getvalue())


def data_url(png: bytes) -> str:
    """PNG bytes as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def accuracy_chart(values: list[float]) -> str:
    """Accuracy over rounds as an inline drawing, 0 to 1."""
    width, height, left, top = 640, 220, 44, 12
    inner_w, inner_h = width - left - 16, height - top - 30

    def at(i: int, v: float) -> tuple[float, float]:
        return left + inner_w * i / max(1, len(values) - 1), top + inner_h * (1 - v)

    points = [at(i, v) for i, v in enumerate(values)]
    grid = "".join(
        f'<line x1="{left}" x2="{left + inner_w}" y1="{at(0, v)[1]:.1f}" y2="{at(0, v)[1]:.1f}" '
        f'stroke="currentColor" stroke-opacity=".15"/><text x="8" y="{at(0, v)[1] + 4:.1f}">{v:.2f}</text>'
        for v in (0, 0.25, 0.5, 0.75, 1)
    )
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="currentColor"/>'
        f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{i}</text>'
        for i, (x, y) in enumerate(points)
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    shown = ", ".join(f"{v:.3f}" for v in values)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Accuracy before and after each round: {shown}">'
        f'{grid}<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="2"/>{dots}</svg>'
    )
