"""The backend over pycryptodome: always installed, no OpenSSL needed, the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from Crypto.Cipher import AES, ChaCha20, ChaCha20_Poly1305
from Crypto.Hash import SHA256, Poly1305
from Crypto.Protocol import HPKE
from Crypto.Protocol.DH import import_x25519_private_key, import_x25519_public_key, key_agreement
from Crypto.Protocol.KDF import HKDF
from Crypto.Signature import eddsa

from edgepriv.primitives import AES_GCM, TAG_BYTES, ZERO_NONCE, Alg, Buffer, KeyStream, not_authentic

if TYPE_CHECKING:
    from Crypto.PublicKey import ECC


class _Stream:
    """AES-CTR or ChaCha20 from the zero counter."""

    def __init__(self, cipher: Any) -> None:
        self._cipher = cipher

    def xor_into(self, data: Buffer, out: bytearray | memoryview) -> None:
        self._cipher.encrypt(data, output=out)


def _aead(alg: Alg, key: bytes, nonce: bytes) -> Any:
    if alg == AES_GCM:
        return AES.new(key, AES.MODE_GCM, nonce=nonce, mac_len=TAG_BYTES)
    return ChaCha20_Poly1305.new(key=key, nonce=nonce)


class PortableBackend:
    """Implements `edgepriv.primitives.Backend`."""

    name = "portable"

    def hkdf(self, key: bytes, length: int, *, salt: bytes, info: bytes) -> bytes:
        """See Backend."""
        derived: bytes = HKDF(key, length, salt, SHA256, 1, context=info)
        return derived

    def keystream(self, alg: Alg, key: bytes) -> KeyStream:
        """See Backend. The zero counter is safe because the key is used for one message only."""
        if alg == AES_GCM:
            return _Stream(AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=bytes(16)))
        return _Stream(ChaCha20.new(key=key, nonce=ZERO_NONCE))

    def mask(self, alg: Alg, key: bytes, data: Buffer, out: Any) -> None:
        """See Backend."""
        if alg == AES_GCM:
            cipher = AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=2)
        else:
            cipher = ChaCha20.new(key=key, nonce=ZERO_NONCE)
            cipher.seek(64)
        cipher.encrypt(data, output=out)

    def seal_into(self, alg: Alg, key: bytes, nonce: bytes, data: Buffer, aad: Buffer, out: Any) -> None:
        """See Backend."""
        cipher, view = _aead(alg, key, nonce), memoryview(out).cast("B")
        cipher.update(aad)
        if len(data):
            cipher.encrypt(data, output=view[: len(data)])
        view[len(data) :] = cipher.digest()

    def open_into(self, alg: Alg, key: bytes, nonce: bytes, sealed: Buffer, aad: Buffer, out: Any) -> None:
        """See Backend."""
        cipher, view, raw = _aead(alg, key, nonce), memoryview(sealed).cast("B"), memoryview(out).cast("B")
        cipher.update(aad)
        if len(raw):
            cipher.decrypt(view[:-TAG_BYTES], output=raw)
        try:
            cipher.verify(bytes(view[-TAG_BYTES:]))
        except ValueError:
            raw[:] = bytes(len(raw))  # no unauthenticated byte leaves
            raise not_authentic() from None

    def mac(self, alg: Alg, key: bytes, *parts: Buffer) -> bytes:
        """See Backend. The constant nonce is safe because the key is used once."""
        if alg == AES_GCM:
            cipher = AES.new(key, AES.MODE_GCM, nonce=ZERO_NONCE, mac_len=TAG_BYTES)
            for part in parts:
                cipher.update(part)
            return bytes(cipher.digest())
        one_time = ChaCha20.new(key=key, nonce=ZERO_NONCE).encrypt(bytes(32))
        poly = Poly1305.Poly1305_MAC(one_time[:16], one_time[16:], None)
        for part in parts:
            poly.update(part)
        return bytes(poly.digest())

    def ed25519_public(self, private: bytes) -> bytes:
        """See Backend."""
        public: bytes = eddsa.import_private_key(private).public_key().export_key(format="raw")
        return public

    def ed25519_sign(self, private: bytes, message: bytes) -> bytes:
        """See Backend."""
        return bytes(eddsa.new(eddsa.import_private_key(private), "rfc8032").sign(message))

    def ed25519_verify(self, public: bytes, message: bytes, signature: bytes) -> bool:
        """See Backend."""
        try:
            eddsa.new(eddsa.import_public_key(public), "rfc8032").verify(message, signature)
        except ValueError:
            return False
        return True

    def x25519_public(self, private: bytes) -> bytes:
        """See Backend."""
        public: bytes = import_x25519_private_key(private).public_key().export_key(format="raw")
        return public

    def x25519(self, private: bytes, public: bytes) -> bytes:
        """See Backend."""
        try:
            secret: bytes = key_agreement(
                static_priv=import_x25519_private_key(private),
                static_pub=import_x25519_public_key(public),
                kdf=lambda shared: shared,
            )
        except ValueError:
            raise not_authentic() from None
        return secret

    def hpke_wrap(self, public: bytes, data: bytes, info: bytes) -> bytes:
        """See Backend. The key must be public: HPKE.new takes its role from the key it is given."""
        try:
            key: ECC.EccKey = import_x25519_public_key(public)
            context = HPKE.new(receiver_key=key, aead_id=HPKE.AEAD.AES256_GCM, info=info)
        except ValueError:
            raise not_authentic() from None
        return bytes(context.enc) + bytes(context.seal(data))

    def hpke_open(self, private: bytes, sealed: bytes, info: bytes) -> bytes:
        """See Backend."""
        if len(sealed) < 32 + TAG_BYTES:
            raise not_authentic()
        try:
            key = import_x25519_private_key(private)
            context = HPKE.new(receiver_key=key, aead_id=HPKE.AEAD.AES256_GCM, enc=sealed[:32], info=info)
            return bytes(context.unseal(sealed[32:]))
        except ValueError:
            raise not_authentic() from None
