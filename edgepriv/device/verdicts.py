"""The risk service's verdict on exactly these bytes, as a device checks it (the gateway is not trusted with this)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgepriv import primitives
from edgepriv.errors import AuthenticationError, TrustError, WireError
from edgepriv.wire import cbor, delivery

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

VERDICT_USE = "verdict"
GOOD_VERDICT = "low leakage"


def verdict_path(folder: Path, level: int) -> Path:
    """The verdict file that speaks of one level: its own, or the one for the whole delivery."""
    own = folder / delivery.verdict_name(level)
    return own if own.is_file() else folder / delivery.VERDICT


def check_verdict(path: Path, digest: bytes, risk_keys: Collection[bytes], floor_s: int) -> int:
    """Check the verdict file of a model against the digest of what would run; returns when it was issued.

    Raises:
        TrustError: there is none, it is of other bytes, not good, expired or not signed by a risk service.
    """
    if not path.is_file():
        raise TrustError("the model has no verdict of the risk service, and the owner's policy demands one")
    fields = read_verdict(path.read_bytes(), risk_keys)
    if fields["model"] != digest:
        raise TrustError("the verdict is of other bytes than those that would run")
    if fields["expires"] <= floor_s:
        raise TrustError("the verdict has expired")
    if fields["verdict"] != GOOD_VERDICT:
        raise TrustError(f"the verdict is {fields['verdict']!r}")
    return int(fields["issued"])


def read_verdict(raw: bytes, risk_keys: Collection[bytes]) -> dict[str, Any]:
    """Verify a verdict: CBOR ``[body, signature]``, Ed25519 by a risk key for the use ``verdict``.

    Raises:
        TrustError: not signed by a risk service that is trusted, or malformed.
    """
    try:
        body, signature = cbor.decode(raw, max_bytes=1 << 16)
        fields = cbor.decode_map(body, max_bytes=1 << 16)
    except (WireError, ValueError, TypeError) as error:
        raise TrustError("the verdict is malformed") from error
    wanted = {"model": bytes, "verdict": str, "issued": int, "expires": int}
    if any(type(fields.get(key)) is not kind for key, kind in wanted.items()):
        raise TrustError("the verdict is malformed")
    for key in risk_keys:
        try:
            primitives.verify(key, VERDICT_USE, body, signature)
        except AuthenticationError:
            continue
        return dict(fields)
    raise TrustError("the verdict is not signed by a risk service that is trusted")
