"""The standard algorithms that everything else is built from, over two libraries that give the same bytes.

``openssl`` (the ``cryptography`` package, OpenSSL speed) is used where it is importable, ``portable``
(pycryptodome, always there) otherwise. Keys are raw bytes here; `edgepriv.keys` gives them purpose and files.

Algorithms: AES-256-GCM and ChaCha20-Poly1305 (RFC 8439), AES-256-CTR and ChaCha20 key streams, GMAC and Poly1305
as one-time MACs, HKDF-SHA256 (RFC 5869), Ed25519 (RFC 8032), X25519 (RFC 7748), HPKE base mode
DHKEM(X25519, HKDF-SHA256) / HKDF-SHA256 / AES-256-GCM (RFC 9180).

Rules: nonces are arguments, because every key that meets a constant nonce here is derived for one message.
Any failure to authenticate is `edgepriv.errors.AuthenticationError` with one wording for all causes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from functools import lru_cache
from typing import Any, Literal, Protocol

from edgepriv.errors import AuthenticationError, ConfigError, MissingDependencyError

Alg = Literal["aes-256-gcm", "chacha20-poly1305"]
AES_GCM: Alg = "aes-256-gcm"
CHACHA: Alg = "chacha20-poly1305"
TAG_BYTES = 16
KEY_BYTES = 32
NONCE_BYTES = 12
ZERO_NONCE = bytes(NONCE_BYTES)
HPKE_OVERHEAD_BYTES = 32 + TAG_BYTES

Buffer = bytes | bytearray | memoryview


class KeyStream(Protocol):
    """A stream cipher in motion; each call continues where the last one ended."""

    def xor_into(self, data: Buffer, out: bytearray | memoryview) -> None:
        """Write ``data`` XOR the next key-stream bytes to ``out`` (same length; may be the same memory)."""
        ...


class Backend(Protocol):
    """What a library must provide. Both implementations give identical bytes (HPKE stanzas cross-open)."""

    name: str

    def hkdf(self, key: bytes, length: int, *, salt: bytes, info: bytes) -> bytes:
        """Derive ``length`` bytes by HKDF-SHA256."""
        ...

    def keystream(self, alg: Alg, key: bytes) -> KeyStream:
        """Start AES-256-CTR (zero counter block) or ChaCha20 (zero nonce) under a single-use key."""
        ...

    def mask(self, alg: Alg, key: bytes, data: Buffer, out: Any) -> None:
        """Write ``data`` XOR the AEAD's own key stream under a single-use key to ``out`` (may be the same memory).

        The stream is AES-256-CTR from counter block 2, which is what AES-256-GCM adds under the zero nonce, or
        ChaCha20 from block 1, which is what ChaCha20-Poly1305 adds; so that a library may use its fastest code.
        """
        ...

    def seal_into(self, alg: Alg, key: bytes, nonce: bytes, data: Buffer, aad: Buffer, out: Any) -> None:
        """Encrypt ``data`` to ``out`` (``len(data) + 16`` bytes: ciphertext, tag), which may begin at ``data``."""
        ...

    def open_into(self, alg: Alg, key: bytes, nonce: bytes, sealed: Buffer, aad: Buffer, out: Any) -> None:
        """Decrypt ``sealed`` to ``out`` (16 bytes shorter); on failure ``out`` is zeroed and it raises."""
        ...

    def mac(self, alg: Alg, key: bytes, *parts: Buffer) -> bytes:
        """One-time MAC of the concatenated parts: GMAC under AES-GCM, else Poly1305 with a ChaCha20 key."""
        ...

    def ed25519_public(self, private: bytes) -> bytes:
        """Public key of a raw private key."""
        ...

    def ed25519_sign(self, private: bytes, message: bytes) -> bytes:
        """Sign (64 bytes)."""
        ...

    def ed25519_verify(self, public: bytes, message: bytes, signature: bytes) -> bool:
        """Say whether the signature is valid."""
        ...

    def x25519_public(self, private: bytes) -> bytes:
        """Public key of a raw private key."""
        ...

    def x25519(self, private: bytes, public: bytes) -> bytes:
        """Shared secret; refuses the all-zero result."""
        ...

    def hpke_wrap(self, public: bytes, data: bytes, info: bytes) -> bytes:
        """Seal ``data`` to an X25519 public key: ``enc (32) | ciphertext | tag (16)``."""
        ...

    def hpke_open(self, private: bytes, sealed: bytes, info: bytes) -> bytes:
        """Open what `hpke_wrap` made."""
        ...


BACKEND_VARIABLE = "EDGEPRIV_CRYPTO_BACKEND"


def backend(name: str = "") -> Backend:
    """Return a backend: ``openssl``, ``portable`` or ``auto`` (the faster one that imports).

    Without a name: what the environment variable EDGEPRIV_CRYPTO_BACKEND says, else ``auto``; read once.

    Raises:
        MissingDependencyError: ``openssl`` was asked for and the ``cryptography`` package is not installed.
    """
    return _backend(name) if name else _default_backend()


@lru_cache(maxsize=1)
def _default_backend() -> Backend:
    return _backend(os.environ.get(BACKEND_VARIABLE, "auto"))


@lru_cache(maxsize=4)
def _backend(name: str) -> Backend:
    if name not in {"auto", "openssl", "portable"}:
        raise ConfigError(f"no crypto backend {name!r}", hint=f"{BACKEND_VARIABLE} is openssl, portable or auto")
    if name != "portable":
        try:
            from edgepriv.primitives.openssl import OpenSSLBackend
        except ImportError as error:
            if name == "openssl":
                raise MissingDependencyError(
                    "the openssl backend needs the cryptography package",
                    hint="pip install 'edgepriv[device]'",
                ) from error
        else:
            return OpenSSLBackend()
    from edgepriv.primitives.portable import PortableBackend

    return PortableBackend()


def hkdf(key: bytes, length: int, *, salt: bytes = b"", info: bytes) -> bytes:
    """HKDF-SHA256; ``info`` is the one label of this use."""
    return backend().hkdf(key, length, salt=salt, info=info)


def hkdf_extract(key: bytes, salt: bytes) -> bytes:
    """First half of HKDF-SHA256 (RFC 5869): a pseudo-random key from ``key`` and a salt."""
    return hmac.digest(salt, key, "sha256")


def hkdf_expand(prk: bytes, info: bytes) -> bytes:
    """Second half of HKDF-SHA256 for one block: 32 bytes for the one use that ``info`` names."""
    return hmac.digest(prk, info + b"\x01", "sha256")


def aead_seal(key: bytes, nonce: bytes, data: Buffer, aad: Buffer = b"", *, alg: Alg = AES_GCM) -> bytes:
    """Encrypt and authenticate; returns ``ciphertext | tag (16)``."""
    out = bytearray(len(data) + TAG_BYTES)
    backend().seal_into(alg, key, nonce, data, aad, out)
    return bytes(out)


def aead_open(key: bytes, nonce: bytes, sealed: Buffer, aad: Buffer = b"", *, alg: Alg = AES_GCM) -> bytes:
    """Verify and decrypt what `aead_seal` made, or raise AuthenticationError."""
    if len(sealed) < TAG_BYTES:
        raise not_authentic()
    out = bytearray(len(sealed) - TAG_BYTES)
    backend().open_into(alg, key, nonce, sealed, aad, out)
    return bytes(out)


def keystream_bytes(key: bytes, length: int, *, alg: Alg = AES_GCM) -> bytearray:
    """``length`` bytes of AES-256-CTR (or ChaCha20) key stream under a single-use key."""
    out = bytearray(length)
    backend().keystream(alg, key).xor_into(out, out)
    return out


def hpke_wrap(public: bytes, data: bytes, info: bytes) -> bytes:
    """Seal ``data`` to an X25519 public key; the sender is not authenticated by this."""
    return backend().hpke_wrap(public, data, info)


def hpke_open(private: bytes, sealed: bytes, info: bytes) -> bytes:
    """Open what `hpke_wrap` made, or raise AuthenticationError."""
    return backend().hpke_open(private, sealed, info)


def sign(private: bytes, use: str, message: Buffer) -> bytes:
    """Ed25519 over ``"edgepriv/sig/<use>/v1" | 0x00 | SHA256(message)``: one context for each use."""
    return backend().ed25519_sign(private, _signed_bytes(use, message))


def verify(public: bytes, use: str, message: Buffer, signature: bytes) -> None:
    """Check a signature made by `sign` for the same use, or raise AuthenticationError."""
    if len(public) != KEY_BYTES or len(signature) != 64:
        raise not_authentic()
    if not backend().ed25519_verify(public, _signed_bytes(use, message), signature):
        raise not_authentic()


def _signed_bytes(use: str, message: Buffer) -> bytes:
    return f"edgepriv/sig/{use}/v1".encode() + b"\x00" + hashlib.sha256(message).digest()


def hmac_sha256(key: bytes, *parts: Buffer) -> bytes:
    """HMAC-SHA256 of the concatenated parts."""
    mac = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(part)
    return mac.digest()


def equal(a: bytes, b: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(a, b)


def random_bytes(length: int) -> bytes:
    """Bytes from the operating system; drawn anew after a fork by construction."""
    return os.urandom(length)


def not_authentic() -> AuthenticationError:
    """The one error for every failed authentication."""
    return AuthenticationError("not authentic: a wrong key, or the bytes were altered")
