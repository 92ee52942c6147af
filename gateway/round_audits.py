"""What the risk service is told of ended rounds, and what it reported about them (table ``reports``, kind ``round``).

The row's ``body`` is a CBOR map: ``leakage_bound`` (dB, the attack-free ceiling on canary images), ``leakage_floor``
(dB, what the prior alone gives), ``attack`` (``psnr_db``, ``ssim``, ``iip``, ``rdlv``, ``seconds``), ``verdict``,
``reason``, ``protection``, ``clients``, ``canaries``, ``recipe``, ``about``; or ``error`` where it could not be
audited.
Rules: the risk service learns a round's recipe and which weights it began with; not who took part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gateway.store import unpack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gateway.database import Database

MAX_LISTED = 50
TOLD = (
    "round", "model", "privacy", "rule", "outcome", "before", "publish", "noise", "noise_multiplier", "clip",
    "statistics", "training",
)  # fmt: skip


def waiting(
    database: Database, weights: Callable[[bytes], tuple[Path, int] | None] | None, *, after: int = -1
) -> list[dict[str, Any]]:
    """The newest rounds that ended well and have no report yet, oldest first.

    Each has the fields `TOLD` of its record, ``devices`` (how many are in its sum) and ``before_bytes``: the size of
    the weights it began with, 0 where they are no longer here.
    """
    rows = database.query(
        "SELECT record FROM rounds WHERE state = 'done' AND snapshot IS NULL AND number > ? AND NOT EXISTS (SELECT 1"
        " FROM reports WHERE kind = 'round' AND subject = CAST(rounds.number AS TEXT)) ORDER BY number DESC LIMIT ?",
        (after, MAX_LISTED),
    )
    records = [unpack(raw) for (raw,) in reversed(rows)]
    return [_told(record, weights) for record in records if "clip" in record]  # older records lack the recipe


def _told(record: dict[str, Any], weights: Callable[[bytes], tuple[Path, int] | None] | None) -> dict[str, Any]:
    found = weights(record["before"][:16]) if weights is not None else None
    told = {name: record[name] for name in TOLD if name in record}
    return {**told, "devices": len(record.get("participants", ())), "before_bytes": found[1] if found else 0}


def keep(database: Database, kind: str, subject: str, sender: str, now: float, raw: bytes) -> None:
    """Keep a report; a later one of the same subject replaces it."""
    database.execute(
        "INSERT INTO reports (kind, subject, sender, at, body) VALUES (?, ?, ?, ?, ?) ON CONFLICT (kind, subject)"
        " DO UPDATE SET sender = excluded.sender, at = excluded.at, body = excluded.body",
        (kind, subject, sender, now, raw),
    )


def leakage(database: Database, number: int) -> dict[str, Any] | None:
    """What was reported about a round, with ``sender`` and ``at``; None where nothing was."""
    rows = database.query("SELECT sender, at, body FROM reports WHERE kind = 'round' AND subject = ?", (str(number),))
    return {**unpack(rows[0][2]), "sender": rows[0][0], "at": rows[0][1]} if rows else None


def lines(found: dict[str, Any] | None) -> list[str]:
    """The report for people."""
    if found is None:
        return ["leakage: not audited (a risk service with [rounds] canaries audits every round)"]
    if "error" in found:
        return [f"leakage: could not be audited: {found['error']}"]
    said = [f"leakage: {found.get('verdict')}: {found.get('reason')}"]
    if isinstance(found.get("leakage_bound"), float):
        floor = found.get("leakage_floor", 0.0)
        said.append(f"leakage bound: {found['leakage_bound']:.1f} dB PSNR; the prior alone {floor:.1f} dB")
    if isinstance(attack := found.get("attack"), dict):
        said.append(
            f"leakage attack: PSNR {attack['psnr_db']:.1f} dB, SSIM {attack['ssim']:.2f}, IIP {attack['iip']:.2f}"
        )
    return [*said, f"leakage is about: {found.get('about', 'pictures of the auditor')}"]
