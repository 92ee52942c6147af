"""The leakage audit as pages a person can read: self-contained HTML, pictures and curves inside, no scripts.

Grids show original | reconstruction | nearest public image, so that a lucky prior is not taken for a leak. Only
canaries are ever shown.
"""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv.risk.pictures import grid_png
from edgepriv.risk.report import STYLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgepriv.risk.gradient_leakage.audit import Canaries, UpdateAudit

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 340, 56, 44, 62
COLOURS = ("#b3261e", "#1f5fbf", "#2a7a4b", "#9a6700", "#6b3fa0")
MAX_SHOWN = 8
COLOUR_OF = {"leaks": "vicious", "at risk": "high", "contained": ""}  # class names of the shared style


def update_html(audit: UpdateAudit, canaries: Canaries, title: str) -> str:
    """Render one audited update."""
    found, ceiling = audit.leakage, audit.ceiling
    rows = [
        ("PSNR of the attack", f"{found.psnr_db:.1f} dB"),
        ("SSIM of the attack", f"{found.ssim:.3f} (the prior alone: {found.prior_ssim:.3f})"),
        ("IIP", f"{found.iip:.2f} of {found.n} among {found.pool_size} images, 95 % in {_range(found.iip_interval)}"),
        ("best reconstructed image", f"{max(found.per_image_psnr_db):.1f} dB, SSIM {max(found.per_image_ssim):.3f}"),
        ("RDLV", "undefined" if found.rdlv is None else f"{found.rdlv:.2f}"),
        ("attack took", f"{audit.reconstruction.seconds:.1f} s"),
    ]
    if ceiling is not None:
        rows.append(
            ("bound, without any attack", f"{ceiling.psnr_db:.1f} dB (the prior alone: {ceiling.floor_db:.1f} dB)")
        )
    table = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in rows)
    caveat = "" if ceiling is None else f"<p>{escape(ceiling.caveat)}</p>"
    columns = "canary | reconstruction" + (" | nearest public image" if canaries.apart else "")
    body = f"""<h1>{escape(title)}</h1>
<p class="verdict {COLOUR_OF[audit.verdict]}"><strong>{escape(audit.verdict)}</strong>:
{escape(audit.reason)}.</p><table>{table}</table>
<h2>Pictures</h2><p>Canaries and what the attack made of them{", beside the nearest public image" * canaries.apart}.</p>
{figure(audit_grid(audit, canaries), columns)}
<h2>What this is not</h2><p>One attack with the stated budget on canaries: a failure of it is no proof.</p>{caveat}"""
    return document(title, body)


def audit_grid(audit: UpdateAudit, canaries: Canaries) -> bytes:
    """Return the matched grid of an audit as PNG bytes: original | reconstruction | nearest public image, if any."""
    ordered = audit.reconstruction.images[list(audit.leakage.matched)]
    columns = [canaries.images.transpose(0, 2, 3, 1), ordered]
    if canaries.prior is not None:
        columns.append(nearest_public(ordered, canaries.prior.transpose(0, 2, 3, 1)))
    return grid_png([as_bytes(column[:MAX_SHOWN]) for column in columns])


