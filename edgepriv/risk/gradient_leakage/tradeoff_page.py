"""The trade-off for people: a table, four pictures, and the recommended setting as the gateway's configuration."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from edgepriv.errors import DataError
from edgepriv.risk.gradient_leakage import page

if TYPE_CHECKING:
    from edgepriv.risk.gradient_leakage.tradeoff import Point, Tradeoff

    Series = dict[str, list[tuple[float, float]]]
MAX_CURVES = 5


def recommended_toml(result: Tradeoff) -> str:
    """Return the ``[rounds]`` part of ``gateway.toml`` for the recommended setting."""
    if result.recommended is None:
        raise DataError(
            f"no setting of the sweep withstands the attack at an IIP of at most {result.max_iip}",
            hint="sweep more noise, or statistics at home",
        )
    point, recipe = result.recommended, result.recommended.setting.recipe
    noisy = point.setting.noise_multiplier > 0
    spent = (
        "no epsilon: no noise" if point.epsilon is None else f"epsilon {point.epsilon:.3g} at delta {result.delta:g}"
    )
    hides = noisy or point.setting.masked
    cohort = max(2, result.clients if noisy else result.cohort)
    lines = [
        f"# edgepriv audit privacy-tradeoff: accuracy {point.accuracy:.3f}, IIP {point.iip:.2f},",
        f"# {spent} after {result.rounds} rounds of {result.clients} devices",
        f"# {point.gap or 'contained in every audited round'}",
        "[rounds]",
        # the noise counts on all devices together, and so does a sum: fewer would hide less than was measured
        *(['privacy = "masked"', f"min_cohort = {cohort}", f"quorum = {cohort}"] if hides else ['privacy = "clear"']),
        f"clip = {point.setting.clip!r}",
        'noise = "distributed"' if noisy else 'noise = "none"',
        *([f"noise_multiplier = {point.setting.noise_multiplier!r}", "max_weight = 1"] if noisy else []),
        f"delta = {result.delta!r}",
        f'statistics = "{"shared" if recipe.shares_statistics else "home"}"',
        "",
        "[rounds.training]",
        f"learning_rate = {recipe.learning_rate!r}",
        f"momentum = {recipe.momentum!r}",
        f"batch_size = {recipe.batch_size}",
        f"epochs = {recipe.epochs}",
    ]
    return "\n".join(lines) + "\n"


HEADS = (
    "setting",
    "verdict",
    "accuracy",
    "epsilon (sum)",
    "IIP",
    "PSNR first",
    "PSNR last",
    "SSIM first",
    "SSIM last",
    "bound first",
    "bound last",
)


def rows(result: Tradeoff) -> list[list[str]]:
    """Return the table's cells."""
    return [
        [
            ("* " if point is result.recommended else "") + point.setting.name,
            point.verdict,
            f"{point.accuracy:.3f}",
            "none" if point.epsilon is None else f"{point.epsilon:.3g}",
            f"{point.iip:.2f}",
            *(f"{leak['psnr_db']:.1f} dB" for leak in (point.fresh, point.final)),
            *(f"{leak['ssim']:.2f}" for leak in (point.fresh, point.final)),
            *(_decibels(leak["bound_psnr_db"]) for leak in (point.fresh, point.final)),
        ]
        for point in result.points
    ]


def _decibels(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.1f} dB"


def recommendation(result: Tradeoff) -> str:
    """Say in one line what is recommended and what it leaves open."""
    if result.recommended is None:
        return f"nothing is recommended: every setting leaks, or has an IIP above {result.max_iip:g}"
    if result.recommended.gap:
        return f"* no setting is contained; nearest to it, and NOT contained: {result.recommended.gap}"
    return f"* recommended: the most accurate that is contained in every audited round (IIP at most {result.max_iip:g})"


