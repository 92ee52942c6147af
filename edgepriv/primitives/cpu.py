"""What the processor can do in hardware, and which AEAD that makes the better choice.

aarch64 Linux: ``getauxval(AT_HWCAP)`` bit 3 = AES, bit 4 = PMULL; 32-bit ARM: ``AT_HWCAP2`` bits 0 and 1; x86: the
flags ``aes`` and ``pclmulqdq``. A 32-bit process on a 64-bit kernel is told ``aarch64`` and has 32-bit ARM's words, so
the size of its pointers decides. Without both, table AES is slow and leaks through the cache: ChaCha20-Poly1305 then.
"""

from __future__ import annotations

import platform
import struct
from functools import lru_cache
from pathlib import Path

from edgepriv.primitives import AES_GCM, CHACHA, Alg

_AT_HWCAP, _AT_HWCAP2 = 16, 26
_AARCH64_AES_PMULL = 1 << 3 | 1 << 4
_ARM32_AES_PMULL = 1 << 0 | 1 << 1


@lru_cache(maxsize=1)
def flags() -> frozenset[str]:
    """Names among ``aes`` (AES and carry-less multiplication, both) and ``vaes`` (wide AES) that this CPU has."""
    machine = platform.machine().lower()
    arm = machine.startswith(("aarch64", "arm"))
    if arm and struct.calcsize("P") == 8:
        return _arm(_AT_HWCAP, _AARCH64_AES_PMULL)
    if arm:
        return _arm(_AT_HWCAP2, _ARM32_AES_PMULL)
    return _x86()


def choose_alg() -> Alg:
    """AES-256-GCM where the CPU has AES and PMULL (or PCLMULQDQ), ChaCha20-Poly1305 elsewhere."""
    return AES_GCM if "aes" in flags() else CHACHA


def _arm(entry: int, wanted: int) -> frozenset[str]:
    import ctypes

    try:
        getauxval = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError):
        return frozenset()
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, (ctypes.c_ulong,)
    return frozenset({"aes"}) if getauxval(entry) & wanted == wanted else frozenset()


def _x86() -> frozenset[str]:
    try:
        words = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return frozenset()
    names = {"aes"} if {"aes", "pclmulqdq"} <= words else set()
    return frozenset(names | ({"vaes"} if {"vaes", "vpclmulqdq"} <= words else set()))
