"""``edgepriv cipher``: what the image cipher costs and how it measures."""

from __future__ import annotations

import json
from typing import Any

import click


@click.group()
def cipher() -> None:
    """Measure the image cipher. Metrics can show that a cipher is bad, never that it is good."""


@cipher.command("bench")
@click.option(
    "--size", "sizes", multiple=True, type=click.Choice(["VGA", "1080p", "4K"]), help="Repeatable; default all."
)
@click.option("--alg", type=click.Choice(["aes-256-gcm", "chacha20-poly1305"]), help="Default: what the CPU does best.")
@click.option("--rounds", default=0, help="Rounds of measurement; 0 takes 40, 30 and 6.")
@click.option("--json", "as_json", is_flag=True)
def bench(sizes: tuple[str, ...], alg: Any, rounds: int, as_json: bool) -> None:
    """Time sealing and opening against the AEAD alone, in one run."""
    from edgepriv.cipher import bench as stand

    document = stand.run(list(sizes or stand.SIZES), alg=alg, rounds=rounds)
    click.echo(json.dumps(document) if as_json else _bench_text(document))


def _bench_text(document: dict[str, Any]) -> str:
    lines = [f"backend {document['backend']}, {document['alg']}, CPU: {', '.join(document['cpu']) or 'no AES'}"]
    for frame in document["frames"]:
        lines.append(
            f"{frame['name']}: AEAD alone {frame['aead_ms']:.3f} ms, copy {frame['copy_ms']:.3f} ms, "
            f"MAC {frame['mac_ms']:.3f} ms, signature {frame['signature_ms']:.3f} ms, "
            f"extra memory {frame['peak_extra_frames']:.2f} frames"
        )
        for name, row in frame["profiles"].items():
            lines.append(
                f"  {name:12} seal {row['seal_ms']:8.3f} ms = {row['seal_ratio']:.2f}x"
                f"  with MAC {row['seal_mac_ms']:8.3f} ms = {row['seal_mac_ratio']:.2f}x"
                f"  open {row['open_ms']:8.3f} ms = {row['open_ratio']:.2f}x"
            )
        parts = "  ".join(f"{key} {ms:.3f}" for key, ms in frame["layer_ms"].items())
        lines.append(f"  parts (ms)   {parts}")
    return "\n".join(lines)
