"""The risk service's first page: every model with its verdicts, every audited round, every release with its card.

One file of HTML without script or network, for the reports' own style; what a name or an error says is text.
"""

from __future__ import annotations

import datetime as dt
from html import escape
from typing import TYPE_CHECKING, Any

from edgepriv.risk.drift import drift_of
from edgepriv.risk.report import STYLE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edgepriv.risk.jobs import Job

INDEX_STYLE = """
tbody tr + tr th { border-top: 1px solid #d7dce2; }
td, th { text-align: left; vertical-align: top; } .bad { color: #99131a; } .good { color: #12602f; }
th[scope=row] { white-space: nowrap; } code { overflow-wrap: anywhere; } .wide { overflow-x: auto; }
a { color: #0b4fa8; } :focus-visible { outline: 3px solid #0b4fa8; outline-offset: 2px; }
@media (prefers-color-scheme: dark) { .bad { color: #ff9d9f; } .good { color: #7fdb9f; } a { color: #8dbcff; } }
"""
GOOD, BAD = {"low leakage", "contained", "release", "accepted"}, {"vicious", "high leakage", "leaks"}
HISTORY = 10
MODEL_HEADS = ("Model", "Verdict", "Reason", "Audited", "Before")
ROUND_HEADS = ("Round", "Verdict", "Leakage bound", "Best attack")
CARD_HEADS = ("Release", "Recommendation", "Card")


def index_html(
    jobs: Iterable[Job],
    rounds: list[dict[str, Any]],
    releases: list[dict[str, Any]],
    drift: list[dict[str, Any]] | None = None,
) -> str:
    """Render the page; newest first everywhere. ``drift``: rows of `drift.drift_in`."""
    models: dict[str, list[Job]] = {}
    for job in jobs:
        models.setdefault(job.name, []).insert(0, job)
    latest = sorted(models.items(), key=lambda pair: -pair[1][0].added)
    tables = [
        _table("Models", MODEL_HEADS, [_model(*pair, drift or []) for pair in latest], "No model was offered yet."),
        _table("Federated rounds", ROUND_HEADS, [_round(row) for row in reversed(rounds)], "No round was audited."),
        _table("Synthetic releases", CARD_HEADS, [_release(row) for row in releases], "No release card is kept here."),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Risk service</title><style>{STYLE}{INDEX_STYLE}</style></head><body><main>
<h1>What leaves the site, measured</h1>
{"".join(tables)}
<p>Lists for programs: <a href="/reports">models</a>, <a href="/rounds">rounds</a>, <a href="/releases">releases</a>,
<a href="/metrics">metrics</a>.</p>
</main></body></html>
"""


def _table(name: str, heads: tuple[str, ...], rows: list[str], empty: str) -> str:
    title = f"<h2>{escape(name)}</h2>"
    if not rows:
        return f"{title}<p>{empty}</p>"
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in heads)
    return (
        f'{title}<div class="wide" tabindex="0" role="region" aria-label="{escape(name)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _word(word: str) -> str:
    """A verdict in its colour; the word says the same."""
    kind = "good" if word in GOOD else "bad" if word in BAD else ""
    return f'<strong class="{kind}">{escape(word)}</strong>'


def _drifted(job: Job, drift: list[dict[str, Any]]) -> str:
    """A line on released outputs that are not like the audited ones; empty where they are, or too few were seen."""
    seen = drift_of(drift, job.digest, job.name)
    if seen is None or not seen.get("alert"):
        return ""
    figures = f"index {float(seen['index']):.2f} over {int(seen['outputs'])} outputs"
    return f'<br><strong class="bad">drift</strong>: what devices release is not what was audited, {figures}'


def _model(name: str, jobs: list[Job], drift: list[dict[str, Any]]) -> str:
    newest, *before = jobs
    report = newest.report or {}
    digest = newest.digest.hex()
    link = f'<br><a href="/reports/{digest}.html">table and pictures</a>' if newest.report else ""
    word = _word(str(report["verdict"])) if report.get("verdict") else escape(newest.state)
    reason = escape(str(report.get("reason") or newest.error or ""))
    if report and newest.state != "done":
        reason = f"not valid any more: {escape(newest.error) or 'it is audited again'}; it was: {reason}"
    reason += "".join(_drifted(job, drift) for job in jobs[:HISTORY])
    return (
        f'<tr><th scope="row">{escape(name)}<br><code>{digest[:16]}</code></th><td>{word}{link}</td><td>{reason}</td>'
        f"<td>{_moment(newest.finished)}</td><td>{_history(before)}</td></tr>"
    )


def _history(jobs: list[Job]) -> str:
    """Verdicts of earlier versions under the same name."""
    said = [
        f"{_moment(job.finished)} {_word(str((job.report or {}).get('verdict') or job.state))}"
        f' <a href="/reports/{job.digest.hex()}.html"><code>{job.digest.hex()[:8]}</code></a>'
        for job in jobs[:HISTORY]
    ]
    return "<br>".join(said) or "&ndash;"


def _round(row: dict[str, Any]) -> str:
    """A row of what `RoundWatch` keeps: number, weights, and a report that holds figures or the reason of a failure."""
    number, report = int(row["round"]), row.get("report") or {}
    if "error" in report:
        said = f"<td>not audited</td><td colspan=2>{escape(str(report['error']))}</td>"
        return f'<tr><th scope="row">{number}</th>{said}</tr>'
    attack = report.get("attack") or {}
    bound, floor = report.get("leakage_bound"), report.get("leakage_floor")
    shown = f"{bound:.1f} dB; the prior alone {floor:.1f} dB" if bound is not None and floor is not None else "&ndash;"
    best = (
        f"{attack['psnr_db']:.1f} dB, SSIM {attack['ssim']:.2f}" if {"psnr_db", "ssim"} <= attack.keys() else "&ndash;"
    )
    word = _word(str(report.get("verdict", "no verdict")))
    return (
        f'<tr><th scope="row"><a href="/rounds/{number}.html">{number}</a></th>'
        f"<td>{word}<br>{escape(str(report.get('reason', '')))}</td><td>{shown}</td><td>{best}</td></tr>"
    )


def _release(row: dict[str, Any]) -> str:
    name = escape(str(row["name"]))
    advice = row.get("recommendation")
    said = escape("; ".join(map(str, advice)) if isinstance(advice, list) else str(advice or "none"))
    return f'<tr><th scope="row">{name}</th><td>{said}</td><td><a href="/releases/{name}/card.html">card</a></td></tr>'


def _moment(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC") if seconds else "&ndash;"
