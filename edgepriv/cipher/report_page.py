"""The report as one HTML file: tables, histograms and pictures, readable without a network or JavaScript."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgepriv.cipher.report import ImageReport

    Bytes = NDArray[np.uint8]

MAX_SIDE = 320
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .7rem;border-bottom:1px solid #d5d9de;text-align:right}
th:first-child,td:first-child{text-align:left}.fail{color:#a40e26;font-weight:600}.pass{color:#116329}
figure{display:inline-block;margin:.5rem 1rem .5rem 0;vertical-align:top}figcaption{color:#57606a}
.printed{color:#57606a}img{max-width:20rem;image-rendering:pixelated}"""


def page(document: dict[str, Any], reports: list[ImageReport]) -> str:
    """One self-contained HTML document."""
    body = "".join(_section(entry, report) for entry, report in zip(document["images"], reports, strict=True))
    title = f"Image cipher report: {html.escape(document['cipher'])}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{document['pairs']} pairs a column; a test fails below p = {document['threshold_p']:.1e}, "
        f"which keeps the whole report at a false alarm of {document['family_alpha']:.1%}. Passing is necessary and "
        "proves nothing: security rests on the AEAD alone.</p>"
        "<p>Columns: <b>fresh</b>, key freshness: each message has its own id, as in the product. <b>pinned</b>, "
        "plaintext sensitivity: one id for two pictures that differ in one bit, which the product never does; judged "
        "for the strong profile alone. <b>key</b>, key sensitivity: two keys that differ in one bit.</p>"
        f"{body}</html>"
    )


def _section(entry: dict[str, Any], report: ImageReport) -> str:
    pictures = {"picture": report.image, **report.pictures}
    figures = "".join(_figure(name, pixels) for name, pixels in pictures.items())
    rows = "".join(_row(test) for test in entry["metrics"])
    verdict, alone = entry["verdict"], entry["layers_verdict"]
    layers = f"; layers 1 and 2 alone: <span class={alone}>{alone}</span>" if alone else ""
    note = f"<p>{html.escape(entry['note'])}</p>" if entry["note"] else ""
    return (
        f"<h2>{html.escape(entry['path'])}: <span class={verdict}>{verdict}</span>{layers}</h2>{note}{figures}"
        f"{_critical(entry)}"
        "<table><tr><th>test</th><th>subject</th><th>column</th><th>mean</th><th>5 % interval</th>"
        f"<th>outside</th><th>p</th><th></th></tr>{rows}</table>"
    )


def _critical(entry: dict[str, Any]) -> str:
    """The critical values for the picture's size, both sides of each."""
    size, levels = math.prod(entry["shape"]), entry["critical"]
    head = "".join(f"<th>{float(alpha) * 100:g} %</th>" for alpha in levels)
    rows = ""
    for name, values in next(iter(levels.values())).items():
        cells = "".join(f"<td>{critical_text(level[name])}</td>" for level in levels.values())
        rows += f"<tr><td>{name.replace('_', ' ')}</td>{cells}</tr>" if values else ""
    return f"<h3>Critical values for {size:,} bytes</h3><table><tr><th>metric</th>{head}</tr>{rows}</table>"


def critical_text(value: float | list[float]) -> str:
    """A one-sided critical value, or the two ends of an interval."""
    return f"{value[0]:.5f} to {value[1]:.5f}" if isinstance(value, list) else f"at least {value:.5f}"


def _row(test: dict[str, Any]) -> str:
    low, high = test["interval_05"]
    result = ("pass" if test["pass"] else "fail") if test["judged"] else "printed"
    return (
        f"<tr class={'printed' if result == 'printed' else ''}><td>{test['test']}</td><td>{test['subject']}</td>"
        f"<td>{test['column']}: {test['label']}</td><td>{test['mean']:.5f}</td><td>{low:.5f} to {high:.5f}</td>"
        f"<td>{test['outside_05']}/{test['of']}</td><td>{test['p']:.2g}</td><td class={result}>{result}</td></tr>"
    )


def _figure(name: str, pixels: Bytes) -> str:
    step = max(1, -(-max(pixels.shape[:2]) // MAX_SIDE))
    shown = pixels[::step, ::step]
    picture = base64.b64encode(png(shown)).decode()
    return (
        f'<figure><img alt="{name}" src="data:image/png;base64,{picture}"><br>{_histogram(pixels)}'
        f"<figcaption>{name}</figcaption></figure>"
    )


def _histogram(pixels: Bytes) -> str:
    counts = np.bincount(pixels.reshape(-1), minlength=256)
    heights = 60 * counts / max(1, counts.max())
    bars = "".join(f"M{x} 60v-{height:.1f}h1V60" for x, height in enumerate(heights) if height)
    return f'<svg width="256" height="62" role="img" aria-label="histogram"><path d="{bars}" fill="#0969da"/></svg>'


def png(pixels: Bytes) -> bytes:
    """Encode uint8 [h, w, c] (1, 3 or 4 channels; others show their first) as PNG, without an imaging library."""
    if pixels.shape[2] not in {1, 3, 4}:
        pixels = pixels[:, :, :1]
    height, width, channels = pixels.shape
    kind = {1: 0, 3: 2, 4: 6}[channels]
    rows = np.zeros((height, 1 + width * channels), np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.data, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in parts
    )
