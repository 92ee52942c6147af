"""A verdict as signed bytes, bound to a model's digest, to how it was released and read in the audit, and to a time.

Bytes: CBOR ``[body, signature]``; the body is a byte string that holds a CBOR map with ``model`` (SHA-256 of the exact
bytes), ``verdict``, ``policy`` (audited safe policies, joined by commas), ``purifier`` (SHA-256 of its file, empty
without one), ``output`` (names under which ``model.toml`` may name the audited output; the empty one is the first
output), ``scale`` and ``mean`` (one or per channel: input = (pixel - mean) * scale), ``colour``, ``serial``,
``issued``, ``expires`` (Unix seconds). All of it comes from the audit's own report, nothing from today's
configuration. Ed25519 for the use ``verdict``; the signing function is passed in, so that no key is handled here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgepriv.errors import ConfigError, DataError, WireError
from edgepriv.wire import cbor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VERDICT_USE = "verdict"
DAY_S = 86_400
MAX_VERDICT_BYTES = 65_536


def statement(report: dict[str, Any], digest: bytes) -> dict[str, Any]:
    """What a verdict on this audit says, without its number and times.

    Args:
        report: of the audit, schema ``edgepriv.audit-outputs/1``, with the worker's ``judged``.
        digest: SHA-256 of the model's bytes.

    Raises:
        DataError: the report is of other bytes, or does not say how the outputs were read and released.
        ConfigError: a policy's name cannot be signed.
    """
    if report.get("sha256") != digest.hex():
        raise DataError("the audit's report is of other bytes than the model's")
    judged = report.get("judged")
    if not isinstance(judged, dict):
        raise DataError("the audit's report does not say what it holds for", hint="edgepriv risk retry DIGEST")
    policies = held_policies([str(policy["policy"]) for policy in report["policies"]])
    if unfit := [name for name in policies if "," in name]:
        raise ConfigError(f"a verdict cannot hold for the policy {unfit[0]!r}: its name has a comma")
    return {
        "model": digest,
        "verdict": str(report["verdict"]),
        "policy": ",".join(policies),
        "purifier": bytes.fromhex(judged["purifier"]),
        "output": [str(name) for name in judged["output"]],
        "scale": [float(value) for value in judged["scale"]],
        "mean": [float(value) for value in judged["mean"]],
        "colour": str(judged["colour"]),
    }


def verdict_bytes(
    said: dict[str, Any], *, serial: int, now: float, days: float, sign: Callable[[str, bytes], bytes]
) -> bytes:
    """Sign a `statement`.

    Args:
        said: the statement.
        serial: above that of every earlier verdict.
        now: Unix seconds of issue.
        days: until it expires.
        sign: ``(use, message) -> signature``.
    """
    body = cbor.encode({**said, "serial": serial, "issued": int(now), "expires": int(now + days * DAY_S)})
    return cbor.encode([body, sign(VERDICT_USE, body)])


def says(raw: object, said: dict[str, Any]) -> bool:
    """Whether a verdict's bytes, as a gateway holds them, make this statement; the signature is not looked at."""
    if not isinstance(raw, bytes):
        return False
    try:
        body, _ = cbor.decode(raw, max_bytes=MAX_VERDICT_BYTES)
        fields = cbor.decode_map(body, max_bytes=MAX_VERDICT_BYTES)
    except (WireError, TypeError, ValueError):
        return False
    return {name: value for name, value in fields.items() if name not in {"serial", "issued", "expires"}} == said


def held_policies(policies: Sequence[str]) -> list[str]:
    """Return the policies that a verdict holds for: those not spelled unsafe, or all where there are only such."""
    return [policy for policy in policies if not policy.startswith("unsafe_")] or list(policies)
