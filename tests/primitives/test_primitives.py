"""Known answers of the standards, and both backends giving identical bytes."""

import hmac

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv import primitives as p
from edgepriv.errors import AuthenticationError, ConfigError, MissingDependencyError
from edgepriv.primitives import cpu
from edgepriv.primitives.openssl import OpenSSLBackend
from edgepriv.primitives.portable import PortableBackend

BACKENDS = [OpenSSLBackend(), PortableBackend()]
EACH = pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
ALGS = pytest.mark.parametrize("alg", [p.AES_GCM, p.CHACHA])


def h(text):
    return bytes.fromhex(text.replace(" ", ""))


def seal(backend, alg, key, nonce, data, aad):
    out = bytearray(len(data) + 16)
    backend.seal_into(alg, key, nonce, data, aad, out)
    return bytes(out)


@EACH
def test_aes_256_gcm_nist_vector(backend):
    """McGrew and Viega's test case 16, the one NIST's validation set repeats."""
    key = h("feffe9928665731c6d6a8f9467308308 feffe9928665731c6d6a8f9467308308")
    data = h(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    )
    sealed = seal(
        backend, p.AES_GCM, key, h("cafebabefacedbaddecaf888"), data, h("feedfacedeadbeeffeedfacedeadbeefabaddad2")
    )
    assert sealed == h(
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662 76fc6ece0f4e1768cddf8853bb2d551b"
    )


@EACH
def test_chacha20_poly1305_rfc8439_vector(backend):
    """RFC 8439, section 2.8.2."""
    data = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
        b"sunscreen would be it."
    )
    key = bytes(range(0x80, 0xA0))
    sealed = seal(backend, p.CHACHA, key, h("070000004041424344454647"), data, h("50515253c0c1c2c3c4c5c6c7"))
    assert sealed[:16] == h("d31a8d34648e60db7b86afbc53ef7ec2")
    assert sealed[-16:] == h("1ae10b594f09e26a7e902ecbd0600691")


@EACH
def test_hkdf_rfc5869_vectors(backend):
    """RFC 5869, appendix A, cases 1 and 3; and our two halves give the same."""
    ikm, salt, info = b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA))
    okm = h("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")
    assert backend.hkdf(ikm, 42, salt=salt, info=info) == okm
    prk = p.hkdf_extract(ikm, salt)
    assert prk == h("077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5")
    assert p.hkdf_expand(prk, info) == okm[:32]
    assert backend.hkdf(ikm, 42, salt=b"", info=b"") == h(
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    )


