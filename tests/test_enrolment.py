"""Enrolment over real HTTPS: once, for the named device, to the right gateway only, again when a reply is lost."""

import dataclasses
import json
import os
import ssl
import threading
import time

import pytest
from click.testing import CliRunner
from cryptography import x509 as library

from edgepriv import keys
from edgepriv.cli import root
from edgepriv.errors import (
    AuthenticationError,
    ConfigError,
    EdgeprivError,
    KeyFileError,
    MissingFileError,
    RefusedError,
    TrustError,
    UnavailableError,
    WireError,
)
from edgepriv.primitives import x509
from edgepriv.wire.enrolment import (
    USE,
    USE_RENEW,
    EnrolRequest,
    RenewRequest,
    Token,
    proof_bytes,
    read_token,
    renewal_bytes,
)
from edgepriv.wire.trust import TrustList, sign_trust
from gateway.cli import root as gateway_root
from gateway.enrol import Enrolment
from gateway.enrol_server import EnrolServer

OWNER = keys.Identity.new("owner", "owner")
GATEWAY = keys.Identity.new("gateway", "one")


class Clock:
    def __init__(self):
        self.now = time.time()

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def enrolment(tmp_path, clock):
    made = Enrolment(tmp_path / "state", clock=clock)
    yield made
    made.close()


@pytest.fixture
def server(enrolment):
    trust = sign_trust(TrustList(1, 0, 2**40, (GATEWAY.public,)), OWNER)
    running = EnrolServer(("127.0.0.1", 0), enrolment, ("127.0.0.1",), lambda: trust)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def url_of(server):
    return f"https://127.0.0.1:{server.server_address[1]}"


def token_for(enrolment, url="https://127.0.0.1:1", device="cam1", **kwargs):
    return enrolment.new_token(device, url, OWNER.public, **{"lifetime_s": 3600, **kwargs})


