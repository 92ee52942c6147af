"""Shamir's secret sharing of 16 bytes over GF(2^128).

The library underneath returns garbage in silence for wrong or too few shares, and a share at index 0 would be the
secret itself. So: indices are 1..n here and nothing else, duplicates are refused, and a caller must check what
`combine` returns against a commitment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepriv.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Mapping

SECRET_BYTES = 16
MAX_SHARES = 256


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares of indices 1..count (in order, 16 bytes each); any ``threshold`` of them give the secret."""
    from Crypto.Protocol.SecretSharing import Shamir

    if len(secret) != SECRET_BYTES or not 2 <= threshold <= count <= MAX_SHARES:
        raise ValueError("a secret has 16 bytes, a threshold lies in 2..count")
    return [share for _, share in sorted(Shamir.split(threshold, count, secret))]


def combine(shares: Mapping[int, bytes], count: int) -> bytes:
    """The secret, if the shares are right and enough; check it against its commitment.

    Raises:
        WireError: an index outside 1..count, or a share of the wrong length.
    """
    from Crypto.Protocol.SecretSharing import Shamir

    if len(shares) < 2 or any(not 1 <= index <= count for index in shares):
        raise WireError("a share has an index outside its cohort")
    if any(len(share) != SECRET_BYTES for share in shares.values()):
        raise WireError("a share has the wrong length")
    secret: bytes = Shamir.combine(sorted(shares.items()))
    return secret
