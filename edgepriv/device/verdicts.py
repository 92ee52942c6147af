"""The risk service's verdict on exactly these bytes, as a device checks it (the gateway is not trusted with this).

A verdict is a statement about what is released, so more than the bytes must be the judged ones: the release policy by
name, the purifier in front of it by the SHA-256 of its file, the output that is read, and how pixels become its input.
Each must be *equal* to what was judged. A coarser policy is not covered by a finer one: what was measured is the
leakage that fixed auditors found, which is not monotone, and the rounding of a finer policy makes ties that a coarser
one tells apart (a model with logits of 1e-20 shows nothing in ``softmax`` and a winner in ``argmax``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv import primitives
from edgepriv.errors import AuthenticationError, TrustError, WireError
from edgepriv.wire import cbor, delivery

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from edgepriv.device.infer import ModelSpec

VERDICT_USE = "verdict"
GOOD_VERDICT = "low leakage"
JUDGE_AGAIN = "have the model judged again: the risk service does so by itself when it offers this policy"
PIXEL_TOLERANCE = 1e-4  # of a 0..255 pixel


@dataclass(frozen=True, slots=True)
class Release:
    """How this device releases: the policy's name and SHA-256 of the purifier's file (empty: none)."""

    policy: str
    purifier: bytes = b""


def verdict_path(folder: Path, level: int) -> Path:
    """The verdict file that speaks of one level: its own, or the one for the whole delivery."""
    own = folder / delivery.verdict_name(level)
    return own if own.is_file() else folder / delivery.VERDICT


def check_verdict(
    path: Path,
    digest: bytes,
    risk_keys: Collection[bytes],
    floor_s: int,
    *,
    release: Release | None,
    spec: ModelSpec,
) -> int:
    """Check the verdict file of a model against what would run and be released; returns when it was issued.

    Args:
        path: the verdict's file.
        digest: SHA-256 of the bytes that would run.
        risk_keys: whose verdicts count.
        floor_s: the time floor.
        release: how this device releases; None, where that is not known, is covered by no verdict.
        spec: the model's description, by which its input is made and its output read.

    Raises:
        TrustError: there is none, it is of other bytes, of another release, not good, expired or not signed by a risk
            service.
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
    _check_release(fields, release)
    _check_reading(fields, spec)
    return int(fields["issued"])


def _check_release(fields: dict[str, Any], release: Release | None) -> None:
    policies, purifier = fields.get("policy"), fields.get("purifier")
    if not isinstance(policies, str) or not isinstance(purifier, bytes):
        raise TrustError("the verdict is of an older form, which does not say what it holds for", hint=JUDGE_AGAIN)
    if release is None:
        raise TrustError("how this device releases is not known, and a verdict holds for stated policies only")
    if release.policy not in policies.split(","):
        raise TrustError(
            f"the verdict holds for the release policies {policies}, this device releases {release.policy}",
            hint="set [release] policy to a judged one, or add this one to the risk service's [audit] policies",
        )
    if release.purifier != purifier:
        raise TrustError(
            f"the model was judged {_behind(purifier)}, this device releases {_behind(release.purifier)}",
            hint="[release] purifier and the risk service's [audit] purifier must be one file",
        )


def _behind(purifier: bytes) -> str:
    return f"behind the purifier {purifier.hex()[:12]}" if purifier else "without a purifier"


def _check_reading(fields: dict[str, Any], spec: ModelSpec) -> None:
    """The output that is read and how pixels become the input: by ``model.toml``, which nobody has to sign."""
    kinds = {"output": str, "scale": float, "mean": float}
    if not all(_all(fields.get(name), kind) for name, kind in kinds.items()) or type(fields.get("colour")) is not str:
        raise TrustError("the verdict is of an older form, which does not say what it holds for", hint=JUDGE_AGAIN)
    outputs, scale, mean = fields["output"], fields["scale"], fields["mean"]
    hint = "model.toml and the risk service's [audit] output, scale, mean and colour must agree"
    if spec.logits not in outputs:
        raise TrustError(
            f"the verdict is on the output {_output(outputs[-1])}, model.toml reads {_output(spec.logits)}", hint=hint
        )
    if spec.colour != fields["colour"]:
        raise TrustError(f"the model was judged on {fields['colour']} pixels, model.toml has {spec.colour}", hint=hint)
    for name, judged, here, exact in (("scale", scale, spec.scale, 0.0), ("mean", mean, spec.mean, PIXEL_TOLERANCE)):
        if not _same(judged, here, exact):
            raise TrustError(f"the model was judged with {name} {judged}, model.toml has {list(here)}", hint=hint)


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) is kind for value in values)


def _output(name: str) -> str:
    return repr(name) if name else "that comes first"


def _same(judged: Sequence[float], here: Sequence[float], tolerance: float) -> bool:
    """Whether two values per channel are one; a single value stands for all channels."""
    channels = max(len(judged), len(here))
    if {len(judged), len(here)} - {1, channels}:
        return False
    pairs = zip(
        judged if len(judged) > 1 else [*judged] * channels, here if len(here) > 1 else [*here] * channels, strict=True
    )
    return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=tolerance) for a, b in pairs)


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
