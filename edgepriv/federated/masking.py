"""Masks of a round: key streams added in the ring, which cancel in the sum or can be taken off again.

``y = x + PRG(b_i) + sum over j of +-PRG(s_ij)`` (Bonawitz et al. 2017, section 4). PRG = AES-256-CTR under a key that
HKDF binds to round, cohort and parties, read as little-endian ring elements; of a pair the one whose name sorts first
adds, the other subtracts. A stream runs forward block by block, so vectors of any length are masked in O(block).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepriv import primitives

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

BLOCK_BYTES = 1 << 20
SEED_BYTES = 16


def round_salt(round_number: int) -> bytes:
    """The HKDF salt of a round."""
    return round_number.to_bytes(8, "big")


def _info(label: str, *parts: str) -> bytes:
    return b"\x00".join([f"edgepriv/{label}/v1".encode(), *(part.encode() for part in parts)])


def mask_private_key(seed: bytes, round_number: int) -> bytes:
    """The X25519 private key that a device's mask seed stands for (what its shares rebuild)."""
    return primitives.hkdf(seed, 32, salt=round_salt(round_number), info=_info("mask-key"))


def commit(kind: str, seed: bytes) -> bytes:
    """Commitment to a random seed: rebuilt seeds are checked against it before use."""
    return hashlib.sha256(f"edgepriv/{kind}-seed/v1".encode() + b"\x00" + seed).digest()


def pair_key(shared: bytes, round_number: int, cohort: str, one: str, other: str) -> bytes:
    """Stream key of a pair, the same from both ends."""
    first, second = sorted((one, other))
    return primitives.hkdf(shared, 32, salt=round_salt(round_number), info=_info("pair-mask", cohort, first, second))


def self_key(seed: bytes, round_number: int, cohort: str, device: str) -> bytes:
    """Stream key of a device's own mask."""
    return primitives.hkdf(seed, 32, salt=round_salt(round_number), info=_info("self-mask", cohort, device))


def share_key(shared: bytes, round_number: int, cohort: str, sender: str, receiver: str) -> bytes:
    """Key of the one box of shares that ``sender`` seals to ``receiver`` in a round."""
    return primitives.hkdf(shared, 32, salt=round_salt(round_number), info=_info("share", cohort, sender, receiver))


class MaskStream:
    """Adds or subtracts several key streams on consecutive blocks of a vector."""

    def __init__(self, keys: Iterable[tuple[bytes, int]]) -> None:
        backend = primitives.backend()
        self._streams = [(backend.keystream(primitives.AES_GCM, key), sign) for key, sign in keys]
        self._zeros, self._buffer = bytes(BLOCK_BYTES), bytearray(BLOCK_BYTES)

    def apply(self, vector: NDArray[Any]) -> None:
        """Mask the next ``len(vector)`` ring elements in place."""
        step = BLOCK_BYTES // vector.dtype.itemsize
        for first in range(0, len(vector), step):
            block = vector[first : first + step]
            for stream, sign in self._streams:
                self._one(stream, sign, block)

    def _one(self, stream: primitives.KeyStream, sign: int, block: NDArray[Any]) -> None:
        view = memoryview(self._buffer)[: block.nbytes]
        stream.xor_into(memoryview(self._zeros)[: block.nbytes], view)
        mask = np.frombuffer(view, block.dtype)
        if sign > 0:
            np.add(block, mask, out=block)
        else:
            np.subtract(block, mask, out=block)


def sign_of(me: str, other: str) -> int:
    """+1 where this device adds the pair's stream, -1 where it subtracts."""
    return 1 if me < other else -1
