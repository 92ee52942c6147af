"""``edgepriv-gateway devices``: the fleet as the gateway last heard of it, for people and for scripts."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - click reads the annotations
from typing import Any

import click

from gateway.console import AS_JSON, CONFIG, load_config, opened_store, show


@click.command()
@CONFIG
@AS_JSON
@click.option("--search", default="", help="Only names that contain this.")
@click.option("--silent", is_flag=True, help="Only devices that were not heard for [alerts] device_silent_s.")
@click.option("--page", "number", default=1, show_default=True, type=click.IntRange(1), help="50 devices a page.")
def devices(config_path: Path, as_json: bool, search: str, silent: bool, number: int) -> None:
    """List devices, with what was last heard of each.

    Model and level, queue, drops, days that its certificate has left, trust list.
    """
    from gateway.pages.figures import Figures

    config = load_config(config_path)
    with opened_store(config) as store:
        page = Figures(store.database, config).fleet(search, number, only_silent=silent)
    document = {
        "schema": "edgepriv.gateway-devices/1",
        "total": page.total,
        "page": page.number,
        "pages": page.pages,
        "devices": page.rows,
    }
    lines = [_line(row) for row in page.rows]
    if page.pages > 1:
        lines.append(f"page {page.number} of {page.pages}, {page.total} devices")
    show(document, as_json, lines or ["no devices"])


def _line(row: dict[str, Any]) -> str:
    days = row["certificate_days"]
    parts = [
        f"{row['name']}: heard {row['seen_s']:.0f} s ago{' (silent)' if row['silent'] else ''}",
        f"model {row['model'] or '-'} level {row['level']}",
        f"{row['queue'] if row['queue'] is not None else '-'} items wait, {row['drops']} dropped",
        f"certificate {f'{days:.0f} days' if isinstance(days, (int, float)) else '-'}",
        f"trust list {row['trust_version'] or '-'}",
    ]
    return ", ".join(parts)