def as_text(result: Tradeoff) -> str:
    """Return the table as text."""
    body = [list(HEADS), *rows(result)]
    widths = [max(len(line[i]) for line in body) for i in range(len(HEADS))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in body]
    floor = _decibels(result.points[0].fresh["bound_floor_db"])
    foot = [
        recommendation(result),
        f"IIP is the worst of the audited rounds; the prior alone gives {floor}",
        f"masks: the sum over {result.cohort} canary devices",
    ]
    return "\n".join([*lines, *foot, *result.notes])


def tradeoff_html(result: Tradeoff) -> str:
    """Return the page with the table and the pictures: against accuracy, over noise, over rounds."""
    chosen = result.recommended
    marks = (None, None) if chosen is None else ((chosen.accuracy, chosen.psnr_db), (chosen.accuracy, chosen.iip))
    pictures = page.chart("Trade-off", "accuracy", "IIP", _points(result, "iip"), lines=False, marked=marks[1])
    pictures += page.chart(
        "Trade-off", "accuracy", "PSNR of the attack (dB)", _points(result, "psnr_db"), lines=False, marked=marks[0]
    )
    levels = sorted({point.setting.noise_multiplier for point in result.points})
    if len(levels) > 1:
        pictures += _over_noise(result, levels)
    pictures += _over_rounds(result)
    snippet = f"<h2>Recommended</h2><p>{escape(recommendation(result))}</p>"
    if chosen is not None:
        snippet += f"<pre>{escape(recommended_toml(result))}</pre>"
    notes = "".join(f"<li>{note}</li>" for note in result.notes)
    body = f"<h1>Leakage against accuracy</h1>{pictures}{page.table(HEADS, rows(result))}{snippet}<ul>{notes}</ul>"
    return page.document("Leakage against accuracy", body)


def _points(result: Tradeoff, what: str) -> Series:
    found: Series = {}
    for point in result.points:
        found.setdefault(point.setting.kind, []).append((point.accuracy, float(getattr(point, what))))
    return found


def _over_noise(result: Tradeoff, levels: list[float]) -> str:
    """Curves by noise level; the axis is ordinal, because levels differ by factors and 0 is one of them."""
    pictures = ""
    for title, name, what in (
        ("Attack over noise", "IIP", "iip"),
        ("Attack over noise", "PSNR (dB)", "psnr_db"),
        ("Bound over noise", "gain over the prior (dB)", "bound_gain_db"),
    ):
        series: Series = {point.setting.kind: [] for point in result.points}
        for point in result.points:
            if what == "bound_gain_db" and not point.setting.noise_multiplier:
                continue  # without noise the bound is only what float32 rounds away
            at = float(levels.index(point.setting.noise_multiplier))
            series[point.setting.kind].append((at, float(getattr(point, what))))
        labels = [f"{level:g}" for level in levels]
        pictures += page.chart(
            title, "noise of the sum over the clip norm", name, {k: _worst(v) for k, v in series.items()}, labels=labels
        )
    return pictures


def _worst(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Several settings may share a noise level: the curve is that of the worst."""
    return [(x, max(y for at, y in points if at == x)) for x in sorted({at for at, _ in points})]


def _over_rounds(result: Tradeoff) -> str:
    """Curves over rounds: the settings without noise, and the recommended one."""
    plain = [point for point in result.points if not point.setting.noise_multiplier][: MAX_CURVES - 1]
    chosen = [p for p in (result.recommended,) if p is not None and p not in plain]
    return page.chart(
        "Attack over rounds",
        "round",
        "PSNR (dB)",
        {_curve(point, result): _by_round(point) for point in plain + chosen},
    )


def _curve(point: Point, result: Tradeoff) -> str:
    noise = f", noise {point.setting.noise_multiplier:g}" if point.setting.noise_multiplier else ""
    batch = f", B={point.setting.recipe.batch_size}" if len({p.setting.recipe for p in result.points}) > 2 else ""
    return point.setting.kind + noise + batch + (" *" if point is result.recommended else "")


def _by_round(point: Point) -> list[tuple[float, float]]:
    return [(float(number), float(leak["psnr_db"])) for number, leak in point.leaks]
