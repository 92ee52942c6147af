"""The release card: what was released, what is proved, what was measured, and what we would do instead.

JSON schema ``edgepriv.release-card/1``; the HTML twin is one file without network or script. A card shows released
pictures and generator samples only, never a private one, and its words come from ``generator.guarantee``: the
claim of a release whose VAE saw the private records without DP-SGD never contains the claim of one that did not.
"""

from __future__ import annotations

import base64
import html
import io
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["AUC_TO_AIM_AT", "ReleaseCard", "Suggestion", "picture_grid", "recommend", "render_html"]

SCHEMA = "edgepriv.release-card/1"
AS_GOOD_WITHIN = 0.005
AUC_TO_AIM_AT = 0.57
WORDED = frozenset({"recommendation", "claim", "warnings", "suggestion", "measured_on"})  # sentences, not the table's


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A larger noise ratio and the AUC that the attacks on the released set then read; None where none was enough."""

    noise_ratio: float | None
    auc: float


@dataclass(frozen=True, slots=True)
class ReleaseCard:
    """Every figure of a release; accuracies are shares of held-out private-side images, None where not measured.

    ``audit`` is the audit's report with its ``outcome``, ``verdict`` and ``limits``; ``measured_on`` says what models
    the accuracies and the audit are of.
    """

    data: str
    records: int
    released: int
    mode: str
    latent_dim: int
    clip_radius: float
    latent_rms: float
    noise_ratio: float | None
    epsilon_metric: float | None
    kappa: float | None
    epsilon: float | None
    delta: float | None
    advantage_bound: float | None
    copies: int
    extra: int
    vae_trained_on: str
    vae_images: int
    vae_budget: tuple[float, float] | None
    labels: str
    claim: str
    held_out: str
    accuracy_real: float | None = None
    accuracy_synthetic: float | None = None
    accuracy_public_only: float | None = None
    accuracy_prior_samples: float | None = None
    recommendation: str = ""
    audit: dict[str, Any] | None = None
    suggestion: Suggestion | None = None
    classes: int = 0
    class_names: list[str] = field(default_factory=list)
    measured_on: str = ""
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite or undefined figure is null."""
        return {"schema": SCHEMA, **{key: _plain(value) for key, value in asdict(self).items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def recommend(card: ReleaseCard) -> str:
    """Say whether to release, and what to do where something else is as good.

    "Release" follows from the audit's outcome ``none`` alone: an audit that is void, weak or found a leak never does.
    """
    synthetic, audit = card.accuracy_synthetic, card.audit
    if synthetic is None or not audit:
        return "Not measured: run without --no-audit before anything is released."
    advice = [*_leaks(card, audit), *_alternatives(card, synthetic)]
    if not advice:
        limits = audit["limits"]
        advice = [
            (
                f"Release: it gains {_gain(card, synthetic)}, and no attack that was run passed AUC "
                f"{limits['auc']:.2f} or told more than {limits['tpr']:.0%} of the members at "
                f"{limits['rate']:.1%} false alarms."
            )
        ]
    return " ".join(advice)


def _leaks(card: ReleaseCard, audit: dict[str, Any]) -> list[str]:
    found = []
    if card.vae_trained_on == "private":
        found.append(
            "Do not release as it stands: the VAE saw the private records; train it on public data or by DP-SGD."
        )
    if audit["outcome"] == "void":
        found.append("Do not release: the audit is void, so nothing was shown about this release.")
    elif audit["outcome"] == "weak":
        found.append(f"Do not release yet: the audit shows little ({'; '.join(audit['weak_because'])}).")
    elif audit["outcome"] == "leak":
        found.append(f"Do not release: {_caught(audit)}; {_louder(card.suggestion)}")
    return found


def _caught(audit: dict[str, Any]) -> str:
    limits = audit["limits"]
    worst = audit.get("max_tpr_at_1pct" if limits["rate"] >= 0.01 else "max_tpr_at_01pct")
    told = f"{audit['strongest']} tells members apart with AUC {audit['auc']:.3f}"
    if worst and worst["tpr"] > limits["tpr"]:
        told += f", and {worst['attack']} finds {worst['tpr']:.1%} of them at {limits['rate']:.1%} false alarms"
    return told


def _louder(suggestion: Suggestion | None) -> str:
    if suggestion is None:
        return "raise --noise-ratio."
    if suggestion.noise_ratio is None:
        return f"no larger noise that was tried stopped it (AUC {suggestion.auc:.3f} at the largest); use --mode prior."
    return (
        f"with --noise-ratio {suggestion.noise_ratio:g} the attacks on the released set read at most "
        f"{suggestion.auc:.3f}. Make that release and let it be audited whole: less accuracy is left in it."
    )


def _alternatives(card: ReleaseCard, synthetic: float) -> list[str]:
    public, prior = card.accuracy_public_only, card.accuracy_prior_samples
    if public is not None and public >= synthetic - AS_GOOD_WITHIN:
        return [
            (
                f"Train on the public data alone: it gives {public:.3f} against {synthetic:.3f} from the release, "
                "and no private record is touched."
            )
        ]
    if card.mode != "prior" and prior is not None and prior >= synthetic - AS_GOOD_WITHIN:
        return [
            (
                f"Release generator samples instead (--mode prior): {prior:.3f} against {synthetic:.3f}, "
                "and no record's own code is used."
            )
        ]
    return []


def _gain(card: ReleaseCard, synthetic: float) -> str:
    prior = None if card.mode == "prior" else card.accuracy_prior_samples
    others = [a for a in (card.accuracy_public_only, prior) if a is not None]
    if not others:
        return f"an accuracy of {synthetic:.3f}"
    return f"{100 * (synthetic - max(others)):.1f} points over what needs no private record"


def picture_grid(images: NDArray[np.uint8], labels: NDArray[np.int64], columns: int = 10, rows: int = 4) -> bytes:
    """PNG of up to ``rows`` pictures for each of the first ``columns`` classes, classes side by side."""
    from PIL import Image

    height, width, channels = images.shape[1:]
    classes = np.unique(labels)[:columns]
    sheet = np.full(((height + 2) * rows, (width + 2) * len(classes), channels), 255, np.uint8)
    for column, label in enumerate(classes):
        for row, picture in enumerate(images[labels == label][:rows]):
            top, left = row * (height + 2), column * (width + 2)
            sheet[top : top + height, left : left + width] = picture
    zoom = max(1, 400 // max(sheet.shape[0], 1))
    image = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    stream = io.BytesIO()
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(stream, "PNG")
    return stream.getvalue()


def render_html(card: ReleaseCard, pictures: dict[str, bytes]) -> str:
    """The card as one page; ``pictures`` maps a caption to PNG bytes."""
    document = card.as_json()
    audit = document.pop("audit")
    rows = "".join(_row(k, v) for k, v in document.items() if k not in WORDED)
    shown = "".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, png in pictures.items()
    )
    warnings = "".join(f"<li>{html.escape(text)}</li>" for text in card.warnings)
    return _PAGE.format(
        title=html.escape(f"Release card: {card.data}"),
        recommendation=html.escape(card.recommendation),
        claim=html.escape(card.claim),
        warnings=f"<h2>Warnings</h2><ul>{warnings}</ul>" if warnings else "",
        rows=rows,
        audit=_audit_table(audit, card.measured_on),
        pictures=shown,
    )


def _row(key: str, value: Any) -> str:
    text = "not applicable" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    text = ", ".join(map(str, value)) if isinstance(value, list) else text
    return f"<tr><th scope=row>{html.escape(key.replace('_', ' '))}</th><td>{html.escape(text)}</td></tr>"


def _audit_table(audit: dict[str, Any] | None, measured_on: str) -> str:
    if not audit:
        return "<p>No audit was run.</p>"
    head = "<tr><th>attack</th><th>surface</th><th>AUC</th><th>95 % interval</th><th>TPR at 1 % FPR</th></tr>"
    body = "".join(
        f"<tr{' class=top' if a['attack'] == audit['strongest'] else ''}><th scope=row>{html.escape(a['attack'])}</th>"
        f"<td>{html.escape(a['surface'])}</td><td>{a['auc']:.3f}</td>"
        f"<td>{a['auc_interval'][0]:.3f} to {a['auc_interval'][1]:.3f}</td><td>{_share(a['tpr_at_1pct'])}</td></tr>"
        for a in audit.get("attacks", [])
    )
    noise = audit.get("noise_null")
    nulls = f"Null (permuted membership): AUC {audit['null_auc']:.3f}" + (
        "." if noise is None else f"; null (random scores): {noise:.3f}."
    )
    note = html.escape(f"{audit.get('verdict', '')} {nulls} {measured_on}")
    return f"<p>{note}</p><table>{head}{body}</table>"


def _share(value: float | None) -> str:
    return "too few records" if value is None else f"{100 * value:.1f} %"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --line: color-mix(in srgb, currentColor 22%, transparent); }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.advice {{ border-left: 4px solid #b45309; padding: .5rem 1rem;
  background: color-mix(in srgb, #b45309 9%, transparent); }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }}
tr.top {{ background: color-mix(in srgb, #b45309 9%, transparent); }}
figure {{ margin: 1rem 0; overflow-x: auto; }} img {{ max-width: 100%; image-rendering: pixelated; }}
</style></head><body><h1>{title}</h1><p class="advice">{recommendation}</p><h2>What is proved</h2><p>{claim}</p>
{warnings}<h2>What was measured by attack</h2>{audit}<h2>Pictures</h2>{pictures}
<h2>Figures</h2><table>{rows}</table></body></html>
"""
