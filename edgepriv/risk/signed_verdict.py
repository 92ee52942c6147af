"""A verdict as signed bytes, bound to a model's digest, the audited policies and a time.

Bytes: CBOR ``[body, signature]``; the body is a byte string that holds a CBOR map with ``model`` (SHA-256 of the exact
bytes), ``verdict``, ``policy`` (audited safe policies, joined by commas), ``serial``, ``issued``, ``expires`` (Unix
seconds). Ed25519 for the use ``verdict``; the signing function is passed in, so that no key is handled here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgepriv.wire import cbor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VERDICT_USE = "verdict"
DAY_S = 86_400


def verdict_bytes(
    report: dict[str, Any],
    digest: bytes,
    policies: Sequence[str],
    *,
    serial: int,
    now: float,
    days: float,
    sign: Callable[[str, bytes], bytes],
) -> bytes:
    """Sign what an audit concluded.

    Args:
        report: of the audit, schema ``edgepriv.audit-outputs/1``.
        digest: SHA-256 of the model's bytes.
        policies: those that the verdict holds for.
        serial: above that of every earlier verdict.
        now: Unix seconds of issue.
        days: until it expires.
        sign: ``(use, message) -> signature``.
    """
    body = cbor.encode(
        {
            "model": digest,
            "verdict": str(report["verdict"]),
            "policy": ",".join(policies),
            "serial": serial,
            "issued": int(now),
            "expires": int(now + days * DAY_S),
        }
    )
    return cbor.encode([body, sign(VERDICT_USE, body)])


def held_policies(policies: Sequence[str]) -> list[str]:
    """Return the policies that a verdict holds for: those not spelled unsafe, or all where there are only such."""
    return [policy for policy in policies if not policy.startswith("unsafe_")] or list(policies)