@EACH
def test_ed25519_rfc8032_vector(backend):
    """RFC 8032, section 7.1, test 2."""
    private = h("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    public = h("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
    signature = h(
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert backend.ed25519_public(private) == public
    assert backend.ed25519_sign(private, b"\x72") == signature
    assert backend.ed25519_verify(public, b"\x72", signature)
    assert not backend.ed25519_verify(public, b"\x73", signature)


@EACH
def test_x25519_rfc7748_vector(backend):
    """RFC 7748, section 6.1."""
    alice = h("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob_public = h("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    assert backend.x25519_public(alice) == h("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    shared = h("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert backend.x25519(alice, bob_public) == shared
    with pytest.raises(AuthenticationError):
        backend.x25519(alice, bytes(32))


@EACH
def test_hpke_opens_across_backends_and_refuses_changes(backend):
    """With the recipient key of RFC 9180, A.1; tests/frame_reference.py opens the same by its own HPKE."""
    private = h("4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8")
    public = h("3948cfe0ad1ddb695d780e59077195da6c56506b027329794ab02bca80815c4d")
    assert backend.x25519_public(private) == public
    for other in BACKENDS:
        sealed = backend.hpke_wrap(public, b"content key", b"info")
        assert len(sealed) == 11 + p.HPKE_OVERHEAD_BYTES
        assert other.hpke_open(private, sealed, b"info") == b"content key"
        for bad, info in ((sealed, b"other"), (sealed[:-1], b"info"), (b"", b"info"), (bytes(60), b"info")):
            with pytest.raises(AuthenticationError):
                other.hpke_open(private, bad, info)
        for i in range(0, len(sealed), 7):
            bent = bytearray(sealed)
            bent[i] ^= 4
            with pytest.raises(AuthenticationError):
                other.hpke_open(private, bytes(bent), b"info")


@ALGS
@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=40), st.binary(min_size=32, max_size=32))
def test_both_backends_give_identical_bytes(alg, data, aad, key):
    one, two = BACKENDS
    sealed = seal(one, alg, key, bytes(12), data, aad)
    assert seal(two, alg, key, bytes(12), data, aad) == sealed
    assert one.mac(alg, key, data, aad) == two.mac(alg, key, data, aad) == one.mac(alg, key, data + aad)
    assert one.hkdf(key, 50, salt=aad, info=data) == two.hkdf(key, 50, salt=aad, info=data)
    streams = []
    for backend in BACKENDS:
        masked, streamed = bytearray(len(data)), bytearray(len(data))
        backend.mask(alg, key, data, masked)
        stream = backend.keystream(alg, key)
        half = len(data) // 2
        stream.xor_into(data[:half], memoryview(streamed)[:half])
        stream.xor_into(data[half:], memoryview(streamed)[half:])
        streams.append((bytes(masked), bytes(streamed)))
        assert sealed[: len(data)] == masked  # the mask is the AEAD's own key stream under the zero nonce
    assert streams[0] == streams[1]


@EACH
@ALGS
def test_mask_and_seal_work_in_place(backend, alg):
    data = bytes(range(256)) * 5
    expected = seal(backend, alg, b"k" * 32, bytes(12), data, b"aad")
    buffer = memoryview(bytearray(data + bytes(16)))
    backend.seal_into(alg, b"k" * 32, bytes(12), buffer[:-16], b"aad", buffer)
    assert bytes(buffer) == expected
    masked = memoryview(bytearray(data))
    backend.mask(alg, b"k" * 32, masked, masked)
    assert bytes(masked) == expected[:-16]


@pytest.mark.parametrize("wide", [True, False])
def test_the_mask_is_the_same_with_and_without_wide_aes(wide, monkeypatch):
    monkeypatch.setattr(cpu, "flags", lambda: frozenset({"aes", "vaes"} if wide else {"aes"}))
    out = bytearray(1000)
    BACKENDS[0].mask(p.AES_GCM, b"k" * 32, bytes(1000), out)
    assert bytes(out) == seal(BACKENDS[1], p.AES_GCM, b"k" * 32, bytes(12), bytes(1000), b"")[:-16]


@EACH
@ALGS
def test_a_failed_open_leaves_zeros(backend, alg):
    sealed = bytearray(seal(backend, alg, b"k" * 32, bytes(12), b"secret" * 9, b""))
    sealed[3] ^= 1
    out = bytearray(b"\xff" * 54)
    with pytest.raises(AuthenticationError) as caught:
        backend.open_into(alg, b"k" * 32, bytes(12), sealed, b"", out)
    assert out == bytes(54)
    assert str(caught.value) == str(p.not_authentic())
    with pytest.raises(AuthenticationError):
        p.aead_open(b"k" * 32, bytes(12), b"short", alg=alg)


def test_signatures_are_bound_to_their_use():
    private = bytes(range(32))
    public = p.backend().ed25519_public(private)
    signature = p.sign(private, "frame", b"message")
    p.verify(public, "frame", b"message", signature)
    for use, message, bad in (
        ("trust", b"message", signature),
        ("frame", b"messagf", signature),
        ("frame", b"message", b""),
    ):
        with pytest.raises(AuthenticationError):
            p.verify(public, use, message, bad)


def test_hmac_parts_concatenate():
    assert p.hmac_sha256(b"k", b"a", b"b") == hmac.digest(b"k", b"ab", "sha256")
    assert p.equal(b"a", b"a")
    assert not p.equal(b"a", b"b")


def test_backends_are_chosen_by_name(monkeypatch):
    assert p.backend("portable").name == "portable"
    assert p.backend("auto").name == "openssl"
    with pytest.raises(ConfigError):
        p.backend("rot13")
    p._backend.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "edgepriv.primitives.openssl", None)
    assert p.backend("auto").name == "portable"
    with pytest.raises(MissingDependencyError):
        p.backend("openssl")
    p._backend.cache_clear()


@pytest.mark.parametrize(
    ("machine", "pointer", "hwcap", "expected"),
    [
        ("aarch64", 8, 0b11000, p.AES_GCM),
        ("aarch64", 8, 0b01000, p.CHACHA),
        ("armv7l", 4, 0b11, p.AES_GCM),
        ("armv7l", 4, 0, p.CHACHA),
        ("aarch64", 4, 0b11, p.AES_GCM),  # a 32-bit system on a 64-bit kernel
        ("aarch64", 4, 0b11000, p.CHACHA),
        ("armv8l", 4, 0b11, p.AES_GCM),
    ],
)
def test_the_algorithm_follows_the_cpu(machine, pointer, hwcap, expected, monkeypatch):
    import ctypes
    from types import SimpleNamespace

    class Getauxval:
        def __call__(self, entry):
            assert entry == (16 if pointer == 8 else 26)
            return hwcap

    cpu.flags.cache_clear()
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu, "struct", SimpleNamespace(calcsize=lambda _: pointer))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(getauxval=Getauxval()))
    assert cpu.choose_alg() == expected
    cpu.flags.cache_clear()
