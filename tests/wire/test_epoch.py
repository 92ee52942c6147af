"""Epoch records: signed once, addressed to one gateway and the listed recipients, bound by digest."""

import dataclasses

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepriv.errors import AuthenticationError, EdgeprivError, TrustError, WireError
from edgepriv.keys import Identity
from edgepriv.wire import epoch as wire
from edgepriv.wire.session import open_session
from edgepriv.wire.trust import TrustList

DEVICE, GATEWAY = Identity.new("device", "cam1"), Identity.new("gateway", "one")
OTHER_GATEWAY = Identity.new("gateway", "two")
ANN, RISK = Identity.new("recipient", "ann"), Identity.new("risk", "one")
TRUST = TrustList(3, 0, 2**40, tuple(i.public for i in (DEVICE, GATEWAY, OTHER_GATEWAY, ANN, RISK)))
CK, EPOCH_ID = b"c" * 32, b"e" * 16


def record(**changes):
    base = wire.EpochRecord(
        version=1,
        party=DEVICE.name,
        gateway=GATEWAY.name,
        epoch_id=EPOCH_ID,
        seq=4,
        created=100,
        max_frames=10,
        trust_version=3,
        alg="aes-256-gcm",
        profile="flep3",
        auth="link-mac",
        stanzas=(wire.wrap_stanza(ANN.public, CK, DEVICE.name, EPOCH_ID),),
        link=b"",
        commitment=wire.commitment(CK, DEVICE.name, EPOCH_ID),
    )
    return dataclasses.replace(base, **changes)


def test_a_record_is_read_back_with_its_digest():
    signed = wire.sign_epoch(record(), DEVICE)
    assert wire.read_epoch(signed.raw, TRUST) == signed
    assert wire.unwrap_content(signed.record, ANN) == CK


def test_every_party_opens_a_session_and_only_its_gateway_takes_it():
    for party in (DEVICE, ANN, RISK):
        signed, session = open_session(party, TRUST, GATEWAY.name, seq=0, now=5.0)
        read = wire.read_epoch(signed.raw, TRUST)
        assert read.record.stanzas == ()
        assert len(wire.unwrap_link(read.record, GATEWAY)) == 32
        assert session.party == party.name
        with pytest.raises(AuthenticationError, match="addressed to"):
            wire.unwrap_link(read.record, OTHER_GATEWAY)
        with pytest.raises(AuthenticationError):
            wire.unwrap_link(dataclasses.replace(read.record, gateway=OTHER_GATEWAY.name), OTHER_GATEWAY)


def test_a_session_needs_listed_keys():
    impostor = Identity.new("device", "cam1")
    with pytest.raises(TrustError, match="other keys"):
        open_session(impostor, TRUST, GATEWAY.name, seq=0, now=0)
    with pytest.raises(TrustError, match="not in the trust list"):
        open_session(Identity.new("device", "new"), TRUST, GATEWAY.name, seq=0, now=0)
    with pytest.raises(TrustError):
        open_session(DEVICE, TRUST, ANN.name, seq=0, now=0)


def test_a_record_is_taken_only_from_the_party_it_names():
    for signer in (ANN, GATEWAY, Identity.new("device", "cam1")):
        with pytest.raises(AuthenticationError):
            wire.read_epoch(wire.sign_epoch(record(), signer).raw, TRUST)
    with pytest.raises(TrustError):
        wire.read_epoch(wire.sign_epoch(record(party="dev-none"), DEVICE).raw, TRUST)
    with pytest.raises(TrustError):
        wire.read_epoch(wire.sign_epoch(record(), DEVICE).raw, dataclasses.replace(TRUST, revoked=(DEVICE.name,)))


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 0},
        {"version": 2},
        {"epoch_id": b"short"},
        {"stanzas": (b"x",)},
        {"commitment": b""},
        {"stanzas": ()},
        {"max_frames": -1},
        {"seq": -1},
        {"seq": 1 << 63},
    ],
)
def test_contradictory_records_are_refused(changes):
    with pytest.raises(WireError):
        wire.read_epoch(wire.sign_epoch(record(**changes), DEVICE).raw, TRUST)


def test_stanzas_are_bound_to_device_epoch_and_key():
    stanza = record().stanzas[0]
    for changes in ({"party": "dev-cam2"}, {"epoch_id": b"f" * 16}, {"commitment": bytes(32)}):
        with pytest.raises(AuthenticationError):
            wire.unwrap_content(record(**changes), ANN)
    with pytest.raises(TrustError, match="not addressed"):
        wire.unwrap_content(record(), RISK)
    bent = bytearray(stanza)
    bent[-1] ^= 1
    with pytest.raises(AuthenticationError):
        wire.unwrap_content(record(stanzas=(bytes(bent),)), ANN)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200) | st.lists(st.binary(max_size=40), max_size=3).map(lambda v: cbor2.dumps(v, canonical=True))
)
def test_any_bytes_are_one_documented_error(raw):
    with pytest.raises(EdgeprivError):
        wire.read_epoch(raw, TRUST)
