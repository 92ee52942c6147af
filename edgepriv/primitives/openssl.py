"""The backend over the ``cryptography`` package: OpenSSL's speed."""

from __future__ import annotations

from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.poly1305 import Poly1305

from edgepriv.primitives import AES_GCM, TAG_BYTES, ZERO_NONCE, Alg, Buffer, KeyStream, cpu, not_authentic

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


class _Stream:
    """AES-CTR or ChaCha20 from the zero counter."""

    def __init__(self, context: CipherContext) -> None:
        self._context = context

    def xor_into(self, data: Buffer, out: bytearray | memoryview) -> None:
        self._context.update_into(data, out)


def _aead(alg: Alg, key: bytes) -> AESGCM | ChaCha20Poly1305:
    return AESGCM(key) if alg == AES_GCM else ChaCha20Poly1305(key)


class OpenSSLBackend:
    """Implements `edgepriv.primitives.Backend`."""

    name = "openssl"

    def hkdf(self, key: bytes, length: int, *, salt: bytes, info: bytes) -> bytes:
        """See Backend."""
        return HKDF(hashes.SHA256(), length, salt, info).derive(key)

    def keystream(self, alg: Alg, key: bytes) -> KeyStream:
        """See Backend. The zero counter is safe because the key is used for one message only."""
        if alg == AES_GCM:
            return _Stream(Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor())
        return _Stream(Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor())

    def mask(self, alg: Alg, key: bytes, data: Buffer, out: Any) -> None:
        """See Backend. OpenSSL's GCM is up to twice as fast as its CTR where AES is wide (VAES)."""
        if alg != AES_GCM:
            start = (1).to_bytes(4, "little") + ZERO_NONCE
            context = Cipher(algorithms.ChaCha20(key, start), None).encryptor()
        elif "vaes" in cpu.flags():
            context = Cipher(algorithms.AES(key), modes.GCM(ZERO_NONCE)).encryptor()
        else:
            context = Cipher(algorithms.AES(key), modes.CTR((2).to_bytes(16, "big"))).encryptor()
        context.update_into(data, out)

    def seal_into(self, alg: Alg, key: bytes, nonce: bytes, data: Buffer, aad: Buffer, out: Any) -> None:
        """See Backend."""
        _aead(alg, key).encrypt_into(nonce, data, aad, out)

    def open_into(self, alg: Alg, key: bytes, nonce: bytes, sealed: Buffer, aad: Buffer, out: Any) -> None:
        """See Backend."""
        try:
            _aead(alg, key).decrypt_into(nonce, sealed, aad, out)
        except InvalidTag:
            memoryview(out).cast("B")[:] = bytes(len(out))  # no unauthenticated byte leaves
            raise not_authentic() from None

    def mac(self, alg: Alg, key: bytes, *parts: Buffer) -> bytes:
        """See Backend. The constant nonce is safe because the key is used once."""
        if alg == AES_GCM:
            context = Cipher(algorithms.AES(key), modes.GCM(ZERO_NONCE)).encryptor()
            for part in parts:
                context.authenticate_additional_data(part)
            context.finalize()
            return context.tag
        one_time = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor().update(bytes(32))
        poly = Poly1305(one_time)
        for part in parts:
            poly.update(part)
        return poly.finalize()

    def ed25519_public(self, private: bytes) -> bytes:
        """See Backend."""
        return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()

    def ed25519_sign(self, private: bytes, message: bytes) -> bytes:
        """See Backend."""
        return Ed25519PrivateKey.from_private_bytes(private).sign(message)

    def ed25519_verify(self, public: bytes, message: bytes, signature: bytes) -> bool:
        """See Backend."""
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True

    def x25519_public(self, private: bytes) -> bytes:
        """See Backend."""
        return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()

    def x25519(self, private: bytes, public: bytes) -> bytes:
        """See Backend."""
        try:
            return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise not_authentic() from None

    def hpke_wrap(self, public: bytes, data: bytes, info: bytes) -> bytes:
        """See Backend."""
        try:
            return _SUITE.encrypt(data, X25519PublicKey.from_public_bytes(public), info)
        except ValueError:
            raise not_authentic() from None

    def hpke_open(self, private: bytes, sealed: bytes, info: bytes) -> bytes:
        """See Backend."""
        if len(sealed) < 32 + TAG_BYTES:
            raise not_authentic()
        try:
            return _SUITE.decrypt(sealed, X25519PrivateKey.from_private_bytes(private), info)
        except (InvalidTag, ValueError):
            raise not_authentic() from None