def nearest_public(images: NDArray[np.float32], public: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return for each image the public one with the least pixel distance."""
    flat_i, flat_p = images.reshape(len(images), -1), public.reshape(len(public), -1)
    distance = (flat_p**2).sum(1)[None] - 2 * flat_i @ flat_p.T
    return np.asarray(public[distance.argmin(1)], np.float32)


def as_bytes(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Turn 0..1 into 0..255."""
    return np.asarray(np.round(np.clip(images, 0, 1) * 255), np.uint8)


def figure(png: bytes, caption: str) -> str:
    """Embed a PNG with its caption."""
    data = base64.b64encode(png).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def document(title: str, body: str) -> str:
    """Wrap a body into a whole page."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>{STYLE} svg text {{ font: 12px system-ui, sans-serif; fill: currentColor; }}</style>
</head><body>{body}</body></html>
"""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table of escaped text."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{lines}</table>"


def chart(
    title: str,
    x_name: str,
    y_name: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    lines: bool = True,
    marked: tuple[float, float] | None = None,
    labels: Sequence[str] = (),
) -> str:
    """Draw curves or points as an inline SVG.

    Args:
        title: of the picture.
        x_name: of the axis.
        y_name: of the axis.
        series: points by name.
        lines: join the points.
        marked: gets a ring (the recommended setting).
        labels: of an ordinal axis: x then counts them from 0.
    """
    points = [p for rows in series.values() for p in rows]
    if not points:
        return ""
    xs = (-0.2, len(labels) - 0.8) if labels else _span([p[0] for p in points])
    ys = _span([p[1] for p in points])

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x = LEFT + (point[0] - xs[0]) / (xs[1] - xs[0]) * (WIDTH - LEFT - 16)
        y = HEIGHT - BOTTOM - (point[1] - ys[0]) / (ys[1] - ys[0]) * (HEIGHT - BOTTOM - TOP)
        return round(x, 1), round(y, 1)

    parts = [_axes(title, x_name, y_name, xs, ys, labels), _legend(series)]
    for index, rows in enumerate(series.values()):
        colour = COLOURS[index % len(COLOURS)]
        placed = [at(p) for p in rows]
        if lines and len(placed) > 1:
            path = " ".join(f"{x},{y}" for x, y in placed)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.extend(_mark(index, x, y) for x, y in placed)
    if marked is not None:
        x, y = at(marked)
        parts.append(f'<circle cx="{x}" cy="{y}" r="10" fill="none" stroke="currentColor" stroke-width="2"/>')
    label = escape(f"{title}: {y_name} against {x_name}")
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">{"".join(parts)}</svg>'


def _mark(index: int, x: float, y: float) -> str:
    """Return a series' own shape in its colour, so that curves can be told apart without colours."""
    colour = COLOURS[index % len(COLOURS)]
    if index % 4 == 0:
        return f'<circle cx="{x}" cy="{y}" r="4.5" fill="{colour}"/>'
    if index % 4 == 1:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'
    tip, base = (y - 6, y + 4) if index % 4 == 2 else (y + 6, y - 4)
    return f'<polygon points="{x:.1f},{tip:.1f} {x - 5:.1f},{base:.1f} {x + 5:.1f},{base:.1f}" fill="{colour}"/>'


def _legend(series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return the names of the series that have points; an empty one keeps its colour for the next picture."""
    parts, x, y = [], float(LEFT), 34
    for index, (name, rows) in enumerate(series.items()):
        if not rows:
            continue
        width = 28 + 7 * len(name)
        if x > LEFT and x + width > WIDTH:
            x, y = float(LEFT), y + 16
        colour = COLOURS[index % len(COLOURS)]
        parts.append(_mark(index, x + 5, y - 4))
        parts.append(f'<text x="{x + 14:.0f}" y="{y}" style="fill:{colour}">{escape(name)}</text>')
        x += width
    return "".join(parts)


def _axes(
    title: str, x_name: str, y_name: str, xs: tuple[float, float], ys: tuple[float, float], labels: Sequence[str]
) -> str:
    base, right = HEIGHT - BOTTOM, WIDTH - 16
    ticks = []
    shown = list(labels) or [f"{xs[0] + step / 4 * (xs[1] - xs[0]):.3g}" for step in range(5)]
    for index, text in enumerate(shown):
        share = (index - xs[0]) / (xs[1] - xs[0]) if labels else index / 4
        ticks.append(
            f'<text x="{LEFT + share * (right - LEFT):.0f}" y="{base + 16}" text-anchor="middle">{text}</text>'
        )
    for step in range(5):
        y = base - step / 4 * (base - TOP)
        y_value = ys[0] + step / 4 * (ys[1] - ys[0])
        ticks.append(f'<text x="{LEFT - 6}" y="{y + 4:.0f}" text-anchor="end">{y_value:.3g}</text>')
        ticks.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.0f}" y2="{y:.0f}" stroke="currentColor" opacity=".15"/>')
    middle = (LEFT + right) / 2
    return "".join(ticks) + (
        f'<text x="{LEFT}" y="16" font-weight="bold">{escape(title)}: {escape(y_name)}</text>'
        f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_name)}</text>'
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low >= 0 and 0.05 < high <= 1:
        return 0.0, 1.0  # shares and noise multipliers read best on the whole scale
    margin = 0.05 * (high - low) or max(abs(high) * 0.05, 0.05)
    return low - margin, high + margin


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def record_rows(record: Mapping[str, Any]) -> str:
    """Return a flat record as a list, for the foot of a page."""
    return "<ul>" + "".join(f"<li>{escape(k)}: {escape(str(v))}</li>" for k, v in record.items()) + "</ul>"
