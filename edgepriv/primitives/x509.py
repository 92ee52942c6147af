"""Certificates for the TLS hop: a small device CA, requests and what it issues. Needs the ``cryptography`` package.

These certificates give *transport* identity only: they let a party through the broker's door. What a party may say is
decided by the keys in the owner's trust list, never by a certificate. Keys are P-256, which every TLS library takes.
Rules: the CA ignores a request's subject and extensions and names the certificate itself; a leaf cannot sign.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgepriv.errors import WireError

MAX_CSR_BYTES = 4096
SKEW_S = 3600.0  # certificates begin this much before they are made, for clocks that are behind


@dataclass(frozen=True, slots=True)
class KeyAndCertificate:
    """PEM of a private key and of its certificate; the key never shows in a repr."""

    key: bytes
    certificate: bytes

    def __repr__(self) -> str:
        return "KeyAndCertificate(hidden)"


def new_key() -> bytes:
    """A P-256 private key as unencrypted PEM, for a file of mode 0600."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def new_ca(name: str, now: float, days: int) -> KeyAndCertificate:
    """A self-signed CA that may sign leaves only."""
    key = new_key()
    private = _load(key)
    subject = _name(name)
    builder = _builder(subject, subject, private.public_key(), now, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(sign_certificates=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
    return KeyAndCertificate(key, _pem(builder.sign(private, hashes.SHA256())))


def new_request(key: bytes) -> bytes:
    """A certificate request (PEM) that proves possession of ``key``; it names nobody."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return request.sign(_load(key), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def request_key(request: bytes) -> bytes:
    """SHA-256 of a request's public key, after its signature was checked, or WireError."""
    return hashlib.sha256(
        _request_key(request).public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ).digest()


def certificate_key(certificate: bytes) -> bytes:
    """SHA-256 of a certificate's public key, to compare with `request_key`."""
    public = x509.load_pem_x509_certificate(certificate).public_key()
    return hashlib.sha256(
        public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ).digest()


def valid_between(certificate: bytes) -> tuple[float, float]:
    """When a certificate (PEM) begins and ends to be valid, Unix seconds, or WireError."""
    try:
        parsed = x509.load_pem_x509_certificate(certificate)
    except ValueError:
        raise WireError("not a certificate") from None
    return parsed.not_valid_before_utc.timestamp(), parsed.not_valid_after_utc.timestamp()


def issue(ca: KeyAndCertificate, request: bytes, name: str, now: float, days: int) -> bytes:
    """A client certificate (PEM) with CN = ``name`` for the key of a request."""
    return _leaf(ca, _request_key(request), name, now, days, hosts=())


def issue_server(ca: KeyAndCertificate, name: str, hosts: tuple[str, ...], now: float, days: int) -> KeyAndCertificate:
    """A key and server certificate for host names and addresses."""
    key = new_key()
    return KeyAndCertificate(key, _leaf(ca, _load(key).public_key(), name, now, days, hosts=hosts))


def fingerprint(certificate: bytes) -> bytes:
    """SHA-256 of a certificate (PEM), over its DER bytes, or WireError."""
    try:
        parsed = x509.load_pem_x509_certificate(certificate)
    except ValueError:
        raise WireError("not a certificate") from None
    return parsed.fingerprint(hashes.SHA256())


def common_name(certificate: bytes) -> str:
    """The CN of a certificate (PEM)."""
    subject = x509.load_pem_x509_certificate(certificate).subject
    return str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _leaf(
    ca: KeyAndCertificate,
    public: ec.EllipticCurvePublicKey,
    name: str,
    now: float,
    days: int,
    *,
    hosts: tuple[str, ...],
) -> bytes:
    issuer, signer = x509.load_pem_x509_certificate(ca.certificate), _load(ca.key)
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = _builder(_name(name), issuer.subject, public, now, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(sign_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    return _pem(builder.sign(signer, hashes.SHA256()))


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: float, days: int
) -> x509.CertificateBuilder:
    start = dt.datetime.fromtimestamp(now, dt.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - dt.timedelta(seconds=SKEW_S))
        .not_valid_after(start + dt.timedelta(days=days))
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _request_key(raw: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a request whose signature proves possession of it, or WireError."""
    if len(raw) > MAX_CSR_BYTES:
        raise WireError("a certificate request is over its limit")
    try:
        request = x509.load_pem_x509_csr(raw)
        public, valid = request.public_key(), request.is_signature_valid
    except (ValueError, InvalidSignature):
        raise WireError("not a certificate request") from None
    if not valid or not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise WireError("a certificate request must be signed by a P-256 key")
    return public


def _load(key: bytes) -> ec.EllipticCurvePrivateKey:
    private = serialization.load_pem_private_key(key, None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise WireError("not a P-256 key")
    return private


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
