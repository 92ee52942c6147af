"""Layers 1 and 2: confusion and diffusion. They add no security that is claimed; layer 3 (the AEAD) alone does.

Layer 1 permutes blocks of the payload by a key-dependent permutation; the tail that fills no block stays in place.
Layer 2 adds a key stream as long as the payload. In ``flep3-strong`` that stream's key depends on every byte of the
payload (a synthetic value in the manner of SIV), so that one changed byte changes every byte after it and before it.
Integer arithmetic only, so that ARM and x86 give the same bytes. The whole of the specification is in README.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgepriv import primitives

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

MAX_BLOCKS = 1024
MIN_BLOCK_BYTES = 16
SYNTHETIC_BYTES = 32
_INDEX_MASK = np.uint64(MAX_BLOCKS - 1)
_S_LABEL = b"edgepriv/strong-s/v1"
_NK_LABEL = b"edgepriv/strong-nk/v1"


def block_bytes(size: int) -> int:
    """The block size for a payload: the smallest 16 * 2^j that gives at most 1,024 whole blocks."""
    block = MIN_BLOCK_BYTES
    while size // block > MAX_BLOCKS:
        block *= 2
    return block


def permutation(key: bytes, blocks: int, alg: primitives.Alg) -> NDArray[np.intp]:
    """The permutation p of ``blocks`` blocks under a single-use key: output block j is input block p[j].

    Word i is key-stream bytes 8i..8i+7 (little-endian) with its 10 lowest bits replaced by i; sorted ascending, the
    lowest 10 bits are p. No two words are equal, so every sorting method gives the same p.
    """
    words = np.zeros(blocks, dtype="<u8")
    if blocks:
        primitives.backend().mask(alg, key, words.data.cast("B"), words.data.cast("B"))
    words &= ~_INDEX_MASK
    words |= np.arange(blocks, dtype=np.uint64)
    words.sort()
    return (words & _INDEX_MASK).astype(np.intp)


def permute_into(payload: Bytes, key: bytes, alg: primitives.Alg, out: Bytes) -> None:
    """Layer 1: write the permuted payload to ``out`` (same length, other memory)."""
    block = block_bytes(payload.size)
    blocks = payload.size // block
    cut = blocks * block
    order = permutation(key, blocks, alg)
    # mode="clip" lets numpy write to out directly; the indices are in range by construction.
    np.take(payload[:cut].reshape(blocks, block), order, axis=0, out=out[:cut].reshape(blocks, block), mode="clip")
    out[cut:] = payload[cut:]


def unpermute_into(permuted: Bytes, key: bytes, alg: primitives.Alg, out: Bytes) -> None:
    """Inverse of layer 1: write the payload to ``out`` (same length, other memory)."""
    block = block_bytes(permuted.size)
    blocks = permuted.size // block
    cut = blocks * block
    inverse = np.empty(blocks, dtype=np.intp)
    inverse[permutation(key, blocks, alg)] = np.arange(blocks)
    np.take(permuted[:cut].reshape(blocks, block), inverse, axis=0, out=out[:cut].reshape(blocks, block), mode="clip")
    out[cut:] = permuted[cut:]


def mask_into(data: Bytes, key: bytes, alg: primitives.Alg, out: Bytes) -> None:
    """Layer 2 and its own inverse: add the full-length key stream of a single-use key; ``out`` may be ``data``."""
    primitives.backend().mask(alg, key, data.data, out.data)


def synthetic(data: Bytes, key: bytes, mac_key: bytes, alg: primitives.Alg) -> bytes:
    """The synthetic value s of ``flep3-strong``: a PRF of the permuted payload (universal hash, then HMAC)."""
    digest = primitives.backend().mac(alg, mac_key, data.data)
    return primitives.hmac_sha256(key, _S_LABEL, digest)


def synthetic_key(key: bytes, s: bytes) -> bytes:
    """The key of the key stream that a synthetic value selects."""
    return primitives.hmac_sha256(key, _NK_LABEL, s)
