"""The audit of outputs as a page a person can read: one self-contained HTML file, pictures inside, no scripts."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING, Any

from edgepriv.risk.pictures import grid_png

if TYPE_CHECKING:
    from edgepriv.risk.reconstruction.audit import OutputAudit
    from edgepriv.risk.reconstruction.leakage import PolicyLeakage

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24; }
h1, code { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: right; padding: .3rem .6rem; }
th:first-child, td:first-child { text-align: left; } tr + tr td { border-top: 1px solid #d7dce2; }
.verdict { padding: .8rem 1rem; border-left: .4rem solid #2a7a4b; background: #f2f7f4; }
.verdict.vicious { border-color: #b3261e; background: #fbeeed; }
.verdict.high { border-color: #9a6700; background: #fdf6e3; }
figure { display: inline-block; margin: 1rem 1rem 0 0; }
figcaption { font-size: .9rem; } img { image-rendering: pixelated; }
@media (prefers-color-scheme: dark) { body { background: #14171a; color: #e6e9ec; }
  .verdict { color: #1b1f24; } }
"""
COLUMNS = (
    ("bits", "bits", "{:.1f}"),
    ("explained_variance", "explained variance", "{:.3f}"),
    ("ssim", "SSIM", "{:.3f}"),
    ("psnr_db", "PSNR dB", "{:.2f}"),
    ("risk_r", "R", "{:.3f}"),
    ("accuracy", "accuracy", "{:.3f}"),
)


def audit_html(audit: OutputAudit) -> str:
    """Render an audit as one HTML page."""
    verdict = audit.verdict
    rows = "".join(_row(policy) for policy in audit.policies)
    heads = "".join(f"<th>{escape(title)}</th>" for _, title, _ in COLUMNS)
    notes = "".join(f"<li>{escape(note)}</li>" for note in audit.notes)
    record = "".join(f"<li>{escape(key)}: {escape(str(value))}</li>" for key, value in audit.record.items())
    p_value = "not given (fewer than 19 references)" if verdict.p_value is None else f"{verdict.p_value:.3f}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Audit of {escape(audit.model)}</title><style>{STYLE}</style></head><body>
<h1>What the outputs of {escape(audit.model)} give away</h1>
<p class="verdict {escape(verdict.word.split()[0])}"><strong>{escape(verdict.word)}</strong>: {escape(verdict.reason)}.
{verdict.references} honest reference models; p-value {p_value}.</p>
<p>SHA-256 <code>{escape(audit.sha256)}</code>, pictures of {escape(audit.probe)}.</p>
<table><tr><th>released</th>{heads}</tr>{rows}</table>
<p>Explained variance: share of what the class does not tell about a picture that an auditor rebuilt from the released
outputs; 0 is nothing, 1 a copy. Bits: bound on what any decoder can learn from one inference.</p>
<h2>Pictures</h2><p>Input, reconstruction, mean picture of the class.</p>
{"".join(_figure(policy) for policy in audit.policies)}
<h2>Limits and record</h2><ul>{notes}{record}</ul></body></html>
"""


def _cell(value: Any, form: str) -> str:
    return "<td>&ndash;</td>" if value is None else f"<td>{form.format(value)}</td>"


def _row(policy: PolicyLeakage) -> str:
    values = policy.as_dict()
    cells = "".join(_cell(values[key], form) for key, _, form in COLUMNS)
    return f"<tr><td>{escape(policy.policy)}</td>{cells}</tr>"


def _figure(policy: PolicyLeakage) -> str:
    shown = policy.pictures
    encoded = base64.b64encode(grid_png([shown.inputs, shown.reconstructions, shown.class_means])).decode()
    text = f"{policy.policy}: input, reconstruction, class mean"
    return (
        f'<figure><img alt="{escape(text)}" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{escape(policy.policy)} ({escape(policy.auditor)})</figcaption></figure>"
    )
