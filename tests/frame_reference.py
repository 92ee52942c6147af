"""A slow second implementation of edgepriv/cipher/README.md: opens an envelope, and seals one from fixed keys.

Written from the specification; shares no code with the product. From libraries it takes single AES blocks, X25519,
Ed25519, SHA-256 and CBOR. Its own: CTR, GHASH, GCM, ChaCha20, Poly1305, HKDF, HPKE, both layers.
"""

import hashlib
import hmac
import struct

import cbor2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

ALG, PROFILE, AUTH = {1: "gcm", 2: "chacha"}, {0: "aead", 1: "flep3", 2: "flep3-strong"}, {1: "link-mac", 2: "ed25519"}


class RefusedError(Exception):
    """Any check that fails."""


def need(condition, what):
    if not condition:
        raise RefusedError(what)


def mac256(key, message):
    return hmac.new(key, message, hashlib.sha256).digest()


def expand(prk, info, length):
    out, block, i = b"", b"", 1
    while len(out) < length:
        block = mac256(prk, block + info + bytes([i]))
        out, i = out + block, i + 1
    return out[:length]


def xor(a, b):
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


# --- AES-256-CTR, GHASH, GCM ---------------------------------------------------------------------


def aes_block(key, block):
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # single blocks, to build CTR from
    return encryptor.update(block)