def enroll(token, out, tmp_path):
    path = tmp_path / "token.txt"
    path.write_text(token.to_text() + "\n")
    result = CliRunner().invoke(root, ["enroll", str(path), "--out", str(out), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return json.loads(result.stdout)


def request_for(token, *, identity=None, tls_key=None, **changes):
    identity = identity or keys.Identity.new("device", "cam1")
    csr = x509.new_request(tls_key or x509.new_key())
    public = identity.public
    proof = identity.sign(USE, proof_bytes(token.id, csr, public.ed25519, public.x25519))
    fields = {"token_id": token.id, "secret": token.secret, "request": csr}
    fields |= {"ed25519": public.ed25519, "x25519": public.x25519, "proof": proof}
    return EnrolRequest(**{**fields, **changes})


def test_a_device_enrols_and_gets_everything_it_pins(server, enrolment, tmp_path):
    document = enroll(token_for(enrolment, url_of(server)), tmp_path / "device", tmp_path)
    assert document == {
        "schema": "edgepriv.enroll/1",
        "name": "dev-cam1",
        "out": str(tmp_path / "device"),
        "trust": True,
    }
    out = tmp_path / "device"
    certificate = library.load_pem_x509_certificate((out / "tls.crt").read_bytes())
    assert x509.common_name((out / "tls.crt").read_bytes()) == "dev-cam1"
    assert not certificate.extensions.get_extension_for_class(library.BasicConstraints).value.ca
    assert keys.load_public(out / "owner.key.pub") == OWNER.public
    assert keys.load_identity(out / "device.key").public == enrolment.devices()[0]
    for secret in ("device.key", "tls.key"):
        assert os.stat(out / secret).st_mode & 0o777 == 0o600
    context = ssl.create_default_context(cafile=str(out / "tls-ca.crt"))
    context.load_cert_chain(out / "tls.crt", out / "tls.key")
    assert enrolment.tokens()[0]["state"] == "used"


def test_a_lost_reply_gives_the_same_certificate_and_other_keys_are_an_alarm(server, enrolment, tmp_path):
    token = token_for(enrolment, url_of(server))
    enroll(token, tmp_path / "device", tmp_path)
    first = (tmp_path / "device" / "tls.crt").read_bytes()
    (tmp_path / "device" / "tls.crt").unlink()
    enroll(token, tmp_path / "device", tmp_path)
    assert (tmp_path / "device" / "tls.crt").read_bytes() == first
    with pytest.raises(AuthenticationError, match="another key"):
        enroll(token, tmp_path / "thief", tmp_path)
    assert enrolment.tokens()[0]["alarms"] == 1
    assert [d.ed25519 for d in enrolment.devices()] == [
        keys.load_identity(tmp_path / "device" / "device.key").public.ed25519
    ]


def test_of_many_at_once_one_wins(enrolment):
    token = token_for(enrolment)
    results = []

    def attempt():
        try:
            results.append(enrolment.enrol(request_for(token)).certificate)
        except AuthenticationError:
            results.append(None)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(result is not None for result in results) == 1
    assert enrolment.tokens()[0]["alarms"] == 7


def test_the_secret_is_not_sent_to_a_server_with_another_ca(server, enrolment, tmp_path, clock):
    mallory = Enrolment(tmp_path / "mallory", clock=clock)
    token = token_for(mallory, url_of(server))  # the honest server stands for the stranger here
    with pytest.raises(AuthenticationError, match="was not sent"):
        enroll(token, tmp_path / "device", tmp_path)
    mallory.close()


def test_a_second_certificate_behind_the_right_one_is_not_believed(server, enrolment, tmp_path, clock, monkeypatch):
    """A server between that shows the right CA's text with its own CA appended must not get the secret."""
    mallory = Enrolment(tmp_path / "mallory", clock=clock)
    sent = []
    between = EnrolServer(("127.0.0.1", 0), mallory, ("127.0.0.1",), lambda: b"")
    both = enrolment.ca.certificate + mallory.ca.certificate
    monkeypatch.setattr(mallory, "ca", x509.KeyAndCertificate(mallory.ca.key, both))
    monkeypatch.setattr(mallory, "enrol", lambda *a: sent.append(a))
    thread = threading.Thread(target=between.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        with pytest.raises(AuthenticationError):
            enroll(token_for(enrolment, url_of(between)), tmp_path / "device", tmp_path)
    finally:
        between.shutdown()
        thread.join()
        between.server_close()
        mallory.close()
    assert not sent


def test_wrong_secrets_ids_and_proofs_are_one_refusal(enrolment):
    token = token_for(enrolment)
    good = request_for(token)
    for changes in ({"secret": bytes(16)}, {"token_id": bytes(8)}, {"proof": bytes(64)}, {"x25519": bytes(32)}):
        with pytest.raises(AuthenticationError) as caught:
            enrolment.enrol(request_for(token, **changes))
        assert "not authentic" in str(caught.value)
    with pytest.raises(WireError):
        enrolment.enrol(request_for(token, request=b"no request"))
    with pytest.raises(WireError):
        enrolment.enrol(request_for(token, ed25519=b"short"))
    assert enrolment.enrol(good).name == "dev-cam1"


def test_tokens_expire_and_can_be_revoked(enrolment, clock, tmp_path):
    token, other = token_for(enrolment), token_for(enrolment, device="cam2")
    assert enrolment.revoke(other.id)
    with pytest.raises(AuthenticationError):
        enrolment.enrol(request_for(other))
    clock.now += 3601
    with pytest.raises(TrustError, match="expired"):
        enrolment.enrol(request_for(token))
    assert not enrolment.revoke(bytes(8))
    assert {row["state"] for row in enrolment.tokens()} == {"expired", "revoked"}
    with pytest.raises(TrustError, match="expired"):
        enroll(
            token_for(enrolment, lifetime_s=1).__class__(**{**as_dict(token), "expires": 5}), tmp_path / "d", tmp_path
        )


def as_dict(token):
    return {name: getattr(token, name) for name in Token.__slots__}


def test_a_token_lives_a_day_at_most_and_is_for_one_new_device(enrolment):
    for seconds in (0, -5, 24 * 3600 + 1):
        with pytest.raises(RefusedError, match="24 hours"):
            token_for(enrolment, lifetime_s=seconds)
    with pytest.raises(RefusedError, match="https"):
        token_for(enrolment, url="http://gateway")
    with pytest.raises(ConfigError):
        token_for(enrolment, device="Cam/1")
    enrolment.enrol(request_for(token_for(enrolment)))
    with pytest.raises(RefusedError, match="is enrolled"):
        token_for(enrolment)
    replaced = keys.Identity.new("device", "cam1")
    enrolment.enrol(request_for(token_for(enrolment, replace=True), identity=replaced))
    assert enrolment.devices() == [replaced.public]


def test_the_ca_names_the_device_whatever_the_request_says(enrolment):
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import NameOID

    key = x509.new_key()
    name = library.Name([library.NameAttribute(NameOID.COMMON_NAME, "gateway-one")])
    csr = (
        library.CertificateSigningRequestBuilder()
        .subject_name(name)
        .add_extension(library.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(serialization.load_pem_private_key(key, None), hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    token, identity = token_for(enrolment), keys.Identity.new("device", "cam1")
    public = identity.public
    proof = identity.sign(USE, proof_bytes(token.id, csr, public.ed25519, public.x25519))
    answer = enrolment.enrol(EnrolRequest(token.id, token.secret, csr, public.ed25519, public.x25519, proof))
    certificate = library.load_pem_x509_certificate(answer.certificate)
    assert x509.common_name(answer.certificate) == "dev-cam1"
    assert not certificate.extensions.get_extension_for_class(library.BasicConstraints).value.ca


def test_only_the_hash_of_a_secret_is_stored_and_ca_survives_a_restart(enrolment, tmp_path, clock):
    token = token_for(enrolment)
    enrolment.close()
    for path in (tmp_path / "state").iterdir():
        assert token.secret not in path.read_bytes()
    assert os.stat(tmp_path / "state" / "ca.key").st_mode & 0o777 == 0o600
    again = Enrolment(tmp_path / "state", clock=clock)
    assert again.ca.certificate == enrolment.ca.certificate
    assert again.enrol(request_for(token)).name == "dev-cam1"
    again.close()


def test_a_trust_list_of_another_owner_is_not_kept(server, enrolment, tmp_path):
    mallory = keys.Identity.new("owner", "owner")
    server.trust = lambda: sign_trust(TrustList(9, 0, 2**40, (GATEWAY.public,)), mallory)
    with pytest.raises(TrustError, match="not signed"):
        enroll(token_for(enrolment, url_of(server)), tmp_path / "device", tmp_path)
    assert not (tmp_path / "device" / "trust.cbor").exists()


def test_a_folder_that_pins_another_owner_or_device_is_refused(server, enrolment, tmp_path):
    out = tmp_path / "device"
    enroll(token_for(enrolment, url_of(server)), out, tmp_path)
    with pytest.raises(ConfigError, match="dev-cam1"):
        enroll(token_for(enrolment, url_of(server), device="cam2"), out, tmp_path)
    (out / "owner.key.pub").write_text(keys.Identity.new("owner", "owner").public.to_text())
    with pytest.raises(KeyFileError, match="another owner"):
        enroll(token_for(enrolment, url_of(server), replace=True), out, tmp_path)


def test_bad_tokens_and_absent_servers_are_clear_errors(enrolment, tmp_path):
    good = token_for(enrolment, "https://127.0.0.1:9").to_text()
    for text in ("", "nonsense", good[:-8], good + "AAAA", "edgepriv-token-1:!!!"):
        with pytest.raises(WireError):
            read_token(text)
    assert read_token(good).secret
    assert "secret hidden" in repr(read_token(good))
    with pytest.raises(UnavailableError):
        enroll(read_token(good), tmp_path / "device", tmp_path)
    with pytest.raises(MissingFileError):
        CliRunner().invoke(root, ["enroll", "/none", "--out", str(tmp_path)], catch_exceptions=False)


def test_the_server_bounds_what_it_reads(server):
    import http.client

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for method, path, body, length, status in (
        ("GET", "/state/ca.key", b"", 0, 404),
        ("POST", "/enrol", b"x" * 10, 10, 400),
        ("POST", "/enrol", b"", 20_000, 400),
        ("POST", "/enrol", b"", -1, 400),
        ("POST", "/other", b"", 0, 400),
    ):
        connection = http.client.HTTPSConnection(*server.server_address, context=context, timeout=5)
        connection.request(method, path, body, headers={"Content-Length": str(length)})
        response = connection.getresponse()
        assert response.status == status
        response.read()
        connection.close()


def test_the_gateway_commands_hand_out_list_and_export(tmp_path, clock):
    (tmp_path / "owner.key.pub").write_text(OWNER.public.to_text())
    GATEWAY_FILE = tmp_path / "gateway.key"
    GATEWAY.save(GATEWAY_FILE)
    config = tmp_path / "gateway.toml"
    config.write_text(
        f'[gateway]\nidentity = "{GATEWAY_FILE}"\nowner = "{tmp_path / "owner.key.pub"}"\n'
        f'trust = "{tmp_path / "trust.cbor"}"\nstate = "{tmp_path / "state"}"\n'
    )

    def call(*args):
        result = CliRunner().invoke(gateway_root, ["token", *map(str, args)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    args = ["new", "--config", config, "--device", "cam1", "--url", "https://127.0.0.1:8443", "--json"]
    made = json.loads(call(*args, "--out", tmp_path / "t.txt"))
    assert made["device"] == "dev-cam1"
    assert os.stat(tmp_path / "t.txt").st_mode & 0o777 == 0o600
    token = read_token((tmp_path / "t.txt").read_text())
    assert json.loads(call("list", "--config", config, "--json"))["tokens"][0]["state"] == "open"
    enrolment = Enrolment(tmp_path / "state" / "enrolment", clock=clock)
    identity = keys.Identity.new("device", "cam1")
    enrolment.enrol(request_for(token, identity=identity))
    enrolment.close()
    call("export", "--config", config, tmp_path / "pubs")
    assert keys.load_public(tmp_path / "pubs" / "dev-cam1.pub") == identity.public
    with pytest.raises(EdgeprivError):
        call("revoke", "--config", config, "00" * 8)


# --- renewal ----------------------------------------------------------------------------------------------------------


def renew(folder, *flags):
    result = CliRunner().invoke(root, ["renew", str(folder), "--json", *flags])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture
def aged(server, enrolment, clock, tmp_path):
    """A device that was enrolled 300 of its 365 days ago."""
    really, clock.now = clock.now, clock.now - 300 * 86_400
    token = token_for(enrolment, url_of(server), lifetime_s=3600)
    clock.now = really - 300 * 86_400 + 60
    out = tmp_path / "device"
    path = tmp_path / "old-token.txt"
    path.write_text(dataclasses.replace(token, expires=int(really) + 600).to_text())
    result = CliRunner().invoke(root, ["enroll", str(path), "--out", str(out)])
    assert result.exit_code == 0, result.exception
    clock.now = really
    return out


def test_a_certificate_is_renewed_for_the_same_key_when_it_is_due_and_not_before(aged, server, enrolment, tmp_path):
    before, key = (aged / "tls.crt").read_bytes(), (aged / "tls.key").read_bytes()
    assert renew(aged, "--check")[0] == 0
    code, document = renew(aged)
    assert code == 0
    assert document["renewed"]
    assert 364 < document["days"] <= 365
    assert (aged / "tls.key").read_bytes() == key
    assert (aged / "tls.crt").read_bytes() != before
    context = ssl.create_default_context(cafile=str(aged / "tls-ca.crt"))
    context.load_cert_chain(aged / "tls.crt", aged / "tls.key")
    assert renew(aged, "--check")[0] == 1
    assert not renew(aged)[1]["renewed"]
    after = (aged / "tls.crt").read_bytes()
    assert renew(aged, "--now")[1]["renewed"]
    assert (aged / "tls.crt").read_bytes() == after, "a young certificate is given again: a lost reply does no harm"


def renewal(enrolment, folder, **changes):
    identity, csr = keys.load_identity(folder / "device.key"), x509.new_request((folder / "tls.key").read_bytes())
    name, csr = changes.get("name", identity.name), changes.get("request", csr)
    signer = changes.get("signer", identity)
    return RenewRequest(name, csr, signer.sign(USE_RENEW, renewal_bytes(name, csr)))


def test_nobody_renews_in_anothers_name_or_for_another_key(aged, enrolment):
    stranger = keys.Identity.new("device", "cam1")
    for changes in ({"signer": stranger}, {"name": "dev-other"}, {"request": x509.new_request(x509.new_key())}):
        with pytest.raises(AuthenticationError):
            enrolment.renew(renewal(enrolment, aged, **changes))
    with pytest.raises(AuthenticationError, match="revoked"):
        enrolment.renew(renewal(enrolment, aged), revoked=("dev-cam1",))
    good = renewal(enrolment, aged)
    with pytest.raises(AuthenticationError):
        enrolment.renew(RenewRequest(good.name, good.request, bytes(64)))
    with pytest.raises(WireError):
        enrolment.renew(renewal(enrolment, aged, request=b"not a request"))
    assert enrolment.renew(good).name == "dev-cam1"


def test_a_renewal_brings_the_newer_trust_list_and_never_an_older_one(aged, server):
    newer = sign_trust(TrustList(5, 0, 2**40, (GATEWAY.public,)), OWNER)
    (aged / "trust.cbor").write_bytes(newer)
    renew(aged)
    assert (aged / "trust.cbor").read_bytes() == newer
    server.trust = lambda: sign_trust(TrustList(6, 0, 2**40, (GATEWAY.public,)), OWNER)
    renew(aged, "--now")
    assert (aged / "trust.cbor").read_bytes() == server.trust()


def test_certificates_stay_readable_to_the_service_under_the_umask_of_a_unit(aged):
    before = os.umask(0o077)
    try:
        renew(aged)
    finally:
        os.umask(before)
    modes = {name: (aged / name).stat().st_mode & 0o777 for name in ("tls.crt", "tls-ca.crt", "trust.cbor")}
    assert set(modes.values()) == {0o644}
    assert (aged / "tls.key").stat().st_mode & 0o777 == 0o600


def test_renewal_says_what_is_missing_and_who_does_not_answer(aged, server, clock):
    with pytest.raises(MissingFileError, match=r"tls\.crt"):
        renew(aged.parent / "nothing")
    (aged / "enrolment.url").write_text("https://127.0.0.1:1\n")
    before = (aged / "tls.crt").read_bytes()
    with pytest.raises(UnavailableError):
        renew(aged)
    assert (aged / "tls.crt").read_bytes() == before


def test_a_renewal_goes_to_the_pinned_ca_only(aged, tmp_path, clock):
    other = Enrolment(tmp_path / "other", clock=clock)
    impostor = EnrolServer(("127.0.0.1", 0), other, ("127.0.0.1",), lambda: b"")
    thread = threading.Thread(target=impostor.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    (aged / "enrolment.url").write_text(url_of(impostor))
    with pytest.raises(AuthenticationError, match="does not fit"):
        renew(aged)
    impostor.shutdown()
    thread.join()
    impostor.server_close()
    other.close()


def test_enrolment_brings_the_ca_of_the_broker(tmp_path, clock):
    made = Enrolment(tmp_path / "state", clock=clock, broker_ca=b"-----BEGIN CERTIFICATE-----\n")
    answer = made.enrol(request_for(token_for(made)))
    assert answer.broker_ca.startswith(b"-----BEGIN")
    made.close()
