"""What the owner's policy permits a device's epochs to be. Sender, gateway and recipient ask this one place.

Nothing is negotiated: a record outside the policy is neither made, nor stored, nor opened. The keys of a policy table
are in the table of edgepriv/cipher/README.md; what is not said there is permitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepriv.wire import envelope
from edgepriv.wire.epoch import AUTH_LINK_MAC

if TYPE_CHECKING:
    from edgepriv.wire.epoch import EpochRecord


@dataclass(frozen=True, slots=True)
class Allowed:
    """What is accepted from one device."""

    profiles: tuple[str, ...] = tuple(envelope.PROFILES)
    algs: tuple[str, ...] = tuple(envelope.ALGS)
    auths: tuple[str, ...] = tuple(envelope.AUTHS)
    min_version: int = envelope.VERSION
    max_frames: int = envelope.MAX_FRAMES
    recipient_forgery: bool = False

    @classmethod
    def by_policy(cls, policy: dict[str, Any]) -> Allowed:
        """What the owner's policy for a device permits (`TrustList.policy_for`)."""
        default = cls()
        return cls(
            profiles=tuple(policy.get("profiles", default.profiles)),
            algs=tuple(policy.get("algs", default.algs)),
            auths=tuple(policy.get("auths", default.auths)),
            min_version=int(policy.get("min_version", default.min_version)),
            max_frames=int(policy.get("max_frames", default.max_frames)),
            recipient_forgery=bool(policy.get("allow_recipient_forgery", False)),
        )

    def refusal(self, record: EpochRecord) -> str:
        """What of a record the policy does not permit, in words, or an empty string."""
        for value, permitted, what in (
            (record.profile, self.profiles, "profile"),
            (record.alg, self.algs, "algorithm"),
            (record.auth, self.auths, "authentication"),
        ):
            if value not in permitted:
                return f"the {what} {value} (it permits {', '.join(permitted)})"
        if record.version < self.min_version:
            return f"version {record.version} (it permits {self.min_version} and later)"
        if record.max_frames > self.max_frames:
            return f"an epoch of {record.max_frames} frames (it permits {self.max_frames})"
        if len(record.stanzas) > 1 and record.auth == AUTH_LINK_MAC and not self.recipient_forgery:
            return (
                f"{AUTH_LINK_MAC} with {len(record.stanzas)} recipients, who could forge frames to each other "
                "(allow_recipient_forgery permits it)"
            )
        return ""