def ctr(key, first, n):
    blocks = (aes_block(key, (first + i).to_bytes(16, "big")) for i in range(-(-n // 16)))
    return b"".join(blocks)[:n]


def ghash(h, data):
    h, y = int.from_bytes(h, "big"), 0
    for i in range(0, len(data), 16):
        x, v, z = y ^ int.from_bytes(data[i : i + 16], "big"), h, 0
        for bit in range(127, -1, -1):
            if x >> bit & 1:
                z ^= v
            v = v >> 1 ^ (0xE1 << 120 if v & 1 else 0)
        y = z
    return y.to_bytes(16, "big")


def pad16(data):
    return data + bytes(-len(data) % 16)


def gcm_tag(key, nonce, aad, ciphertext):
    lengths = struct.pack(">QQ", 8 * len(aad), 8 * len(ciphertext))
    digest = ghash(aes_block(key, bytes(16)), pad16(aad) + pad16(ciphertext) + lengths)
    return xor(digest, aes_block(key, nonce + b"\x00\x00\x00\x01"))


# --- ChaCha20, Poly1305 --------------------------------------------------------------------------


def chacha_block(key, counter, nonce):
    start = list(struct.unpack("<16I", b"expand 32-byte k" + key + struct.pack("<I", counter) + nonce))
    s = start[:]

    def quarter(a, b, c, d):
        for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            s[x] = s[x] + s[y] & 0xFFFFFFFF
            t = s[z] ^ s[x]
            s[z] = (t << turn | t >> 32 - turn) & 0xFFFFFFFF

    for _ in range(10):
        for i in range(4):
            quarter(i, i + 4, i + 8, i + 12)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return struct.pack("<16I", *(a + b & 0xFFFFFFFF for a, b in zip(s, start, strict=True)))


def chacha(key, counter, nonce, n):
    return b"".join(chacha_block(key, counter + i, nonce) for i in range(-(-n // 64)))[:n]


def poly1305(key, message):
    r = int.from_bytes(key[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    total = 0
    for i in range(0, len(message), 16):
        total = (total + int.from_bytes(message[i : i + 16] + b"\x01", "little")) * r % ((1 << 130) - 5)
    return ((total + int.from_bytes(key[16:32], "little")) % (1 << 128)).to_bytes(16, "little")


# --- what the specification names ----------------------------------------------------------------


def key_stream(alg, key, n):
    return ctr(key, 2, n) if alg == "gcm" else chacha(key, 1, bytes(12), n)


def mac1(alg, key, message):
    if alg == "gcm":
        return gcm_tag(key, bytes(12), message, b"")
    return poly1305(chacha(key, 0, bytes(12), 32), message)


def aead_tag(alg, key, aad, ciphertext):
    if alg == "gcm":
        return gcm_tag(key, bytes(12), aad, ciphertext)
    lengths = struct.pack("<QQ", len(aad), len(ciphertext))
    return poly1305(chacha(key, 0, bytes(12), 32), pad16(aad) + pad16(ciphertext) + lengths)


def hpke_open(private, sealed, info, *, aad=b"", aead_id=2, key_bytes=32):
    """RFC 9180 base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-GCM; first message."""
    private = X25519PrivateKey.from_private_bytes(private)
    enc, body = sealed[:32], sealed[32:]
    public = private.public_key().public_bytes_raw()
    shared = private.exchange(X25519PublicKey.from_public_bytes(enc))
    kem, suite = b"KEM\x00\x20", b"HPKE\x00\x20\x00\x01" + aead_id.to_bytes(2, "big")

    def labeled_extract(ident, salt, label, ikm):
        return mac256(salt or bytes(32), b"HPKE-v1" + ident + label + ikm)

    def labeled_expand(ident, prk, label, context, n):
        return expand(prk, n.to_bytes(2, "big") + b"HPKE-v1" + ident + label + context, n)

    eae = labeled_extract(kem, b"", b"eae_prk", shared)
    secret = labeled_expand(kem, eae, b"shared_secret", enc + public, 32)
    context = (
        b"\x00" + labeled_extract(suite, b"", b"psk_id_hash", b"") + labeled_extract(suite, b"", b"info_hash", info)
    )
    schedule = labeled_extract(suite, secret, b"secret", b"")
    key = labeled_expand(suite, schedule, b"key", context, key_bytes)
    nonce = labeled_expand(suite, schedule, b"base_nonce", context, 12)
    need(hmac.compare_digest(gcm_tag(key, nonce, aad, body[:-16]), body[-16:]), "HPKE tag")
    return xor(body[:-16], ctr(key, int.from_bytes(nonce + b"\x00\x00\x00\x02", "big"), len(body) - 16))


def signed(use, message):
    return b"edgepriv/sig/" + use + b"/v1\x00" + hashlib.sha256(message).digest()


def verify(public, use, message, signature):
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, signed(use, message))
    except Exception as error:
        raise RefusedError("signature") from error


def frame_key(ck, hdr, use):
    prk = mac256(hdr[16:48], ck)
    return expand(prk, b"edgepriv/frame/" + use.encode() + b"/v1\x00" + hdr, 32)


def block_order(alg, key, n):
    width = 16
    while n // width > 1024:
        width *= 2
    blocks = n // width
    stream = key_stream(alg, key, 8 * blocks)
    words = [struct.unpack_from("<Q", stream, 8 * i)[0] // 1024 * 1024 + i for i in range(blocks)]
    return width, [word % 1024 for word in sorted(words)]


def layers(profile, alg, ck, hdr, x):
    if profile == "aead":
        return x
    width, order = block_order(alg, frame_key(ck, hdr, "layer1"), len(x))
    z = b"".join(x[width * j : width * (j + 1)] for j in order) + x[width * len(order) :]
    key = frame_key(ck, hdr, "layer2")
    if profile == "flep3":
        return xor(z, key_stream(alg, key, len(z)))
    digest = mac1(alg, frame_key(ck, hdr, "strong-hash"), z)
    s = mac256(frame_key(ck, hdr, "strong-prf"), b"edgepriv/strong-s/v1" + digest)
    return s + xor(z, key_stream(alg, mac256(key, b"edgepriv/strong-nk/v1" + s), len(z)))


def unlayers(profile, alg, ck, hdr, y):
    if profile == "aead":
        return y
    key = frame_key(ck, hdr, "layer2")
    if profile == "flep3-strong":
        s, y = y[:32], y[32:]
        key = mac256(key, b"edgepriv/strong-nk/v1" + s)
    z = xor(y, key_stream(alg, key, len(y)))
    width, order = block_order(alg, frame_key(ck, hdr, "layer1"), len(z))
    x = bytearray(z)
    for place, j in enumerate(order):
        x[width * j : width * (j + 1)] = z[width * place : width * (place + 1)]
    need(layers(profile, alg, ck, hdr, bytes(x)) == (s + y if profile == "flep3-strong" else y), "synthetic value")
    return bytes(x)


def seal(hdr, ck, description, x, *, k_link=None, epoch_id=None, device_ed25519=None):
    """An envelope from its header, content key, description (64 bytes) and padded payload."""
    alg, profile, auth = ALG[hdr[6]], PROFILE[hdr[5]], AUTH[hdr[7]]
    com, key = frame_key(ck, hdr, "commit"), frame_key(ck, hdr, "aead")
    plain = description + layers(profile, alg, ck, hdr, x)
    ciphertext = xor(plain, key_stream(alg, key, len(plain)))
    tag = aead_tag(alg, key, hdr + com, ciphertext)
    raw = hdr + com + ciphertext + tag
    if auth == "ed25519":
        return raw + Ed25519PrivateKey.from_private_bytes(device_ed25519).sign(signed(b"frame", raw))
    prk = mac256(epoch_id, k_link)
    mk = expand(prk, b"edgepriv/gwmac/v1" + hashlib.sha256(hdr + com + tag).digest(), 32)
    return raw + mac1(alg, mk, raw)


def open_record(record, device_ed25519):
    body, signature = cbor2.loads(record)
    verify(device_ed25519, b"epoch", body, signature)
    return cbor2.loads(body)


def content_key(fields, x25519_private):
    public = X25519PrivateKey.from_private_bytes(x25519_private).public_key().public_bytes_raw()
    hint = hashlib.sha256(public).digest()[:8]
    bound = b"\x00" + fields["party"].encode() + b"\x00" + fields["epoch_id"]
    for stanza in fields["stanzas"]:
        if stanza[:8] == hint:
            ck = hpke_open(x25519_private, stanza[8:], b"edgepriv/wrap/v1" + bound)
            need(mac256(ck, b"edgepriv/epoch-commit/v1" + bound) == fields["commitment"], "epoch commitment")
            return ck
    raise RefusedError("no stanza")


def link_key(fields, x25519_private):
    bound = b"\x00" + fields["party"].encode() + b"\x00" + fields["epoch_id"]
    return hpke_open(x25519_private, fields["link"], b"edgepriv/gwlink/v1" + bound)


def open_envelope(raw, record, x25519_private, device_ed25519):
    """Description and payload (padding removed) of an envelope, or RefusedError."""
    fields = open_record(record, device_ed25519)
    ck = content_key(fields, x25519_private)
    need(len(raw) >= 112 and raw[:5] == b"EPE1\x01", "magic and version")
    hdr, com = raw[:80], raw[80:112]
    names = ({"gcm": "aes-256-gcm", "chacha": "chacha20-poly1305"}[ALG[hdr[6]]], PROFILE[hdr[5]], AUTH[hdr[7]])
    need(names == (fields["alg"], fields["profile"], fields["auth"]), "differs from its record")
    need(hdr[48:80] == hashlib.sha256(record).digest(), "another record")
    need(int.from_bytes(hdr[8:16], "big") < fields["max_frames"], "counter")
    end = len(raw) - (64 if names[2] == "ed25519" else 16)
    if names[2] == "ed25519":
        verify(device_ed25519, b"frame", raw[:end], raw[end:])
    need(frame_key(ck, hdr, "commit") == com, "commitment")
    key, alg = frame_key(ck, hdr, "aead"), ALG[hdr[6]]
    ciphertext, tag = raw[112 : end - 16], raw[end - 16 : end]
    need(aead_tag(alg, key, hdr + com, ciphertext) == tag, "AEAD tag")
    plain = xor(ciphertext, key_stream(alg, key, len(ciphertext)))
    x = unlayers(PROFILE[hdr[5]], alg, ck, hdr, plain[64:])
    size = int.from_bytes(plain[16:24], "big")
    need(0 < size <= len(x) and not any(x[size:]), "padding")
    return plain[:64], x[:size]
